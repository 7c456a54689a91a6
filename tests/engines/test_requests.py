"""What vLLM is asked, and told at its start, without an engine."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.engines.arguments import EngineSpec, engine_arguments
from rlhf.engines.engine import Engine, sampling_params
from rlhf.engines.environment import environment_set
from rlhf.engines.sampling import Sampling
from rlhf.types import Prompt, Shipment, WeightSpec

SPEC = EngineSpec(
    model="model",
    dtype="fp32",
    devices=1,
    gpu=False,
    max_model_len=64,
    max_num_seqs=4,
    gpu_memory=0.5,
    cpu_cache_bytes=2**20,
)


class Recorded(Engine):
    """An engine that notes what its workers and its model are asked."""

    def __init__(self, **results: Any) -> None:
        super().__init__()
        self.results, self.asked, self.params, self.priority = results, [], None, 0

    async def workers(self, method: str, **arguments: Any) -> list[Any]:
        self.asked.append(method)
        return self.results.get(method, [None, None])

    async def _answer(self, token_ids: list[int], params: Any, priority: int) -> Any:
        self.params, self.priority = params, priority
        logprobs = {token: SimpleNamespace(logprob=-float(token)) for token in (*(params.allowed_token_ids or ()), 99)}
        return SimpleNamespace(outputs=[] if params.n > 1 else [SimpleNamespace(logprobs=[logprobs])])

    async def set_version(self, version: int) -> None: ...

    async def sleep(self, level: int) -> None: ...

    async def wake(self) -> None: ...

    def close(self) -> None: ...


def test_requests_carry_the_tokens_unless_ends_are_ignored() -> None:
    assert sampling_params(Sampling(2, 8), 0, [7]).stop_token_ids == [7]
    assert sampling_params(Sampling(2, 8, ignore_eos=True), 0, [7]).stop_token_ids == []


def test_an_urgent_request_has_the_lower_priority() -> None:
    engine, prompt = Recorded(), Prompt("p", (1, 2), "p")
    priorities = []
    for urgent in (False, True):
        asyncio.run(engine.generate(prompt, Sampling(2, 8, urgent=urgent)))
        priorities.append(engine.priority)
    assert priorities[1] < priorities[0], "vLLM begins with the lowest"
    assert engine_arguments(SPEC)["scheduling_policy"] == "priority"


def test_a_choice_is_between_the_named_tokens_only_and_in_their_order() -> None:
    engine = Recorded()
    assert asyncio.run(engine.choose([1, 2], (5, 3))) == [-5.0, -3.0]
    assert (engine.params.allowed_token_ids, engine.params.max_tokens, engine.params.logprobs) == ([5, 3], 1, 2)
    assert engine.params.temperature == 1.0, "the log-probs are those of the model"


@pytest.mark.parametrize(
    ("adapter", "steps"),
    [
        (None, ["aim", "start_weight_update", "update_weights", "finish_weight_update", "attest"]),
        ({"r": 4}, ["receive_adapter", "attest"]),
    ],
)
def test_workers_are_told_of_weights_in_vllms_order(adapter: dict[str, Any] | None, steps: list[str]) -> None:
    engine, shipment = Recorded(attest=["mark", "mark"]), Shipment(1, "policy", (WeightSpec("w", "float32", (2,)),))
    assert asyncio.run(engine.receive_weights(shipment, adapter)) == {"mark"}
    assert engine.asked == steps


def test_a_digest_does_not_depend_on_the_order_of_the_workers() -> None:
    first, second = {"tp0:w": "a"}, {"tp1:w": "b"}
    digests = {
        asyncio.run(Recorded(compute_weight_checksums=workers).weight_digest())
        for workers in ([first, second], [second, first], [first | second])
    }
    assert len(digests) == 1 and len(digests.pop()) == 16


def test_without_gpus_there_are_no_graphs_and_a_cache_of_a_given_size() -> None:
    cpu, gpu = engine_arguments(SPEC), engine_arguments(replace(SPEC, gpu=True))
    assert (cpu["enforce_eager"], cpu["kv_cache_memory_bytes"]) == (True, 2**20)
    assert (gpu["enforce_eager"], gpu["kv_cache_memory_bytes"]) == (False, None)
    assert engine_arguments(replace(SPEC, gpu=True, eager=True))["enforce_eager"]


def test_only_requests_with_seeds_on_a_cpu_keep_prompts_whole() -> None:
    seeded = replace(SPEC, seeded=True)
    assert engine_arguments(seeded)["enable_chunked_prefill"] is False
    assert engine_arguments(replace(seeded, gpu=True))["enable_chunked_prefill"] is True
    assert "enable_chunked_prefill" not in engine_arguments(SPEC), "vLLM's choice"


def test_an_engine_that_takes_no_weights_gets_no_receivers() -> None:
    assert not {"weight_transfer_config", "worker_extension_cls"} & engine_arguments(SPEC).keys()
    taking = engine_arguments(replace(SPEC, backend="gloo"))
    assert taking["weight_transfer_config"] == {"backend": "rlhf_gloo"}


def test_the_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_TEST_SET", "before")
    monkeypatch.delenv("RLHF_TEST_UNSET", raising=False)
    with pytest.raises(ValueError), environment_set({"RLHF_TEST_SET": "in", "RLHF_TEST_UNSET": "in"}):
        assert os.environ["RLHF_TEST_SET"] == os.environ["RLHF_TEST_UNSET"] == "in"
        raise ValueError
    assert os.environ["RLHF_TEST_SET"] == "before" and "RLHF_TEST_UNSET" not in os.environ
