"""vLLM's `AsyncLLM`, whose core and workers are child processes: the engine of Ray actors and of reward servers. Written for vLLM 0.32."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rlhf.engines.engine import Engine, EngineDied
from rlhf.transfer import TransferFailed


class AsyncEngine(Engine):
    """`AsyncLLM`: continuous batching. Arguments: vLLM's own, and `Engine`'s."""

    def __init__(self, arguments: dict[str, Any], stops: Sequence[int]):
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        super().__init__(stops)
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))

    async def _answer(self, token_ids: list[int], params: Any, priority: int) -> Any:
        tokens, request = {"prompt_token_ids": token_ids}, str(next(self._numbers))
        with _death_told():
            answering = self._llm.generate(tokens, params, request, lora_request=self._adapter, priority=priority)
            async for output in answering:
                final = output
        return final

    async def workers(self, method: str, **arguments: Any) -> list[Any]:
        from vllm.v1.engine.exceptions import EngineDeadError

        call = self._llm.collective_rpc(method, kwargs=arguments)
        # Not a try statement: vLLM reports a worker's error as the bare class Exception, with the cause in its text.
        result: Any = (await asyncio.gather(call, return_exceptions=True))[0]
        if isinstance(result, EngineDeadError):
            raise EngineDied(f"vLLM's core process ended: {result}") from result
        if isinstance(result, BaseException):
            raise TransferFailed(str(result)) from result
        return result

    async def pause(self, *, keep: bool) -> None:
        """Hold new requests back, and forget all that was cached with the present weights.

        Every token that has been sampled when this returns is marked with the present version: vLLM steps until nothing is under way
        before it clears the cache, and new tokens come only after `resume`.

        Args:
            keep: running requests stop where they are, and go on after `resume`: vLLM preempts them and computes their cache anew.
                Else they are finished first.
        """
        with _death_told():
            await self._llm.pause_generation(mode="keep" if keep else "wait", clear_cache=True)

    async def abort(self) -> None:
        """End all requests, while they are paused. Each answers with the finish reason `abort`."""
        with _death_told():
            await self._llm.pause_generation(mode="abort", clear_cache=True)

    async def resume(self) -> None:
        """Undo `pause`."""
        with _death_told():
            await self._llm.resume_generation()

    async def set_version(self, version: int) -> None:
        with _death_told():
            await self._llm.update_weight_version(str(version))

    async def sleep(self, level: int) -> None:
        if self._llm.vllm_config.model_config.enable_sleep_mode:
            await self._llm.sleep(level=level, mode="keep")

    async def wake(self) -> None:
        if self._llm.vllm_config.model_config.enable_sleep_mode:
            await self._llm.wake_up()

    def close(self) -> None:
        self._llm.shutdown()


@contextmanager
def _death_told() -> Iterator[None]:
    """What vLLM raises of a dead core is raised as `EngineDied`."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EngineDied(f"vLLM's core process ended: {error}") from error
