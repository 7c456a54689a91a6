"""All cases of the walk."""

from __future__ import annotations

from collections.abc import Iterator

from tests.bad_input import checkpoints, models, modules, rows, schema, texts
from tests.bad_input.walk import Case

TABLES = (texts, rows, models, modules, checkpoints)


def all_cases(every: bool = False) -> Iterator[Case]:
    """All cases, in a fixed order.

    Args:
        every: also those of the schema that the tests leave out.
    """
    yield from schema.cases(every)
    for table in TABLES:
        yield from table.cases()
