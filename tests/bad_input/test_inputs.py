"""Files of rows, model folders, the user's code, checkpoints, and the options of all commands."""

from __future__ import annotations

import pytest

from tests.bad_input.place import Place
from tests.bad_input.tables import CONFIGURATION, INPUTS, all_cases, by_group
from tests.bad_input.walk import Case, Verdict, bad_answers, run

GROUPS = by_group(INPUTS)


@pytest.mark.parametrize("cases", GROUPS.values(), ids=GROUPS)
def test_is_refused_with_its_name_and_remedy_or_right(cases: list[Case], place: Place) -> None:
    bad = bad_answers(cases, place)
    assert not bad, bad


def test_the_walk_is_long_and_names_each_case_once() -> None:
    names = [case.name for case in all_cases()]
    assert len(names) == len(set(names)) > 3000
    assert sum(map(len, by_group((*CONFIGURATION, *INPUTS)).values())) > 1500


def test_what_is_accepted_raises_hangs_or_leaves_files_is_found(place: Place) -> None:
    """The walk itself: a bad file that is accepted, a good one that is not, a message without a remedy."""

    def verdict(argv: list[str], about: str, right: str | None = None, required: bool = False) -> Verdict:
        return run(Case("x/y/z", lambda place: argv, (about,), right, required), place).verdict

    good = ["config", "show", "run.yaml"]
    assert verdict(good, "x") is Verdict.SILENT
    assert verdict([*good, "loop.steps=x"], "loop.steps") is Verdict.CLEAR
    assert verdict([*good, "loop.steps=x"], "loop.epochs_per_step") is Verdict.UNCLEAR
    assert verdict([*good, "loop.steps=x"], "loop.steps", "good", required=True) is Verdict.WRONG
    assert verdict(["plan", "run.yaml", "--json", "new"], "new", "good") is Verdict.LEFT
    assert verdict(["generate", "tiny", "--prompt", "say"], "tiny") is Verdict.STARTED
