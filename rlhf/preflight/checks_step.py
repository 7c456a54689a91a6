"""One step of the real loop at the limits of all lengths, so that what runs out of memory does so now.

Prompts of `data.max_prompt_tokens`, responses that do not stop before `rollout.max_tokens`, and as many of them as fill a micro-batch on
every rank. The loop itself is handed in: this room does not know it.
"""

from __future__ import annotations

import json
import random
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlhf.config import Settings, UserError
from rlhf.config.checks import largest_assignment
from rlhf.config.reward import RewardSettings
from rlhf.data.prompts import make_prompt
from rlhf.data.rendering import renderer
from rlhf.preflight.finding import Finding

Train = Callable[[Settings], None]
"""Runs the loop that the settings describe, with responses of full length."""

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
SPARE = 4
"""Tokens that a data set's response is kept below the limit, for those that the template puts around it."""
MEMORY_WORDS = ("out of memory", "outofmemory", "no available memory", "oom", "cannot allocate memory")


def by_digest(prompt: str, response: str, payload: Mapping[str, Any]) -> float:
    """A reward that costs nothing and hardly ever ties, so that there is something to learn from in the trial step."""
    return zlib.crc32(response.encode()) / 2**32


def by_digest_pair(prompt: str, a: str, b: str, payload: Mapping[str, Any]) -> float:
    """The same for two responses."""
    return 0.5 + (by_digest(prompt, a, payload) - by_digest(prompt, b, payload)) / 2


def worst_case(settings: Settings, tokenizer: Any, folder: Path) -> Settings:
    """The settings of the trial step; writes its prompts into `folder`.

    Reward models are the real ones. Any other judge is replaced by `by_digest`: it uses no memory of a device, and might find nothing
    to tell apart in random text, or miss what a prompt's line should have told it.
    """
    per_rank = max(1, settings.policy.micro_batch_tokens // largest_assignment(settings))
    count = min(settings.loop.prompts_per_step, per_rank * settings.policy.ranks)
    prompts = folder / "prompts.jsonl"
    rows = (_row(settings, tokenizer, number) for number in range(count))
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    evaluates = settings.data.eval_prompts is not None
    changes: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "run")},
        "data": {"prompts": str(prompts), "eval_prompts": str(prompts) if evaluates else None, "shuffle": False},
        "policy": {"warmup_steps": 0},
        "loop": {
            "steps": 1,
            "prompts_per_step": count,
            "updates_per_step": 1,
            "epochs_per_step": 1,
            "eval_every": 0,
            "eval_limit": settings.policy.ranks,
        },
        "checkpoint": {"every": 0, "export": False},
        "tracking": {"wandb": "off", "console": "off"},
        "reward": _trial_reward(settings.reward),
    }
    # No response of the trial ends by itself, and the policy is to learn in the one step that there is.
    off = {"critic_warmup_steps": 0, "mask_truncated": False}
    changes["algorithm"] = {field: value for field, value in off.items() if hasattr(settings.algorithm, field)}
    sections = {name: getattr(settings, name).model_copy(update=update) for name, update in changes.items()}
    return settings.model_copy(update=sections)


def _trial_reward(reward: RewardSettings) -> dict[str, Any]:
    """What is changed in `reward`. Nothing of it knows the prompts of the trial."""
    changes: dict[str, Any] = {"transforms": [], "reference_scores": None}
    if all(source.model is not None for _, source in reward.sources()):
        return changes | {"members": [one.model_copy(update={"transforms": []}) for one in reward.members]}
    kind, name = ("pairwise_function", "by_digest_pair") if reward.compares else ("function", "by_digest")
    own: dict[str, Any] = {"kind": kind, "path": f"{__name__}:{name}", "url": None, "members": [], "canaries": None}
    return changes | own


def _row(settings: Settings, tokenizer: Any, number: int) -> dict[str, str]:
    """A prompt of random letters, as long as it may be, with a pair of responses for methods that learn from them."""
    rng, conversations = random.Random(number), renderer(tokenizer, settings.data)

    def prompt_tokens(text: str) -> int:
        return len(make_prompt("doctor", {"prompt": text}, conversations).token_ids)

    def response_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids) + SPARE

    row = {"prompt": longest_text(rng, prompt_tokens, settings.data.max_prompt_tokens)}
    if (
        getattr(settings.algorithm, "pairs", None) == "dataset"
        or getattr(settings.algorithm, "ranked_with", None) == "dataset"
    ):
        row |= {
            name: longest_text(rng, response_tokens, settings.rollout.max_tokens) for name in ("chosen", "rejected")
        }
    return row


def longest_text(rng: random.Random, tokens: Callable[[str], int], limit: int) -> str:
    """Random letters and spaces that come near `limit` tokens and do not exceed it, except that there is at least one letter."""
    text = "".join(rng.choices(ALPHABET + "    ", k=8 * limit)).strip()
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tokens(text[:middle]) <= limit else (low, middle - 1)
    return text[:low]


def check_step(settings: Settings, tokenizer: Any, train: Train) -> Finding:
    """Run the trial step in a temporary folder and say how it went."""
    with tempfile.TemporaryDirectory(prefix="rlhf-doctor-") as folder:
        trial = worst_case(settings, tokenizer, Path(folder))
        try:
            train(trial)
        except UserError as error:
            return Finding("worst-case step", "failed", str(error), "put right what the message names")
        except Exception as error:  # noqa: BLE001 - whatever ends the trial is what it found out
            return broken_step(error)
        return completed_step(trial, Path(trial.run.dir) / "metrics.jsonl")


def completed_step(trial: Settings, metrics: Path) -> Finding:
    """What the step's own record says."""
    line = json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])
    prompts, trained = trial.loop.prompts_per_step, line["loop/prompts_trained"]
    seen = (
        f"{prompts} prompts of up to {trial.data.max_prompt_tokens} tokens, {line['rollout/tokens']:,.0f} response tokens at the full "
        f"{trial.rollout.max_tokens} each: {line['time/step']:.1f} s, {trained:.0f} prompts learned from"
    )
    if trained:
        return Finding("worst-case step", "ok", seen)
    return Finding(
        "worst-case step",
        "warning",
        f"{seen}, so the learning step was not tried",
        "the method built nothing from these responses (ties?): see `algorithm` and the reward",
    )


def broken_step(error: BaseException) -> Finding:
    """What ended the step, and what to do: less of everything if memory ran out."""
    words = f"{type(error).__name__}: {error}"
    first = next((line for line in reversed(words.splitlines()) if line.strip()), words) if "\n" in words else words
    if any(sign in words.lower() for sign in MEMORY_WORDS):
        remedy = (
            "lower `policy.micro_batch_tokens` or set `policy.gradient_checkpointing: true`, raise `policy.zero_stage`, offload "
            "(`policy.offload_optimizer: cpu`); for an engine lower `rollout.gpu_memory_utilization` or raise "
            "`rollout.tensor_parallel_size`; `rlhf plan` shows what takes how much"
        )
        return Finding("worst-case step", "failed", f"out of memory: {first}", remedy)
    return Finding(
        "worst-case step",
        "failed",
        first,
        "the same would end the run: docs/troubleshooting.md starts from error messages, and `rlhf train --debug` reaches the place in one "
        "process",
    )
