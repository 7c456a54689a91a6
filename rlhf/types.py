"""The nouns that rooms exchange: frozen, typed, and free of torch.

A room hands another room these objects or references to them, never a dict of tensors. Token ids and log-probs are numpy
arrays, so that an object can cross a process border without copying and be read without a deep-learning library.

Walk: `Prompt` -> `Rollout` (K `Completion`s behind a reference) -> `Feedback` -> `TrainingItem`s inside an `Assignment` -> `RankBatch`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np

FinishReason = Literal["stop", "length"]
ModelSlot = Literal["policy", "partner"]
"""Which of an engine's models is meant: the policy, or the second one that mixtures are made with."""

DATASET_VERSION = -1
"""The weight version of a response that no policy wrote."""


class Turn(NamedTuple):
    """One message of a conversation: who speaks (`system`, `user`, `assistant`, or what else a chat template knows), and what.

    Attributes:
        more: the message's other fields (`tool_calls`, ...) as a JSON object, so that a turn can be hashed; empty if there are none.
    """

    role: str
    content: str
    more: str = ""

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> Turn:
        """A message as a turn; fields that are null are left out."""
        more = {name: value for name, value in message.items() if name not in ("role", "content") and value is not None}
        return cls(
            message["role"], message["content"], json.dumps(more, sort_keys=True, ensure_ascii=False) if more else ""
        )

    def message(self) -> dict[str, Any]:
        """As a chat template, and everybody else, wants it."""
        return {"role": self.role, "content": self.content, **(json.loads(self.more) if self.more else {})}


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready for the engine.

    Attributes:
        id: stable across runs: a hash of the content (see `content_id`).
        token_ids: the prompt after the chat template, [n_prompt_tokens].
        text: the last turn's content, before the chat template (for records and reward functions).
        payload: whatever a verifiable reward needs (reference answer, test cases, ...).
        pair: token ids of the data set's chosen and rejected response, each with its end-of-sequence token.
        conversation: all turns that a response answers, system message and earlier turns included. Given none, it is `text` as the
            user's only turn.
    """

    id: str
    token_ids: tuple[int, ...]
    text: str
    payload: Mapping[str, Any] = field(default_factory=dict)
    pair: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    conversation: tuple[Turn, ...] = ()

    def __post_init__(self) -> None:
        if not self.conversation:
            object.__setattr__(self, "conversation", (Turn("user", self.text),))


def content_id(value: Any) -> str:
    """A 16-digit hexadecimal hash of any JSON value; equal content gives an equal id on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Completion:
    """One response, exactly as it was sampled. Its tokens are never decoded and tokenised again.

    Attributes:
        token_ids: int32 [n_tokens], including the end-of-sequence token if, and only if, it was generated.
        logprobs: float32 [n_tokens], log-probability (nats) under the distribution really sampled from (temperature and
            mixture included); NaN for a response of the data set.
        weight_version: the version of the policy's weights that wrote it; `DATASET_VERSION` for the data set's.
        finish_reason: "stop" (end of sequence) or "length" (truncated at the token limit).
        source: which of the algorithm's sources wrote it; "chosen" and "rejected" are the data set's.
        by_policy: sampled from the policy alone, so that the trainer must agree with `logprobs`.
    """

    prompt_id: str
    token_ids: np.ndarray
    logprobs: np.ndarray
    weight_version: int
    finish_reason: FinishReason
    source: str = "policy"
    by_policy: bool = True

    def info(self) -> CompletionInfo:
        """What the driver needs to know of this completion."""
        digest = hashlib.sha256(np.ascontiguousarray(self.token_ids, dtype=np.int32).tobytes()).hexdigest()[:16]
        mean = float(self.logprobs.mean()) if len(self.logprobs) else 0.0
        return CompletionInfo(len(self.token_ids), digest, mean, self.weight_version, self.finish_reason, self.source)


@dataclass(frozen=True)
class CompletionInfo:
    """The facts about a completion that the driver plans with; the tokens stay behind the rollout's reference.

    Attributes:
        n_tokens: response length in tokens.
        digest: equal for completions with equal token ids.
        mean_logprob: mean behaviour log-prob per token (nats); NaN for a response of the data set.
        source: see `Completion`.
    """

    n_tokens: int
    digest: str
    mean_logprob: float
    weight_version: int
    finish_reason: FinishReason
    source: str = "policy"


@dataclass(frozen=True)
class Rollout:
    """The K completions of one prompt, as the driver sees them.

    Attributes:
        infos: one per completion, in order.
        completions: reference to a `list[Completion]` of the same length (see `rlhf.cluster.calls`).
    """

    prompt: Prompt
    infos: tuple[CompletionInfo, ...]
    completions: Any


