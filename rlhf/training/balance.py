"""Who learns what: assignments spread over updates, ranks and micro-batches. Pure arithmetic on token counts.

Two promises: within an update every rank has the same number of micro-batches (some may be empty), so that no rank ever waits in a
collective call that another does not make; and ranks carry nearly equal numbers of tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

MicroBatch = tuple[int, ...]
"""Indices of the assignments that are forwarded together."""


def plan_updates(costs: Sequence[int], updates: int, ranks: int, budget: int) -> list[list[list[MicroBatch]]]:
    """Split assignments into `plan[update][rank][micro_batch]`.

    Args:
        costs: tokens of each assignment in the packed forward.
        updates: optimizer steps; assignments are divided over them in order. Fewer assignments than updates give fewer updates.
        ranks: data-parallel ranks.
        budget: most tokens of a micro-batch; one assignment above it gets a micro-batch of its own.
    """
    plan = []
    for update in range(updates):
        first, last = update * len(costs) // updates, (update + 1) * len(costs) // updates
        if first == last:
            continue
        shares = [_fill(share, costs, budget) for share in _spread(range(first, last), costs, ranks)]
        longest = max(len(share) for share in shares)
        plan.append([share + [()] * (longest - len(share)) for share in shares])
    return plan


def _spread(indices: Sequence[int], costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Heaviest first, each to the lightest rank."""
    loads = [(0, rank) for rank in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(indices, key=lambda i: -costs[i]):
        load, rank = heapq.heappop(loads)
        shares[rank].append(index)
        heapq.heappush(loads, (load + costs[index], rank))
    return shares


def _fill(share: Sequence[int], costs: Sequence[int], budget: int) -> list[MicroBatch]:
    """First fit; `share` comes heaviest first, which keeps the number of micro-batches near the least possible."""
    bins: list[list[int]] = []
    free: list[int] = []
    for index in share:
        place = next((i for i, room in enumerate(free) if costs[index] <= room), None)
        if place is None:
            bins.append([index])
            free.append(budget - costs[index])
        else:
            bins[place].append(index)
            free[place] -= costs[index]
    return [tuple(b) for b in bins]
