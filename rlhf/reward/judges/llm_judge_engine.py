"""A language model in a folder answers A or B, in an engine of the reward server's own (`rlhf.engines`).

Owns what that engine is to be, how a question becomes tokens, and which two tokens are the answers. Questions that wait together are
worked on together. On GPUs: designed, not yet run.
"""

from __future__ import annotations

import asyncio
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.cluster.devices import own_share
from rlhf.cluster.precision import look
from rlhf.config import Settings
from rlhf.data.architecture import architecture_of, check_folder
from rlhf.data.model_folder import find_model, read_config, read_tokenizer, size_of
from rlhf.data.rendering import check_template, encode, render
from rlhf.engines.arguments import EngineSpec
from rlhf.engines.engine import Engine, EngineDied
from rlhf.engines.environment import built_for_cpu, engine_environment, environment_set
from rlhf.engines.start import start_engine
from rlhf.reward.errors import RewardError
from rlhf.reward.judges.batching import BATCH_TOKENS_CPU, BATCH_TOKENS_GPU
from rlhf.types import Failed, TimedOut

LETTERS = ("A", "B")
SPARE_TOKENS = 16


class Reader:
    """Makes a question the tokens that the model reads, up to where its answer begins."""

    def __init__(self, tokenizer: Any, name: str):
        self._tokenizer, self._name = tokenizer, name
        self._chat = tokenizer.chat_template is not None

    def text(self, question: str) -> str:
        """Through the chat template if there is one, without room for a train of thought; else as it is."""
        if not self._chat:
            return question
        turns = [{"role": "user", "content": question}]
        return render(self._tokenizer, turns, "reward.path", {"enable_thinking": False}, prompt=True)

    def tokens(self, text: str) -> list[int]:
        return encode(self._tokenizer, text, rendered=self._chat)

    def answers(self, question: str) -> tuple[int, int]:
        """The tokens that stand for A and B after a question.

        Raises:
            RewardError: a letter is not one token there, or both are the same one.
        """
        text = self.text(question)
        blank = "" if self._chat or text[-1:].isspace() else " "
        before, found = self.tokens(text), []
        for letter in LETTERS:
            after = self.tokens(text + blank + letter)
            if len(after) != len(before) + 1 or after[:-1] != before:
                raise RewardError(
                    f"`reward.path`: for the tokenizer of {self._name}, `{blank}{letter}` after the question is not one token of its own, "
                    "so its probability cannot be read. End `reward.judge_prompt` in another way, or choose another model"
                )
            found.append(after[-1])
        if found[0] == found[1]:
            raise RewardError(f"`reward.path`: the tokenizer of {self._name} has the same token for A and B")
        return found[0], found[1]


@dataclass(frozen=True)
class Opened:
    """A model's folder before its weights are loaded.

    Attributes:
        answers: the tokens that stand for A and B.
        question_tokens: of the question about empty texts.
    """

    folder: str
    config: Any
    reader: Reader
    answers: tuple[int, int]
    question_tokens: int


def open_model(path: str, empty_question: str, weights: bool = True) -> Opened:
    """Configuration and tokenizer. The weight files' headers are compared with the architecture that is named, if transformers has it.

    Args:
        empty_question: the question about empty texts.
        weights: False fetches of a hub's model the small files only.

    Raises:
        UserError: no language model there, or a template that cannot be used.
        RewardError: no single tokens for the answers.
        WeightsError: tensors are missing, of another shape, or not part of the model.
    """
    from transformers import AutoModelForCausalLM

    folder = find_model(path, "`reward.path`", weights)
    config, tokenizer = read_config(folder, "`reward.path`"), read_tokenizer(folder, "`reward.path`")
    check_template(tokenizer, "`reward.path`")
    architecture = architecture_of(AutoModelForCausalLM, config)
    if architecture is not None and architecture.__name__ in (config.architectures or ()) and Path(folder).is_dir():
        check_folder(Path(folder), architecture, config, "`reward.path`")
    reader = Reader(tokenizer, path)
    return Opened(
        folder, config, reader, reader.answers(empty_question), len(reader.tokens(reader.text(empty_question)))
    )


