"""The mathematics: pure functions on tensors and numbers. No Ray, no vLLM, no DeepSpeed.

An algorithm is a declaration (`Algorithm`): how many responses, how they become training items (`builders`), and the
contrast loss on those items (`contrast`, the kernel that all direct preference methods share). `make(settings)` gives the one
that the configuration names.
"""

from rlhf.algorithms.algorithm import Algorithm, AlgorithmError, make
from rlhf.algorithms.contrast import Contrast

__all__ = ["Algorithm", "AlgorithmError", "Contrast", "make"]
