"""Every option of every command, found in the parser, with values that it may not have; and options that do not go together."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from unittest import mock

from tests.bad_input.walk import Case

BASES: Mapping[str, Sequence[str]] = {
    "train": ["run.yaml", "--dry-run"],
    "sft": ["sft.yaml", "--dry-run"],
    "plan": ["run.yaml"],
    "doctor": ["run.yaml", "--no-step"],
    "submit": ["run.yaml", "--address", "http://127.0.0.1:9", "run.dir=/shared/run", "policy.model=asset:tiny-llama"],
    "config show": ["run.yaml"],
    "reward train": [
        "--model",
        "tiny",
        "--train",
        "ratings.jsonl",
        "--output",
        "out",
        "--method",
        "full",
        "--device",
        "cpu",
    ],
    "reward serve": ["run.yaml", "--local"],
    "reward calibrate": ["run.yaml", "--output", "scores.jsonl"],
    "algorithms": [],
    "generate": ["tiny", "--prompt", "say"],
    "eval": ["run.yaml", "--policy", "tiny", "data.eval_prompts=prompts.jsonl"],
    "fetch": ["asset:tiny-prompts.jsonl"],
}
"""Good arguments of each command. A command without an entry gets names at which there is nothing."""
PARTNERS: Mapping[str, tuple[str, Sequence[str]]] = {
    "--prompts": ("--prompt", []),
    "--reward-config": ("", ["--best-of", "4"]),
    "--at-least": ("", ["--best-of", "4", "--reward-config", "run.yaml"]),
    "--best-of": ("", ["--reward-config", "run.yaml"]),
    "--nodes": ("", ["--gpu", "h100-80gb"]),
    "--gpus-per-node": ("", ["--gpu", "h100-80gb"]),
    "--good": ("", ["--bad", "b", "--prompt", "c"]),
    "--bad": ("", ["--good", "a", "--prompt", "c"]),
}
"""Option -> one of the base that it excludes, and others that it needs."""
MAKES_FOLDERS = ("reward train", "reward calibrate")
"""Their outputs may lie in folders that are not there yet."""
KINDS: Sequence[Mapping[str, str]] = (
    {"empty": "", "blank": " "},
    {"text": "banana", "list": "[1]", "brace": "{", "null": "null"},
    {"negative": "-1", "zero": "0", "fraction": "1.5"},
    {"nan": "nan", "inf": "inf", "huge": "1e308"},
    {"5000-digits": "9" * 5000, "long": "x" * 5000},
    {
        "no-folder": "no/such/folder/x",
        "folder": "tiny",
        "below-a-file": "run.yaml/x",
        "in-proc": "/proc/x",
        "home": "~/x",
    },
    {"not-utf-8": os.fsdecode(b"\xff\xfe"), "control": "\x1b[31m", "newline": "a\nb"},
)
"""Values by kind. An option is tried with one of each kind, the next option with the next; `--every` tries all."""
NO_NUMBER = (
    "empty",
    "blank",
    "text",
    "nan",
    "inf",
    "5000-digits",
    "long",
    "list",
    "brace",
    "null",
    "folder",
    "no-folder",
    "home",
)
NO_FILE = ("empty", "folder", "no-folder", "below-a-file", "in-proc", "long")
FINITE = (*NO_NUMBER, "huge", "negative")
ANY_SIGN = ("--at-least",)
"""Numbers of any size."""


class _Found(Exception):
    """The parser, on its way out of the command line."""


@cache
def commands() -> Mapping[str, argparse.ArgumentParser]:
    """The parser of each command, by the command's words."""
    from rlhf.cli import main

    def stop(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        raise _Found(self)

    with mock.patch("argparse.ArgumentParser.parse_known_args", stop):
        try:
            main(["reward", "train"])
        except _Found as found:
            return dict(_leaves(found.args[0], ""))
    raise AssertionError("the command line has no parser")


def _leaves(parser: argparse.ArgumentParser, words: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield words.strip(), parser
    for group in groups:
        for name, inner in group.choices.items():
            yield from _leaves(inner, f"{words} {name}")


def cases(every: bool = False) -> Iterator[Case]:
    for words, parser in commands().items():
        needed = [action.dest for action in parser._actions if not action.option_strings and action.required]
        base = [*words.split(), *BASES.get(words, needed)]
        yield from _of_command(words, parser, base, every)
    for name, (argv, *about) in TOGETHER.items():
        about = [*about, *_options(argv)]
        yield Case(f"command/together/{name}", lambda place, argv=argv: argv, tuple(about), leaves=("home/cache",))


def _options(argv: Sequence[str]) -> list[str]:
    return [part for part in argv if part.startswith("--")]


def _of_command(words: str, parser: argparse.ArgumentParser, base: list[str], every: bool) -> Iterator[Case]:
    where = f"command/{words.replace(' ', '-')}"
    if words in BASES:
        made = ("work/", "home/")
        yield Case(f"{where}/good", lambda place: base, (), "good", required=True, starts=True, leaves=made)
    yield Case(f"{where}/unknown-option", lambda place: [*base, "--banana"], ("--banana",))
    yield Case(f"{where}/unknown-letter", lambda place: [*base, "-z"], ("-z",))
    for number, action in enumerate(parser._actions):
        option = action.option_strings[-1] if action.option_strings else None
        if isinstance(action, argparse._HelpAction | argparse._VersionAction):
            continue
        if option is None:
            yield from _positional(where, words, action, base, every)
            continue
        if action.nargs == 0:
            argv = [*base, f"{option}=banana"]
            yield Case(f"{where}/{option}/a-value", lambda place, argv=argv: argv, (option,))
            continue
        excluded, needed = PARTNERS.get(option, ("", []))
        without = [*_without(_without(base, option), excluded), *needed]
        if words == "plan" and option in ("--model", "--simulate"):
            without.remove("run.yaml")
        yield Case(f"{where}/{option}/no-value", lambda place, a=[*without, option]: a, (option,))
        for how, value in _values(number, every, all_of=action.metavar == "FILE"):
            yield _valued(f"{where}/{option}/{how}", words, action, how, [*without, f"{option}={value}"])


def _values(number: int, every: bool, all_of: bool) -> Iterator[tuple[str, str]]:
    for kind in KINDS:
        values = list(kind.items())
        yield from values if every or all_of else [values[number % len(values)]]


def _without(argv: list[str], option: str) -> list[str]:
    if option not in argv:
        return argv
    at = argv.index(option)
    return argv[:at] + argv[at + 2 :]


def _valued(name: str, words: str, action: argparse.Action, how: str, argv: list[str]) -> Case:
    option = action.option_strings[-1]
    right: str | None = "a text, or the name of what only the command looks up"
    if _is_number(action):
        finite = tuple(kind for kind in FINITE if kind != "negative") if option in ANY_SIGN else FINITE
        right = None if how in finite else "a number within the option's bounds"
    elif action.choices is not None or how == "not-utf-8":
        right = None
    elif action.metavar == "FILE" or option in ("--output", "--out"):
        refused = how in NO_FILE and not (how == "no-folder" and words in MAKES_FOLDERS)
        right = None if refused else "a file of that name can be written"
    value = argv[-1].partition("=")[2]
    nothing = () if words in BASES else ("there is no such",)  # which is said first
    about = (
        option,
        "argument",
        "UTF-8",
        *nothing,
        *([ascii(value)[1:-1][:20], value.lstrip("~")[:20]] if value.strip() else ["``", "''", "(no name)"]),
    )
    return Case(name, lambda place: argv, about, right, starts=True, leaves=("work/", "home/"))


def _is_number(action: argparse.Action) -> bool:
    if action.type is None:
        return False
    try:
        action.type("banana")  # type: ignore[operator]
    except (argparse.ArgumentTypeError, ValueError, TypeError):
        return _takes(action, "1") or _takes(action, "2") or _takes(action, "0.5")
    return False


def _takes(action: argparse.Action, text: str) -> bool:
    try:
        return isinstance(action.type(text), int | float)  # type: ignore[operator]
    except (argparse.ArgumentTypeError, ValueError, TypeError):
        return False


def _positional(where: str, words: str, action: argparse.Action, base: list[str], every: bool) -> Iterator[Case]:
    """Values of the first positional; further ones are overrides, walked elsewhere."""
    if action.dest == "overrides":
        return
    first = len(words.split())
    if action.required and len(base) > first:
        yield Case(
            f"{where}/{action.dest}/missing",
            lambda place: base[:first] + base[first + 1 :],
            (action.dest, str(action.metavar), "CONFIG", "override", "there is no such file"),
        )
    if first > len(base) or (len(base) == first and words != "algorithms"):
        return
    for how, value in _values(0, every, all_of=True):
        argv = [*base[:first], value, *base[first + 1 :]]
        about = (
            action.dest,
            str(action.metavar),
            value[:20] or "``",
            "argument",
            "configuration",
            "asset",
            "model",
            "unknown",
            "algorithm",
        )
        right = "the good model itself" if (words, how) == ("generate", "folder") else None
        yield Case(
            f"{where}/{action.dest}/{how}", lambda place, argv=argv: argv, about, right, starts=right is not None
        )


TOGETHER: Mapping[str, Sequence[object]] = {}


def _together() -> dict[str, tuple[list[str], str]]:
    generate, train = ["generate", "tiny", "--prompt", "say"], ["reward", "train", *BASES["reward train"]]
    full = ["--method", "full"]
    ridge = [part for part in train if part not in full]
    return {
        "nothing": ([], "COMMAND"),
        "unknown-command": (["banana"], "banana"),
        "near-command": (["trian", "run.yaml"], "trian"),
        "empty-command": ([""], "COMMAND"),
        "reward-alone": (["reward"], "COMMAND"),
        "reward-unknown": (["reward", "banana"], "banana"),
        "config-alone": (["config"], "COMMAND"),
        "only-an-option": (["--banana"], "COMMAND"),
        "two-configs": (["train", "run.yaml", "run.yaml", "--dry-run"], "run.yaml"),
        "plan-of-an-sft-file": (["plan", "sft.yaml"], "sft"),
        "train-of-an-sft-file": (["train", "sft.yaml", "--dry-run"], "sft"),
        "sft-of-a-train-file": (["sft", "run.yaml", "--dry-run"], "run.yaml"),
        "algorithm-unknown": (["algorithms", "banana"], "banana"),
        "algorithm-two": (["algorithms", "ppo", "grpo"], "grpo"),
        "plan-nothing": (["plan"], "CONFIG"),
        "plan-both": (["plan", "run.yaml", "--model", "tiny"], "--model"),
        "plan-simulate-a-file": (["plan", "--simulate", "run.yaml"], "run.yaml"),
        "plan-simulate-with-a-config": (["plan", "run.yaml", "--simulate", "run"], "CONFIG"),
        "plan-unknown-model": (["plan", "--model", "banana"], "banana"),
        "plan-unknown-gpu": (["plan", "run.yaml", "--gpu", "banana"], "banana"),
        "plan-too-many-nodes": (["plan", "run.yaml", "--gpu", "h100-80gb", "--nodes", "100000000"], "--nodes"),
        "plan-too-many-gpus": (
            ["plan", "run.yaml", "--gpu", "h100-80gb", "--gpus-per-node", "100000000"],
            "--gpus-per-node",
        ),
        "doctor-half-a-pair": (["doctor", "--good", "a"], "--good"),
        "doctor-two-thirds": (["doctor", "--good", "a", "--bad", "b"], "--prompt"),
        "doctor-empty-texts": (["doctor", "--good", "", "--bad", "", "--prompt", ""], "--prompt"),
        "doctor-pair-without-config": (["doctor", "--good", "a", "--bad", "b", "--prompt", "c"], "CONFIG"),
        "doctor-pair-alike": (
            ["doctor", "run.yaml", "--no-step", "--good", "a", "--bad", "a", "--prompt", "c"],
            "--bad",
        ),
        "submit-no-address": (["submit", "run.yaml"], "--address"),
        "submit-nonsense": (["submit", "run.yaml", "--address", "nonsense"], "--address"),
        "submit-ray-address": (["submit", "run.yaml", "--address", "ray://head:10001"], "--address"),
        "submit-password": (["submit", *BASES["submit"], "--address", "http://a:b@head:8265"], "--address"),
        "submit-port": (["submit", "run.yaml", "--address", "http://head:99999"], "--address"),
        "submit-unknown-command": (
            ["submit", "run.yaml", "--address", "http://head:8265", "--command", "eval"],
            "--command",
        ),
        "submit-wrong-file": (["submit", "sft.yaml", "--address", "http://head:8265"], "sft.yaml"),
        "generate-no-prompt": (["generate", "tiny"], "--prompt"),
        "generate-both": ([*generate, "--prompts", "prompts.jsonl"], "--prompts"),
        "generate-empty-prompt": (["generate", "tiny", "--prompt", ""], "--prompt"),
        "generate-blank-prompt": (["generate", "tiny", "--prompt", "  "], "--prompt"),
        "generate-no-file": (["generate", "tiny", "--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        "generate-no-model": (["generate", "nosuchfolder", "--prompt", "say"], "nosuchfolder"),
        "generate-a-file": (["generate", "prompts.jsonl", "--prompt", "say"], "prompts.jsonl"),
        "generate-a-classifier": (["generate", "judge", "--prompt", "say"], "judge"),
        "generate-greedy-twice": ([*generate, "--n", "2", "--temperature", "0"], "--n"),
        "generate-hot": ([*generate, "--temperature", "3"], "--temperature"),
        "generate-cold": ([*generate, "--temperature", "-1"], "--temperature"),
        "generate-beyond-the-context": ([*generate, "--max-tokens", "100000"], "--max-tokens"),
        "generate-out-here": ([*generate, "--out", "."], "--out"),
        "generate-out-up": ([*generate, "--out", ".."], "--out"),
        "generate-out-slash": ([*generate, "--out", "new/"], "--out"),
        "generate-keep-all": ([*generate, "--keep-all"], "--best-of"),
        "generate-at-least": ([*generate, "--at-least", "1"], "--best-of"),
        "generate-best-of": ([*generate, "--best-of", "4"], "--reward-config"),
        "generate-best-of-one": ([*generate, "--best-of", "1", "--reward-config", "run.yaml"], "--best-of"),
        "generate-best-of-n": ([*generate, "--best-of", "4", "--n", "2", "--reward-config", "run.yaml"], "--n"),
        "generate-best-of-greedy": (
            [*generate, "--best-of", "4", "--temperature", "0", "--reward-config", "run.yaml"],
            "--temperature",
        ),
        "generate-best-of-nowhere": ([*generate, "--best-of", "4", "--reward-config", "nowhere.yaml"], "nowhere.yaml"),
        "generate-best-of-sft": ([*generate, "--best-of", "4", "--reward-config", "sft.yaml"], "sft.yaml"),
        "generate-arguments-list": ([*generate, "--template-arguments", "[]"], "--template-arguments"),
        "generate-arguments-taken": ([*generate, "--template-arguments", '{"tokenize": true}'], "template"),
        "generate-arguments-deep": (
            [*generate, "--template-arguments", '{"a":' * 3000 + "1" + "}" * 3000],
            "--template-arguments",
        ),
        "generate-arguments-twice": ([*generate, "--template-arguments", '{"a": 1, "a": 2}'], "--template-arguments"),
        "generate-arguments-nan": ([*generate, "--template-arguments", '{"a": NaN}'], "--template-arguments"),
        "eval-no-policy": (["eval", "run.yaml"], "--policy"),
        "eval-no-prompts": (["eval", "run.yaml", "--policy", "tiny"], "data.eval_prompts"),
        "eval-nowhere": (["eval", "run.yaml", "--policy", "nowhere", "data.eval_prompts=prompts.jsonl"], "nowhere"),
        "eval-baseline-nowhere": (["eval", *BASES["eval"], "--baseline", "nowhere"], "nowhere"),
        "eval-policy-a-file": (
            ["eval", "run.yaml", "--policy", "prompts.jsonl", "data.eval_prompts=prompts.jsonl"],
            "prompts.jsonl",
        ),
        "eval-policy-a-classifier": (
            ["eval", "run.yaml", "--policy", "judge", "data.eval_prompts=prompts.jsonl"],
            "judge",
        ),
        "eval-json-folder": (["eval", *BASES["eval"], "--json", "tiny"], "--json"),
        "serve-port-99999": (["reward", "serve", "run.yaml", "--local", "--port", "99999"], "--port"),
        "serve-host-nowhere": (["reward", "serve", "run.yaml", "--local", "--host", "no.such.host.invalid"], "--host"),
        "serve-a-remote-judge": (
            ["reward", "serve", "run.yaml", "--local", "reward={kind: remote, url: 'http://localhost:1'}"],
            "reward",
        ),
        "calibrate-no-output": (["reward", "calibrate", "run.yaml"], "--output"),
        "calibrate-pairwise": (
            ["reward", "calibrate", "run.yaml", "reward.kind=pairwise_function", "--output", "x"],
            "reward.kind",
        ),
        "fetch-nothing": (["fetch"], "ASSET"),
        "fetch-no-asset": (["fetch", "banana"], "banana"),
        "fetch-unknown": (["fetch", "asset:banana"], "banana"),
        "fetch-up": (["fetch", "asset:tiny-llama/../../x"], "asset:"),
        "reward-train-ridge-of-pairs": ([*ridge, "--train", "pairs.jsonl"], "--method"),
        "reward-train-objective-of-ridge": ([*ridge, "--objective", "ordinal"], "--objective"),
        "reward-train-ordinal-of-fractions": ([*train, "--objective", "ordinal"], "--objective"),
        "reward-train-ordinal-of-pairs": ([*train, "--train", "pairs.jsonl", "--objective", "ordinal"], "--objective"),
        "reward-train-gpm-of-odd": ([*train, "--objective", "gpm", "--dimensions", "3"], "--dimensions"),
        "reward-train-gate-of-ratings": ([*train, "--objective", "gpm", "--gate"], "--gate"),
        "reward-train-dimensions-alone": ([*train, "--dimensions", "4"], "--dimensions"),
        "reward-train-weights": ([*train, "--weights", "banana"], "--weights"),
        "reward-train-weights-of-another": ([*train, "--weights", "banana=1"], "--weights"),
        "reward-train-weights-nan": ([*train, "--weights", "rating=nan"], "--weights"),
        "reward-train-validation-2": ([*train, "--validation", "2"], "--validation"),
        "reward-train-validation-1": ([*train, "--validation", "1"], "--validation"),
        "reward-train-margin-beyond-all": ([*train, "--margin", "1000000"], "--margin"),
        "reward-train-output-a-file": ([*train, "--output", "run.yaml"], "--output"),
        "reward-train-output-a-model": ([*train, "--output", "tiny"], "--output"),
        "reward-train-output-here": ([*train, "--output", "."], "--output"),
        "reward-train-output-empty": ([*train, "--output", ""], "--output"),
        "reward-train-cuda": ([*train, "--device", "cuda"], "--device"),
        "reward-train-test-of-another-kind": ([*train, "--test", "pairs.jsonl"], "pairs.jsonl"),
        "reward-train-test-nowhere": ([*train, "--test", "nowhere.jsonl"], "nowhere.jsonl"),
        "reward-train-resume-alone": ([*train, "--resume"], "--resume"),
        "reward-train-resume-nothing": ([*train, "--resume", "--checkpoint-every", "1"], "--resume"),
        "reward-train-address-alone": ([*train, "--address", "auto"], "--address"),
        "reward-train-stage-of-ridge": ([*ridge, "--zero-stage", "2"], "--zero-stage"),
        "reward-train-threads-0": ([*train, "--threads", "0"], "--threads"),
        "reward-train-rate-nan": ([*train, "--learning-rate", "nan"], "--learning-rate"),
        "reward-train-seed-negative": ([*train, "--seed", "-1"], "--seed"),
    }


TOGETHER = _together()
