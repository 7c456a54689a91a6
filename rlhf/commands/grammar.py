"""How the commands and their options are spelled, what an option may be, and which go together.

Runs nothing; the help needs no heavy library.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from rlhf import __version__
from rlhf.config.arguments import (
    Parser,
    jobs_server,
    json_object,
    named,
    output_file,
    output_file_in_new_folder,
    port,
    real,
    require_text,
    whole,
)
from rlhf.config.base import MAX_TOKENS
from rlhf.config.loader import UserError
from rlhf.config.reward_training_flags import add_flags

MOST_NODES = 256
"""Of `rlhf plan`: it tries every layout, so its time grows with the cluster."""
MOST_GPUS = 64
CHECKPOINT = "a step's folder such as runs/x/checkpoints/step-000050, or a run folder"
MOST_RESPONSES = 4096
"""To one prompt: they are sampled and held together."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments by name; `command` is the command's, such as `reward serve`.

    Raises:
        UserError: there is no such command or option, or its value cannot be.
    """
    arguments = list(arguments)
    require_text(arguments)
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    # argparse takes positionals in one run only; overrides that follow an option are left over.
    if rest and ("overrides" not in args or any(item.startswith("-") for item in rest)):
        parser.prog = f"{parser.prog} {args.command}"
        parser.error(f"unknown argument: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    if args.command in TOGETHER:
        TOGETHER[args.command](args)
    return args


def _parser() -> Parser:
    parser = Parser(prog="rlhf", description="Online alignment of language models, distributed.")
    parser.add_argument("--version", action="version", version=f"rlhf {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = _add(commands, "train", "align a policy online")
    _add_configuration(train)
    train.add_argument("--debug", action="store_true", help="all roles in this one process, for breakpoints")
    train.add_argument(
        "--replay",
        type=named,
        metavar="RUN",
        help="learn again from what the run in this folder learned from (tracking.responses), without engines and rewards",
    )
    _add_start(train)
    sft = _add(commands, "sft", "fine-tune a model on conversations, as a start for alignment")
    _add_configuration(sft)
    sft.add_argument("--debug", action="store_true", help="one rank, in this process, for breakpoints")
    _add_start(sft)

    _add_plan(commands)
    _add_doctor(commands)
    _add_submit(commands)
    config = commands.add_parser("config", help="look at a configuration")
    config_commands = config.add_subparsers(metavar="COMMAND", required=True)
    _add_configuration(_add(config_commands, "show", "print the resolved settings with all defaults", "config show"))
    _add_reward(commands)
    algorithms = _add(commands, "algorithms", "the methods and their choices, or the fields of one")
    algorithms.add_argument(
        "name", nargs="?", metavar="NAME", help="such as ppo: print its fields instead of the table"
    )
    _add_generate(commands)
    _add_eval(commands)
    export = _add(commands, "export", "turn a checkpoint into a model folder, as a run does with its last one")
    export.add_argument(
        "checkpoint", type=named, metavar="CHECKPOINT", help=f"{CHECKPOINT}, of which the last complete one is taken"
    )
    export.add_argument(
        "--out", type=named, metavar="DIR", help="folder to write (default: export-STEP in the run folder)"
    )
    export.add_argument("--model", type=named, metavar="MODEL", help="what the run started from, if it has moved since")
    fetch = _add(commands, "fetch", "build or download assets, and print their paths")
    fetch.add_argument("assets", nargs="+", metavar="ASSET", help="such as asset:tiny-llama")
    return parser


def _add(
    commands: argparse._SubParsersAction, name: str, summary: str, command: str | None = None
) -> argparse.ArgumentParser:
    """Args: command: the whole name, where it has two words."""
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(command=command or name)
    return parser


def _add_configuration(parser: argparse.ArgumentParser, without: str | None = None) -> None:
    """`without`: what happens if CONFIG is left out, where it may be."""
    if without is None:
        parser.add_argument("config", metavar="CONFIG", help="YAML file")
    else:
        parser.add_argument("config", metavar="CONFIG", nargs="?", help=f"YAML file; {without}")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")


def _add_start(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint in run.dir")
    parser.add_argument("--dry-run", action="store_true", help="validate everything, print the plan, load no weights")


def _add_json(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--json", type=output_file, metavar="FILE", help=f"write the {what} there too")


def _add_plan(commands: argparse._SubParsersAction) -> None:
    plan = _add(commands, "plan", "memory, fit, time of a step and a layout, from the model's configuration alone")
    _add_configuration(plan, without="left out with --model or --simulate")
    plan.add_argument(
        "--model", type=named, metavar="NAME", help="such as llama-3.1-8b, a folder or a hub name, instead of a file"
    )
    plan.add_argument("--nodes", type=whole(1, MOST_NODES), default=1, help="nodes of the cluster (default: 1)")
    plan.add_argument("--gpus-per-node", type=whole(1, MOST_GPUS), default=8, help="GPUs of each node (default: 8)")
    plan.add_argument("--gpu", metavar="KIND", help="kind of GPU, such as h100-80gb; without it: memory only")
    plan.add_argument(
        "--simulate",
        type=named,
        metavar="RUN",
        help="instead: what other numbers of engines, ranks, prompts and steps ahead would do, from what this run folder recorded",
    )
    _add_json(plan, "numbers")


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    doctor = _add(commands, "doctor", "look whether this cluster is sound, and whether this run can work on it")
    _add_configuration(doctor, without="without it: the environment only")
    doctor.add_argument("--no-step", action="store_true", help="leave out the trial step, which loads all models")
    doctor.add_argument("--prompt", metavar="TEXT", help="with --good and --bad: the prompt they answer")
    doctor.add_argument("--good", metavar="TEXT", help="a response that the reward should prefer")
    doctor.add_argument("--bad", metavar="TEXT", help="to this one")
    _add_json(doctor, "findings")


def _add_submit(commands: argparse._SubParsersAction) -> None:
    submit = _add(commands, "submit", "run `train` or `sft` as a job on a Ray cluster that is already there")
    _add_configuration(submit)
    submit.add_argument(
        "--command", dest="job", choices=("train", "sft"), default="train", help="what to run (default: train)"
    )
    submit.add_argument(
        "--address", type=jobs_server, required=True, metavar="URL", help="its jobs server, such as http://head:8265"
    )
    submit.add_argument("--follow", action="store_true", help="print the job's output and end with its exit status")
    submit.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint in run.dir")


def _add_reward(commands: argparse._SubParsersAction) -> None:
    reward = commands.add_parser("reward", help="reward models")
    reward_commands = reward.add_subparsers(metavar="COMMAND", required=True)
    train = _add(reward_commands, "train", "fit a reward model on rated or paired text", "reward train")
    _add_configuration(train, without="left out where options say everything")
    _add_start(train)
    add_flags(train)
    serve = _add(reward_commands, "serve", "answer over HTTP what the reward servers of a run would", "reward serve")
    _add_configuration(serve)
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    serve.add_argument("--port", type=port, default=8000, help="0: any that is free (default: 8000)")
    serve.add_argument("--local", action="store_true", help="one server in this process, without Ray")
    calibrate = _add(
        reward_commands, "calibrate", "score the starting policy's own responses to each prompt", "reward calibrate"
    )
    _add_configuration(calibrate)
    calibrate.add_argument(
        "--samples", type=whole(1, MOST_RESPONSES), default=16, metavar="K", help="responses per prompt (default: 16)"
    )
    calibrate.add_argument(
        "--output",
        type=output_file_in_new_folder,
        metavar="FILE",
        help="where to write (default: reward.reference_scores)",
    )


def _add_generate(commands: argparse._SubParsersAction) -> None:
    generate = _add(commands, "generate", "sample responses from a model with the rollout engine")
    generate.add_argument(
        "model", type=named, metavar="MODEL", help=f"folder, asset or hub name, or a checkpoint: {CHECKPOINT}"
    )
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", type=named, metavar="FILE", help="file of prompts, as `data.prompts` describes it")
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given more than once")
    generate.add_argument(
        "--max-tokens", type=whole(1, MAX_TOKENS), default=256, help="longest response, in tokens (default: 256)"
    )
    generate.add_argument("--temperature", type=real(0, 2), default=1.0, help="0 to 2; 0 is greedy (default: 1.0)")
    generate.add_argument("--n", type=whole(1, MOST_RESPONSES), default=1, help="responses per prompt (default: 1)")
    generate.add_argument(
        "--template-arguments",
        type=json_object,
        metavar="JSON",
        help="arguments of the chat template, as data.template_arguments: '{\"enable_thinking\": false}'",
    )
    generate.add_argument("--out", type=output_file, metavar="FILE", help="write JSONL there instead of printing")
    generate.add_argument(
        "--best-of",
        type=whole(2, MOST_RESPONSES),
        metavar="N",
        help="sample N responses per prompt, keep the best one",
    )
    generate.add_argument("--reward-config", type=named, metavar="CONFIG", help="with --best-of: whose `reward` judges")
    generate.add_argument("--keep-all", action="store_true", help="with --best-of: keep all N, each with its reward")
    generate.add_argument("--at-least", type=real(), metavar="R", help="with --best-of: leave out rewards below R")


def _add_eval(commands: argparse._SubParsersAction) -> None:
    evaluate = _add(commands, "eval", "mean reward, and win rate against a baseline, on held-out prompts")
    _add_configuration(evaluate)
    evaluate.add_argument(
        "--policy",
        required=True,
        type=named,
        metavar="MODEL",
        help=f"the model to evaluate, or a checkpoint: {CHECKPOINT}",
    )
    evaluate.add_argument(
        "--baseline",
        type=named,
        metavar="MODEL",
        help="the model, or checkpoint, to win against (default: policy.model)",
    )
    _add_json(evaluate, "figures")


def _train_together(args: argparse.Namespace) -> None:
    if args.replay is not None and args.resume:
        raise UserError("`rlhf train`: a replay begins with the first step. Leave out --resume, or --replay")


def _plan_together(args: argparse.Namespace) -> None:
    if args.simulate is not None:
        if args.model is not None or args.gpu is not None or (args.config is not None and "=" not in args.config):
            raise UserError(
                "`rlhf plan --simulate RUN` takes the run's own configuration: leave out CONFIG, --model and --gpu"
            )
        args.config, args.overrides = None, [*([args.config] if args.config else []), *args.overrides]
        return
    if args.model is not None and args.config is not None:
        if "=" not in args.config:
            raise UserError("`rlhf plan` takes a CONFIG or --model, not both")
        args.config, args.overrides = None, [args.config, *args.overrides]
    if args.model is None and args.config is None:
        raise UserError("`rlhf plan` needs a CONFIG, or --model NAME, or --simulate RUN")


def _doctor_together(args: argparse.Namespace) -> None:
    given = [text for text in (args.prompt, args.good, args.bad) if text is not None]
    if given and (len(given) < 3 or not all(text.strip() for text in given) or args.good == args.bad):
        raise UserError(
            "`rlhf doctor`: give --prompt, --good and --bad together, none empty, or none of them; --good is not --bad"
        )
    if given and args.config is None:
        raise UserError("`rlhf doctor`: --prompt, --good and --bad are for the reward of a configuration. Give CONFIG")


def _generate_together(args: argparse.Namespace) -> None:
    if args.best_of is None:
        if args.reward_config is not None or args.keep_all or args.at_least is not None:
            raise UserError("`rlhf generate`: --reward-config, --keep-all and --at-least belong to --best-of N")
        return
    if args.reward_config is None:
        raise UserError("`rlhf generate --best-of`: name the configuration whose reward judges, --reward-config CONFIG")
    if args.n != 1:
        raise UserError("`rlhf generate`: --best-of N says how many responses are sampled. Leave out --n")


TOGETHER: dict[str, Callable[[argparse.Namespace], None]] = {
    "train": _train_together,
    "plan": _plan_together,
    "doctor": _doctor_together,
    "generate": _generate_together,
}
"""Raises UserError where options do not go together, though each is right by itself."""
