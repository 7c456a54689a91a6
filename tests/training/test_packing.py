"""A packed row of responses that several weights wrote, with tokens that are only read."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.training.packing import Experience, pack
from rlhf.types import DATASET_VERSION, Assignment, Completion, Prompt, Rollout, Span, TrainingItem

KINDS = {
    "policy": (2, True, True),
    "older": (1, True, True),
    "mixture": (2, False, True),
    "unlearned": (2, True, False),
    "tool": (DATASET_VERSION, False, False),
}
Shape = list[list[tuple[str, int]]]


def packed(shapes: list[Shape]) -> tuple[Experience, list[list[Completion]]]:
    """A prompt of two tokens for each shape; responses are given by the kinds and lengths of their spans. All token ids differ."""
    assignments, completions, token = [], [], 0
    for number, shape in enumerate(shapes):
        made = []
        for parts in shape:
            ends = np.cumsum([0, *(n for _, n in parts)]).tolist()
            spans = tuple(Span(a, b, *KINDS[kind]) for a, b, (kind, _) in zip(ends, ends[1:], parts, strict=False))
            ids = np.arange(token, token + ends[-1], dtype=np.int32)
            made.append(Completion(str(number), ids, -ids.astype(np.float32), spans, "stop"))
            token += ends[-1]
        rollout = Rollout(Prompt(str(number), (900 + number, 950 + number), ""), tuple(c.info() for c in made), None)
        assignments.append(Assignment(rollout, tuple(TrainingItem((i,), (1.0,)) for i in range(len(made)))))
        completions.append(made)
    return pack(assignments, completions, torch.device("cpu")), completions


RESPONSE = st.lists(st.tuples(st.sampled_from(sorted(KINDS)), st.integers(1, 4)), max_size=4)


@given(shapes=st.lists(st.lists(RESPONSE, min_size=1, max_size=3), min_size=1, max_size=3))
def test_learned_tokens_are_predicted_from_what_precedes_them_and_all_others_are_only_read(shapes: list[Shape]) -> None:
    """Each target is found in its own text, at its own place, behind the token that it is predicted from; and knows who wrote it."""
    row, completions = packed(shapes)
    assert row.segments[-1].stop == row.input_ids.shape[1]
    place = 0
    for number, answer in enumerate(one for group in completions for one in group):
        text = [900 + int(row.group[number]), 950 + int(row.group[number]), *answer.token_ids.tolist()]
        for span in answer.spans:
            for t in range(span.start, span.stop) if span.learned else ():
                assert row.targets[place] == answer.token_ids[t]
                assert row.response[place] == number
                assert row.behaviour[place] == answer.logprobs[t]
                assert (row.by_policy[place], row.version[place]) == (span.by_policy, span.version)
                assert row.input_ids[0, row.source[place]] == text[2 + t - 1]
                assert row.position_ids[0, row.source[place]] == 2 + t - 1
                place += 1
    assert place == len(row.targets)
    # What follows an unlearned token sees it: everything but each response's last token is in the row.
    seen = [t for group in completions for one in group for t in one.token_ids[:-1].tolist()]
    assert sorted(i for i in row.input_ids[0].tolist() if i < 900) == sorted(seen)


def test_two_spans_of_the_policy_and_a_turn_of_a_tool() -> None:
    row, _ = packed([[[("older", 2), ("tool", 2), ("policy", 1)], [("tool", 1)]]])
    assert row.input_ids.tolist() == [[900, 950, 0, 1, 2, 3]]
    assert row.targets.tolist() == [0, 1, 4]
    assert row.source.tolist() == [1, 2, 5]
    assert row.response.tolist() == [0, 0, 0]
    assert row.version.tolist() == [1, 1, 2]
    assert row.written_by(2).tolist() == [False, False, True]
    assert row.n_responses == 2, "the second has no token to learn from and stays in the arithmetic of responses"
