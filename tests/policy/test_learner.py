"""What learners share: micro-batches that are packed when their turn comes, and how equal two forward passes must be."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.cluster import LocalRuntime, fetch
from rlhf.policy import InvariantBroken, PolicyGroup, StepContext
from rlhf.policy import rank as rank_module
from rlhf.policy.learner import EQUAL_TOLERANCE, Lazily, gap_meters, kl_meters, require_equal
from rlhf.training.packing import Experience, idle, pack
from rlhf.types import DATASET_VERSION, Assignment, Completion, Prompt, Rollout, Span, TrainingItem
from tests.helpers import make_rollout, rank_inside
from tests.policy.test_group import LOOPS, OBJECTIVES, context, declare, make_assignments

CPU = torch.device("cpu")


def test_a_lazy_sequence_makes_what_it_is_asked_for_and_keeps_nothing() -> None:
    asked = []

    def make(number: int) -> Experience:
        asked.append(number)
        return idle(CPU)

    lazy = Lazily(3, make)
    assert len(lazy) == 3
    assert asked == []
    kept = [weakref.ref(one) for one in lazy]
    gc.collect()
    assert asked == [0, 1, 2]
    assert [one() for one in kept] == [None] * 3
    lazy[-1], lazy[1:]
    assert asked[3:] == [2, 1, 2]
    with pytest.raises(IndexError):
        lazy[3]


@pytest.mark.engine
@pytest.mark.parametrize("method", ["preference", "ppo"])
def test_a_rank_holds_one_micro_batch_and_learns_as_if_it_held_all(
    tiny_settings: Callable, run: Callable, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Seven micro-batches, visited several times by PPO: never more than the one in use and the one that follows; bit for bit the same."""
    objective = OBJECTIVES[method]
    policy = {"learning_rate": 1e-3, "micro_batch_tokens": 1}
    settings = tiny_settings(policy=policy, loop=LOOPS[method], run={"invariants": False})
    alive: list[weakref.ref] = []
    most, fetched = [], []

    def counting_pack(*args: Any) -> Experience:
        made = pack(*args)
        alive.append(weakref.ref(made))
        most.append(sum(one() is not None for one in alive))
        return made

    def counting_fetch(references: Sequence[Any]) -> list[Any]:
        fetched.append(len(references))
        return fetch(references)

    async def learn() -> list[torch.Tensor]:
        group = await PolicyGroup.start(LocalRuntime(), settings, declare(objective), 4)
        rank = rank_inside(group)
        await group.learn(make_assignments(objective, False), context(objective, 1, equal=True))
        weights = [p.detach().clone() for p in rank.policy.engine.module.parameters()]
        await group.close()
        return weights

    monkeypatch.setattr(rank_module, "pack", counting_pack)
    monkeypatch.setattr(rank_module, "fetch", counting_fetch)
    torch.backends.cuda.enable_cudnn_sdp(True)
    lazily = run(learn())
    assert not torch.backends.cuda.cudnn_sdp_enabled(), "it plans for every exact shape"
    assert fetched == [7]
    assert max(most) == 2
    most.clear()
    monkeypatch.setattr(rank_module, "Lazily", lambda count, make: tuple(make(place) for place in range(count)))
    at_once = run(learn())
    assert max(most) >= 7, "the count sees what is held"
    assert all(torch.equal(one, other) for one, other in zip(lazily, at_once, strict=True))


def two_responses() -> Experience:
    rollout = make_rollout([[7, 8, 9], [10, 11]], (1, 2))
    made = Assignment(rollout, tuple(TrainingItem((i,), (1.0,)) for i in range(2)))
    return pack([made], [rollout.completions.value], CPU)


@pytest.mark.parametrize("dtype", EQUAL_TOLERANCE)
def test_equal_means_to_the_rounding_of_the_type(dtype: str) -> None:
    experience, reference = two_responses(), torch.full((5,), -2.0)
    mean, most = EQUAL_TOLERANCE[dtype]
    require_equal(experience, reference + 0.9 * mean, reference, dtype)
    for gap in (torch.full((5,), 1.1 * mean), torch.tensor([0, 0, 0, 1.1 * most, 0]), torch.full((5,), torch.nan)):
        with pytest.raises(InvariantBroken, match="before the first update"):
            require_equal(experience, reference + gap, reference, dtype)
    assert EQUAL_TOLERANCE["fp32"][1] < EQUAL_TOLERANCE["bf16"][0] / 100


def test_the_error_names_the_tokens_that_differ_most() -> None:
    gap = torch.tensor([0.0, 0.0, 0.1, 0.0, 4.0])
    with pytest.raises(InvariantBroken) as error:
        require_equal(two_responses(), gap - 2, torch.full((5,), -2.0), "bf16")
    assert "by 0.82 nats on average and 4 at the most (in bf16, 0.15 and 2 are allowed)" in str(error.value)
    assert "Most of all at response 1, token 1 (id 11): 2.0000 and -2.0000; response 0, token 2 (id 9)" in str(
        error.value
    )


def of_spans(*spans: Span) -> Experience:
    """One response whose tokens were recorded with log-probs of -1, -2, ..."""
    n = spans[-1].stop
    answer = Completion("p", np.arange(n, dtype=np.int32), -np.arange(1, n + 1, dtype=np.float32), spans, "stop")
    rollout = Rollout(Prompt("p", (1, 2), ""), (answer.info(),), None)
    return pack([Assignment(rollout, (TrainingItem((0,), (1.0,)),))], [[answer]], CPU)


def test_the_gap_is_that_of_tokens_of_the_steps_own_version() -> None:
    """Of five learned tokens two are by older weights and one is a mixture's; what a tool wrote is in the row and in no mean."""
    experience = of_spans(
        Span(0, 2, 6), Span(2, 4, DATASET_VERSION, False, learned=False), Span(4, 6, 7), Span(6, 7, 7, by_policy=False)
    )
    trainer = torch.tensor([-11.0, -12.0, -5.25, -6.75, -100.0])
    assert gap_meters(experience, trainer, StepContext(8, equal=False).version) == {"policy/logprob_gap": (1.0, 2.0)}
    older = gap_meters(experience, trainer, 6)
    assert older == {"policy/logprob_gap": (20.0, 2.0)}
    assert gap_meters(experience, trainer, 9) == {"policy/logprob_gap": (0.0, 0.0)}


def test_the_kl_is_that_of_tokens_that_the_policy_wrote_alone() -> None:
    experience = of_spans(Span(0, 1, 6), Span(1, 2, 6, learned=False), Span(2, 3, 7), Span(3, 4, 7, by_policy=False))
    meters = kl_meters(experience, torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.25, -9.0]))
    assert meters["policy/kl"] == (0.75, 2.0)
    assert meters["policy/kl_response"] == (0.75, 1.0)


def test_the_error_counts_a_token_where_it_stands_in_its_response() -> None:
    experience = of_spans(Span(0, 3, DATASET_VERSION, False, learned=False), Span(3, 5, 0))
    with pytest.raises(InvariantBroken, match=r"response 0, token 4 \(id 4\): 3.0000 and -2.0000"):
        require_equal(experience, torch.tensor([-2.0, 3.0]), torch.tensor([-2.0, -2.0]), "fp32")
