"""Where a response ends: also at the token with which the chat template ends a turn, where that is not the end-of-sequence token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf.data.prompts import load_tokenizer
from rlhf.engines.arguments import EngineSpec
from rlhf.rollout import engine


class _Started(Exception):
    """Raised in place of starting vLLM, with the tokens that it was told to stop at."""


@pytest.mark.parametrize("chat_template", [True, False])
def test_an_engine_is_told_the_end_of_its_models_turns(
    tmp_path: Path, tiny_model: Path, tiny_settings: Any, run: Any, monkeypatch: pytest.MonkeyPatch, chat_template: bool
) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|unused_300|>{% endfor %}"
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(tmp_path)

    def start(spec: EngineSpec, *, in_process: bool, stops: list[int]) -> Any:
        raise _Started(stops)

    monkeypatch.setattr(engine, "start_engine", start)
    settings = tiny_settings(policy={"model": str(tmp_path)}, data={"chat_template": chat_template})
    end = tokenizer.convert_tokens_to_ids("<|unused_300|>") if chat_template else tokenizer.eos_token_id
    with pytest.raises(_Started, match=rf"\[{end}\]"):
        run(engine.RolloutEngine(settings, 0, True, "local", False).ready())
