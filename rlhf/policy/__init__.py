"""The policy group: the model that learns and its frozen reference, spread over DeepSpeed ranks.

Owns: one rank (`PolicyRank`, an actor), all ranks as one object (`PolicyGroup`), how a rank learns (`preference_learner`,
`gradient_learner`), PPO's `critic`, the frozen models and their update rules (`anchor`), their metrics, and giving out
weights. Does not know: where completions come from, what a reward is, or how engines load weights.
"""

from rlhf.policy.group import PolicyGroup
from rlhf.policy.learner import InvariantBroken, StepContext

__all__ = ["InvariantBroken", "PolicyGroup", "StepContext"]
