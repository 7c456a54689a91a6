"""How much memory the roles need, from the model's shape alone.

Pure arithmetic: knows bytes per parameter, how ZeRO divides them and what DeepSpeed and vLLM set aside, not what a device has.
How far the estimates are off is measured by `benchmarks/planner_accuracy.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rlhf.algorithms import Algorithm, PolicyGradient
from rlhf.algorithms.anchors import Ema, Extrapolated, Fixed
from rlhf.config.policy import PolicySettings
from rlhf.config.rollout import RolloutSettings
from rlhf.training.shapes import ModelShape
from rlhf.transfer.buckets import BUCKET_BYTES
from rlhf.transfer.fingerprint import SCRATCH_BYTES

BYTES = {"bf16": 2, "fp32": 4}
GIB = 2**30

LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default `stage3_max_live_parameters`: weights that ZeRO-3 keeps gathered, in elements."""
QUANTISED_BYTES = 0.516
"""Of a weight in 4 bits, with its share of the scales: one per 64 weights, itself in 8 bits."""
# Repeated from `rlhf.training.model`, `.deepspeed`, `.sharded` and `.weights`, whose imports take seconds; a test holds them equal.
ROWS = 64
REDUCE_BUCKET = 500_000_000
READ_ELEMENTS = 64 * 2**20
GATHER_ELEMENTS = 4 * 2**20


ELSEWHERE = ("host", "publishing", "staying", "loading", "loading_host", "exporting")
"""Fields of `PolicyMemory` that are not on the device in a learning step."""


@dataclass(frozen=True)
class PolicyMemory:
    """Bytes on one policy rank's device at the peak of a learning step, and in host memory for what is offloaded.

    Attributes:
        partner: the engines' second model, where it is not the reference.
        start: the model the run started from, where an evaluation needs it beside a reference that moves.
        critic: its weights, gradients and optimizer states.
        head: the gradient of the output projection and a chunk of logits.
        buckets: what DeepSpeed reduces gradients in, and what ZeRO-3 keeps gathered.
        publishing: beside what is resident, while weights leave for the engines; not at the same time as a step's.
        staying: what stays on the device when all else is offloaded, for engines that share it.
        loading: beside what is resident, while models are loaded: their tensors on the way to their shards.
        loading_host: in host memory meanwhile; at ZeRO-3 on the first rank alone. Page cache is not counted.
        exporting: in host memory of the first rank while the whole policy is written.
    """

    policy: float
    reference: float
    partner: float
    start: float
    gradients: float
    optimizer: float
    critic: float
    activations: float
    head: float
    buckets: float
    host: float
    publishing: float
    staying: float
    loading: float
    loading_host: float
    exporting: float

    def parts(self) -> dict[str, float]:
        """What lies on the device in a learning step, by name; what the method does not have is left out."""
        return {name: size for name, size in vars(self).items() if name not in ELSEWHERE and size}

    @property
    def device(self) -> float:
        """The peak: of a learning step or, where that is more, of publishing or loading."""
        return max(sum(self.parts().values()), self.resident + self.publishing, self.loaded)

    @property
    def loaded(self) -> float:
        """The peak while models are loaded: the last one's tensors arrive when all else is there."""
        return self.resident + self.loading

    @property
    def resident(self) -> float:
        """What stays between steps."""
        return self.policy + self.reference + self.partner + self.start + self.optimizer + self.critic


class Trained(NamedTuple):
    """What one model of the policy group holds on each rank, in bytes."""

    weights: float
    gradients: float
    optimizer: float


def trained_parameters(shape: ModelShape, settings: PolicySettings) -> int:
    """Parameters that the optimizer moves: all, or those of the adapters."""
    lora = settings.lora
    if lora.rank == 0:
        return shape.parameters
    wanted = lora.target_modules
    return lora.rank * sum(
        width
        for layer, width in shape.adapter_widths.items()
        if wanted == "all-linear" or any(layer.endswith(end) for end in wanted)
    )


def model_states(shape: ModelShape, settings: PolicySettings) -> Trained:
    """Weights, gradients and optimizer states of the policy, on each rank.

    ZeRO 0 updates in place: bf16 weights have fp32 master copies, fp32 weights none. From stage 1 on DeepSpeed keeps fp32
    master copies in either precision, and with bf16 it accumulates gradients in fp32, at stage 1 beside the bf16 ones.
    """
    size, stage, ranks = BYTES[settings.dtype], settings.zero_stage, settings.ranks
    mixed, count = settings.dtype == "bf16", trained_parameters(shape, settings)
    weights = (frozen_weights(shape, settings) if settings.lora.rank else 0) + count * size
    if stage == 1:
        gradients = count * (size + (4 if mixed else 0))
    else:
        gradients = count * (size if stage == 0 else 4)
    master = 4 if mixed or stage >= 1 else 0
    return Trained(
        weights / (ranks if stage == 3 else 1),
        gradients / (ranks if stage >= 2 else 1),
        count * (8 + master) / (ranks if stage >= 1 else 1),
    )


