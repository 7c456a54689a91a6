"""A language model of a few hundred kilobytes, made on the spot: random weights, one token per byte, a chat template.

Owns: the recipe. It is deterministic, so every machine makes the same weights. The model knows nothing: it serves to run the
whole system, with the real engines, in seconds. Used by `asset:tiny-llama` and by the tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 320  # 256 bytes, the special tokens below, and room to a multiple of 64
PAD, EOS, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tiny_model(folder: str | Path) -> None:
    """Write a two-layer Llama (hidden size 64, vocabulary 320, 512 positions, fp32) and its tokenizer into `folder`.

    Any text tokenises to its UTF-8 bytes, so nothing is ever unknown; the chat template adds one token per role and
    one at the end of each message, which is also the end-of-sequence token. The output is sharp enough that likely and
    unlikely tokens differ (an untrained model would be uniform, and tests of log-probs would see nothing).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def tiny_tokenizer() -> Any:
    """A token for each byte, marks of a chat, and names for what is left of the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([PAD, EOS, SYSTEM, USER, ASSISTANT])
    # Names for the remaining rows of the embedding, so that whatever the model samples can be decoded.
    core.add_special_tokens([f"<|unused_{index}|>" for index in range(core.get_vocab_size(), VOCABULARY)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=EOS, model_max_length=512)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=256,
        eos_token_id=257,
        bos_token_id=None,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):  # leave the caller's random state as it was
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()
