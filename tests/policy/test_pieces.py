"""Learners that are fed piece by piece: any split of a loop step, in any order, idle micro-batches included, learns what the whole does.

The learners are the package's own; the trainers are tables of logits under gradient descent, in fp64, so that rounding can be told from
a wrong divisor. What DeepSpeed adds is in tests/training/test_divided.py and tests/policy/test_group.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from rlhf.algorithms import Contrast, Critic, PolicyGradient, Preference
from rlhf.algorithms.algorithm import Objective
from rlhf.cluster import LocalRef
from rlhf.config import Settings
from rlhf.policy import gradient_learner, preference_learner
from rlhf.policy.gradient_learner import GradientLearner
from rlhf.policy.learner import InvariantBroken, Learner, StepContext, require_equal
from rlhf.policy.meters import means
from rlhf.policy.preference_learner import PreferenceLearner
from rlhf.training.balance import plan_updates
from rlhf.training.packing import Experience, idle, pack
from rlhf.types import Assignment, Completion, Counts, Prompt, RankBatch, Rollout, Span, TrainingItem

CPU = torch.device("cpu")
VOCABULARY = 12

CRITIC = Critic(model=None, learning_rate=1.0, warmup_steps=0, value_clip=0.2, lam=0.9)
CONTRASTS = {
    "logistic": Contrast("logistic", scale=0.7),
    "robust": Contrast("robust", scale=0.7, flip_rate=0.1, length_coef=0.01),
    "square": Contrast("square", scale=0.7, reduce="mean"),
    "hinge": Contrast("hinge", scale=0.7, margin=0.8, anchored=False),
    "linear": Contrast("linear", scale=0.7, offset=0.1),
}
PREFERENCES: dict[str, Objective] = {
    name: Preference((contrast, Contrast("linear", scale=0.3, anchored=False))) for name, contrast in CONTRASTS.items()
}
GRADIENTS: dict[str, Objective] = {
    "token_mean": PolicyGradient(baseline="mean", entropy_coef=0.05),
    "seq_mean_token_mean": PolicyGradient(
        baseline="mean_std", aggregation="seq_mean_token_mean", kl_placement="loss", kl_estimator="k3", kl_coef=0.1,
        ratio="sequence", correction="sequence_mask", correction_low=0.01, correction_high=0.9,
    ),
    "seq_mean_token_sum": PolicyGradient(
        baseline="leave_one_out", aggregation="seq_mean_token_sum", kl_placement="reward", kl_coef=0.1,
        kl_before_baseline=True,
    ),
    "seq_mean_token_sum_norm": PolicyGradient(
        baseline="mean", aggregation="seq_mean_token_sum_norm", max_tokens=9, surrogate="cispo", correction="icepop",
        correction_low=0.05, correction_high=0.9,
    ),
    "whitened": PolicyGradient(whiten=True, kl_placement="reward", kl_coef=0.1, dual_clip=3.0),
    "whitened, KL in the loss": PolicyGradient(whiten=True, kl_placement="loss", kl_estimator="k2", kl_coef=0.1),
    "critic": PolicyGradient(critic=CRITIC, gamma=0.98, kl_placement="reward", kl_coef=0.1, correction="tis"),
    "critic, whitened, sequence mean": PolicyGradient(
        critic=CRITIC, whiten=True, aggregation="seq_mean_token_mean", kl_placement="loss", kl_estimator="k2", kl_coef=0.1,
    ),
    "critic that warms up": PolicyGradient(critic=replace(CRITIC, warmup_steps=9), kl_placement="reward", kl_coef=0.1),
}  # fmt: skip
OBJECTIVES = PREFERENCES | GRADIENTS
AT_ONCE = set(PREFERENCES) | {"token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"}
"""Methods that learn from a piece when it comes, if a loop step is one optimizer step."""


class TableTrainer:
    """What a learner asks of a `Trainer`: a parameter, what a forward makes of it, clipped gradient descent."""

    device = CPU

    def __init__(self, table: torch.Tensor, read: Callable[[torch.Tensor, Experience], Any]):
        self.table, self._read = table.clone().requires_grad_(True), read
        self.backwards = self.steps = 0

    def forward(self, experience: Experience) -> Any:
        return self._read(self.table, experience)

    def backward(self, loss: torch.Tensor) -> None:
        self.backwards += 1
        loss.backward()

    def discard(self) -> None:
        self.table.grad = None

    def step(self, normaliser: float) -> tuple[float, float]:
        self.steps += 1
        gradient = self.table.grad / normaliser
        norm = float(gradient.norm())
        with torch.no_grad():
            self.table -= 0.3 * gradient * min(1.0, 1.0 / norm if norm else 1.0)
        self.table.grad = None
        return norm, 0.3


def logprobs(table: torch.Tensor, experience: Experience) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each target after the token before it, and the entropies there."""
    rows = table.log_softmax(1)[experience.input_ids[0, experience.source]]
    return rows.gather(1, experience.targets[:, None])[:, 0], -(rows.exp() * rows).sum(1)


