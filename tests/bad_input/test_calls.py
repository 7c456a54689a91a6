"""Code of the user's that is called, and templates that are tried, in processes of their own: whatever they do."""

from __future__ import annotations

import pytest

from tests.bad_input.place import Place
from tests.bad_input.tables import called_cases
from tests.bad_input.walk import Case, bad_answers

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("case", called_cases(), ids=lambda case: case.name)
def test_is_refused_with_its_name_and_remedy(case: Case, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.data.template_trial.CPU_SECONDS", 1)  # an endless template takes all of them
    bad = bad_answers([case], place)
    assert not bad, bad
