"""Each kind of judge stands in each table that is about kinds."""

from __future__ import annotations

from typing import get_args

from rlhf.config.reward import KINDS, Kind, SourceSettings
from rlhf.config.reward_checks import RULES
from rlhf.reward.judges.make import JUDGES


def test_every_kind_is_known_and_can_be_made() -> None:
    assert KINDS.keys() == JUDGES.keys() == set(get_args(Kind))
    assert {kind.by for kind in KINDS.values()} == RULES.keys() | {"members"}


def test_a_kind_reads_fields_that_there_are() -> None:
    fields = SourceSettings.model_fields.keys() | {"members"}
    assert all(set(kind.reads) <= fields for kind in KINDS.values())
    assert {name for kind in KINDS.values() for name in kind.reads} == fields - {"kind"}
