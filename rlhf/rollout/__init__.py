"""The rollout pool: vLLM engines that write responses with the policy's current weights.

Owns: the actor around one engine (`engine`), and their pool with routing and attestation (`pool`, `router`). Does not know: vLLM
(`rlhf.engines`), rewards, the policy, the loop. Token ids in, token ids and log-probs out.
"""

from rlhf.engines.sampling import Sampling
from rlhf.rollout.engine import Attestation, BadResponse, EngineInfo
from rlhf.rollout.pool import NoEngines, RolloutPool, StaleWeights

__all__ = ["Attestation", "BadResponse", "EngineInfo", "NoEngines", "RolloutPool", "Sampling", "StaleWeights"]
