"""The rollout pool: vLLM engines that write responses with the policy's current weights.

Owns: the actor around one engine (`engine`), and their pool (`pool`). Does not know: vLLM
(`rlhf.engines`), rewards, the policy, the loop. Token ids in, token ids and log-probs out.
"""

from rlhf.engines.sampling import Sampling
from rlhf.rollout.engine import BadResponse, EngineInfo
from rlhf.rollout.pool import NoEngines, RolloutPool
from rlhf.transfer.versions import StaleWeights

__all__ = ["BadResponse", "EngineInfo", "NoEngines", "RolloutPool", "Sampling", "StaleWeights"]
