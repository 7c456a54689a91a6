"""What the learners of one rank share: how they are fed piece by piece, and what they report whatever the method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Generic, Protocol, TypeVar, overload

import torch

from rlhf.policy.meters import Meters
from rlhf.training.deepspeed import Trainer
from rlhf.training.packing import Experience
from rlhf.types import Counts, RankBatch

EQUAL_TOLERANCE = {"bf16": (0.15, 2.0), "fp32": (1e-4, 1e-3)}
"""Nats, on the mean and at the most, that rounding alone may put between two forward passes of the same weights.

Where another kernel sums in another order, every layer rounds otherwise, and so does each logit: in bf16 by 0.06 at a logit of 16 to 32.
Measured on SmolLM2-135M with all of its linear layers in another kernel: bf16 0.05 and 0.27, fp32 below 1e-5. One tensor that was
not loaded, or dropout of 0.01, costs 0.45 and 3.5.
"""
WORST = 5
"""How many tokens an error names."""


class InvariantBroken(RuntimeError):
    """Something that must always hold does not; the run would give wrong results."""


@dataclass(frozen=True)
class StepContext:
    """What a learner must know of the loop step it is in.

    Attributes:
        step: loop step, from 1.
        equal: the policy still equals the reference (checked under `run.invariants`).
        kl_coef: the present factor on the KL, for policy-gradient methods.
    """

    step: int
    equal: bool
    kl_coef: float = 0.0

    @property
    def version(self) -> int:
        """Of the weights that the step starts from: the model's own files are version 0, and step k makes version k."""
        return self.step - 1


class Lazily(Sequence[Experience]):
    """Micro-batches that are packed each time they are asked for and kept by nobody, so that a rank holds the tensors of the one it is
    learning from, not of a whole step.

    Args:
        count: how many there are.
        pack: makes the one with this number; always the same.
    """

    def __init__(self, count: int, pack: Callable[[int], Experience]):
        self._count, self._pack = count, pack

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> Experience: ...
    @overload
    def __getitem__(self, place: slice) -> list[Experience]: ...
    def __getitem__(self, place: int | slice) -> Experience | list[Experience]:
        chosen = range(self._count)[place]
        return self._pack(chosen) if isinstance(chosen, int) else [self._pack(one) for one in chosen]


class Learner(Protocol):
    """Makes the optimizer steps of a loop step, as often as `loop.epochs_per_step`, from pieces that come in any split and order.

    Losses accumulate as sums; what they are divided by is known at `finish` alone. All ranks are given the same pieces with the same
    number of micro-batches, so that their collective calls match.

    Attributes:
        trainers: by name, the models that learn.
    """

    trainers: dict[str, Trainer]

    def begin(self, step: StepContext) -> None:
        """Start a loop step. Of one before that was given up nothing is left: no piece, no target, no gradient."""
        ...

    def accumulate(self, batch: RankBatch[Experience]) -> None:
        """Take in a piece. Its micro-batches may be packed anew at `finish`. Raises as `PolicyRank.learn`."""
        ...

    def finish(self) -> Meters:
        """Make the optimizer steps, of which all pieces are there. Raises as `PolicyRank.learn`."""
        ...


Targets = TypeVar("Targets")


class PendingUpdate(Generic[Targets]):
    """One optimizer step while its pieces arrive. Iterating gives each micro-batch, packed as its turn comes, with its targets.

    Attributes:
        counts: of the pieces so far.
        targets: what is known of each micro-batch before it is learned from.
        visits: what the micro-batches have reported that were learned from as they arrived.
    """

    def __init__(self) -> None:
        self.counts = Counts()
        self.targets: list[Targets] = []
        self.visits: list[Meters] = []
        self._pieces: list[Sequence[Experience]] = []

    def add(self, batch: RankBatch[Experience]) -> Sequence[Experience]:
        """Take in a piece; the caller appends the targets of its micro-batches, which are returned."""
        self.counts += batch.counts
        self._pieces.append(batch.micro_batches)
        return batch.micro_batches

    def __iter__(self) -> Iterator[tuple[Experience, Targets]]:
        return zip(chain.from_iterable(self._pieces), self.targets, strict=True)


