"""What the walk stands in: one working directory, and a guard under which nothing starts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bad_input.place import Place, build_sources
from tests.bad_input.walk import nothing_starts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Good files in a working directory, for a case to spoil one; the guard stands as long as the module's tests."""
    folder = tmp_path_factory.mktemp("walk")
    build_sources(folder / "sources")
    with nothing_starts():
        yield Place(folder / "place", folder / "sources")
