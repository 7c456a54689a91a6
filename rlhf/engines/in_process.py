"""vLLM's `LLMEngine` in this very process, stepped by a task of the event loop: the engine of debug mode, where a breakpoint inside the
model works. Written for vLLM 0.32."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from rlhf.engines.engine import Engine
from rlhf.engines.shared_process import default_group_kept, torch_as_it_was
from rlhf.transfer.versions import StaleWeights
from rlhf.types import Shipment


class InProcessEngine(Engine):
    """`LLMEngine` in this process. Arguments: vLLM's own, and `Engine`'s. Requests awaited together are batched, as in `AsyncEngine`."""

    def __init__(self, arguments: dict[str, Any], stops: Sequence[int]):
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        super().__init__(stops)
        with torch_as_it_was():
            self._llm = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self._waiting: dict[str, asyncio.Future] = {}
        self._stepper: asyncio.Task | None = None

    async def _answer(self, token_ids: list[int], params: Any, priority: int) -> Any:
        request_id, tokens = str(next(self._numbers)), {"prompt_token_ids": token_ids}
        self._llm.add_request(request_id, tokens, params, lora_request=self._adapter, priority=priority)
        future = self._waiting[request_id] = asyncio.get_running_loop().create_future()
        if self._stepper is None or self._stepper.done():
            self._stepper = asyncio.create_task(self._step_until_idle())
            self._stepper.add_done_callback(self._pass_on_failure)
        try:
            return await future
        finally:
            if self._waiting.pop(request_id, None) is not None and not future.done():
                self._llm.abort_request([request_id])

    async def _step_until_idle(self) -> None:
        while self._llm.has_unfinished_requests():
            self._step()
            await asyncio.sleep(0)  # requests that others are about to make join the next step

    def _step(self) -> None:
        for output in self._llm.step():
            future = self._waiting.get(output.request_id)
            if output.finished and future is not None and not future.done():
                future.set_result(output)

    def _pass_on_failure(self, stepper: asyncio.Task) -> None:
        """An error inside the model belongs to those who wait for its answer."""
        failure = None if stepper.cancelled() else stepper.exception()
        for future in self._waiting.values():
            if failure is not None and not future.done():
                future.set_exception(failure)

    async def workers(self, method: str, **arguments: Any) -> list[Any]:
        return self._llm.collective_rpc(method, kwargs=arguments)

    def load(
        self,
        weights: Iterable[tuple[str, Any]],
        shipment: Shipment,
        adapter: dict[str, Any] | None = None,
        *,
        keep: bool = False,
    ) -> str:
        """Load new weights into a slot, now, between two steps. Returns their fingerprint.

        Args:
            shipment: completions from now on are marked with the version of a policy's.
            adapter: the weights are a LoRA adapter with this configuration (`rlhf.engines.lora.peft_config`).
            keep: running requests go on with the new weights afterwards, their cache computed anew. Else they are finished first, here.

        Raises:
            TransferFailed, and what the weights raise. All requests have ended with `StaleWeights` then: a half-loaded model cannot run.
        """
        from vllm.v1.core.sched.interface import PauseState

        core = self._llm.engine_core.engine_core
        core.scheduler.set_pause_state(PauseState.PAUSED_ALL if keep else PauseState.PAUSED_NEW)
        try:
            # With vLLM's asynchronous scheduling a forward may have run whose tokens have not been read: they are the old version's.
            while core.batch_queue or core.scheduler.has_requests():
                self._step()
            self._llm.reset_prefix_cache(reset_running_requests=True)
            fingerprint = self._load(weights, shipment, adapter)
        except BaseException:
            self._end_all()
            raise
        finally:
            core.resume_scheduler()
        return fingerprint

    def _end_all(self) -> None:
        self._llm.abort_request(list(self._waiting))
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(
                    StaleWeights("new weights were sent while this was written, and could not be loaded")
                )

    def _load(self, weights: Iterable[tuple[str, Any]], shipment: Shipment, adapter: dict[str, Any] | None) -> str:
        if adapter is not None:
            self._llm.collective_rpc("receive_adapter", kwargs={"update_info": {"weights": weights}, "config": adapter})
            self.use_adapter()
        else:
            self._llm.collective_rpc("aim", kwargs={"slot": shipment.slot})
            self._llm.collective_rpc("start_weight_update")
            self._llm.collective_rpc("update_weights", kwargs={"update_info": {"weights": weights}})
            self._llm.collective_rpc("finish_weight_update")
        if shipment.slot == "policy":
            self._llm.set_weight_version(str(shipment.version))
        return self._llm.collective_rpc("attest")[0]

    async def set_version(self, version: int) -> None:
        self._llm.set_weight_version(str(version))

    async def sleep(self, level: int) -> None:
        if self._llm.model_config.enable_sleep_mode:
            self._llm.sleep(level=level, mode="keep")

    async def wake(self) -> None:
        if self._llm.model_config.enable_sleep_mode:
            self._llm.wake_up()

    def close(self) -> None:
        with default_group_kept():
            self._llm.engine_core.shutdown()
