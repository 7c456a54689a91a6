"""The troubleshooting page quotes messages as the code says them."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS, _, FOREIGN = (ROOT / "docs" / "troubleshooting.md").read_text().partition("## What the libraries say")
QUOTES = re.findall(r"^### `(.+)`$", OURS, re.MULTILINE)
HOLE = "\0"


@functools.cache
def messages() -> str:
    """Every string in the package, one per line, with a hole for what is filled in."""
    found = [text for path in (ROOT / "rlhf").rglob("*.py") for text in strings(ast.parse(path.read_text()))]
    return "\n".join(text.replace("\n", " ") for text in found)


def strings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)


def occurs(quote: str) -> bool:
    """Whether some string holds the quote's words, with holes only where the quote has `…`."""
    pattern = re.escape(quote).replace("…", f"[^\\n]*{HOLE}[^\\n]*")
    return re.search(pattern, messages()) is not None


@pytest.mark.parametrize("quote", QUOTES)
def test_the_code_says_it(quote: str) -> None:
    assert occurs(quote)


def test_a_message_that_nobody_says_is_noticed() -> None:
    assert len(QUOTES) > 25
    assert not occurs("the driver waited … minutes for …")
    assert not occurs("the driver waited 3 s for …")
