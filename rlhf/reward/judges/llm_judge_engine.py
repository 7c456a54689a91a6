"""A language model in a folder answers A or B, in a vLLM engine of the reward server's own. Every vLLM call of the reward room.

Owns the engine, how a question becomes tokens, and which two tokens are the answers. Written for vLLM 0.32. The engine's core is a
process of its own, in debug mode too; questions that wait together are worked on together. On GPUs: designed, not yet run.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.cluster.devices import memory_env, own_share
from rlhf.cluster.precision import look
from rlhf.config import Settings
from rlhf.data.architecture import architecture_of, check_folder
from rlhf.data.model_folder import find_model, read_config, read_tokenizer, size_of
from rlhf.data.rendering import check_template, encode, render
from rlhf.engines.environment import executor, process_environment
from rlhf.reward.errors import RewardError
from rlhf.reward.judges.judge import BATCH_TOKENS_CPU, BATCH_TOKENS_GPU
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


class Engine:
    """vLLM's `AsyncLLM`, of which one token is wanted: A or B."""

    def __init__(self, llm: Any, opened: Opened, longest: int, fingerprint: str):
        from vllm import SamplingParams

        self._llm, self._reader, self._answers = llm, opened.reader, opened.answers
        self._longest, self._fingerprint = longest, fingerprint
        self._numbers = itertools.count()
        # With all other tokens ruled out, the log-probs of the two are those of the choice between them.
        self._parameters = SamplingParams(
            max_tokens=1,
            temperature=1.0,
            seed=None,
            logprobs=2,
            allowed_token_ids=list(opened.answers),
            detokenize=False,
        )

    async def first_wins(self, question: str, deadline_s: float) -> float | Failed | TimedOut:
        ids = self._reader.tokens(self._reader.text(question))
        if len(ids) >= self._longest:  # without any of its prompt
            return Failed(
                f"the question and both responses are {len(ids)} tokens, and the judge reads {self._longest - 1}"
            )
        try:
            return await asyncio.wait_for(self._ask(ids), deadline_s)
        except TimeoutError:
            return TimedOut(deadline_s)

    def fits(self, question: str) -> bool:
        return len(self._reader.tokens(self._reader.text(question))) < self._longest

    async def _ask(self, ids: list[int]) -> float | Failed:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            request = f"judge-{next(self._numbers)}"
            async for output in self._llm.generate({"prompt_token_ids": ids}, self._parameters, request):
                final = output
        except EngineDeadError as error:
            return Failed(f"the judge's vLLM engine has ended: {error}")
        a, b = (final.outputs[0].logprobs[0][token].logprob for token in self._answers)
        return 1 / (1 + math.exp(b - a)) if b - a < 700 else 0.0

    def fingerprint(self) -> str:
        """Hash of the weights as the engine loaded them; nothing changes them afterwards."""
        return self._fingerprint

    def close(self) -> None:
        """End the engine's processes."""
        self._llm.shutdown()


async def start_engine(opened: Opened, settings: Settings, local: bool) -> Engine:
    """Load the model; takes tens of seconds.

    Args:
        local: in the driver's process (debug mode).

    Raises:
        RewardError: vLLM cannot run the model, or there is no GPU for it.
    """
    longest = _longest(settings, opened)
    with _environment(_variables(settings, local)):
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        cpu = current_platform.is_cpu()
        if not cpu and settings.reward.gpus == 0:
            raise RewardError(
                "`reward.gpus`: the vLLM that is installed here is built for GPUs, so an LLM judge needs one. Set `reward.gpus: 1`, or "
                "ask an endpoint (`reward.url`)"
            )
        arguments = _arguments(settings, opened, longest, cpu)
        try:
            llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        except ValueError as error:
            raise RewardError(f"`reward.path`: vLLM refuses {opened.folder}: {error}") from None
    return Engine(llm, opened, longest, _digest(await llm.compute_weight_checksums()))


def _longest(settings: Settings, opened: Opened) -> int:
    """Tokens of question and answer. Twice what the texts have in the policy's tokens, since the judge's may be shorter."""
    texts = settings.data.max_prompt_tokens + 2 * settings.rollout.max_tokens
    needed = opened.question_tokens + 2 * texts + SPARE_TOKENS
    context = getattr(opened.config.get_text_config(), "max_position_embeddings", None)
    return needed if context is None else min(needed, context)


def _arguments(settings: Settings, opened: Opened, longest: int, cpu: bool) -> dict[str, Any]:
    reward = settings.reward
    text, usual = opened.config.get_text_config(), BATCH_TOKENS_CPU if cpu else BATCH_TOKENS_GPU
    # In the checkpoint's own precision, unless the CPU only emulates it; vLLM's `auto` would round one in fp32.
    fp32 = _in_fp32(text) or (cpu and not look(gpu=False).native)
    batch = max(reward.batch_tokens or usual, longest)
    return {
        "model": opened.folder,
        "dtype": "float32" if fp32 else "auto",
        "max_model_len": longest,
        "max_num_seqs": reward.batch_size,
        "max_num_batched_tokens": batch,
        "enforce_eager": cpu,
        "tensor_parallel_size": _devices(settings),
        "distributed_executor_backend": executor(_devices(settings)),
        "gpu_memory_utilization": 0.9 * min(1.0, reward.gpus or 1.0),
        "kv_cache_memory_bytes": _cache_bytes(text, 2 * batch, 4 if fp32 else 2) if cpu else None,
        "logprobs_mode": "processed_logprobs",
        "seed": 0,
        "disable_log_stats": True,
    }


def _in_fp32(config: Any) -> bool:
    return str(config.dtype).removeprefix("torch.") == "float32"


def _cache_bytes(config: Any, tokens: int, size: int) -> int:
    """Keys and values of so many tokens, in numbers of `size` bytes."""
    heads = size_of(config, "num_key_value_heads") or config.num_attention_heads
    width = size_of(config, "head_dim") or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * size * tokens


def _variables(settings: Settings, local: bool) -> dict[str, str]:
    """What the engine's processes need in their environment. In debug mode the driver's threads are left alone."""
    variables = process_environment(_devices(settings), local)
    if local:
        return variables
    threads = settings.cluster.threads or own_share(os.environ, settings.reward.servers)
    return variables | memory_env(settings.cluster) | {"OMP_NUM_THREADS": str(threads)}


def _devices(settings: Settings) -> int:
    return max(1, int(settings.reward.gpus))


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Inside, and for processes that are started inside, these variables are set."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _digest(checksums: list[dict[str, str]]) -> str:
    pairs = sorted(pair for worker in checksums for pair in worker.items())
    return hashlib.sha256(repr(pairs).encode()).hexdigest()[:16]
