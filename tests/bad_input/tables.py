"""All cases of the walk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from types import ModuleType

from tests.bad_input import checkpoints, commands, models, modules, rows, schema, texts
from tests.bad_input.walk import Case

CONFIGURATION = (schema, texts)
INPUTS = (commands, rows, models, modules, checkpoints)
TESTED = {schema: 2, rows: 4, models: 4, modules: 4, checkpoints: 4}
"""Table -> of how many of its cases the tests take one, where a case reads a model or a file and takes long; all of the others."""


def all_cases(every: bool = False) -> Iterator[Case]:
    """All cases, in a fixed order.

    Args:
        every: also those that meet the same code as others.
    """
    return chain(_of((*CONFIGURATION, *INPUTS), every), called_cases())


def called_cases() -> Iterator[Case]:
    """Cases that start a process each, for code that may not end."""
    return chain(modules.calls(), models.calls())


def _of(tables: Sequence[ModuleType], every: bool = False) -> Iterator[Case]:
    again = 0
    for case in chain.from_iterable(table.cases(every) for table in tables):
        again += case.again
        if every or not case.again or again % 3 == 0:
            yield case


def by_group(tables: Sequence[ModuleType]) -> dict[str, list[Case]]:
    """The tests' share of the cases of these tables by what they are about: their names without the last part."""
    groups: dict[str, list[Case]] = {}
    for table in tables:
        for case in islice(_of((table,)), 0, None, TESTED.get(table, 1)):
            groups.setdefault(case.name.rpartition("/")[0], []).append(case)
    return groups
