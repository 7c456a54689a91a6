"""What a checkpoint holds of the driver: it comes back as it was, and so does that of a checkpoint written before `RunState` was there."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.algorithms import Critic, PolicyGradient
from rlhf.config.transforms import Normalise
from rlhf.data.ledger import Ledger
from rlhf.loop.state import RunState
from rlhf.policy.kl import KlController
from rlhf.reward.errors import RewardError
from rlhf.reward.shaping import Shaping
from rlhf.training.resume import ONLINE
from rlhf.types import Prompt

STEERED = PolicyGradient(baseline="leave_one_out", kl_placement="reward", kl_coef=0.1, kl_target=2.0, kl_horizon=10)
PROMPTS = [Prompt(f"p{i}", (i,), "") for i in range(7)]
STORED = """{"step": 3, "ledger": {"drawn": 13, "settled": {"trained": 10, "tie": 2, "repeated": 1}},
"run": {"settings": {"run": {"seed": 5}}, "contents": {"data.prompts": "0123456789abcdef"}}, "policy": {"kl_coef": 0.07},
"shaping": [[24, 1.5, 8.0]]}"""
"""`state.json` of an earlier version, but for the files and their checksums, which `Checkpoints` writes and removes."""


def make(transforms: int = 1, objective: PolicyGradient = STEERED) -> RunState:
    shaping = Shaping([Normalise(name="normalise") for _ in range(transforms)])
    return RunState(Ledger(PROMPTS, 5, True), KlController(objective), shaping, run={})


def test_the_state_of_an_earlier_version_is_restored_and_written_again() -> None:
    stored = json.loads(STORED)
    state = make()
    state.restore(stored)
    state.run = stored["run"]
    assert (state.step, state.version, state.kl.coef) == (3, 3, 0.07)
    assert state.ledger.settled["tie"] == 2 and state.ledger.epoch == pytest.approx(13 / 7)
    assert json.loads(json.dumps(state.state())) == stored


def test_each_part_has_the_form_that_is_looked_for_before_anything_starts() -> None:
    written = json.loads(json.dumps(make().state()))
    assert {name: type(written[name]) for name in ONLINE} == ONLINE
    assert written.keys() == ONLINE.keys() | {"step", "run"}


def test_other_transforms_are_refused() -> None:
    with pytest.raises(RewardError, match="remembers 1 `normalise`, but there are 2 now"):
        make(transforms=2).restore(json.loads(STORED))


def walk(state: RunState, steps: int, kl: float) -> list[Any]:
    """What so many steps draw and learn with."""
    seen: list[Any] = []
    for _ in range(steps):
        leased = state.ledger.lease(3)
        seen.append(([prompt.id for prompt in leased], state.kl.coef))
        state.kl.after(state.step + 1, {"policy/kl_response": kl}, 4)
        state.next_version()
        for prompt in leased:
            state.ledger.settle(prompt.id, "trained")
        state.finish_step()
    return seen


@given(before=st.integers(0, 6), after=st.integers(0, 6), kl=st.floats(0, 50))
def test_a_run_that_goes_on_does_what_the_uninterrupted_one_does(before: int, after: int, kl: float) -> None:
    whole, resumed = make(), make()
    walk(whole, before, kl)
    resumed.restore(json.loads(json.dumps(whole.state())))
    assert walk(resumed, after, kl) == walk(whole, after, kl)
    assert resumed.state() == whole.state()
    assert resumed.step == resumed.version == before + after


# The factor on the KL


@pytest.mark.parametrize(("target", "coef"), [(None, 0.1), (0.5, 9.0)])
def test_a_factor_on_the_kl_is_restored_only_where_something_steers_it(target: float | None, coef: float) -> None:
    """Otherwise a run that is resumed with another algorithm.kl_coef would go on with the old one."""
    kl = KlController(PolicyGradient(kl_placement="reward", kl_coef=0.1, kl_target=target))
    kl.restore({})  # a run in which nothing held the policy
    assert kl.state() == {"kl_coef": 0.1}
    kl.restore({"kl_coef": 9.0})
    assert kl.state() == {"kl_coef": coef}


def test_where_nothing_holds_the_policy_there_is_no_factor() -> None:
    kl = KlController(PolicyGradient(kl_placement="none"))
    assert (kl.coef, kl.after(1, {"policy/kl_response": 3.0}, 8), kl.state()) == (0.0, {}, {})
    kl.restore({"kl_coef": 9.0})
    assert kl.coef == 0.0


def test_while_the_critic_warms_up_the_factor_stays() -> None:
    critic = Critic(model=None, learning_rate=1e-5, warmup_steps=2, value_clip=None, lam=1.0)
    kl = KlController(PolicyGradient(kl_placement="reward", kl_coef=0.1, kl_target=1.0, kl_horizon=10, critic=critic))
    for step in (1, 2):
        assert kl.after(step, {"policy/kl_response": 9.0}, 10) == {"policy/kl_coef": 0.1} and kl.coef == 0.1
    assert kl.after(3, {"policy/kl_response": 9.0}, 10) == {"policy/kl_coef": 0.1}
    assert kl.coef == pytest.approx(0.12), "what is recorded is what the step learned with"