@dataclass(frozen=True)
class Score:
    """A finite scalar reward."""

    value: float


@dataclass(frozen=True)
class Invalid:
    """The reward source judged that this response has no reward (not a number, unparsable, ...)."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """The reward source itself broke; the response may be fine."""

    reason: str


@dataclass(frozen=True)
class TimedOut:
    """No answer within the deadline, in seconds.

    Attributes:
        who: the judge that was silent, where there are several.
    """

    seconds: float
    who: str = ""


Outcome = Score | Invalid | Failed | TimedOut


@dataclass(frozen=True)
class Feedback:
    """What the reward side says about one rollout. A failure is an outcome of its own, never a reward of zero.

    Attributes:
        outcomes: one per completion, in the rollout's order. From pairwise judges, a completion's score is its mean probability of
            beating the others.
        preferences: float64 [K, K] from pairwise judges: [i, j] is the probability that i beats j, [j, i] is 1 less it, the
            diagonal is 1/2; NaN without a verdict. None from judges that score.
        measures: name -> numbers that the judges observed on the way (disagreement, position bias, ...), for the record: the mean
            over all of a step's numbers, NaN left out, is logged as reward/NAME.
    """

    prompt_id: str
    outcomes: tuple[Outcome, ...]
    preferences: np.ndarray | None = None
    measures: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingItem:
    """What one or several responses teach: a contrast of their scores (algorithms/contrast.py), or one response's reward
    (algorithms/policy_gradient.py).

    Attributes:
        members: indices into the rollout's completions; one for a policy-gradient method.
        coefficients: one per member; (+1, -1) is a chosen/rejected pair.
        target: for a contrast, the probability that it should be positive; for a policy-gradient method, the reward.
        weight: factor on this item's loss; 0 for a response whose reward counts in its group's baseline but which is not learned from.
        term: which term of a `Preference` objective the item belongs to.
    """

    members: tuple[int, ...]
    coefficients: tuple[float, ...]
    target: float = 1.0
    weight: float = 1.0
    term: int = 0


@dataclass(frozen=True)
class Assignment:
    """A rollout with the items to learn from it: the unit that is assigned to a rank (never split)."""

    rollout: Rollout
    items: tuple[TrainingItem, ...]

    def members(self) -> tuple[int, ...]:
        """Completions that some item uses, ascending; the others are not forwarded."""
        return tuple(sorted({m for item in self.items for m in item.members}))

    def learned(self) -> tuple[int, ...]:
        """Completions whose tokens have a loss, ascending: what a mean over responses or tokens divides by."""
        return tuple(sorted({m for item in self.items if item.weight for m in item.members}))

    def response_tokens(self) -> int:
        """Tokens of the used responses."""
        return sum(self.rollout.infos[m].n_tokens for m in self.members())

    def n_tokens(self) -> int:
        """Tokens in the packed forward: the prompt once, and each used response."""
        return len(self.rollout.prompt.token_ids) + self.response_tokens()


@dataclass(frozen=True)
class Counts:
    """What the means of an optimizer step divide by: sums over all ranks, never a rank's own. Those of a step's pieces add up.

    Attributes:
        n_groups: prompts with items.
        n_responses: the responses of theirs that have a loss.
        n_tokens: those responses' tokens.
    """

    n_groups: int = 0
    n_responses: int = 0
    n_tokens: int = 0

    @classmethod
    def of(cls, assignments: Iterable[Assignment]) -> Counts:
        """Of these assignments together."""
        learned = [[assignment.rollout.infos[m] for m in assignment.learned()] for assignment in assignments]
        responses = [info for group in learned for info in group]
        return cls(len(learned), len(responses), sum(info.n_tokens for info in responses))

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.n_groups + other.n_groups, self.n_responses + other.n_responses, self.n_tokens + other.n_tokens
        )


MicroBatch = TypeVar("MicroBatch")


@dataclass(frozen=True)
class RankBatch(Generic[MicroBatch]):
    """One rank's part of one optimizer step, or of a piece of it.

    Attributes:
        micro_batches: what is forwarded together: tuples of assignments on the way to the rank, packed tensors (`Experience`) in it. An
            empty one keeps this rank in step with the others.
        counts: of all ranks' parts of this piece.
        update: which of the loop step's optimizer steps it belongs to, from 0.
    """

    micro_batches: Sequence[MicroBatch]
    counts: Counts
    update: int = 0


@dataclass(frozen=True)
class WeightSpec:
    """One tensor to come, under its Hugging Face name.

    Attributes:
        dtype: torch's name without the prefix, for example "bfloat16".
        shape: of the whole tensor, never of a shard.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