def twice(table: torch.Tensor, experience: Experience) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs, and those at the sampling temperature, which is 1."""
    mine, _ = logprobs(table, experience)
    return mine, mine


def values(table: torch.Tensor, experience: Experience) -> torch.Tensor:
    return table[experience.input_ids[0, experience.source]]


class Alone(GradientLearner):
    """On one rank without a process group."""

    def _total(self, sums: torch.Tensor) -> torch.Tensor:
        return sums


def random_table(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_learner(
    objective: Objective, updates: int, epochs: int, *, apart: float = 0.3, invariants: bool = False
) -> Any:
    """Args:
    apart: how far the anchor is from the policy.
    """
    settings = Settings(
        data={"prompts": "none"}, policy={"model": "none", "dtype": "fp32"}, reward={"path": "none:none"},
        loop={"updates_per_step": updates, "epochs_per_step": epochs}, run={"invariants": invariants},
    )  # fmt: skip
    read = twice if isinstance(objective, Preference) else logprobs
    policy = TableTrainer(random_table(0, VOCABULARY, VOCABULARY), read)
    anchor = policy.table.detach() + apart * random_table(1, VOCABULARY, VOCABULARY)
    if isinstance(objective, Preference):
        return PreferenceLearner(settings, objective, policy, lambda experience: twice(anchor, experience))
    critic = None if objective.critic is None else TableTrainer(random_table(2, VOCABULARY), values)
    return Alone(settings, objective, policy, lambda experience: logprobs(anchor, experience)[0], critic)


def written(group: int, tokens: list[int], versions: Sequence[int]) -> Completion:
    """A response that the policy wrote half with each of these versions, as it is if new weights come while it is being written."""
    n, half = len(tokens), len(tokens) // 2
    borders = [(0, half, versions[0]), (half, n, versions[-1])] if half else [(0, n, versions[-1])]
    spans = tuple(Span(*one) for one in borders)
    return Completion(str(group), np.array(tokens, np.int32), np.full(n, -2.5, np.float32), spans, "stop")


def make_assignments(objective: Objective, count: int, versions: Sequence[int] = (0, 1)) -> list[Assignment]:
    """Prompts with three ragged responses, of which some are not learned from."""
    rng, made = random.Random(count), []
    for group in range(count):
        tokens = [[rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 6))] for _ in range(3)]
        completions = [written(group, t, versions) for t in tokens]
        prompt = Prompt(str(group), tuple(rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 4))), "")
        rollout = Rollout(prompt, tuple(c.info() for c in completions), LocalRef(completions))
        if isinstance(objective, PolicyGradient):
            items = tuple(
                TrainingItem((i,), (1.0,), target=rng.gauss(0, 1), weight=float(i != group % 4)) for i in range(3)
            )
        else:
            pair = TrainingItem((2, 0), (1.0, -1.0), target=rng.random(), weight=rng.choice([0.5, 1.0]))
            items = (pair, TrainingItem((1,), (1.0,), term=1)) if rng.random() < 0.5 else (pair,)
        made.append(Assignment(rollout, items))
    return made


def packed(micro_batch: Sequence[Assignment]) -> Experience:
    if not micro_batch:
        made = idle(CPU)
    else:
        made = pack(micro_batch, [one.rollout.completions.value for one in micro_batch], CPU)
    wide = {name: getattr(made, name).double() for name in ("behaviour", "coefficients", "target", "weight")}
    return replace(made, **wide)


def piece(micro_batches: Sequence[Sequence[Assignment]], update: int) -> RankBatch[Experience]:
    counts = Counts.of(one for micro_batch in micro_batches for one in micro_batch)
    return RankBatch([packed(micro_batch) for micro_batch in micro_batches], counts, update)


@dataclass
class Learned:
    metrics: dict[str, float]
    tables: list[torch.Tensor]


def learn(learner: Learner, pieces: Sequence[RankBatch[Experience]]) -> Learned:
    """Two loop steps of the same pieces, so that the second starts with what the first has left."""
    for step in (1, 2):
        learner.begin(StepContext(step, equal=False, kl_coef=0.1))
        for one in pieces:
            learner.accumulate(one)
        metrics = means(learner.finish())
    return Learned(metrics, [trainer.table.detach() for trainer in learner.trainers.values()])  # type: ignore[attr-defined]


def planned(assignments: Sequence[Assignment], updates: int) -> list[list[Assignment]]:
    """The assignments of each optimizer step."""
    plan = plan_updates([one.n_tokens() for one in assignments], updates, 1, 10**6)
    return [[assignments[i] for micro_batch in share for i in micro_batch] for (share,) in plan]


@pytest.mark.parametrize("name", OBJECTIVES)
@examples(max_examples=12)
@given(data=st.data())
def test_any_pieces_in_any_order_are_the_whole(name: str, data: Any) -> None:
    objective = OBJECTIVES[name]
    updates, epochs = data.draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (3, 2)]))
    assignments = make_assignments(objective, data.draw(st.integers(1, 7)))
    plan = planned(assignments, updates)
    whole = learn(make_learner(objective, updates, epochs), [piece([part], i) for i, part in enumerate(plan)])

    pieces = []
    for update, part in enumerate(plan):
        part, micro_batches = data.draw(st.permutations(part)), []
        while part:
            size = data.draw(st.integers(1, len(part)))
            micro_batches.append(part[:size])
            part = part[size:]
            micro_batches += [()] * data.draw(st.integers(0, 1))
        while micro_batches:
            size = data.draw(st.integers(1, len(micro_batches)))
            pieces.append(piece(micro_batches[:size], update))
            micro_batches = micro_batches[size:]
    split = learn(make_learner(objective, updates, epochs), data.draw(st.permutations(pieces)))

    assert split.metrics.keys() == whole.metrics.keys()
    for metric, value in whole.metrics.items():
        assert split.metrics[metric] == pytest.approx(value, rel=1e-6, abs=1e-8), metric
    for one, other in zip(split.tables, whole.tables, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_piece_is_learned_from_when_it_comes_if_it_can_be(name: str) -> None:
    """And no optimizer step is made before the last piece is there."""
    objective = OBJECTIVES[name]
    assignments = make_assignments(objective, 4)
    for updates, at_once in ((1, name in AT_ONCE), (2, name in PREFERENCES)):
        learner = make_learner(objective, updates, 1)
        learner.begin(StepContext(10, equal=False, kl_coef=0.1))
        for number, one in enumerate(assignments):
            learner.accumulate(piece([[one]], 0))
            assert learner.policy.backwards == (number + 1 if at_once else 0)
        learner.accumulate(piece([assignments], 1))
        assert [trainer.steps for trainer in learner.trainers.values()] == [0] * len(learner.trainers)
        learner.finish()
        assert [trainer.steps for trainer in learner.trainers.values()] == [2] * len(learner.trainers)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_reported_is_that_of_the_whole(name: str) -> None:
    """The mean over groups, responses or tokens of the step, whatever the pieces' own would be."""
    objective = OBJECTIVES[name]
    assignments = make_assignments(objective, 5)
    whole, split = (
        learn(make_learner(objective, 1, 1), pieces).metrics.get("policy/loss")
        for pieces in ([piece([assignments], 0)], [piece([[one]], 0) for one in assignments])
    )
    assert (whole is None) == (name == "critic that warms up")
    assert split == pytest.approx(whole)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_that_was_given_up_leaves_nothing_behind(name: str) -> None:
    """A piece of it was taken in, and more than one optimizer step's; the next step is what it would have been."""
    objective = OBJECTIVES[name]
    assignments = make_assignments(objective, 4)
    for updates in (1, 2):
        plan = [piece([part], i) for i, part in enumerate(planned(assignments, updates))]
        whole, again = make_learner(objective, updates, 1), make_learner(objective, updates, 1)
        again.begin(StepContext(1, equal=False, kl_coef=0.1))
        again.accumulate(piece([make_assignments(objective, 3)], 0))
        again.accumulate(piece([make_assignments(objective, 2)], updates - 1))
        one, other = learn(whole, plan), learn(again, plan)
        assert one.metrics == other.metrics
        assert all(torch.equal(*tables) for tables in zip(one.tables, other.tables, strict=True))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_of_tokens_that_older_weights_wrote_no_gap_is_reported(name: str) -> None:
    """It is absent, not NaN; of a response of two versions it is that of the tokens of the step's own."""
    objective = OBJECTIVES[name]

    def metrics(versions: Sequence[int]) -> dict[str, float]:
        learner = make_learner(objective, 1, 1)
        learner.begin(StepContext(5, equal=False, kl_coef=0.1))
        learner.accumulate(piece([make_assignments(objective, 3, versions)], 0))
        return means(learner.finish())

    older, mixed, present = metrics([2, 3]), metrics([2, 4]), metrics([4, 4])
    assert not np.isnan(list(older.values())).any()
    assert older.keys() == present.keys() - {"policy/logprob_gap"}
    same = present.keys() - {"policy/logprob_gap"}
    assert {k: older[k] for k in same} == {k: mixed[k] for k in same} == {k: present[k] for k in same}, (
        "nothing else looks"
    )

    learner = make_learner(objective, 1, 1)
    experience = packed(make_assignments(objective, 3, [2, 4]))
    now = logprobs(learner.policy.table.detach(), experience)[0]
    late = experience.version == 4
    assert 0 < late.sum() < len(late)
    assert mixed["policy/logprob_gap"] == pytest.approx(float((now + 2.5)[late].abs().mean()))


