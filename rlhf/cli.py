"""The `rlhf` command: parses, calls, prints.

Owns the spelling of the commands and how errors end: a mistake of the user's is one message on stderr and exit status
2, without a traceback. Each command imports what it needs when it runs, so that help and configuration errors come at
once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf import __version__
from rlhf.config import Settings, UserError, load, show
from rlhf.config.method_checks import method_warnings

Command = Callable[[argparse.Namespace], "int | None"]
"""Runs what was asked; returns an exit status other than 0 where the answer is no."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 if `doctor` finds a failure, 2 for a user's mistake, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parse(arguments)
        status = args.command(args)
    except UserError as error:
        sys.stderr.write(f"rlhf: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("rlhf: interrupted\n")
        return 130
    return status or 0


@contextmanager
def _cut_off_quietly() -> Iterator[None]:
    """`rlhf config show ... | head` ends without an error. Not by SIGPIPE, which would also kill on a lost socket."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _parser(reward_training=arguments[:2] == ["reward", "train"])
    args, rest = parser.parse_known_args(arguments)
    # argparse takes positionals in one run only; overrides that follow an option are left over.
    if rest and ("overrides" not in args or any(item.startswith("-") for item in rest)):
        parser.error(f"unknown argument: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _parser(reward_training: bool) -> argparse.ArgumentParser:
    """The grammar. `rlhf reward train` declares its options in its own module, imported only for that command."""
    parser = argparse.ArgumentParser(prog="rlhf", description="Online alignment of language models, distributed.")
    parser.add_argument("--version", action="version", version=f"rlhf {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = _add(commands, "train", _train, "align a policy online")
    _add_configuration(train)
    train.add_argument("--debug", action="store_true", help="all roles in this one process, for breakpoints")
    train.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint in run.dir")
    train.add_argument("--dry-run", action="store_true", help="validate everything, print the plan, load no weights")

    _add_sft(commands)
    _add_plan(commands)
    _add_doctor(commands)
    _add_submit(commands)

    config = commands.add_parser("config", help="look at a configuration")
    config_commands = config.add_subparsers(metavar="COMMAND", required=True)
    _add_configuration(_add(config_commands, "show", _show, "print the resolved settings with all defaults"))

    reward = commands.add_parser("reward", help="reward models")
    reward_commands = reward.add_subparsers(metavar="COMMAND", required=True)
    reward_train = _add(reward_commands, "train", _reward_train, "fit a reward model on rated or paired text")
    _add_serve(reward_commands)
    _add_calibrate(reward_commands)
    if reward_training:
        from rlhf.reward.training.train import add_arguments

        add_arguments(reward_train)

    algorithms = _add(commands, "algorithms", _algorithms, "the methods and their choices, or the fields of one")
    algorithms.add_argument(
        "name", nargs="?", metavar="NAME", help="such as ppo: print its fields instead of the table"
    )

    _add_generate(commands)
    evaluate = _add(commands, "eval", _eval, "mean reward, and win rate against a baseline, on held-out prompts")
    _add_configuration(evaluate)
    evaluate.add_argument("--policy", required=True, metavar="EXPORT", help="the model to evaluate")
    evaluate.add_argument("--baseline", metavar="MODEL", help="the model to win against (default: policy.model)")
    evaluate.add_argument("--json", metavar="FILE", help="write the figures there too")

    fetch = _add(commands, "fetch", _fetch, "build or download assets, and print their paths")
    fetch.add_argument("assets", nargs="+", metavar="ASSET", help="such as asset:tiny-llama")
    return parser


def _add(commands: argparse._SubParsersAction, name: str, command: Command, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(command=command)
    return parser


def _add_configuration(parser: argparse.ArgumentParser, without: str | None = None) -> None:
    """`without`: what happens if CONFIG is left out, where it may be."""
    if without is None:
        parser.add_argument("config", metavar="CONFIG", help="YAML file")
    else:
        parser.add_argument("config", metavar="CONFIG", nargs="?", help=f"YAML file; {without}")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")


def _add_sft(commands: argparse._SubParsersAction) -> None:
    sft = _add(commands, "sft", _sft, "fine-tune a model on conversations, as a start for alignment")
    _add_configuration(sft)
    sft.add_argument("--debug", action="store_true", help="one rank, in this process, for breakpoints")
    sft.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint in run.dir")
    sft.add_argument("--dry-run", action="store_true", help="validate everything, print the plan, load no weights")


def _add_plan(commands: argparse._SubParsersAction) -> None:
    plan = _add(
        commands, "plan", _plan, "memory, fit, time of a step and a layout, from the model's configuration alone"
    )
    _add_configuration(plan, without="left out with --model")
    plan.add_argument("--model", metavar="NAME", help="such as llama-3.1-8b, a folder or a hub name, instead of a file")
    plan.add_argument("--nodes", type=_count, default=1, help="nodes of the cluster (default: 1)")
    plan.add_argument("--gpus-per-node", type=_count, default=8, help="GPUs of each node (default: 8)")
    plan.add_argument("--gpu", metavar="KIND", help="kind of GPU, such as h100-80gb; without it: memory only")
    plan.add_argument("--json", metavar="FILE", help="write the numbers there too")


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    doctor = _add(
        commands, "doctor", _doctor, "look whether this cluster is sound, and whether this run can work on it"
    )
    _add_configuration(doctor, without="without it: the environment only")
    doctor.add_argument("--no-step", action="store_true", help="leave out the trial step, which loads all models")
    doctor.add_argument("--prompt", metavar="TEXT", help="with --good and --bad: the prompt they answer")
    doctor.add_argument("--good", metavar="TEXT", help="a response that the reward should prefer")
    doctor.add_argument("--bad", metavar="TEXT", help="to this one")
    doctor.add_argument("--json", metavar="FILE", help="write the findings there too")


def _add_submit(commands: argparse._SubParsersAction) -> None:
    submit = _add(commands, "submit", _submit, "run `train` or `sft` as a job on a Ray cluster that is already there")
    _add_configuration(submit)
    submit.add_argument(
        "--command", dest="job", choices=("train", "sft"), default="train", help="what to run (default: train)"
    )
    submit.add_argument("--address", required=True, metavar="URL", help="its jobs server, such as http://head:8265")
    submit.add_argument("--follow", action="store_true", help="print the job's output and end with its exit status")
    submit.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint in run.dir")


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number above 0")
    return int(text)


def _add_serve(commands: argparse._SubParsersAction) -> None:
    serve = _add(commands, "serve", _reward_serve, "answer over HTTP what the reward servers of a run would")
    _add_configuration(serve)
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    serve.add_argument("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    serve.add_argument("--local", action="store_true", help="one server in this process, without Ray")


def _add_calibrate(commands: argparse._SubParsersAction) -> None:
    calibrate = _add(
        commands, "calibrate", _reward_calibrate, "score the starting policy's own responses to each prompt"
    )
    _add_configuration(calibrate)
    calibrate.add_argument("--samples", type=_count, default=16, metavar="K", help="responses per prompt (default: 16)")
    calibrate.add_argument("--output", metavar="FILE", help="where to write (default: reward.reference_scores)")


def _add_generate(commands: argparse._SubParsersAction) -> None:
    generate = _add(commands, "generate", _generate, "sample responses from a model with the rollout engine")
    generate.add_argument("model", metavar="MODEL", help="folder, asset or hub name; for example an export")
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", metavar="FILE", help="file of prompts, as `data.prompts` describes it")
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given more than once")
    generate.add_argument("--max-tokens", type=int, default=256, help="longest response, in tokens (default: 256)")
    generate.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: 1.0)")
    generate.add_argument("--n", type=int, default=1, help="responses per prompt (default: 1)")
    generate.add_argument(
        "--template-arguments",
        type=_mapping,
        metavar="JSON",
        help="arguments of the chat template, as data.template_arguments: '{\"enable_thinking\": false}'",
    )
    generate.add_argument("--out", metavar="FILE", help="write JSONL there instead of printing")
    generate.add_argument(
        "--best-of", type=_count, metavar="N", help="sample N responses per prompt, keep the best one"
    )
    generate.add_argument("--reward-config", metavar="CONFIG", help="with --best-of: whose `reward` judges")
    generate.add_argument("--keep-all", action="store_true", help="with --best-of: keep all N, each with its reward")
    generate.add_argument("--at-least", type=float, metavar="R", help="with --best-of: leave out rewards below R")


def _train(args: argparse.Namespace) -> None:
    settings = load(args.config, args.overrides)
    for warning in method_warnings(settings):
        print(f"warning: {warning}", file=sys.stderr)
    if args.dry_run:
        from rlhf.preflight.plan import describe

        print(describe(settings, debug=args.debug, resume=args.resume))
        return
    from rlhf.loop.run import train
    from rlhf.preflight.inputs import read_inputs

    read_inputs(settings)  # what cannot work is said before anything starts
    train(settings, debug=args.debug, resume=args.resume)


def _sft(args: argparse.Namespace) -> None:
    from rlhf.config.sft_checks import load_sft

    settings = load_sft(args.config, args.overrides)
    from rlhf.preflight.sft import describe_sft, read_model

    if args.dry_run:
        print(describe_sft(settings, debug=args.debug, resume=args.resume))
        return
    read_model(settings)  # what cannot work is said before anything starts
    from rlhf.loop.sft import sft

    sft(settings, debug=args.debug, resume=args.resume)


@_cut_off_quietly()
def _plan(args: argparse.Namespace) -> None:
    overrides = args.overrides
    if args.model is not None and args.config is not None:
        if "=" not in args.config:
            raise UserError("`rlhf plan` takes a CONFIG or --model, not both")
        overrides = [args.config, *overrides]
    if args.model is None and args.config is None:
        raise UserError("`rlhf plan` needs a CONFIG, or --model NAME")
    from rlhf.preflight.estimate import Cluster
    from rlhf.preflight.gpus import gpu_kind
    from rlhf.preflight.report import as_json, make_plan, text, typical

    cluster = None if args.gpu is None else Cluster(args.nodes, args.gpus_per_node, gpu_kind(args.gpu))
    settings = load(args.config, overrides) if args.model is None else typical(args.model, overrides)
    plan = make_plan(settings, cluster, configured=args.model is None)
    print(text(plan))
    if args.json is not None:
        Path(args.json).write_text(as_json(plan) + "\n", encoding="utf-8")


def _doctor(args: argparse.Namespace) -> int:
    given = [args.prompt, args.good, args.bad]
    if any(given) and not all(given):
        raise UserError("`rlhf doctor`: give --prompt, --good and --bad together, or none of them")
    settings = None if args.config is None else load(args.config, args.overrides)
    from rlhf.preflight import doctor
    from rlhf.preflight.checks_reward import Pair

    def train(trial: Settings) -> None:
        from rlhf.loop.run import train

        train(trial, full_length=True)

    pair = Pair(*given) if all(given) else None
    findings = []
    for finding in doctor.examine(settings, doctor.Wanted(pair, None if args.no_step else train)):
        print(doctor.line(finding), flush=True)
        findings.append(finding)
    if args.json is not None:
        Path(args.json).write_text(doctor.as_json(findings) + "\n", encoding="utf-8")
    fit = doctor.fit(findings)
    print("fit" if fit else "NOT FIT")
    return 0 if fit else 1


def _submit(args: argparse.Namespace) -> None:
    from rlhf.cluster.submit import submit
    from rlhf.config.commands import LOADERS

    settings = LOADERS[args.job](args.config, args.overrides)
    status = submit(settings, args.address, follow=args.follow, resume=args.resume)
    if status != 0:
        sys.exit(status)


@_cut_off_quietly()
def _show(args: argparse.Namespace) -> None:
    from rlhf.config.commands import load_any

    settings = load_any(args.config, args.overrides)
    print(show(settings), end="")
    if settings.policy.dtype == "auto":
        from rlhf.cluster.precision import choose_here

        choice = choose_here(settings)
        print(f"# policy.dtype: auto is {choice.dtype} here ({choice.why})")


@_cut_off_quietly()
def _algorithms(args: argparse.Namespace) -> None:
    if args.name is None:
        _print_methods()
        return
    from rlhf.config.algorithm import METHODS
    from rlhf.config.reference import method_text

    if args.name not in METHODS:
        raise UserError(f"there is no built-in algorithm `{args.name}`. Choose one of {', '.join(METHODS)}")
    print(method_text(args.name, METHODS[args.name]), end="")


def _print_methods() -> None:
    """Each method's choice at every plug point, as a table as wide as the terminal (200 columns into a file)."""
    from rich.console import Console
    from rich.table import Table

    from rlhf.algorithms import catalogue

    rows = [vars(row) for row in catalogue.rows()]
    table = Table(*rows[0], box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*row.values())
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)
    console.print(table)
    console.print("\n`rlhf algorithms NAME` prints the fields of one method; your own is named by its import path.")


