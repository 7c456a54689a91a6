"""The plan of a supervised run in words, for `rlhf sft ... --dry-run`. Reads configuration, tokenizer and examples; loads no weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlhf.cluster import uses_gpu
from rlhf.cluster.precision import Choice, choose_here, settled
from rlhf.config.data import in_words
from rlhf.config.sft import SftSettings, one_rank
from rlhf.config.sft_checks import check_warm_up
from rlhf.data.conversations import ReadConversations, read_examples
from rlhf.data.model_folder import find_model
from rlhf.preflight.finding import PlanError
from rlhf.preflight.inputs import open_model
from rlhf.preflight.machine import check_rank_devices, check_room
from rlhf.preflight.plan import dtype_line, mixture_lines, start_lines
from rlhf.tracking.folder import check_run_folder
from rlhf.tracking.record import recorded_dtype
from rlhf.training.resume import sft_contents, starting_point
from rlhf.training.sft import Conversations
from rlhf.training.shapes import ModelShape, model_shape
from rlhf.training.supervised import Course


def read_model(settings: SftSettings) -> tuple[str, ModelShape]:
    """The model's type and sizes.

    Raises:
        UserError: it is none, or its context does not hold the longest example.
    """
    config, _ = open_model(settings, find_model(settings.policy.model, "`policy.model`", weights=False))
    try:
        shape = model_shape(config)
    except ValueError as error:
        raise PlanError(
            f"`policy.model`: `{settings.policy.model}` is not a causal language model in Hugging Face format: {error}"
        ) from None
    if shape.context is not None and settings.data.max_tokens > shape.context:
        raise PlanError(
            f"`data.max_tokens`: examples of up to {settings.data.max_tokens} tokens, but the model's context holds {shape.context}. "
            f"Set `data.max_tokens` to {shape.context} or less"
        )
    return config.model_type, shape


@dataclass(frozen=True)
class Ready:
    """What was found before a supervised run.

    Attributes:
        settings: with what was left open decided.
        asked: as they were given, or as debug mode has them.
        kind: the model's type.
        seen: what this machine has of what the run needs, a line each.
    """

    settings: SftSettings
    asked: SftSettings
    choice: Choice
    kind: str
    shape: ModelShape
    examples: ReadConversations
    held_out: ReadConversations | None
    course: Course
    seen: Sequence[str]


def ready_sft(settings: SftSettings, debug: bool = False, resume: bool = False) -> Ready:
    """Everything that is looked at before a supervised run starts, as `ready` has it for an online one.

    Args:
        debug: one rank in this process.
        resume: the run in `run.dir` goes on.

    Raises:
        UserError: the run cannot work as configured.
    """
    check_run_folder(settings.run.dir, resume)
    if debug:
        settings = one_rank(settings)
    asked, choice = settings, choose_here(settings, recorded_dtype(settings.run.dir) if resume else None)
    settings = settled(settings, choice)
    seen = list(check_rank_devices(settings, debug))
    kind, shape = read_model(settings)
    examples, held_out = read_examples(settings.policy.model, settings.data)
    training = settings.training
    seed = settings.run.seed
    course = Course(Conversations(examples, seed), training.batch_size, training.epochs, seed)
    check_warm_up(settings, course.updates)
    seen.append(check_room(settings, shape, course.updates, resume))
    return Ready(settings, asked, choice, kind, shape, examples, held_out, course, seen)


def describe_sft(settings: SftSettings, debug: bool = False, resume: bool = False) -> str:
    """The plan, after everything that can be validated without weights has been. Arguments and errors as those of `ready_sft`."""
    found = ready_sft(settings, debug, resume)
    settings = found.settings
    going_on: list[str] = []
    if resume:
        contents = sft_contents(find_model(settings.policy.model, "`policy.model`", weights=False), found.examples)
        going_on = start_lines(starting_point(found.asked, contents, found.course.updates))
    parts = {
        "Run": _run(settings, going_on),
        "Examples": _examples(settings, found.examples, found.held_out),
        "Training": _training(settings, found.choice, found.kind, found.shape, found.course),
        "Checked": found.seen,
    }
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in parts.items())


def _run(settings: SftSettings, going_on: Sequence[str]) -> Iterator[str]:
    folder, checkpoint = os.path.abspath(settings.run.dir), settings.checkpoint
    yield f"folder {folder}; seed {settings.run.seed}"
    yield from going_on
    every = (
        f"every {checkpoint.every} optimizer steps, the last {checkpoint.keep} kept" if checkpoint.every else "never"
    )
    yield f"checkpoints: {every}; export: {'yes' if checkpoint.export else 'no'}"


def _examples(settings: SftSettings, examples: ReadConversations, held_out: ReadConversations | None) -> Iterator[str]:
    yield f"{in_words(settings.data.examples)}: {_count(examples)}"
    yield from mixture_lines(
        settings.data.examples, examples.shares, len(examples.conversations) * settings.training.epochs
    )
    if held_out is None or settings.data.eval_examples is None:
        yield "held-out examples: none, so nothing is measured"
    else:
        yield f"held-out, {in_words(settings.data.eval_examples)}: {_count(held_out)}"


def _count(read: ReadConversations) -> str:
    lengths = [len(conversation.token_ids) for conversation in read.conversations]
    left_out = "".join(f"; {count} left out ({reason})" for reason, count in read.dropped.items())
    return (
        f"{len(lengths):,} examples of up to {max(lengths)} tokens, {sum(lengths):,} in all, of which {read.learned_tokens:,} are "
        f"learned{left_out}"
    )


def _training(settings: SftSettings, choice: Choice, kind: str, shape: ModelShape, course: Course) -> Iterator[str]:
    policy, training = settings.policy, settings.training
    yield f"{policy.model}, {kind}, {shape.parameters / 1e6:,.1f} M parameters"
    if policy.lora.rank:
        yield f"LoRA of rank {policy.lora.rank} learns; the rest is frozen"
    yield (
        f"{course.updates} optimizer steps: {training.epochs} epoch(s) of {course.updates_per_epoch}, {training.batch_size} examples each, "
        f"on {policy.ranks} rank(s) on {'GPU' if uses_gpu(settings.cluster) else 'CPU'}, ZeRO stage {policy.zero_stage}"
    )
    yield dtype_line(choice, policy.learning_rate, settings.cluster.address)
    yield (
        f"the learning rate is {policy.schedule}, with {policy.warmup_steps} steps of warm-up; at most {policy.micro_batch_tokens} tokens "
        "in a forward pass"
    )
