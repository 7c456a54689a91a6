"""What an option may be, and what is said when it is not: the option, the value, what is allowed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import UserError
from rlhf.config.arguments import (
    Parser,
    count,
    jobs_server,
    json_object,
    output_file,
    output_file_in_new_folder,
    port,
    real,
    require_text,
    whole,
)

RATE = real(0, above=True)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (count, "1", 1),
        (whole(0), "0", 0),
        (whole(-3, 3), "-3", -3),
        (real(), "-1e-3", -1e-3),
        (RATE, "2e-4", 2e-4),
        (real(0, 2), "0", 0.0),
        (port, "65535", 65_535),
        (jobs_server, "http://head:8265", "http://head:8265"),
        (jobs_server, "https://[::1]", "https://[::1]"),
        (json_object, '{"a": [1]}', {"a": [1]}),
    ],
)
def test_what_can_be_is_read(kind: Callable[[str], Any], text: str, value: Any) -> None:
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "texts", "says"),
    [
        (count, ["0", "-1", "1.5", "1e3", "", "x", "1_0", " 1", "٣", "9" * 5000, "2147483648"], "of at least 1"),
        (whole(1, 256), ["0", "257", "100000000"], "of at least 1 and at most 256"),
        (
            real(0, 2),
            ["nan", "inf", "-0.1", "2.1", "warm", "", "1e999"],
            "finite number of at least 0 and of at most 2",
        ),
        (real(0, 1, above=True, below=True), ["0", "1", "nan"], "finite number above 0 and below 1"),
        (real(), ["nan", "-inf", "x"], "is not a finite number$"),
        (port, ["-1", "65536", "99999", "http", "80.0"], "is not a port: 0 to 65535"),
        (
            jobs_server,
            [
                "nonsense",
                "head:8265",
                "ftp://head",
                "http://",
                "http://head:x",
                "http://[::1",
                "http://a b",
                "http://a:0",
            ],
            "such as http://head:8265",
        ),
        (json_object, ["[1]", "{", "null", "[" * 100_000], "JSON"),
    ],
)
def test_what_cannot_be_is_refused(kind: Callable[[str], Any], texts: list[str], says: str) -> None:
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError, match=says) as caught:
            kind(text)
        assert len(str(caught.value)) < 300


def test_an_output_must_be_writable_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "x")
    refused = {
        str(tmp_path): "is a folder",
        ".": "is a folder",
        "": "no name of a file",
        "a\0b": "no name of a file",
        str(tmp_path / "none" / "x.json"): "its folder does not exist. Make it",
        str(tmp_path / "file" / "x.json"): "its folder is no folder",
        str(tmp_path / ("x" * 300)): "name too long",
        str(tmp_path / "link"): "its folder does not exist",
        "/proc/none.json": "cannot be written",
    }
    for name, says in refused.items():
        with pytest.raises(argparse.ArgumentTypeError, match=f"(?i){says}"):
            output_file(name)
    for name in ("file", "new.json"):
        assert output_file(str(tmp_path / name)) == str(tmp_path / name)
    assert output_file(os.devnull) == os.devnull
    assert output_file_in_new_folder(str(tmp_path / "none" / "deep" / "x.json"))
    with pytest.raises(argparse.ArgumentTypeError, match="is no folder"):
        output_file_in_new_folder(str(tmp_path / "file" / "deep" / "x.json"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"], "looking leaves nothing behind"
    assert (tmp_path / "file").read_text() == "kept"


def test_an_argument_that_is_no_text_is_named() -> None:
    require_text(["ü", "loop.steps=1"])
    with pytest.raises(UserError, match=r"argument 2, `x=.*xff`, is not UTF-8"):
        require_text(["train", os.fsdecode(b"x=\xff")])


def test_a_mistake_is_one_message_with_the_option() -> None:
    parser = Parser(prog="rlhf try")
    parser.add_argument("--n", type=count)
    with pytest.raises(UserError) as caught:
        parser.parse_args(["--n", "0"])
    assert str(caught.value) == "--n: `0` is not a whole number of at least 1. See `rlhf try --help`"
