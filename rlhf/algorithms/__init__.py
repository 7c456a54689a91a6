"""The mathematics: pure functions on tensors and numbers. No Ray, no vLLM, no DeepSpeed.

An algorithm is a declaration (`Algorithm`): who writes responses, how they become training items (`builders`), the loss on those
items, and how the reference changes. There are two losses: the contrast kernel (`contrast`, all direct preference methods)
and the policy-gradient kernel (`policy_gradient`). Each method is a short file; `make(settings)` gives the one that the
configuration names.
"""

from rlhf.algorithms.algorithm import Algorithm, Source
from rlhf.algorithms.contrast import Contrast, Preference
from rlhf.algorithms.policy_gradient import Critic, PolicyGradient
from rlhf.algorithms.registry import AlgorithmError, make

__all__ = ["Algorithm", "AlgorithmError", "Contrast", "Critic", "PolicyGradient", "Preference", "Source", "make"]
