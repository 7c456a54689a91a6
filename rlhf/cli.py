"""The `rlhf` command: parses, calls, prints.

Owns how commands end: a mistake of the user's is one message on stderr and exit status 2, without a traceback. Each command imports what
it needs when it runs, so that help and configuration errors come at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlhf.cluster.signals import ended_by_sigterm
from rlhf.commands.grammar import parse
from rlhf.config import Settings, UserError, load, show
from rlhf.config.arguments import printable
from rlhf.config.explain import shortened
from rlhf.config.method_checks import method_warnings


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 if `doctor` finds a failure, 2 for a user's mistake, 130 after Ctrl-C, 143 after
    SIGTERM."""
    with ended_by_sigterm() as ending:
        try:
            args = parse(sys.argv[1:] if argv is None else argv)
            status = COMMANDS[args.command](args)
        except UserError as error:
            sys.stderr.write(f"rlhf: {printable(str(error))}\n")
            return 2
        except KeyboardInterrupt:
            sys.stderr.write("rlhf: ended by SIGTERM\n" if ending.told else "rlhf: interrupted\n")
            return 143 if ending.told else 130
        return status or 0


@contextmanager
def _cut_off_quietly() -> Iterator[None]:
    """`rlhf config show ... | head` ends without an error. Not by SIGPIPE, which would also kill on a lost socket."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _train(args: argparse.Namespace) -> None:
    from rlhf.tracking.folder import check_run_folder

    settings = load(args.config, args.overrides)
    for warning in method_warnings(settings):
        print(f"warning: {warning}", file=sys.stderr)
    check_run_folder(settings.run.dir, args.resume)  # before anything is imported that takes seconds
    if args.dry_run:
        from rlhf.preflight.plan import describe

        print(describe(settings, debug=args.debug, resume=args.resume))
        return
    from rlhf.commands.train import train
    from rlhf.preflight.ready import ready

    ready(settings, debug=args.debug, resume=args.resume)  # what cannot work is said before anything starts
    train(settings, debug=args.debug, resume=args.resume)


def _sft(args: argparse.Namespace) -> None:
    from rlhf.config.sft_checks import load_sft
    from rlhf.tracking.folder import check_run_folder

    settings = load_sft(args.config, args.overrides)
    check_run_folder(settings.run.dir, args.resume)
    from rlhf.preflight.sft import describe_sft, ready_sft

    if args.dry_run:
        print(describe_sft(settings, debug=args.debug, resume=args.resume))
        return
    ready_sft(settings, debug=args.debug, resume=args.resume)  # what cannot work is said before anything starts
    from rlhf.commands.train import sft

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
    given = [text for text in (args.prompt, args.good, args.bad) if text is not None]
    if given and (len(given) < 3 or not all(text.strip() for text in given) or args.good == args.bad):
        raise UserError(
            "`rlhf doctor`: give --prompt, --good and --bad together, none empty, or none of them; --good is not --bad"
        )
    if given and args.config is None:
        raise UserError("`rlhf doctor`: --prompt, --good and --bad are for the reward of a configuration. Give CONFIG")
    settings = None if args.config is None else load(args.config, args.overrides)
    from rlhf.preflight import doctor
    from rlhf.preflight.checks_reward import Pair

    def train(trial: Settings) -> None:
        from rlhf.loop.run import train

        train(trial, full_length=True)

    pair = Pair(*given) if given else None
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
    from rlhf.commands.calibrate import calibrate

    calibrate(load(args.config, args.overrides), args.samples, args.output)


def _generate(args: argparse.Namespace) -> None:
    if args.best_of is not None:
        _generate_best(args)
        return
    if args.reward_config is not None or args.keep_all or args.at_least is not None:
        raise UserError("`rlhf generate`: --reward-config, --keep-all and --at-least belong to --best-of N")
    from rlhf.commands.generate import generate

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
    from rlhf.commands.best_of import Selection, generate_best
    from rlhf.commands.export import as_model
    from rlhf.commands.generate import ask
    from rlhf.engines.sampling import Sampling

    sampling = Sampling(n=args.best_of, max_tokens=args.max_tokens, temperature=args.temperature)
    with as_model(args.model, "MODEL") as model:
        question = ask(model, args.prompts, args.prompt, args.max_tokens, args.template_arguments)
        generate_best(question, judge, sampling, Selection(args.keep_all, args.at_least), args.out)


def _eval(args: argparse.Namespace) -> None:
    from rlhf.commands.evaluate import evaluate

    evaluate(load(args.config, args.overrides), policy=args.policy, baseline=args.baseline, json_path=args.json)


def _export(args: argparse.Namespace) -> None:
    from rlhf.commands.export import export

    print(export(args.checkpoint, args.out, args.model))


def _fetch(args: argparse.Namespace) -> None:
    from rlhf.data.assets import PREFIX, resolve

    for asset in args.assets:
        if not asset.startswith(PREFIX):
            raise UserError(
                f"`{shortened(asset)}` is no asset: these begin with `{PREFIX}`, such as asset:tiny-llama. Correct the name"
            )
    for asset in args.assets:
        print(resolve(asset))


Command = Callable[[argparse.Namespace], "int | None"]
"""Runs what was asked; returns an exit status other than 0 where the answer is no."""

COMMANDS: dict[str, Command] = {
    "train": _train,
    "sft": _sft,
    "plan": _plan,
    "doctor": _doctor,
    "submit": _submit,
    "config show": _show,
    "reward train": _reward_train,
    "reward serve": _reward_serve,
    "reward calibrate": _reward_calibrate,
    "algorithms": _algorithms,
    "generate": _generate,
    "eval": _eval,
    "export": _export,
    "fetch": _fetch,
}


if __name__ == "__main__":
    sys.exit(main())
