"""Which tokens of a packed row see which: the lengths of its groups, and what attention's forms derive from them.

A row is a concatenation of groups; a group is one prompt followed by its responses, which see the prompt and themselves but not each
other. Owns: those facts, and what follows from them (a group's mask for a CPU, sequence bounds and blocks for a GPU), made when first
asked for and kept as long as the row. No [row, row] mask ever exists. Does not know: how attention is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, TypeVar, overload

import numpy as np
import torch

T = TypeVar("T")


class Run(NamedTuple):
    """Tokens of a row that are one after the other in a text.

    Attributes:
        start, stop: places in the row.
        first: position of the first one in its text.
        root: number of the run that holds the beginning of the text; of the run itself if it begins one.
    """

    start: int
    stop: int
    first: int
    root: int


@dataclass(frozen=True)
class Segment:
    """One group's place in the row, or one whole text's.

    Attributes:
        start: place in the row.
        prompt: tokens of the prompt, or of the whole text.
        responses: tokens of each response after the prompt.
    """

    start: int
    prompt: int
    responses: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        return self.prompt + sum(self.responses)

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def branches(self) -> bool:
        """Whether there are tokens after the prompt that do not see each other."""
        return sum(size > 0 for size in self.responses) > 1


class Segments(Sequence[Segment]):
    """The groups of one row, in order and without gaps."""

    def __init__(self, segments: Sequence[Segment]):
        self._segments = tuple(segments)
        self._kept: dict[Hashable, object] = {}

    @classmethod
    def of_texts(cls, lengths: Sequence[int]) -> Segments:
        """Whole texts, each of which sees only itself."""
        starts = [0, *accumulate(lengths)]
        return cls([Segment(start, length) for start, length in zip(starts, lengths, strict=False)])

    def __len__(self) -> int:
        return len(self._segments)

    @overload
    def __getitem__(self, place: int) -> Segment: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Segment, ...]: ...
    def __getitem__(self, place: int | slice) -> Segment | tuple[Segment, ...]:
        return self._segments[place]

    @property
    def total(self) -> int:
        """Tokens of the row."""
        return self._segments[-1].stop

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest group."""
        return max(segment.length for segment in self._segments)

    @cached_property
    def branches(self) -> bool:
        """Whether a prompt is shared by several responses."""
        return any(segment.branches for segment in self._segments)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The row's tokens, in order; no run is empty."""
        runs: list[Run] = []
        for segment in self._segments:
            if not segment.branches:
                runs.append(Run(segment.start, segment.stop, 0, len(runs)))
                continue
            root, at = len(runs), segment.start
            for length in (segment.prompt, *segment.responses):
                if length:
                    runs.append(Run(at, at + length, 0 if at == segment.start else segment.prompt, root))
                at += length
        return tuple(runs)

    def keep(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made once per key and kept as long as the row."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]  # type: ignore[return-value]

    def hidden(self, segment: Segment, window: int | None, device: torch.device) -> torch.Tensor:
        """bool [n, n], True where a query of a causal group may not see a key. Groups alike share one."""
        shape = (segment.prompt, segment.responses) if segment.branches else segment.length
        if window is not None and segment.length <= window:
            window = None
        return self.keep(("hidden", shape, window, device), lambda: hidden_keys(segment, window, device))

    def bounds(self, device: torch.device) -> torch.Tensor:
        """int32 [groups + 1]: where each group starts, and the end of the row."""
        starts = [*(segment.start for segment in self._segments), self.total]
        return self.keep(("bounds", device), lambda: torch.tensor(starts, dtype=torch.int32, device=device))


def hidden_keys(segment: Segment, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [n, n] of one causal group: True where the key comes later, is another response's or is `window` or more tokens back."""
    n = segment.length
    hidden = torch.ones(n, n, dtype=torch.bool, device=device).triu(1)
    if segment.branches:
        sizes = torch.tensor([segment.prompt, *segment.responses], device=device)
        branch = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes)
        hidden |= (branch[:, None] != branch[None, :]) & (branch != 0)[None, :]
    if window is not None:
        position = torch.cat(
            [torch.arange(segment.prompt), *(segment.prompt + torch.arange(r) for r in segment.responses)]
        )
        hidden |= (position[:, None] - position[None, :] >= window).to(device)
    return hidden


class Blocks(NamedTuple):
    """Which blocks of a row's [row, row] scores attention must look at; bool [blocks, blocks], query blocks first.

    Attributes:
        some: a query of the block sees a key of the block.
        all: every query sees every key.
    """

    some: np.ndarray
    all: np.ndarray


class _Piece(NamedTuple):
    """Tokens of one run in one block: number of run and block, root of the run, first place in the row, first and last position."""

    run: int
    block: int
    root: int
    start: int
    first: int
    last: int


def blocks(runs: Sequence[Run], size: int, window: int | None, *, causal: bool) -> Blocks:
    """The blocks of a row whose length is a multiple of `size`, from its runs alone: of the order of (blocks + runs) squared."""
    pieces = np.array(list(_pieces(runs, size)))
    run, block, root, start, first, last = (pieces[:, column] for column in range(6))
    mine = run[:, None] == run[None, :]
    nearest = first[:, None] - last[None, :]
    furthest = last[:, None] - first[None, :]
    some = all_ = mine | (root[:, None] == run[None, :])
    if causal:
        # A root's keys precede all others of its text, so positions order keys within a text.
        some, all_ = some & (furthest >= 0), all_ & (nearest >= 0)
    if window is not None:
        some, all_ = some & (nearest < window), all_ & (furthest < window)
    count = runs[-1].stop // size
    found = np.zeros((count, count), dtype=bool)
    np.logical_or.at(found, (block[:, None], block[None, :]), some)
    whole = np.ones((count, count), dtype=bool)
    np.logical_and.at(whole, (block[:, None], block[None, :]), all_)
    return Blocks(found, whole)


def _pieces(runs: Sequence[Run], size: int) -> Iterator[_Piece]:
    for number, run in enumerate(runs):
        for block in range(run.start // size, (run.stop - 1) // size + 1):
            start, stop = max(run.start, block * size), min(run.stop, (block + 1) * size)
            first = run.first + start - run.start
            yield _Piece(number, block, run.root, start, first, first + stop - start - 1)


def padded(runs: Sequence[Run], size: int) -> tuple[Run, ...]:
    """The runs and one more, a text of its own, that fills the row up to the next multiple of `size`; at least two blocks."""
    total = runs[-1].stop
    length = max(2 * size, -(-total // size) * size)
    return (*runs, Run(total, length, 0, len(runs))) if length > total else tuple(runs)
