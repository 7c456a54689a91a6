"""Files of rows: prompts, pairs, examples for `rlhf sft`, ratings for `rlhf reward train`, and the judge's own files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.bad_input.place import SFT, Place
from tests.bad_input.walk import Case


@dataclass(frozen=True)
class Kind:
    """A file of rows, and the command that reads it.

    Attributes:
        row: a good one.
        text: the row's field that holds a text.
        command: with `bad.jsonl` for the file.
        starts: the command ends in a start, not in a plan.
        missing: fields without which a row is none.
    """

    row: Mapping[str, Any]
    text: str
    command: Callable[[Place, str], Sequence[str]]
    missing: tuple[str, ...]
    starts: bool = False


def _train(changes: Mapping[str, Any]) -> Callable[[Place, str], Sequence[str]]:
    """`changes`: section -> field -> value, of which "FILE" stands for the file."""

    def command(place: Place, file: str) -> Sequence[str]:
        filled = {
            section: {name: file if value == "FILE" else value for name, value in values.items()}
            for section, values in changes.items()
        }
        return ["train", place.configuration(filled, name="files.yaml"), "--dry-run"]

    return command


def _sft(place: Place, file: str) -> Sequence[str]:
    return ["sft", place.configuration({"data": {"examples": file}}, SFT, name="files.yaml"), "--dry-run"]


def _reward(place: Place, file: str) -> Sequence[str]:
    return [
        "reward",
        "train",
        "--model",
        "tiny",
        "--train",
        file,
        "--output",
        "judge-out",
        "--method",
        "full",
        "--device",
        "cpu",
    ]


def _generate(place: Place, file: str) -> Sequence[str]:
    """Reads prompts as `rlhf train` does, after less."""
    return ["generate", "tiny", "--prompts", file, "--max-tokens", "8"]


KINDS = {
    "prompts": Kind({"prompt": "say"}, "prompt", _generate, ("prompt",), starts=True),
    "trained-on": Kind({"prompt": "say"}, "prompt", _train({"data": {"prompts": "FILE"}}), ("prompt",)),
    "held-out": Kind({"prompt": "say"}, "prompt", _train({"data": {"eval_prompts": "FILE"}}), ("prompt",)),
    "pairs": Kind(
        {"prompt": "say", "chosen": "yes", "rejected": "no"},
        "chosen",
        _train({"data": {"prompts": "FILE"}, "algorithm": {"name": "selm"}, "policy": {"micro_batch_tokens": 1024}}),
        ("chosen", "rejected"),
    ),
    "examples": Kind({"prompt": "say", "response": "yes"}, "response", _sft, ("prompt", "response")),
    "ratings": Kind({"text": "a text", "rating": 1.5}, "text", _reward, ("text", "rating"), starts=True),
    "preferences": Kind(
        {"prompt": "say", "chosen": "yes", "rejected": "no"}, "chosen", _reward, ("rejected",), starts=True
    ),
    "canaries": Kind({"good": "yes", "bad": "no"}, "good", _train({"reward": {"canaries": "FILE"}}), ("good", "bad")),
}
ALIKE = ("trained-on", "held-out", "pairs", "preferences", "canaries")
"""Read by what reads the prompts, or the ratings, as well."""
GOOD_ROWS = 24


def _lines(kind: Kind, bad: str, at: int = 3) -> str:
    """A file with the line `bad` among good ones."""
    rated = "rating" in kind.row
    rows = [json.dumps(kind.row | {"rating" if rated else "n": n}) for n in range(GOOD_ROWS)]
    return "\n".join([*rows[:at], bad, *rows[at:]]) + "\n"


def _without(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


def _bad_lines(kind: Kind) -> Iterator[tuple[str, str]]:
    """A line that no reader may take, by name."""
    good, text = json.dumps(kind.row), json.dumps(kind.row[kind.text])
    yield "truncated", good[: len(good) // 2]
    yield "truncated-in-an-escape", good.replace(text, '"\\u12')
    yield "single-quotes", good.replace('"', "'")
    yield "trailing-comma", good[:-1] + ",}"
    yield "two-objects", good + good
    yield "in-a-list", f"[{good}]"
    yield "text", "banana"
    yield "quoted-text", '"banana"'
    yield "number", "42"
    yield "null", "null"
    yield "list", "[]"
    yield "empty-object", "{}"
    yield "python", repr(dict(kind.row))
    yield "csv", ",".join(map(str, kind.row.values()))
    yield "duplicated-key", good[:-1] + f', "{kind.text}": {text}}}'
    yield "duplicated-key-inside", good[:-1] + ', "more": {"a": 1, "a": 2}}'
    yield "int-of-5000-digits", good[:-1] + ', "more": ' + "9" * 5000 + "}"
    yield "nan", good[:-1] + ', "more": NaN}'
    yield "infinity", good[:-1] + ', "more": -Infinity}'
    yield "deep", good[:-1] + ', "more": ' + "[" * 100_000 + "]" * 100_000 + "}"
    yield "deep-unclosed", good[:-1] + ', "more": ' + '{"a":' * 100_000
    yield "surrogate", good.replace(text, '"half \\ud83d"')
    yield "surrogate-in-the-payload", good[:-1] + ', "more": ["half \\ud83d"]}'
    yield "surrogate-in-a-key", good[:-1] + ', "half \\ud83d": 1}'
    yield "surrogates-reversed", good.replace(text, '"\\ude00\\ud83d"')
    for name in kind.missing:
        row = kind.row
        yield f"without-{name}", json.dumps(_without(row, name) | {"other": 1})
        yield f"{name}-null", json.dumps(row | {name: None})
        yield f"{name}-true", json.dumps(row | {name: True})
        yield f"{name}-empty-list", json.dumps(row | {name: []})
        yield f"{name}-mapping", json.dumps(row | {name: {"text": "x"}})
        yield f"{name}-numbers", json.dumps(row | {name: [1, 2]})
        if isinstance(row[name], str):
            yield f"{name}-empty", json.dumps(row | {name: ""})
            yield f"{name}-blank", json.dumps(row | {name: " \n "})
            yield f"{name}-number", json.dumps(row | {name: 3})
        else:
            yield f"{name}-text", json.dumps(row | {name: "good"})
            yield f"{name}-huge", json.dumps(row)[:-1].replace(str(row[name]), "1e999") + "}"


CHATS: dict[str, Any] = {
    "empty": [],
    "null": None,
    "text": "say",
    "mapping": {"role": "user", "content": "say"},
    "of-texts": ["say"],
    "of-nulls": [None],
    "of-lists": [["user", "say"]],
    "no-role": [{"content": "say"}],
    "no-content": [{"role": "user"}],
    "null-content": [{"role": "user", "content": None}],
    "empty-content": [{"role": "user", "content": ""}],
    "blank-content": [{"role": "user", "content": "  "}],
    "number-content": [{"role": "user", "content": 3}],
    "parts": [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
    "unknown-role": [{"role": "banana", "content": "say"}],
    "number-role": [{"role": 3, "content": "say"}],
    "list-role": [{"role": ["user"], "content": "say"}],
    "sharegpt": [{"from": "human", "value": "say"}],
    "other-name": [{"role": "human", "content": "say"}],
    "only-system": [{"role": "system", "content": "say"}],
    "assistant-last": [{"role": "user", "content": "say"}, {"role": "assistant", "content": "yes"}],
    "empty-turn-before": [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "say"},
    ],
    "surrogate": [{"role": "user", "content": "half \ud83d"}],
}


def _files(kind: Kind) -> Iterator[tuple[str, Callable[[Place], str]]]:
    """Files as wholes that no reader may take."""
    rows = _lines(kind, json.dumps(kind.row))

    def content(text: str | bytes, name: str = "bad.jsonl") -> Callable[[Place], str]:
        return lambda place: place.write(name, text)

    yield "empty", content("")
    yield "blank", content("\n\n  \n")
    yield "one-json-list", content(json.dumps([kind.row]))
    yield "pretty-json", content(json.dumps(kind.row, indent=2))
    yield "csv", content("prompt,response\nsay,yes\n")
    yield "yaml", content("- prompt: say\n")
    yield "utf-16", content(rows.encode("utf-16"))
    yield "latin-1", content(rows.encode() + b'{"prompt": "caf\xe9"}\n')
    yield "binary", content(bytes(range(256)) * 4)
    yield "nul-bytes", content(bytes(4096))
    yield "gzip", content(b"\x1f\x8b\x08\x00" + bytes(64))
    yield "false-parquet", content(rows, "bad.parquet")
    yield "empty-parquet", content(b"", "bad.parquet")
    yield "truncated-parquet", content(b"PAR1" + bytes(100) + b"PAR1", "bad.parquet")
    yield "missing", lambda place: "bad-nowhere.jsonl"
    yield "missing-parquet", lambda place: "bad-nowhere.parquet"
    yield "folder", _folder
    yield "fifo", _fifo
    yield "device", lambda place: "/dev/null"
    yield "endless-device", lambda place: "/dev/zero"
    yield "loop-of-links", _loop
    yield "too-long-a-name", lambda place: "bad" * 200
    yield "too-long-a-path", lambda place: "bad/" * 3000
    yield "unknown-asset", lambda place: "asset:bad"
    yield "asset-up", lambda place: "asset:tiny-prompts.jsonl/../bad"
    yield "asset-far-up", lambda place: "asset:tiny-llama/../../../../../../../../etc/passwd"
    yield "asset-file-missing", lambda place: "asset:tiny-llama/bad.jsonl"
    yield "asset-empty", lambda place: "asset:"
    yield "hub-empty", lambda place: "hf:"
    yield "hub-folder-of-none", lambda place: "hf:tiny"
    yield "hub-colons", lambda place: "hf::::"
    yield "tilde-missing", lambda place: "~/bad.jsonl"
    yield "unknown-user", lambda place: "~no-such-user/bad.jsonl"


def _folder(place: Place) -> str:
    (place.work / "bad.jsonl").mkdir()
    return "bad.jsonl"


def _fifo(place: Place) -> str:
    os.mkfifo(place.work / "bad.jsonl")
    return "bad.jsonl"


def _loop(place: Place) -> str:
    os.symlink("bad.jsonl", place.work / "bad.jsonl")
    return "bad.jsonl"


def cases(every: bool = False) -> Iterator[Case]:
    for name, kind in KINDS.items():
        yield _case(
            f"rows/{name}/good",
            kind,
            lambda place, k=kind: place.write("bad.jsonl", _lines(k, json.dumps(k.row))),
            "good rows",
            required=True,
        )
        for how, line in _bad_lines(kind):
            right = (
                "a response may be empty"
                if name in ("pairs", "canaries") and how.endswith(("-empty", "-blank"))
                else None
            )
            yield _case(
                f"rows/{name}/{how}",
                kind,
                lambda place, k=kind, one=line: place.write("bad.jsonl", _lines(k, one)),
                right,
                again=name in ALIKE,
            )
        for how, make in _files(kind):
            array = "an array of rows is a file of rows" if how == "one-json-list" else None
            yield _case(f"rows/{name}/file-{how}", kind, make, array, again=name not in ("prompts", "ratings"))
    prompts = KINDS["prompts"]
    for how, chat in CHATS.items():
        line = json.dumps({"messages": chat})
        yield _case(
            f"rows/prompts/messages-{how}",
            prompts,
            lambda place, one=line: place.write("bad.jsonl", _lines(prompts, one)),
            "turns as ShareGPT has them" if how == "sharegpt" else None,
        )
    for how, text in GOOD_FILES.items():
        yield _case(
            f"rows/prompts/good-{how}",
            prompts,
            lambda place, one=text: place.write("bad.jsonl", one),
            "another way to write good rows",
            required=True,
        )


_GOOD = _lines(KINDS["prompts"], '{"prompt": "x"}')
GOOD_FILES: dict[str, str | bytes] = {
    "crlf": _GOOD.replace("\n", "\r\n"),
    "byte-order-mark": "\ufeff" + _GOOD,
    "no-last-newline": _GOOD.rstrip("\n"),
    "blank-lines": _GOOD.replace("\n", "\n\n"),
    "emoji": _lines(KINDS["prompts"], '{"prompt": "\\ud83d\\ude00"}'),
    "raw-emoji": _lines(KINDS["prompts"], '{"prompt": "\U0001f600"}'),
    "nul-escape": _lines(KINDS["prompts"], '{"prompt": "a\\u0000b"}'),
    "null-payload": _lines(KINDS["prompts"], '{"prompt": "x", "more": null}'),
    "chat": _lines(KINDS["prompts"], '{"messages": [{"role": "user", "content": "x"}]}'),
}


def _case(
    name: str,
    kind: Kind,
    make: Callable[[Place], str],
    right: str | None = None,
    required: bool = False,
    again: bool = False,
) -> Case:
    return Case(
        name,
        lambda place: kind.command(place, make(place)),
        about=("bad", "/dev/", "asset:", "hf:", "prompts", "examples", "canaries"),
        right=right,
        required=required,
        starts=kind.starts,
        leaves=("home/cache", "home/.cache"),  # where assets are made, and data sets converted
        again=again,
    )