def test_the_importance_weights_are_those_of_each_tokens_own_writer() -> None:
    """REINFORCE of what two versions wrote, each with its own log-probs: the gradient is sum_t w_t A grad log pi, without any clamp."""
    objective = PolicyGradient(
        correction="tis", correction_low=0.0, correction_high=1e9, aggregation="seq_mean_token_sum"
    )
    assignments = make_assignments(objective, 2)
    recorded = torch.linspace(-4, -0.5, 200, dtype=torch.float64)
    experience = packed(assignments)
    experience = replace(experience, behaviour=recorded[: len(experience.targets)])
    learner = make_learner(objective, 1, 1)
    learner.begin(StepContext(2, equal=False))
    learner.accumulate(RankBatch([experience], Counts.of(assignments)))

    table = learner.policy.table.detach().clone().requires_grad_(True)
    now = logprobs(table, experience)[0]
    weight = (experience.coefficients.T @ (experience.target * experience.weight))[experience.response]
    ratio = torch.exp(now.detach() - experience.behaviour)
    (expected,) = torch.autograd.grad(-(ratio * weight * now).sum(), table)
    assert torch.allclose(learner.policy.table.grad, expected, atol=1e-12)
    metrics = means(learner.finish())
    assert metrics["policy/mismatch_ratio"] == pytest.approx(float(ratio.mean()))


