"""`python examples/movie_reviews/gguf_checkpoint.py SOURCE.gguf TARGET`: GGUF to an ordinary bf16 checkpoint.

A program of its own, because the conversion is slow and large and its caller may not want torch. Refuses a result
without the chat template, or whose end of sequence is not the token that ends a turn: an engine would then never stop
a response.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

from rlhf.data.rendering import render


def convert(source: Path, target: Path) -> None:
    """Write the checkpoint and the tokenizer of `source` to the new folder `target`."""
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    turn = render(tokenizer, [{"role": "user", "content": "x"}], source.name)
    if tokenizer.eos_token is None or not turn.rstrip().endswith(tokenizer.eos_token):
        raise ValueError(
            f"the chat template ends a turn with {turn[-20:]!r}, the tokenizer with {tokenizer.eos_token!r}"
        )
    for settings in (model.config, model.generation_config):
        settings.eos_token_id = tokenizer.eos_token_id
        settings.pad_token_id = tokenizer.pad_token_id
        settings.bos_token_id = tokenizer.bos_token_id
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
