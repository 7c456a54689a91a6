"""`policy`: the model that learns, its optimiser and how DeepSpeed spreads it over ranks."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field

from rlhf.config.base import PathText, Section

DecayRate = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(ge=0, le=100)]
Dtype = Literal["bf16", "fp32"]
"""A type that weights and activations can have."""


class LoraSettings(Section):
    rank: int = Field(
        0,
        ge=0,
        le=512,
        description="Rank of the trained product. 0 trains all weights; any other freezes them, and the reference shares them.",
    )
    alpha: float = Field(
        16.0,
        gt=0,
        le=1e6,
        description="The product is scaled by `alpha` / `rank`.",
    )
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="Which layers are adapted: every linear layer but the output layer, or a list of ends of names, such as "
        "[q_proj, v_proj].",
    )
    publish: Literal["merged", "adapter"] = Field(
        "merged",
        description="How new weights reach the engines: added to the base and rounded to its precision, or as an adapter that vLLM "
        "applies itself: far fewer bytes, nothing rounded, slower decoding.",
    )
    quantize_base: Literal["none", "4bit"] = Field(
        "none",
        description="Hold the frozen weights in 4 bits (QLoRA, NF4 with double quantization, through bitsandbytes; extra `qlora`).",
    )


class PolicySettings(Section):
    model: PathText = Field(
        description="Folder or hub name (`OWNER/NAME`, or `OWNER/NAME@REVISION`) of a causal language model in Hugging Face format; also "
        "the fixed reference.",
    )
    dtype: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="Precision of weights and activations. bf16 keeps fp32 master weights in the optimizer. auto: one of the two for the "
        "whole run: bf16 if every node of policy and engines computes in it natively (GPUs of compute capability 8.0 and later, CPUs with "
        "AVX-512 BF16 or AMX), else fp32. `--dry-run` says which and why.",
    )
    ranks: int = Field(1, ge=1, le=16384, description="DeepSpeed ranks, one per device.")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="ZeRO stage: 0 shards nothing, 1 optimizer states, 2 also gradients, 3 also the weights of policy "
        "and reference. With bf16, stage 0 also accumulates gradients in bf16; the others in fp32.",
    )
    offload_optimizer: Literal["none", "cpu"] = Field(
        "none",
        description="Keep optimizer states in host memory (stages 1 to 3).",
    )
    offload_parameters: Literal["none", "cpu"] = Field(
        "none",
        description="Keep sharded weights in host memory (stage 3).",
    )
    learning_rate: Rate | dict[Dtype, Rate] = Field(
        1e-6,
        description="Peak learning rate of AdamW. 0 is allowed and must leave the policy unchanged. A short run in bf16, whose weights "
        "round small updates away, may need a larger one: `{bf16: 4e-5, fp32: 2e-5}` gives one for each `dtype`.",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="Shape of the learning rate after warm-up, over all optimizer steps of the run.",
    )
    warmup_steps: int = Field(
        0,
        ge=0,
        le=10**9,
        description="Optimizer steps over which the learning rate rises linearly from 0.",
    )
    min_learning_rate_ratio: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Where `linear` and `cosine` end, as a fraction of the peak.",
    )
    adam_betas: tuple[DecayRate, DecayRate] = Field(
        (0.9, 0.95),
        strict=False,
        description="AdamW's decay rates of the first and second moment.",
    )
    weight_decay: float = Field(0.0, ge=0, le=10, description="AdamW's decoupled weight decay.")
    max_grad_norm: float = Field(1.0, ge=1e-9, le=1e9, description="Global gradient norm is clipped to this.")
    micro_batch_tokens: int = Field(
        4096,
        ge=1,
        le=2**30,
        description="Token budget of one packed forward and backward on one rank. Memory grows with it; results do not "
        "depend on it.",
    )
    logprob_chunk_tokens: int = Field(
        1024,
        ge=1,
        le=2**30,
        description="Tokens projected to the vocabulary at a time, so that [tokens, vocabulary] never exists whole. "
        "Results do not depend on it.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass: about a third slower, far less memory.",
    )
    lora: LoraSettings = Field(
        LoraSettings(),
        description="Train small matrices beside frozen weights.",
    )

    def computing_in(self, dtype: Dtype) -> Self:
        """The same with `auto` decided, and one learning rate."""
        rate = self.learning_rate
        return self.model_copy(
            update={"dtype": dtype, "learning_rate": rate[dtype] if isinstance(rate, dict) else rate}
        )
