"""Admission and buffer as pure machines, alone and together, against a plain account of what a run may do."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.loop.admission import Admission, Place
from rlhf.loop.batch import Refill
from rlhf.loop.buffer import Buffer

SIZES = {"size": st.integers(1, 5), "bound": st.integers(0, 4), "steps": st.integers(1, 8)}


@dataclass
class Run:
    """A loop over the two machines alone. Prompts come back in any order, and some teach nothing.

    Attributes:
        versions: place -> version that was there when it started.
        learned: place -> version that learned from it.
        most: prompts out at the same time.
    """

    size: int
    bound: int
    steps: int
    chance: random.Random
    refill: int = 0
    idle: float = 0.0
    done: int = 0
    versions: dict[int, int] = field(default_factory=dict)
    learned: dict[int, int] = field(default_factory=dict)
    taken: list[list[int]] = field(default_factory=list)
    most: int = 0

    def take(self, *, whole: bool) -> None:
        admission = Admission(self.size, self.bound, self.steps, self.done)
        buffer: Buffer[int] = Buffer(admission.started)
        out: list[Place] = []
        for step in range(self.done + 1, self.steps + 1):
            refill = Refill(self.size, self.refill * self.size, exact=self.bound > 0 or not whole)
            buffer.open(self.size)
            taught, taken = 0, []
            while buffer.pending:
                while admission.may_start:
                    out.append(admission.start())
                    self.versions[out[-1].number] = step - 1
                self.most = max(self.most, len(out))
                arrived = buffer.take_all() if whole else buffer.take_next()
                for place in arrived:
                    taken.append(place)
                    self.learned[place] = step - 1
                    taught += self.chance.random() >= self.idle
                if arrived:
                    more = refill.next(taught + buffer.pending, available=1000)
                    admission.replace(more)
                    buffer.open(more)
                else:
                    assert out, "the step waits, and nobody is under way"
                    place = out.pop(self.chance.randrange(len(out)))
                    buffer.put(place.number, place.number)
            self.taken.append(taken)
            admission.finish_step()
        assert not out and not admission.may_start, "what no step learns from is not started"


RUNS = st.builds(
    Run,
    **SIZES,
    chance=st.randoms(use_true_random=False),
    refill=st.integers(0, 2),
    idle=st.sampled_from([0.0, 0.3, 1.0]),
)


@given(run=RUNS, whole=st.booleans())
def test_nothing_is_older_than_the_bound_and_every_prompt_is_learned_from_once(run: Run, whole: bool) -> None:
    run.take(whole=whole)
    assert run.learned.keys() == run.versions.keys(), "every prompt is settled"
    assert sum(map(len, run.taken)) == len(run.learned), "and once"
    assert all(0 <= run.learned[place] - version <= run.bound for place, version in run.versions.items())


@given(run=RUNS, whole=st.booleans())
def test_a_step_takes_the_oldest_places_whoever_came_back_first(run: Run, whole: bool) -> None:
    run.take(whole=whole)
    places = [sorted(taken) for taken in run.taken]
    assert [place for taken in places for place in taken] == list(range(len(run.learned)))
    assert all(len(taken) >= run.size for taken in places), "and as many as it wants to learn from"
    if whole:
        assert places == run.taken, "in this order"


@given(run=RUNS)
def test_the_bound_is_used(run: Run) -> None:
    """From the start there are as many under way as may be: the steps' prompts of bound + 1 steps."""
    run.idle = 0.0
    run.take(whole=True)
    assert run.most == min(run.bound + 1, run.steps) * run.size


@given(run=RUNS, done=st.integers(0, 7))
def test_a_resumed_run_counts_on(run: Run, done: int) -> None:
    run.done = min(done, run.steps)
    run.take(whole=True)
    assert min(run.versions, default=run.done * run.size) == run.done * run.size
    assert len(run.taken) == run.steps - run.done


@given(**SIZES, chance=st.randoms(use_true_random=False))
def test_a_prompt_is_started_for_the_step_whose_place_it_takes(
    size: int, bound: int, steps: int, chance: random.Random
) -> None:
    """Without replacements the step that it is started for, which gives its seed, is the one that learns from it."""
    admission = Admission(size, bound, steps)
    while admission.may_start or admission.started < steps * size:
        if admission.may_start and chance.random() < 0.8:
            place = admission.start()
            assert place.step == place.number // size + 1
        else:
            admission.finish_step()


def test_with_bound_0_a_replacement_belongs_to_the_step_that_it_replaces_in() -> None:
    admission = Admission(2, 0, 3)
    assert [admission.start(), admission.start()] == [Place(0, 1), Place(1, 1)]
    assert not admission.may_start
    admission.replace(1)
    assert admission.start() == Place(2, 1) and not admission.may_start
    admission.finish_step()
    assert admission.start() == Place(3, 2)


def test_starting_too_many_is_an_error() -> None:
    admission = Admission(1, 0, 2)
    admission.start()
    with pytest.raises(ValueError, match="no more may be"):
        admission.start()


@given(order=st.permutations(range(6)), opened=st.integers(1, 6))
def test_a_take_depends_on_the_order_of_arrival_alone(order: list[int], opened: int) -> None:
    buffer: Buffer[str] = Buffer()
    buffer.open(opened)
    taken: list[str] = []
    for place in order:
        buffer.put(place, f"prompt {place}")
        taken += buffer.take_next()
    assert taken == [f"prompt {place}" for place in order if place < opened]
    assert buffer.pending == 0 and buffer.waiting == 6 - opened
    buffer.open(6 - opened)
    assert buffer.first == opened
    assert buffer.take_all() == [f"prompt {place}" for place in range(opened, 6)]


@pytest.mark.parametrize("taken", [False, True])
def test_a_prompt_that_comes_back_twice_is_an_error(taken: bool) -> None:
    buffer: Buffer[int] = Buffer(3)
    buffer.open(1)
    buffer.put(3, 0)
    if taken:
        assert buffer.take_all() == [0]
    with pytest.raises(ValueError, match="place 3 has arrived twice"):
        buffer.put(3, 0)
