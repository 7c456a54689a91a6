"""What the loop asks of those who take part in a run: the policy, the engines that write and the servers that judge.

Protocols, so that the loop knows neither Ray nor an engine, and is tested with small stand-ins. `PolicyGroup`, `RolloutPool` and
`RewardPool` satisfy them; who starts and connects them is `loop.starting`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rlhf.engines.sampling import Sampling
from rlhf.policy import StepContext
from rlhf.reward.serving.server import ServerInfo
from rlhf.tracking.spans import Timing
from rlhf.types import Assignment, Feedback, ModelSlot, Prompt, Rollout, Shipment, WeightSpec


class PolicyRole(Protocol):
    """Learns. Everything but `send_weights` needs the devices that it may share with engines."""

    @property
    def specs(self) -> tuple[WeightSpec, ...]:
        """The tensors of a shipment, in order."""
        ...

    async def learn(self, assignments: Sequence[Assignment], step: StepContext) -> dict[str, float]:
        """One step; its mean metrics."""
        ...

    async def begin(self, step: StepContext) -> None:
        """Start a step whose assignments come in pieces."""
        ...

    async def accumulate(self, assignments: Sequence[Assignment], update: int = 0) -> None:
        """Take in a piece of the optimizer step number `update`."""
        ...

    async def finish(self) -> dict[str, float]:
        """Make the optimizer steps; the step's mean metrics."""
        ...

    async def follow(self, step: int) -> Mapping[str, bool]:
        """Let reference and partner follow the policy after loop step `step`: name -> whether it changed."""
        ...

    async def measure(self, assignments: Sequence[Assignment]) -> dict[str, float]:
        """KL to the model that the run started from; nothing is learned."""
        ...

    async def check_engines(self, probes: Mapping[int, Rollout]) -> dict[str, float]:
        """Raises InvariantBroken if an engine did not compute what the policy computes."""
        ...

    async def check_anchors(self) -> None:
        """Raises InvariantBroken if a frozen model changed by itself."""
        ...

    async def send_weights(self, shipment: Shipment) -> str:
        """Send to the engines, which must be receiving it; the fingerprint of what was sent."""
        ...

    async def reload(self) -> None:
        """Undo `offload`."""
        ...

    async def offload(self) -> None:
        """Leave only the policy's weights on the devices."""
        ...

    async def save(self, folder: str, tag: str) -> dict[str, str]:
        """Write the ranks' part of a checkpoint; checksum of each large file."""
        ...

    async def load(self, folder: str, tag: str) -> None:
        """Restore what `save` wrote."""
        ...

    async def export(self, folder: str) -> None:
        """Write the policy in Hugging Face format."""
        ...


class RolloutRole(Protocol):
    """Writes responses."""

    @property
    def engines(self) -> int:
        """Living engines."""
        ...

    @property
    def writing(self) -> Mapping[str, int]:
        """Prompts that engines write responses to now -> place of the engine."""
        ...

    @property
    def missing(self) -> tuple[ModelSlot, ...]:
        """The slots whose weights must be sent before all engines may sample, the policy's first."""
        ...

    async def sample(self, prompt: Prompt, samplings: Sequence[Sampling], with_pair: bool = False) -> Rollout:
        """Responses to one prompt, and with `with_pair` the data set's own. While weights are sent, it waits for them."""
        ...

    async def probe(self, prompt: Prompt, samplings: Sequence[Sampling]) -> dict[int, Rollout]:
        """What each living engine writes to the same prompt, by engine."""
        ...

    async def receive(self, shipment: Shipment) -> None:
        """Take the weights that the policy sends meanwhile."""
        ...

    def accept(self, shipment: Shipment, fingerprint: str) -> None:
        """Raises StaleWeights unless every engine attests these weights."""
        ...

    async def offload(self) -> None:
        """Give back the memory of devices that are shared with the policy."""
        ...

    async def reload(self) -> None:
        """Undo `offload`; weights may be missing then."""
        ...


class RewardRole(Protocol):
    """Judges."""

    @property
    def infos(self) -> Sequence[ServerInfo]:
        """Of all servers, as they were when they became ready."""
        ...

    async def judge(self, rollout: Rollout) -> Feedback:
        """An outcome for every response; a judge that fails is one of them."""
        ...

    async def check(self, step: int) -> dict[str, float]:
        """Raises CanaryAlarm if the judges have changed since the start."""
        ...

    async def offload(self) -> None:
        """Give back the memory of devices that are shared with the policy."""
        ...

    async def reload(self) -> None:
        """Undo `offload`."""
        ...


class StepRecord(Protocol):
    """Who writes down what a step came to."""

    def step(self, step: int, metrics: Mapping[str, float], warnings: Sequence[str] = ()) -> None: ...

    def timing(self, timing: Timing) -> None: ...


@dataclass(frozen=True)
class Roles:
    """Who takes part.

    Attributes:
        turns: policy and engines share devices, and use them in turns (`loop.turns`).
    """

    policy: PolicyRole
    rollouts: RolloutRole
    rewards: RewardRole
    turns: bool = False
