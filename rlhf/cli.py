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

from rlhf.cluster.signals import ended_by_sigterm
from rlhf.commands.grammar import parse
from rlhf.config import UserError, load
from rlhf.config.arguments import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 if `doctor` finds a failure, 2 for a user's mistake, 130 after Ctrl-C, 143 after
    SIGTERM; of a job that `submit` follows, the job's."""
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
    from rlhf.commands import train

    start = train.dry_run if args.dry_run else train.train
    start(load(args.config, args.overrides), debug=args.debug, resume=args.resume, replay=args.replay)


def _sft(args: argparse.Namespace) -> None:
    from rlhf.commands import sft
    from rlhf.config.sft_checks import load_sft

    start = sft.dry_run if args.dry_run else sft.sft
    start(load_sft(args.config, args.overrides), debug=args.debug, resume=args.resume)


@_cut_off_quietly()
def _plan(args: argparse.Namespace) -> None:
    if args.simulate is not None:
        from rlhf.commands.plan import simulate

        simulate(args.simulate, args.overrides, json_path=args.json)
        return
    from rlhf.cluster.gpus import gpu_kind
    from rlhf.commands.plan import plan
    from rlhf.preflight.estimate import Cluster
    from rlhf.preflight.report import typical

    cluster = None if args.gpu is None else Cluster(args.nodes, args.gpus_per_node, gpu_kind(args.gpu))
    configured = args.model is None
    settings = load(args.config, args.overrides) if configured else typical(args.model, args.overrides)
    plan(settings, cluster, configured=configured, json_path=args.json)


def _doctor(args: argparse.Namespace) -> int:
    settings = None if args.config is None else load(args.config, args.overrides)
    from rlhf.commands.doctor import doctor
    from rlhf.preflight.checks_reward import Pair

    pair = None if args.prompt is None else Pair(args.prompt, args.good, args.bad)
    return 0 if doctor(settings, pair=pair, step=not args.no_step, json_path=args.json) else 1


def _submit(args: argparse.Namespace) -> int:
    from rlhf.commands.submit import submit
    from rlhf.config.commands import LOADERS

    settings = LOADERS[args.job](args.config, args.overrides)
    return submit(settings, args.address, follow=args.follow, resume=args.resume)


@_cut_off_quietly()
def _show(args: argparse.Namespace) -> None:
    from rlhf.commands.show import print_settings
    from rlhf.config.commands import load_any

    print_settings(load_any(args.config, args.overrides))


@_cut_off_quietly()
def _algorithms(args: argparse.Namespace) -> None:
    from rlhf.commands.algorithms import print_method, print_methods

    if args.name is None:
        print_methods()
    else:
        print_method(args.name)


def _reward_train(args: argparse.Namespace) -> None:
    from rlhf.commands import reward_train
    from rlhf.config.reward_training_checks import load_reward_training
    from rlhf.config.reward_training_flags import asked

    start = reward_train.dry_run if args.dry_run else reward_train.train
    start(load_reward_training(*asked(args)), resume=args.resume)


def _reward_serve(args: argparse.Namespace) -> None:
    from rlhf.commands.serve import serve

    serve(load(args.config, args.overrides), args.host, args.port, local=args.local)


def _reward_calibrate(args: argparse.Namespace) -> None:
    from rlhf.commands.calibrate import calibrate

    calibrate(load(args.config, args.overrides), args.samples, args.output)


def _generate(args: argparse.Namespace) -> None:
    if args.best_of is not None:
        _generate_best(args)
        return
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
    judge = load(args.reward_config)
    from rlhf.commands.best_of import Selection, best_of
    from rlhf.engines.sampling import Sampling

    best_of(
        args.model,
        judge,
        Sampling(n=args.best_of, max_tokens=args.max_tokens, temperature=args.temperature),
        Selection(args.keep_all, args.at_least),
        prompts_file=args.prompts,
        prompts=args.prompt,
        out=args.out,
        template_arguments=args.template_arguments,
    )


def _eval(args: argparse.Namespace) -> None:
    from rlhf.commands.evaluate import evaluate

    evaluate(load(args.config, args.overrides), policy=args.policy, baseline=args.baseline, json_path=args.json)


def _export(args: argparse.Namespace) -> None:
    from rlhf.commands.export import export

    print(export(args.checkpoint, args.out, args.model))


def _fetch(args: argparse.Namespace) -> None:
    from rlhf.commands.fetch import fetch

    fetch(args.assets)


Command = Callable[[argparse.Namespace], "int | None"]
"""Runs what was asked; returns the exit status where it is not 0."""

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
