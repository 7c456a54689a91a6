"""Every field of the configuration with values that it cannot have; YAML that is none; overrides and paths."""

from __future__ import annotations

import pytest

from tests.bad_input.place import Place
from tests.bad_input.tables import CONFIGURATION, by_group
from tests.bad_input.walk import Case, bad_answers

GROUPS = by_group(CONFIGURATION)


@pytest.mark.parametrize("cases", GROUPS.values(), ids=GROUPS)
def test_is_refused_with_field_and_remedy_or_right(cases: list[Case], place: Place) -> None:
    bad = bad_answers(cases, place)
    assert not bad, bad
