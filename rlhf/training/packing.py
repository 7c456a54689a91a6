"""From assignments to the tensors of one micro-batch: one row without padding, each prompt once for all its responses.

Layout of a group: prompt tokens, then each used response without its last token (nothing is predicted from it). Positions of every
response continue the prompt's. The log-prob of a response's first token comes from the prompt's last position.

Only learned tokens are predicted (`Span.learned`). The others are in the row, for what follows to see, and nowhere else: no loss, mean
or length that is computed from these tensors can count them, and no method needs to know of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlhf.training.segments import Segment, Segments
from rlhf.types import Assignment, Completion


@dataclass(frozen=True)
class Row:
    """What the model forwards at once: T tokens without padding, of which N are predicted.

    Attributes:
        input_ids, position_ids: int64 [1, T].
        segments: the groups in the row, which do not see each other.
        source: int64 [N], row position whose hidden state predicts each target.
        targets: int64 [N], the predicted tokens.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: Segments
    source: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class Experience(Row):
    """What one rank forwards and learns from at once: a row whose targets are N learned tokens; R responses, I items.

    Attributes:
        response: int64 [N], response index of each token, 0..R-1, ascending. A response without a learned token has no entry.
        group: int64 [R], index of the prompt each response belongs to.
        behaviour: fp32 [N], log-probs recorded when the tokens were sampled (nats); NaN for a data set's tokens.
        by_policy: bool [N], whether the policy alone sampled the token, so that its log-prob can be compared.
        version: int64 [N], version of the policy's weights that wrote the token (`Span.version`).
        coefficients: fp32 [I, R]; target, weight: fp32 [I]; term: int64 [I] (see `TrainingItem`).
    """

    response: torch.Tensor
    group: torch.Tensor
    behaviour: torch.Tensor
    by_policy: torch.Tensor
    version: torch.Tensor
    coefficients: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor
    term: torch.Tensor

    @property
    def n_responses(self) -> int:
        """R."""
        return len(self.group)

    def written_by(self, version: int) -> torch.Tensor:
        """Whether the policy alone, with the weights of this version, wrote the token, bool [N]."""
        return self.by_policy & (self.version == version)


def pack(
    assignments: Sequence[Assignment], completions: Sequence[Sequence[Completion]], device: torch.device
) -> Experience:
    """Pack assignments with their completions (one list per assignment) into one row."""
    ids, positions, tokens, group = [], [], [], []
    segments, members, start, n_responses = [], [], 0, 0
    for number, (assignment, answers) in enumerate(zip(assignments, completions, strict=True)):
        prompt = np.asarray(assignment.rollout.prompt.token_ids, dtype=np.int64)
        used = assignment.members()
        bodies = []
        at = start + len(prompt)
        ids.append(prompt)
        positions.append(np.arange(len(prompt)))
        for member in used:
            answer = answers[member].token_ids.astype(np.int64)
            body = max(len(answer) - 1, 0)
            ids.append(answer[:body])
            positions.append(np.arange(len(prompt), len(prompt) + body))
            before = np.concatenate(([start + len(prompt) - 1], np.arange(at, at + body)))
            tokens.append(_learned_tokens(answers[member], before[: len(answer)], n_responses))
            group.append(number)
            bodies.append(body)
            at += body
            n_responses += 1
        members.append({member: n_responses - len(used) + place for place, member in enumerate(used)})
        segments.append(Segment(start, len(prompt), tuple(bodies)))
        start = at
    items = [(item, places) for a, places in zip(assignments, members, strict=True) for item in a.items]
    coefficients = torch.zeros(len(items), n_responses)
    for row, (item, places) in enumerate(items):
        for member, coefficient in zip(item.members, item.coefficients, strict=True):
            coefficients[row, places[member]] += coefficient

    def tensor(parts: Sequence[np.ndarray], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(device=device, dtype=dtype)

    source, targets, response, behaviour, by_policy, version = zip(*tokens, strict=True)
    return Experience(
        input_ids=tensor(ids)[None],
        position_ids=tensor(positions)[None],
        segments=Segments(segments),
        source=tensor(source),
        targets=tensor(targets),
        response=tensor(response),
        group=torch.tensor(group, device=device),
        behaviour=tensor(behaviour, torch.float32),
        by_policy=tensor(by_policy, torch.bool),
        version=tensor(version),
        coefficients=coefficients.to(device),
        target=torch.tensor([item.target for item, _ in items], dtype=torch.float32, device=device),
        weight=torch.tensor([item.weight for item, _ in items], dtype=torch.float32, device=device),
        term=torch.tensor([item.term for item, _ in items], dtype=torch.int64, device=device),
    )


def _learned_tokens(answer: Completion, before: np.ndarray, response: int) -> tuple[np.ndarray, ...]:
    """Source, target, response, behaviour log-prob, `by_policy` and version of each learned token of one response, [n_learned] each.

    Args:
        before: row position of what precedes each token, [n_tokens].
        response: its index in the row.
    """
    spans = answer.spans
    columns = (
        before,
        answer.token_ids,
        np.full(len(before), response),
        answer.logprobs,
        answer.per_token([span.by_policy for span in spans]),
        answer.per_token([span.version for span in spans]),
    )
    learned = np.flatnonzero(answer.per_token([span.learned for span in spans]))
    return tuple(column[learned] for column in columns)


def pack_sequences(token_ids: Sequence[np.ndarray], learned: Sequence[np.ndarray], device: torch.device) -> Row:
    """Pack whole sequences, each seeing only itself, into one row whose targets are the learned tokens.

    Args:
        token_ids: int [n] of each sequence.
        learned: bool [n] of each: which of its tokens are to be predicted. Never the first, which nothing precedes.
    """
    ids, positions, source, targets, lengths, start = [], [], [], [], [], 0
    for tokens, wanted in zip(token_ids, learned, strict=True):
        stop = int(
            np.flatnonzero(wanted)[-1]
        )  # nothing is predicted from the last learned token, or from what follows it
        place = np.arange(stop)
        ids.append(tokens[:stop].astype(np.int64))
        positions.append(place)
        source.append(start + place[wanted[1 : stop + 1]])
        targets.append(tokens[1 : stop + 1][wanted[1 : stop + 1]].astype(np.int64))
        lengths.append(stop)
        start += stop
    row, where, from_, what = (
        torch.from_numpy(np.concatenate(parts)).to(device) for parts in (ids, positions, source, targets)
    )
    return Row(row[None], where[None], Segments.of_texts(lengths), from_, what)


def idle(device: torch.device) -> Experience:
    """The smallest row: for a rank without work, which must still take part in every collective call. It has no items."""
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    return Experience(
        input_ids=zero[None],
        position_ids=zero[None],
        segments=Segments.of_texts([1]),
        source=zero,
        targets=zero,
        response=zero,
        group=zero,
        behaviour=torch.zeros(1, device=device),
        by_policy=torch.zeros(1, dtype=torch.bool, device=device),
        version=zero,
        coefficients=torch.zeros(0, 1, device=device),
        target=torch.zeros(0, device=device),
        weight=torch.zeros(0, device=device),
        term=torch.zeros(0, dtype=torch.int64, device=device),
    )
