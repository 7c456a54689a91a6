"""Operations that learning needs, counted from a model's shape and the lengths of what is learned from. Pure arithmetic.

Per weight and token 2 operations forward, 2 backward for the activations and 2 for the weight if it is trained. Attention takes 4 per pair
of tokens, layer and query width forward and twice that backward. Only response tokens are projected to the vocabulary. Not counted:
activations that are computed again, norms, and experts in fused tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.training.shapes import ModelShape


def learning_flops(
    shape: ModelShape, prompt: int, responses: Sequence[int], *, trained: bool = True, head: bool = True
) -> float:
    """Operations of one forward and backward pass over a prompt and responses to it, packed: the prompt is there once, and responses do
    not see each other.

    Args:
        prompt, responses: tokens of each.
        trained: the weights get gradients; not so where adapters are trained beside them, which are too small to count.
        head: with the projection to the vocabulary; a critic has none.
    """
    written = sum(responses)
    weights = shape.linear * (prompt + written) + head * shape.vocabulary * shape.hidden * written
    pairs = prompt**2 / 2 + sum(length * (prompt + length / 2) for length in responses)
    attention = 4 * shape.layers * shape.queries * pairs
    return 2 * weights * (2 + trained) + 3 * attention
