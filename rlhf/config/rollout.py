"""`rollout`: the vLLM engines that write the responses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf.config.base import MAX_S, MAX_TOKENS, MIN_S, Section


class RolloutSettings(Section):
    engines: int = Field(
        1,
        ge=1,
        le=4096,
        description="Number of vLLM engines; prompts go to the one with the fewest outstanding tokens.",
    )
    tensor_parallel_size: int = Field(1, ge=1, le=1024, description="Devices per engine.")
    straddle_nodes: bool = Field(
        False,
        description="Let an engine that fits into no single node span several (through vLLM's Ray executor): slower, because its "
        "devices then talk over the network in every layer.",
    )
    dtype: Literal["policy", "bf16", "fp32"] = Field(
        "policy",
        description="Precision of the engines' weights; `policy` follows `policy.dtype`.",
    )
    max_tokens: int = Field(
        256,
        ge=1,
        le=MAX_TOKENS,
        description="Longest response, in tokens. A response cut here has finish reason `length`.",
    )
    temperature: float = Field(
        1.0,
        ge=0,
        le=2,
        description="Sampling temperature of training responses, 2 at most (vLLM's bound). Log-probs are of the tempered distribution, and "
        "policy gradients are of it too; a contrast loss learns the model itself (temperature 1) whatever it was sampled at. 0 is greedy.",
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Nucleus sampling. Below 1 the log-probs are of the truncated distribution.",
    )
    top_k: int = Field(0, ge=0, le=10**6, description="Sample among the k likeliest tokens; 0: all.")
    max_num_seqs: int = Field(64, ge=1, le=65_536, description="Sequences an engine decodes at the same time.")
    enforce_eager: bool = Field(
        False,
        description="Do not compile or capture graphs: a quicker start, slower decoding on a GPU. CPUs are always "
        "eager.",
    )
    gpu_memory_utilization: float = Field(
        0.6,
        gt=0,
        le=1,
        description="Fraction of a GPU's memory for an engine (weights and key-value cache). Unused on CPU.",
    )
    cpu_kv_cache_gb: float = Field(
        1.0,
        ge=0.001,
        le=100_000,
        description="Size of an engine's key-value cache on CPU, in GiB. Unused on a GPU.",
    )
    sleep_level: Literal[1, 2] = Field(
        1,
        description="What engines do with their weights while the policy has the GPUs they share: 1: keep them in host memory; 2: drop "
        "them, and receive all again.",
    )
    in_flight: Literal["keep", "wait"] = Field(
        "keep",
        description="What becomes of responses that are being written when new weights come (`loop.staleness` above 0): keep: they go on "
        "with the new weights, so that one response may be of several versions; wait: they are finished with the old ones first.",
    )
    transfer: Literal["auto", "gloo", "nccl", "ipc"] = Field(
        "auto",
        description="How new weights reach the engines: gloo (CPU), nccl (GPU to GPU), ipc (within each GPU). auto: gloo on CPUs; on "
        "GPUs nccl, except where engines share GPUs with the policy (`cluster.placement`), because NCCL refuses two ranks on one GPU: "
        "there ipc if all of them do, and gloo if some do.",
    )
    request_deadline_s: float = Field(
        600.0, ge=MIN_S, le=MAX_S, description="Longest wait for one prompt's responses, in seconds."
    )
