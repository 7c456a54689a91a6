"""How a response is drawn from the policy's distribution."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

MIXTURE_ARGUMENT = "mixture"
"""Under this name a request carries `Sampling.mixture` into vLLM (`SamplingParams.extra_args`)."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of one prompt's responses.

    Attributes:
        n: number of responses.
        max_tokens: longest response, in tokens.
        temperature: 0 is greedy.
        top_p: nucleus sampling; 1 is off.
        top_k: sample among the k likeliest tokens; 0 is off.
        seed: with the same seed, prompt and weights, the same responses are drawn. Change it with every step, or a
            prompt that comes back draws the same random numbers again.
        source: marks the completions.
        mixture: 0 is the policy, 1 its partner, between them policy^(1 - mixture) partner^mixture, token by token. The
            temperature applies to the mixture. Above 0 it needs engines that mix.
        ignore_eos: go on after the end-of-sequence token, up to `max_tokens` (`rlhf doctor` looks for the memory that this takes).
        urgent: the engine begins with it before all requests that are not urgent and have not begun.
    """

    n: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    source: str = "policy"
    mixture: float = 0.0
    ignore_eos: bool = False
    urgent: bool = False

    def request_seed(self, prompt_id: str) -> int:
        """The engine's seed for this prompt. vLLM adds the response's index to it, so neighbours must not occur."""
        digest = hashlib.sha256(f"{self.seed}:{self.source}:{prompt_id}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 2  # 62 bits: index included, it stays a signed 64-bit integer