def _reward_train(args: argparse.Namespace) -> None:
    from rlhf.reward.training.train import main as train_reward

    train_reward(args)


def _reward_serve(args: argparse.Namespace) -> None:
    from rlhf.reward.serving.http import serve

    serve(load(args.config, args.overrides), args.host, args.port, local=args.local)


def _reward_calibrate(args: argparse.Namespace) -> None:
    from rlhf.loop.calibrate import calibrate

    calibrate(load(args.config, args.overrides), args.samples, args.output)


def _generate(args: argparse.Namespace) -> None:
    if args.out is not None and not Path(args.out).absolute().parent.is_dir():
        raise UserError(f"--out {args.out}: its folder does not exist. Make it, or correct the path")
    if args.best_of is not None:
        _generate_best(args)
        return
    if args.reward_config is not None or args.keep_all or args.at_least is not None:
        raise UserError("`rlhf generate`: --reward-config, --keep-all and --at-least belong to --best-of N")
    from rlhf.loop.answers import generate

    generate(
        model=args.model,
        prompts_file=args.prompts,
        prompts=args.prompt,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        n=args.n,
        out=args.out,
        template_arguments=args.template_arguments,
    )


def _generate_best(args: argparse.Namespace) -> None:
    if args.reward_config is None:
        raise UserError("`rlhf generate --best-of`: name the configuration whose reward judges, --reward-config CONFIG")
    if args.n != 1:
        raise UserError("`rlhf generate`: --best-of N says how many responses are sampled. Leave out --n")
    judge = load(args.reward_config)
    from rlhf.loop.answers import ask
    from rlhf.loop.best_of import Selection, generate_best
    from rlhf.rollout.sampling import Sampling

    sampling = Sampling(n=args.best_of, max_tokens=args.max_tokens, temperature=args.temperature)
    question = ask(args.model, args.prompts, args.prompt, args.max_tokens, args.template_arguments)
    generate_best(question, judge, sampling, Selection(args.keep_all, args.at_least), args.out)


def _eval(args: argparse.Namespace) -> None:
    from rlhf.loop.answers import evaluate

    evaluate(load(args.config, args.overrides), policy=args.policy, baseline=args.baseline, json_path=args.json)


def _fetch(args: argparse.Namespace) -> None:
    from rlhf.data.assets import resolve

    for asset in args.assets:
        print(resolve(asset))


if __name__ == "__main__":
    sys.exit(main())
