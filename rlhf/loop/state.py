"""The state of an online run: where it stands, and what the driver has to remember.

Owns: how many steps are done, which version the policy's weights are, which parts a checkpoint holds (under the names of
`training.resume.ONLINE`, which the dry run reads too). What is in a part only the part knows (`Stateful`). Does not know: files
(`training.checkpoints`), whether a run may go on (`training.resume`), and what the ranks save by themselves: weights, optimizers,
frozen models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.data.ledger import Ledger
from rlhf.policy.kl import KlController
from rlhf.reward.shaping import Shaping
from rlhf.training.checkpoints import Stateful
from rlhf.training.resume import ONLINE, RUN


class RunState:
    """Changed by the loop alone, between and at the end of steps.

    Attributes:
        step: steps done.
        version: of the policy's weights: 0 for those that the run starts from, and one more after each step.
        ledger: what became of the prompts.
        kl: the factor on the KL to the reference.
        shaping: from judged rewards to learned ones.
        run: what a checkpoint says of the run that writes it (`training.resume.remembered`).
    """

    def __init__(self, ledger: Ledger, kl: KlController, shaping: Shaping, run: Mapping[str, Any]):
        self.step = self.version = 0
        self.ledger, self.kl, self.shaping, self.run = ledger, kl, shaping, run

    def next_version(self) -> None:
        """The policy has learned from a step: its weights are the next version from now on, and are published as such."""
        self.version += 1

    def finish_step(self) -> None:
        """All that belongs to a step is done and recorded."""
        self.step += 1

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, as JSON; only between steps, where a step has brought one version. Prompts that are under way are
        sampled anew by whoever goes on from it."""
        return {"step": self.step, RUN: dict(self.run)} | {name: part.state() for name, part in self._parts().items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave.

        Raises:
            RewardError: the rewards were shaped by other transforms.
        """
        for name, part in self._parts().items():
            part.restore(state[name])
        self.step = self.version = state["step"]

    def _parts(self) -> Mapping[str, Stateful]:
        parts: dict[str, Stateful] = {"ledger": self.ledger, "policy": self.kl, "shaping": self.shaping}
        assert parts.keys() == ONLINE.keys()
        return parts
