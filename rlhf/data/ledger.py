"""The prompt ledger: which prompt comes next, and what became of each. A pure state machine; it owns no task and no file.

Prompts are drawn as `Order` says: pass by pass, each in an order that depends on the seed alone; of a mixture by the weights of its
sources. A leased prompt ends `trained` or `dropped` (with a reason). The state is the number of draws, the counts of outcomes and the
prompts that are out, so a run resumes with exactly the prompts that the uninterrupted one would have drawn; those that were out come
first, once more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.data.order import Order, Share
from rlhf.types import Prompt


class LedgerError(RuntimeError):
    """A prompt was settled that was not leased, or leased twice."""


class Ledger:
    """Leases prompts and counts what became of each.

    Args:
        prompts: all training prompts, those of a mixture source by source; their order is the file order.
        shuffle: a new order each pass, given by `seed`; otherwise file order.
        shares: of a mixture's sources.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool, shares: Sequence[Share] = ()):
        self._prompts, self._order = prompts, Order(len(prompts), seed, shuffle, shares)
        self._drawn = 0
        self._open: dict[str, None] = {}  # in the order in which they were leased
        self._again: list[Prompt] = []
        self.settled: Counter[str] = Counter()

    @property
    def epoch(self) -> float:
        """Passes over the prompts so far: draws over prompts, also for a mixture, whose sources take other times for a pass."""
        return self._drawn / len(self._prompts)

    @property
    def available(self) -> int:
        """Prompts that are not out."""
        return len(self._prompts) - len(self._open)

    def lease(self, count: int) -> list[Prompt]:
        """The next `count` prompts, all different from one another and from those that are out.

        Raises:
            LedgerError: there are not so many.
        """
        if count > self.available:
            raise LedgerError(
                f"{count} prompts are wanted, but there are only {len(self._prompts)}, of which {len(self._open)} are out"
            )
        leased = {prompt.id: prompt for prompt in self._again[:count]}
        self._again = self._again[count:]
        while len(leased) < count:
            prompt = self._prompts[self._order.at(self._drawn)]
            self._drawn += 1
            if (
                prompt.id in leased or prompt.id in self._open or prompt in self._again
            ):  # the border of two epochs can bring one back too early
                self.settled["repeated"] += 1
                continue
            leased[prompt.id] = prompt
        self._open |= dict.fromkeys(leased)
        return list(leased.values())

    def settle(self, prompt_id: str, outcome: str) -> None:
        """A leased prompt ended: `trained`, or the reason why it was dropped."""
        if prompt_id not in self._open:
            raise LedgerError(f"prompt {prompt_id} was settled as {outcome!r} but is not leased")
        del self._open[prompt_id]
        self.settled[outcome] += 1

    def state(self) -> dict[str, Any]:
        """JSON state. Prompts that are out are neither trained nor dropped: whoever goes on from here leases them again."""
        out = [*self._open, *(prompt.id for prompt in self._again)]
        return {"drawn": self._drawn, "settled": dict(self.settled)} | ({"out": out} if out else {})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` gave."""
        self._drawn, self.settled, self._open = state["drawn"], Counter(state["settled"]), {}
        by_id = {prompt.id: prompt for prompt in self._prompts} if state.get("out") else {}
        self._again = [by_id[prompt_id] for prompt_id in state.get("out", ())]
