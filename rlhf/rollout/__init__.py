"""The rollout pool: vLLM engines that write responses with the policy's current weights.

Owns: engines (`engine`), their pool with routing and attestation (`pool`, `router`), sampling parameters, the one
module that talks to vLLM (`vllm_adapter`), what vLLM loads from us to sample from mixtures of two models (`mixture`,
`mixture_processors`), and what it is told of LoRA adapters (`adapters`). Does not know: rewards, the policy, the loop. Token
ids in, token ids and log-probs out.
"""

from rlhf.rollout.engine import Attestation, BadResponse, EngineInfo
from rlhf.rollout.pool import NoEngines, RolloutPool, StaleWeights
from rlhf.rollout.sampling import Sampling

__all__ = ["Attestation", "BadResponse", "EngineInfo", "NoEngines", "RolloutPool", "Sampling", "StaleWeights"]
