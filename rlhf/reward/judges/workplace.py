"""Where a reward server does blocking work, one piece at a time, with the models that it holds.

Owns the worker thread and whether the models' weights are on the device or offloaded to host memory. Knows nothing of rewards.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from rlhf.training.offloading import Offloading


class Workplace:
    """Where blocking work is done, one piece at a time, with the models that lie there."""

    def __init__(self, inline: bool):
        self._inline = inline
        self._models: list[torch.nn.Module] = []
        self._offloaded: Offloading | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._free = asyncio.Lock()

    async def run(self, work: Callable[..., Any], *args: Any) -> Any:
        """`work(*args)`. If the caller is cancelled, the thread is left to itself and the next work gets a new one. A StopIteration
        of the work comes as a RuntimeError, as it would from any coroutine."""
        if self._inline:
            return work(*args)
        async with self._free:
            self._executor = self._executor or ThreadPoolExecutor(1, thread_name_prefix="reward")
            try:
                return await asyncio.get_running_loop().run_in_executor(self._executor, _finished, work, args)
            except asyncio.CancelledError:
                self.close()  # a thread cannot be interrupted
                raise

    def hold(self, model: torch.nn.Module) -> None:
        """Let `offload` move the model's weights."""
        self._models.append(model)

    async def offload(self) -> None:
        """Move the weights to host memory, after the work that is under way. Until `reload` no model judges."""
        if self._models and self._offloaded is None:
            await self.run(self._offload)

    def _offload(self) -> None:
        from rlhf.training.offloading import Offloading

        tensors = [tensor for model in self._models for tensor in (*model.parameters(), *model.buffers())]
        self._offloaded = Offloading()
        self._offloaded.offload(tensors, tensors[0].device)

    async def reload(self) -> None:
        """Undo `offload`."""
        if self._offloaded is not None:
            await self.run(self._offloaded.reload)
            self._offloaded = None

    async def run_model(self, work: Callable[..., Any], *args: Any) -> Any:
        """`work(*args)` with one of the models. Raises RuntimeError while they are offloaded."""

        def with_model() -> Any:
            if self._offloaded is not None:
                raise RuntimeError("the reward model lies in host memory, because the policy has its GPU")
            return work(*args)

        return await self.run(with_model)

    def close(self) -> None:
        """Accept no more work in the present thread."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None


def _finished(work: Callable[..., Any], args: Sequence[Any]) -> Any:
    """`work(*args)`, without the one error that no future can hold: whoever waits for it would wait in vain."""
    try:
        return work(*args)
    except StopIteration as error:
        raise RuntimeError("the work raised StopIteration") from error