def frozen_weights(shape: ModelShape, settings: PolicySettings) -> float:
    """Bytes of the whole base model under adapters: its linear layers may be quantised."""
    size = BYTES[settings.dtype]
    if settings.lora.quantize_base == "none":
        return shape.parameters * size
    return shape.linear * QUANTISED_BYTES + (shape.parameters - shape.linear) * size


def activations(shape: ModelShape, settings: PolicySettings, group: int, gpu: bool = True) -> float:
    """Bytes that the forward pass of one micro-batch keeps for the backward pass.

    Per token and layer: two norms (an fp32 copy of the stream, the normalised stream and the scaled one each), queries, keys,
    values and the attention's output twice, and the feed-forward block's gate, its activation, its up projection and
    their product. With gradient checkpointing a layer keeps only its input, and one layer at a time the rest. Attention
    adds, on a GPU, one fp32 number per token and head and layer, from which the backward pass makes the weights again: there are no
    masks. On a CPU it adds per group and layer the weights of all heads, and once per group a mask of a byte per pair of tokens.
    Other micro-batches take nothing: each is packed when its turn comes.

    Args:
        group: tokens of one prompt with its responses.
    """
    size, tokens = BYTES[settings.dtype], settings.micro_batch_tokens
    norms = 2 * shape.hidden * (4 + 2 * size)
    attention = size * (3 * shape.queries + shape.cached // shape.layers)
    layer = tokens * (norms + attention + 4 * size * shape.feedforward)
    square = group**2 * max(1, tokens // group)
    layer += tokens * shape.heads * 4 if gpu else square * shape.heads * size
    masks = 0 if gpu else square
    if settings.gradient_checkpointing:
        return shape.layers * tokens * shape.hidden * size + layer + masks
    return shape.layers * layer + masks


def head(shape: ModelShape, settings: PolicySettings) -> float:
    """Bytes of the output projection's backward pass: logits of a chunk, and the weight's gradient in fp32 and in its own type."""
    size = BYTES[settings.dtype]
    logits = shape.vocabulary * (settings.logprob_chunk_tokens * size + 2 * ROWS * 4)
    return logits + (0 if settings.lora.rank else shape.vocabulary * shape.hidden * (4 + size))


def buckets(shape: ModelShape, settings: PolicySettings) -> float:
    """Bytes of DeepSpeed's buffers in the backward pass."""
    size, stage = BYTES[settings.dtype], settings.zero_stage
    bucket = min(REDUCE_BUCKET, trained_parameters(shape, settings))
    if stage == 0:
        return bucket * size if settings.ranks > 1 else 0
    if stage == 3:
        return (bucket + min(LIVE_PARAMETERS, shape.parameters)) * size
    return bucket * (4 if stage == 1 else size)


def policy_memory(
    shape: ModelShape,
    settings: PolicySettings,
    algorithm: Algorithm,
    evaluates: bool = False,
    group: int | None = None,
    gpu: bool = True,
) -> PolicyMemory:
    """Bytes per rank.

    A critic is as large as the policy and takes turns with it. With adapters the frozen base is shared: the reference is the
    base itself, and an anchor that moves is a second set of adapters. An average, or the last iterate that an extrapolation
    remembers, is kept in fp32 in host memory.

    Args:
        evaluates: on held-out prompts: with a reference that moves, the start is kept as well, to measure the distance to.
        group: tokens of one prompt with its responses, of which micro-batches are made; None: one fills a micro-batch.
        gpu: where it runs.
    """
    states, lora = model_states(shape, settings), settings.lora.rank > 0
    on_device = settings.offload_parameters == "none"
    weights = states.weights if on_device else 0
    optimizer = states.optimizer if settings.offload_optimizer == "none" else 0
    shards = settings.ranks if settings.zero_stage == 3 else 1
    adapters = trained_parameters(shape, settings) * BYTES[settings.dtype] / shards
    trained = 2 if isinstance(algorithm.objective, PolicyGradient) and algorithm.objective.critic is not None else 1
    anchors = [rule for rule in (algorithm.reference, algorithm.partner) if rule is not None]
    copies = [0.0 if lora and isinstance(rule, Fixed) else adapters if lora else states.weights for rule in anchors]
    start = 0.0
    if evaluates and not isinstance(algorithm.reference, Fixed):
        start = 0.0 if lora else states.weights
    averages, iterates = (sum(isinstance(rule, kind) for rule in anchors) for kind in (Ema, Extrapolated))
    masters = settings.ranks if settings.zero_stage > 0 else 1
    remembered = (
        averages / shards + iterates / masters
    )  # an average of this rank's weights; its part of the fp32 masters
    bucket = min(REDUCE_BUCKET, trained_parameters(shape, settings)) * BYTES[settings.dtype]
    # At stage 3 anchors are shards that stay, and so do DeepSpeed's own buffers for gradients.
    kept = (sum(copies) + start if on_device else 0) + trained * (states.gradients + bucket)
    another = 0 if settings.zero_stage < 3 or not gpu else (trained - 1) * bucket
    return PolicyMemory(
        policy=weights,
        reference=copies[0] if on_device else 0,
        partner=sum(copies[1:]) if on_device else 0,
        start=start if on_device else 0,
        gradients=states.gradients,
        optimizer=optimizer,
        critic=(weights + states.gradients + optimizer) * (trained - 1),
        activations=activations(shape, settings, group or settings.micro_batch_tokens, gpu),
        head=head(shape, settings),
        buckets=buckets(shape, settings) + another,
        host=(states.optimizer - optimizer) * trained
        + (0 if on_device else states.weights * trained + sum(copies) + start)
        + remembered * trained_parameters(shape, settings) * 4,
        publishing=publishing(shape, settings, gpu),
        loading=loading(shape, settings),
        loading_host=loading_host(shape, settings),
        exporting=shape.parameters * BYTES[settings.dtype],
        staying=weights * trained + (kept if settings.zero_stage == 3 else 0),
    )


def loading(shape: ModelShape, settings: PolicySettings) -> float:
    """Bytes on a device of the tensors that are not shards yet (`rlhf.training.sharded`), or not in 4 bits yet."""
    if settings.zero_stage == 3:
        return min(max(READ_ELEMENTS, shape.largest), shape.parameters) * BYTES[settings.dtype]
    return shape.largest * BYTES[settings.dtype] if settings.lora.quantize_base != "none" else 0


def loading_host(shape: ModelShape, settings: PolicySettings) -> float:
    """Bytes in host memory: at ZeRO-3 on the first rank, of a portion as it was read, as it is fused and when it is; else on every rank,
    of a whole model."""
    if settings.zero_stage == 3 or settings.lora.quantize_base != "none":
        return 3 * loading(shape, settings)
    return shape.parameters * BYTES[settings.dtype]


def publishing(shape: ModelShape, settings: PolicySettings, gpu: bool = True) -> float:
    """Bytes that publishing the weights needs for a moment on a rank: what ZeRO-3 gathers, and one bucket on its way."""
    size = BYTES[settings.dtype]
    whole, largest = shape.parameters * size, shape.vocabulary * shape.hidden * size
    gathered = min(GATHER_ELEMENTS * size + largest, whole) if settings.zero_stage == 3 else 0
    return gathered + min(BUCKET_BYTES, whole) + gpu * min(SCRATCH_BYTES, largest)


def arriving(shape: ModelShape, size: int, devices: int, gpu: bool) -> float:
    """Bytes that new weights take on a worker for a moment: two buckets, of which the larger may be one tensor by itself (parts of a layer
    wait for the rest of it), and its share of the largest layer, which vLLM recreates before it copies it into place.

    Args:
        size: of a weight on its way, in bytes.
        devices: of the engine.
    """
    whole, largest = shape.parameters * size, shape.vocabulary * shape.hidden * size
    return min(BUCKET_BYTES + max(BUCKET_BYTES, largest), whole) + largest / devices + gpu * min(SCRATCH_BYTES, largest)


@dataclass(frozen=True)
class EngineMemory:
    """Bytes on each device of one engine.

    Attributes:
        cached_token: what one token takes in the key-value cache.
        arriving: buffers for new weights, outside the share that vLLM takes.
    """

    weights: float
    cached_token: float
    arriving: float

    def room(self, size: float) -> int:
        """Tokens that a key-value cache of `size` bytes holds."""
        return max(0, int(size // self.cached_token))


def engine_memory(
    shape: ModelShape, rollout: RolloutSettings, policy: PolicySettings, mixes: bool = False, gpu: bool = True
) -> EngineMemory:
    """An engine that mixes holds two models, each with its own cache."""
    size = BYTES[policy.dtype if rollout.dtype == "policy" else rollout.dtype]
    models, devices = 1 + mixes, rollout.tensor_parallel_size
    return EngineMemory(
        weights=models * shape.parameters * size / devices,
        cached_token=models * shape.cached * size / devices,
        arriving=arriving(shape, BYTES[policy.dtype], devices, gpu),
    )
