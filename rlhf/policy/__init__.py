"""The policy group: the model that learns and its frozen reference, spread over DeepSpeed ranks.

Owns: one rank (`PolicyRank`, an actor), all ranks as one object (`PolicyGroup`), their metrics, and giving out weights.
Does not know: where completions come from, what a reward is, or how engines load weights.
"""

from rlhf.policy.group import PolicyGroup

__all__ = ["PolicyGroup"]
