"""Types of command-line options: each says what is allowed, before anything is read or started.

For `argparse`: what is raised is an `ArgumentTypeError`, and the parser names the option. Imports nothing that takes time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from rlhf.config.base import is_host, path_text
from rlhf.config.explain import shortened
from rlhf.config.loader import UserError

MOST = 2**31 - 1
"""What a count may be, where nothing says less: more would not fit into the integers of the libraries below."""


class Parser(argparse.ArgumentParser):
    """A mistake is a `UserError`: one message with the option's name, as everywhere else, in place of the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}. See `{self.prog} --help`")


def count(text: str) -> int:
    """A whole number of at least 1."""
    return whole(1)(text)


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """The type of a whole number between two bounds."""

    def read(text: str) -> int:
        # int() also takes underscores, spaces and other scripts' digits, and refuses thousands of digits by itself.
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or not least <= int(text) <= most:
            upper = "" if most == MOST else f" and at most {most:,}"
            raise argparse.ArgumentTypeError(f"`{shortened(text)}` is not a whole number of at least {least}{upper}")
        return int(text)

    return read


def real(
    least: float = -math.inf, most: float = math.inf, *, above: bool = False, below: bool = False
) -> Callable[[str], float]:
    """The type of a finite number between two bounds.

    Args:
        above, below: the lower, or upper, bound itself is not allowed.
    """

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = least < value if above else least <= value
        inside = inside and (value < most if below else value <= most)
        if not (math.isfinite(value) and inside):
            bounds = [f"{'above' if above else 'of at least'} {least:g}"] if math.isfinite(least) else []
            bounds += [f"{'below' if below else 'of at most'} {most:g}"] if math.isfinite(most) else []
            raise argparse.ArgumentTypeError(
                f"`{shortened(text)}` is not a finite number {' and '.join(bounds)}".rstrip()
            )
        return value

    return read


def port(text: str) -> int:
    """A TCP port; 0: any that is free."""
    try:
        return whole(0, 65_535)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"`{shortened(text)}` is not a port: 0 to 65535, where 0 is any that is free"
        ) from None


def jobs_server(text: str) -> str:
    """The address of Ray's jobs server."""
    try:
        url = urlsplit(text)
        whole_address = url.scheme in ("http", "https") and is_host(url.hostname) and url.port != 0
        whole_address = whole_address and url.username is None  # it would be shown in every message
    except ValueError:  # a port that is none, brackets that do not close
        whole_address = False
    if not whole_address or re.search(r"\s", text):
        raise argparse.ArgumentTypeError(
            f"`{shortened(text)}` is no address of a jobs server, such as http://head:8265"
        )
    return text


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name is there twice")
        return found

    def no_number(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number in JSON")

    try:
        value = json.loads(text, object_pairs_hook=once, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"`{shortened(text)}` is no JSON object")
    return value


def named(text: str) -> str:
    """The name of a file, a folder, or what is looked up like one. A leading `~` is the home folder, as in a shell."""
    try:
        return path_text(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def output_folder(text: str) -> str:
    """A folder that is there, or can be made. What may be in it is for the command to say."""
    name = named(text)
    return name if os.path.isdir(name) else _writable(name, make_folder=True)


def output_file(text: str) -> str:
    """A file that can be written: it is not there yet, or may be overwritten, in a folder that is there."""
    return _writable(text, make_folder=False)


def output_file_in_new_folder(text: str) -> str:
    """The same; its folder is made when the file is."""
    return _writable(text, make_folder=True)


def _writable(text: str, make_folder: bool) -> str:
    problem = unwritable(text, make_folder=make_folder)
    if problem is not None:
        raise argparse.ArgumentTypeError(problem)
    return text


def unwritable(name: str, *, make_folder: bool) -> str | None:
    """Why a file of this name cannot be written, and the remedy; None if it can.

    Args:
        make_folder: its folder, and those above, may be missing.
    """
    shown = f"`{shortened(name)}`"
    if not name or "\0" in name:
        return f"{shown} is no name of a file"
    path = Path(os.path.realpath(name))
    try:
        if path.is_dir() or name.endswith("/"):
            return f"{shown} is a folder. Name a file in it, such as {Path(name) / 'out.json'}"
        folder = path.parent
        while make_folder and not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            why = "is no folder" if folder.exists() else "does not exist"
            return f"{shown}: its folder {why}. Make it, or correct the path"
        _try(path if folder == path.parent else folder / f".{os.getpid()}.rlhf")
    except OSError as error:
        return f"{shown}: cannot be written ({error.strerror or error}). Name another file"
    return None


def _try(path: Path) -> None:
    """Raises OSError if the file cannot be written. It is left as it was: what may be written is only known by trying."""
    if path.is_file():
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND))
    elif not path.exists():  # no pipe or device, whose opening may wait
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        path.unlink()


def require_text(arguments: list[str]) -> None:
    """Raises UserError for an argument that is no UTF-8: Python would carry its bytes on as halves of characters that no file takes."""
    for number, argument in enumerate(arguments, start=1):
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            shown = ascii(os.fsencode(argument))[2:-1]
            raise UserError(f"argument {number}, `{shortened(shown)}`, is not UTF-8 text. Write it in UTF-8") from None


def printable(message: str) -> str:
    """A message for a terminal, whatever it quotes: control characters are escaped, and of very long words the beginning is shown."""
    message = re.sub(r"\S{400,}", lambda word: f"{word[0][:300]}...", message)
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in message)
