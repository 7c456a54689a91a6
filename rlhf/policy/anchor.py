"""A frozen copy of the policy that follows an update rule: the reference, or the engines' second model.

Owns the copy's weights and what its rule remembers (an fp32 average; the last iterate's fp32 master weights). Lives in one rank; under
ZeRO-3 it is sharded exactly as the policy is, so every rule works on shards; only a policy that is moved on is gathered anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from rlhf.algorithms.anchors import Ema, Extrapolated, Fixed, Previous, UpdateRule, due
from rlhf.policy.learner import InvariantBroken
from rlhf.training import lora, torch_files
from rlhf.training.deepspeed import PlacedModel, Trainer
from rlhf.training.deepspeed_zero3 import local_shard, local_shards
from rlhf.training.offloading import Offloading
from rlhf.training.packing import Experience
from rlhf.training.weights import whole_weights
from rlhf.transfer.fingerprint import fingerprint


class Anchor:
    """A frozen model and its rule.

    Args:
        placed: with the weights the run starts from.
    """

    def __init__(self, name: str, placed: PlacedModel, rule: UpdateRule):
        self.name, self.model, self.rule = name, placed.module, rule
        self._placed = placed
        self._offloading = Offloading()
        self._memory: list[torch.Tensor] = []
        if isinstance(rule, Ema):  # steps of an average are far below the spacing of bf16 weights
            self._memory = _copies(self._shards())
        self._fingerprint = self._take_fingerprint()

    def logprobs(self, experience: Experience) -> torch.Tensor:
        """fp32 [N] log-probs of the response tokens."""
        return self.forward(experience)[0]

    @torch.no_grad()
    def forward(self, experience: Experience) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `LogProbModel` gives, without gradient."""
        return self._placed.forward(experience)

    @torch.no_grad()
    def follow(self, policy: Trainer, step: int) -> bool:
        """Apply the rule after loop step `step`. Returns whether the weights changed. Collective for `Extrapolated`."""
        if not due(self.rule, step):
            return False
        self.check()
        if isinstance(self.rule, Previous):
            self._take(policy.shards())
        elif isinstance(self.rule, Ema):
            for average, shard, new in zip(self._memory, self._shards(), policy.shards(), strict=True):
                average.lerp_(new.detach().float().cpu(), 1 - self.rule.decay)
                shard.copy_(average)
        elif isinstance(self.rule, Extrapolated):
            self._extrapolate(policy, self.rule.alpha)
        self._fingerprint = self._take_fingerprint()
        return True

    def _extrapolate(self, policy: Trainer, alpha: float) -> None:
        iterate = _copies(iter(policy.masters()))  # what a bf16 weight has lost of a round's movement is much of it
        if self._memory:
            moved = [new + alpha * (new - old) for new, old in zip(iterate, self._memory, strict=True)]
            policy.set_masters(moved)
        self._memory = iterate
        self._take(policy.shards())

    def _take(self, shards: Iterator[torch.Tensor]) -> None:
        for mine, theirs in zip(self._shards(), shards, strict=True):
            mine.copy_(theirs)

    def check(self) -> None:
        """Raises InvariantBroken if the weights changed outside `follow`."""
        if self._take_fingerprint() != self._fingerprint:
            raise InvariantBroken(
                f"the weights of the {self.name} changed by themselves; every log-ratio since is wrong"
            )

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight, whole, one after the other. Collective."""
        return whole_weights(self.model.causal_lm)

    def offload(self, device: torch.device) -> None:
        """Give this device's memory back; the weights lie in host memory until `reload`."""
        self._offloading.offload(self._shards(), device)

    def reload(self) -> None:
        """Undo `offload`."""
        self._offloading.reload()

    @property
    def offloaded(self) -> bool:
        """Whether the weights are in host memory."""
        return self._offloading.nbytes > 0

    def save(self, folder: Path, rank: int) -> dict[str, str]:
        """Write this rank's shard, unless the rule is `Fixed`: then the model's own files hold it. Returns the file's checksum by its
        name."""
        if isinstance(self.rule, Fixed):
            return {}
        file, shards = self._file(folder, rank), [shard.detach().cpu() for shard in self._shards()]
        return {file.name: torch_files.write({"shards": shards, "memory": self._memory}, file)}

    def load(self, folder: Path, rank: int) -> None:
        """Restore what `save` wrote."""
        if isinstance(self.rule, Fixed):
            return
        state = torch_files.read(self._file(folder, rank))
        with torch.no_grad():
            self._take(iter(state["shards"]))
        self._memory = state["memory"]
        self._fingerprint = self._take_fingerprint()

    def _file(self, folder: Path, rank: int) -> Path:
        return folder / f"{self.name}-{rank}.pt"

    def _shards(self) -> Iterator[torch.Tensor]:
        return local_shards(self.model)

    def _take_fingerprint(self) -> str:
        return fingerprint((str(number), shard) for number, shard in enumerate(self._all_shards()))

    def _all_shards(self) -> Iterator[torch.Tensor]:
        """What must not change by itself."""
        return self._shards()


class SharedAnchor(Anchor):
    """A frozen policy without a model of its own, under LoRA: the policy's base with no adapter, or with the anchor's own.

    An adapter of its own, under the anchor's name, is there if the rule is `Previous`. No other rule that moves is possible: what it
    would make of adapters is none of the same rank.

    Args:
        policy: whose base it shares.

    Raises:
        LoraError: the rule averages or extrapolates.
    """

    def __init__(self, name: str, policy: Trainer, rule: UpdateRule):
        self._adapter = name if needs_adapter(name, rule) else None
        super().__init__(name, policy, rule)

    @torch.no_grad()
    def forward(self, experience: Experience) -> tuple[torch.Tensor, torch.Tensor | None]:
        with lora.adapter_in_use(self.model.causal_lm, self._adapter):
            return super().forward(experience)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return whole_weights(self.model.causal_lm, self._adapter)

    def offload(self, device: torch.device) -> None:
        """The base is the policy's and stays with it; an adapter is too small to matter."""

    def _shards(self) -> Iterator[torch.Tensor]:
        if self._adapter is None:
            return iter(())
        return map(local_shard, lora.adapter_parameters(self.model.causal_lm, self._adapter))

    def _all_shards(self) -> Iterator[torch.Tensor]:
        yield from map(local_shard, lora.base_parameters(self.model.causal_lm))
        yield from self._shards()


def needs_adapter(name: str, rule: UpdateRule) -> bool:
    """Whether an anchor that shares the policy's base needs an adapter of its own.

    Raises:
        LoraError: see `SharedAnchor`.
    """
    if isinstance(rule, Fixed | Previous):
        return isinstance(rule, Previous)
    raise lora.LoraError(
        f"policy.lora.rank: the {name} mixes the weights of several iterates ({type(rule).__name__}), and adapters of rank r do not add up "
        "to one of rank r. Use a fixed or previous one, or policy.lora.rank=0."
    )


def _copies(shards: Iterator[torch.Tensor]) -> list[torch.Tensor]:
    """fp32 copies in host memory."""
    return [shard.detach().to("cpu", torch.float32, copy=True) for shard in shards]