def test_a_sequence_mask_goes_by_the_whole_response_whatever_the_versions() -> None:
    """Half of it became likelier and half as much less likely: its mean ratio is 1. Each half alone would be left out."""
    objective = PolicyGradient(correction="sequence_mask", correction_low=0.95, correction_high=1.05)
    learner = make_learner(objective, 1, 1)
    completion = written(0, [1, 2, 3, 4], [0, 1])

    def altered(drift: Sequence[float]) -> float:
        item = TrainingItem((0,), (1.0,))
        rollout = Rollout(Prompt("0", (5, 6), ""), (completion.info(),), LocalRef([completion]))
        made = packed([Assignment(rollout, (item,))])
        now = logprobs(learner.policy.table.detach(), made)[0]
        made = replace(made, behaviour=now - torch.tensor(drift, dtype=torch.float64))
        learner.begin(StepContext(2, equal=False))
        learner.accumulate(RankBatch([made], Counts(1, 1, 4)))
        return means(learner.finish())["policy/mismatch_corrected"]

    assert altered([0.3, 0.3, -0.3, -0.3]) == 0
    assert altered([0.3, 0.3, 0.0, 0.0]) == altered([0.0, 0.0, -0.3, -0.3]) == 1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_equality_is_checked_before_anything_is_learned_from(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A contrast checks the first micro-batch of a step's pieces, and none after it; a policy gradient, which has the log-probs anyway,
    each of them."""
    objective, checked = OBJECTIVES[name], []

    def counting(*args: Any) -> None:
        checked.append(learner.policy.backwards)
        require_equal(*args)

    for module in (gradient_learner, preference_learner):
        monkeypatch.setattr(module, "require_equal", counting)
    learner = make_learner(objective, 1, 1, apart=0.0, invariants=True)
    assignments = make_assignments(objective, 4)
    learner.begin(StepContext(1, equal=True, kl_coef=0.1))
    for part in (assignments[:1], assignments[1:3], assignments[3:]):
        learner.accumulate(piece([[one] for one in part], 0))
    learner.finish()
    assert checked == [0] if isinstance(objective, Preference) else len(checked) == 4

    learner = make_learner(objective, 1, 1, apart=0.3, invariants=True)
    learner.begin(StepContext(1, equal=True, kl_coef=0.1))
    with pytest.raises(InvariantBroken):
        learner.accumulate(piece([assignments], 0))
        learner.finish()
    assert learner.policy.backwards == 0
