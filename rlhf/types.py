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
IncidentKind = Literal["died", "froze", "lied"]

DATASET_VERSION = -1
"""The weight version of tokens that no policy wrote: a response of the data set, a tool's or a user's turn inside a dialogue."""


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
class Span:
    """Who wrote a response's tokens `start` to `stop` (exclusive), and whether they are learned from.

    Attributes:
        version: of the policy's weights that wrote them; `DATASET_VERSION` if no policy did.
        by_policy: sampled from the policy alone, so that the trainer with the weights of that version must agree with their log-probs.
            Not so for a mixture's tokens, greedy ones, and those that no policy wrote.
        learned: whether they have a loss. The others are only read: they count in no loss, mean or length.

    Raises:
        ValueError: the span is empty or begins before the response, or no weights have that version.
    """

    start: int
    stop: int
    version: int
    by_policy: bool = True
    learned: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"a span of tokens {self.start} to {self.stop} has no tokens")
        if self.version < DATASET_VERSION:
            raise ValueError(f"a span has the weight version {self.version}; the first one is 0")

    def __len__(self) -> int:
        """Tokens."""
        return self.stop - self.start


@dataclass(frozen=True)
class Completion:
    """One response, exactly as it was sampled. Its tokens are never decoded and tokenised again.

    Attributes:
        token_ids: int32 [n_tokens], including the end-of-sequence token if, and only if, it was generated.
        logprobs: float32 [n_tokens], log-probability (nats) under the distribution really sampled from (temperature and
            mixture included); NaN for tokens that no policy wrote.
        spans: who wrote which tokens: one after the other without a gap, together all of them. An empty response has none.
        finish_reason: "stop" (end of sequence) or "length" (truncated at the token limit).
        source: which of the algorithm's sources wrote it; "chosen" and "rejected" are the data set's.

    Raises:
        ValueError: the spans do not cover the tokens, each exactly once and in order.
    """

    prompt_id: str
    token_ids: np.ndarray
    logprobs: np.ndarray
    spans: tuple[Span, ...]
    finish_reason: FinishReason
    source: str = "policy"

    def __post_init__(self) -> None:
        borders = [0, *(span.stop for span in self.spans)]
        if [span.start for span in self.spans] != borders[:-1] or borders[-1] != len(self.token_ids):
            covered = ", ".join(f"{span.start} to {span.stop}" for span in self.spans)
            raise ValueError(
                f"a response to prompt {self.prompt_id} has {len(self.token_ids)} tokens, and its spans are {covered or 'none'}: "
                "they must cover each token once, in order"
            )

    @classmethod
    def of_one_version(
        cls,
        prompt_id: str,
        token_ids: np.ndarray,
        logprobs: np.ndarray,
        version: int,
        finish_reason: FinishReason,
        *,
        source: str = "policy",
        by_policy: bool = True,
    ) -> Completion:
        """A response that the same weights wrote from its first to its last token, all of it learned from."""
        spans = (Span(0, len(token_ids), version, by_policy),) if len(token_ids) else ()
        return cls(prompt_id, token_ids, logprobs, spans, finish_reason, source)

    def info(self) -> CompletionInfo:
        """What the driver needs to know of this completion."""
        digest = hashlib.sha256(np.ascontiguousarray(self.token_ids, dtype=np.int32).tobytes()).hexdigest()[:16]
        learned = self.logprobs[self.per_token([span.learned for span in self.spans]) == 1]
        mean = float(learned.mean()) if len(learned) else 0.0
        return CompletionInfo(self.spans, digest, mean, self.finish_reason, self.source)

    def per_token(self, values: Sequence[int]) -> np.ndarray:
        """One value for each span -> the same for each token, int64 [n_tokens]."""
        return np.repeat(np.array(values, np.int64), np.array([len(span) for span in self.spans], np.int64))


@dataclass(frozen=True)
class CompletionInfo:
    """The facts about a completion that the driver plans with; the tokens stay behind the rollout's reference.

    Attributes:
        spans, source: see `Completion`.
        digest: equal for completions with equal token ids.
        mean_logprob: mean behaviour log-prob (nats) of the tokens that are learned from, 0 if there are none; NaN for a response of the
            data set.
    """

    spans: tuple[Span, ...]
    digest: str
    mean_logprob: float
    finish_reason: FinishReason
    source: str = "policy"

    @property
    def n_tokens(self) -> int:
        """Response length in tokens."""
        return self.spans[-1].stop if self.spans else 0

    @property
    def n_learned(self) -> int:
        """Tokens that have a loss."""
        return sum(len(span) for span in self.spans if span.learned)

    @property
    def versions(self) -> tuple[int, ...]:
        """Of the policy's weights that wrote some of it, ascending; empty for a response of the data set."""
        return tuple(sorted({span.version for span in self.spans} - {DATASET_VERSION}))

    @property
    def weight_version(self) -> int:
        """The oldest of `versions`, which says how far behind the policy it is; `DATASET_VERSION` if there is none."""
        return min(self.versions, default=DATASET_VERSION)


@dataclass(frozen=True)
class Rollout:
    """The K completions of one prompt, as the driver sees them.

    Attributes:
        infos: one per completion, in order.
        completions: reference to a `list[Completion]` of the same length (see `rlhf.cluster.calls`).
        engine: place of the engine that wrote them.
    """

    prompt: Prompt
    infos: tuple[CompletionInfo, ...]
    completions: Any
    engine: int = 0


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
        """Completions that have a loss, ascending: what a mean over responses divides by."""
        weighed = {m for item in self.items if item.weight for m in item.members}
        return tuple(sorted(m for m in weighed if self.rollout.infos[m].n_learned))

    def learned_tokens(self) -> int:
        """Tokens that have a loss: what a mean over tokens divides by."""
        return sum(self.rollout.infos[m].n_learned for m in self.learned())

    def response_tokens(self) -> int:
        """Tokens of the used responses, learned or only read."""
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
        n_tokens: those responses' learned tokens.
    """

    n_groups: int = 0
    n_responses: int = 0
    n_tokens: int = 0

    @classmethod
    def of(cls, assignments: Iterable[Assignment]) -> Counts:
        """Of these assignments together."""
        counts = cls()
        for assignment in assignments:
            counts += cls(1, len(assignment.learned()), assignment.learned_tokens())
        return counts

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


@dataclass(frozen=True)
class Shipment:
    """One set of weights on its way from the policy to the engines.

    Attributes:
        version: of the policy's weights in an engine that has received it. A shipment for the partner does not change it.
        slot: the model that the weights are for.
        specs: the tensors, in the order in which they are sent.
    """

    version: int
    slot: ModelSlot
    specs: tuple[WeightSpec, ...]


@dataclass(frozen=True)
class Incident:
    """A process died, froze (does not answer) or lied (is not what it should be).

    Attributes:
        who: the actor's name.
        when: seconds since 1970, as the process that noticed it counts them.
        holding: what it had been given and has not answered: prompt ids, of an engine.
        words: what happened, where and why, as a sentence.
    """

    kind: IncidentKind
    who: str
    when: float
    holding: tuple[str, ...]
    words: str