class JudgeEngine:
    """An engine of which one token is wanted: A or B."""

    def __init__(self, engine: Engine, opened: Opened, longest: int, fingerprint: str):
        self._engine, self._reader, self._answers = engine, opened.reader, opened.answers
        self._longest, self._fingerprint = longest, fingerprint

    async def first_wins(self, question: str, deadline_s: float) -> float | Failed | TimedOut:
        ids = self._reader.tokens(self._reader.text(question))
        if len(ids) >= self._longest:  # without any of its prompt
            return Failed(
                f"the question and both responses are {len(ids)} tokens, and the judge reads {self._longest - 1}"
            )
        try:
            a, b = await asyncio.wait_for(self._engine.choose(ids, self._answers), deadline_s)
        except TimeoutError:
            return TimedOut(deadline_s)
        except EngineDied as error:
            return Failed(f"the judge's engine has died: {error}")
        return 1 / (1 + math.exp(b - a)) if b - a < 700 else 0.0

    def fits(self, question: str) -> bool:
        return len(self._reader.tokens(self._reader.text(question))) < self._longest

    def fingerprint(self) -> str:
        """Hash of the weights as the engine loaded them; nothing changes them afterwards."""
        return self._fingerprint

    def close(self) -> None:
        """End the engine's processes."""
        self._engine.close()


async def start_judge(opened: Opened, settings: Settings, local: bool) -> JudgeEngine:
    """Load the model; takes tens of seconds.

    Args:
        local: in the driver's process (debug mode).

    Raises:
        RewardError: vLLM cannot run the model, or there is no GPU for it.
    """
    longest = _longest(settings, opened)
    with environment_set(judge_environment(settings, local)):
        cpu = built_for_cpu()
        if not cpu and settings.reward.gpus == 0:
            raise RewardError(
                "`reward.gpus`: the vLLM that is installed here is built for GPUs, so an LLM judge needs one. Set `reward.gpus: 1`, or "
                "ask an endpoint (`reward.url`)"
            )
        try:
            # Not in this process, which in debug mode is the driver's.
            engine = start_engine(judge_spec(settings, opened, longest, cpu), in_process=False)
        except ValueError as error:
            raise RewardError(f"`reward.path`: vLLM refuses {opened.folder}: {error}") from None
    return JudgeEngine(engine, opened, longest, await engine.weight_digest())


def _longest(settings: Settings, opened: Opened) -> int:
    """Tokens of question and answer. Twice what the texts have in the policy's tokens, since the judge's may be shorter."""
    texts = settings.data.max_prompt_tokens + 2 * settings.rollout.max_tokens
    needed = opened.question_tokens + 2 * texts + SPARE_TOKENS
    context = getattr(opened.config.get_text_config(), "max_position_embeddings", None)
    return needed if context is None else min(needed, context)


def judge_spec(settings: Settings, opened: Opened, longest: int, cpu: bool) -> EngineSpec:
    """The engine of a judge that reads and writes up to `longest` tokens."""
    reward = settings.reward
    text, usual = opened.config.get_text_config(), BATCH_TOKENS_CPU if cpu else BATCH_TOKENS_GPU
    # In the checkpoint's own precision, unless the CPU only emulates it; vLLM's `auto` would round one in fp32.
    fp32 = _in_fp32(text) or (cpu and not look(gpu=False).native)
    batch = max(reward.batch_tokens or usual, longest)
    return EngineSpec(
        model=opened.folder,
        dtype="fp32" if fp32 else "auto",
        devices=_devices(settings),
        gpu=not cpu,
        max_model_len=longest,
        max_num_seqs=reward.batch_size,
        gpu_memory=0.9 * min(1.0, reward.gpus or 1.0),
        cpu_cache_bytes=_cache_bytes(text, 2 * batch, 4 if fp32 else 2),
        max_batched_tokens=batch,
    )


def _in_fp32(config: Any) -> bool:
    return str(config.dtype).removeprefix("torch.") == "float32"


def _cache_bytes(config: Any, tokens: int, size: int) -> int:
    """Keys and values of so many tokens, in numbers of `size` bytes."""
    heads = size_of(config, "num_key_value_heads") or config.num_attention_heads
    width = size_of(config, "head_dim") or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * size * tokens


def judge_environment(settings: Settings, local: bool) -> dict[str, str]:
    """What the engine's processes need in their environment. In debug mode the driver's threads are left alone."""
    variables = engine_environment(settings.cluster, _devices(settings), local)
    if local:
        return variables
    threads = settings.cluster.threads or own_share(os.environ, settings.reward.servers)
    return variables | {"OMP_NUM_THREADS": str(threads)}


def _devices(settings: Settings) -> int:
    return max(1, int(settings.reward.gpus))