def require_equal(experience: Experience, logprobs: torch.Tensor, reference: torch.Tensor, dtype: str) -> None:
    """Raises InvariantBroken unless policy and reference give the same log-probs, to the rounding of `dtype` (see `EQUAL_TOLERANCE`)."""
    gap = (logprobs.detach() - reference).abs()
    mean, most = gap.mean().item(), gap.max().item()
    allowed_mean, allowed_most = EQUAL_TOLERANCE[dtype]
    if mean <= allowed_mean and most <= allowed_most:  # false of NaN
        return
    raise InvariantBroken(
        f"before the first update the policy's log-probs differ from the reference's by {mean:.3g} nats on average and {most:.3g} at the "
        f"most (in {dtype}, {allowed_mean:g} and {allowed_most:g} are allowed); they are the same weights. Most of all at "
        f"{_worst(experience, logprobs, reference, gap)}. The model's forward pass is not deterministic (dropout?) or its weights were "
        "not loaded as saved."
    )


def _worst(experience: Experience, logprobs: torch.Tensor, reference: torch.Tensor, gap: torch.Tensor) -> str:
    """The tokens of the micro-batch that differ most: which they are, and both log-probs."""
    found = []
    for place in gap.nan_to_num(nan=torch.inf).topk(min(WORST, len(gap))).indices.tolist():
        response = int(experience.response[place])
        prompt = experience.segments[int(experience.group[response])].prompt
        token = int(experience.position_ids[0, experience.source[place]]) + 1 - prompt
        found.append(
            f"response {response}, token {token} (id {int(experience.targets[place])}): {logprobs[place].item():.4f} and "
            f"{reference[place].item():.4f}"
        )
    return "; ".join(found)


@torch.no_grad()
def kl_meters(experience: Experience, logprobs: torch.Tensor, reference: torch.Tensor) -> Meters:
    """KL(pi_T || ref_T) of the distribution that was sampled from (nats), on the tokens that the policy itself wrote: elsewhere these are
    no estimates of it. Tokens that older weights wrote count; they are estimates of it as far as the policy has not moved since, which
    policy/mismatch_ratio shows.

    Names: policy/kl (mean of log pi - log ref per token), policy/kl_k3 (the same by an estimator that is never negative) and
    policy/kl_response (sum over a response's tokens).

    Args:
        logprobs: of the policy as the step starts, at the sampling temperature T, [N].
        reference: of the reference, at T, [N].
    """
    mine = experience.by_policy
    ratio = (logprobs - reference)[mine]
    tokens, responses = float(len(ratio)), float(len(experience.response[mine].unique()))
    return {
        "policy/kl": (ratio.sum().item(), tokens),
        "policy/kl_k3": ((torch.exp(-ratio) - 1 + ratio).sum().item(), tokens),
        "policy/kl_response": (ratio.sum().item(), responses),
    }


@torch.no_grad()
def gap_meters(experience: Experience, tempered: torch.Tensor, version: int) -> Meters:
    """policy/logprob_gap: mean absolute difference between the engines' and the trainer's log-probs of the tokens that both computed with
    the same weights, in nats: those that the policy itself wrote (not a mixture or the data set) with the weights of this version.

    Args:
        tempered: of the weights of `version`, at the sampling temperature, [N].
        version: of the weights that the step starts from. Older tokens differ because the policy has moved, which is no fault: they
            count in policy/mismatch_ratio alone.
    """
    gap = (tempered - experience.behaviour).abs()[experience.written_by(version)]
    return {"policy/logprob_gap": (gap.sum().item(), float(len(gap)))}
