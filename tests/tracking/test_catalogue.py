"""The catalogue of metrics: it knows every name that the package writes, and the package writes every name that it knows."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.tracking import metrics_page
from rlhf.tracking.catalogue import BY_NAME, METRICS, axis, find, phrase, shown
from rlhf.tracking.console import EVALUATED, ONLINE, SUPERVISED

PACKAGE = Path(__file__).parents[2] / "rlhf"
CATALOGUE = (PACKAGE / "tracking" / "catalogue.py", PACKAGE / "tracking" / "metrics_page.py")
NAME = re.compile(rf"(?:{'|'.join({metric.name.partition('/')[0] for metric in METRICS})})/[a-z0-9_{{}}]+")
FAMILIES = {re.sub(r"\w+(?=\})", "", metric.name): metric.name for metric in METRICS if "{" in metric.name}
"""`dropped/{}` -> `dropped/{reason}`."""


def names(path: Path) -> Iterator[tuple[str, int]]:
    """(name, line) of every string that is a metric's name as a whole; what an f-string fills in is `{}`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            text = node.value
        else:
            continue
        if NAME.fullmatch(text):
            yield text, node.lineno


def measures(path: Path) -> Iterator[tuple[str, int]]:
    """(name, line) of what the judges measure; the loop records it after `reward/` (`loop.judged.measured`)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        keys: list[ast.expr | None] = []
        if isinstance(node, ast.FunctionDef) and node.name.endswith("measures"):
            keys = [key for inner in ast.walk(node) if isinstance(inner, ast.Dict) for key in inner.keys]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Measured":
            keys = [key for inner in ast.walk(node) if isinstance(inner, ast.Dict) for key in inner.keys]
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "measures":
            keys = [node.slice]
        for key in keys:
            if isinstance(key, ast.Constant):
                yield f"reward/{key.value}", key.lineno


def written() -> dict[str, str]:
    """Name -> a place that writes or reads it; what the console and the reports read is not written by them."""
    found = {}
    for path in (path for path in PACKAGE.rglob("*.py") if path not in CATALOGUE):
        for name, line in [*names(path), *measures(path)]:
            found.setdefault(name, f"{path}:{line}")
    return found


def test_every_name_that_the_package_uses_is_in_the_catalogue() -> None:
    found = written()
    assert {"policy/kl", "reward/{}", "reward/cache_hits", "heldout/loss"} <= found.keys(), "the search finds names"
    unknown = {name: place for name, place in found.items() if name not in BY_NAME and name not in FAMILIES}
    assert unknown == {}


def test_every_name_in_the_catalogue_is_written_somewhere() -> None:
    rooms = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "tracking"]
    found = {FAMILIES.get(name, name) for path in rooms for name, _ in [*names(path), *measures(path)]}
    # Two kinds of names share one pattern, and a member's measures are joined without a prefix (`judges.ensemble`).
    found |= {"reward/{source}", "reward/{member}", "reward/{member}/{measure}"}
    assert BY_NAME.keys() - found == set()


def test_the_page_is_up_to_date() -> None:
    assert metrics_page.PAGE.read_text(encoding="utf-8") == metrics_page.page(), (
        "run `python -m rlhf.tracking.metrics_page`"
    )
    for metric in METRICS:
        assert f"| `{metric.name}` | " in metrics_page.page()


def test_the_pages_that_say_more_exist() -> None:
    for metric in METRICS:
        assert not metric.page or (metrics_page.PAGE.parent / metric.page.partition("#")[0]).is_file(), metric.name


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("policy/kl", "policy/kl"),
        ("dropped/tie", "dropped/{reason}"),
        ("reward/toxicity", "reward/{source}"),
        ("reward/toxicity/cache_hits", "reward/{member}/{measure}"),
        ("policy/banana", None),
        ("dropped/", None),
        ("dropped/a/b", None),
        ("eval/reward/mean", None),
    ],
)
def test_a_name_finds_its_entry(name: str, entry: str | None) -> None:
    found = find(name)
    assert (None if found is None else found.name) == entry


def test_no_entry_hides_another() -> None:
    assert len(BY_NAME) == len(METRICS)
    for metric in METRICS:
        if "{" not in metric.name:
            assert find(metric.name) is metric


def test_numbers_have_their_digits_and_a_name_or_a_unit() -> None:
    line = {"policy/kl": 0.01234, "reward/mean": 1.25, "time/step": 10.0, "policy/loss": None}
    assert (shown(line, "policy/kl"), phrase(line, "policy/kl")) == ("0.0123", "kl 0.0123")
    assert (phrase(line, "reward/mean"), phrase(line, "time/step")) == ("reward +1.250", "10.0 s")
    assert (phrase(line, "policy/loss"), phrase(line, "train/loss")) == ("loss -", "loss -")
    assert (axis("reward/mean"), axis("policy/kl")) == ("mean reward", "mean KL (nats per token)")


def test_what_is_shown_can_be_told_apart() -> None:
    """Each has a short name or a unit, and no two of a line the same."""
    for line in (ONLINE, EVALUATED, SUPERVISED):
        titles = [BY_NAME[name].label or BY_NAME[name].unit for name in line]
        assert all(titles) and len(set(titles)) == len(titles)
