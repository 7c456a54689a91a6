"""Whether a run may go on from its last checkpoint: what must be as it was, what may change and is said.

Pure reading: no model is loaded and nothing is written, so that the dry run asks the same. Each change that cannot be right is named
with its field, its old and its new value.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rlhf.config.base import Section
from rlhf.config.loader import UserError
from rlhf.config.policy import Dtype
from rlhf.config.settings import Settings
from rlhf.config.sft import SftSettings
from rlhf.data.conversations import ReadConversations
from rlhf.data.model_identity import model_digest
from rlhf.data.prompts import PromptSet
from rlhf.tracking.folder import check_run_folder
from rlhf.training.checkpoints import CHECKSUMS, Checkpoints
from rlhf.types import content_id

Tree = TypeVar("Tree", Settings, SftSettings)

RUN = "run"
"""Key of a checkpoint's state that holds what `remembered` returns."""
ONLINE: Mapping[str, type] = {"ledger": dict, "policy": dict, "shaping": list}
SUPERVISED: Mapping[str, type] = {"identity": dict}
"""Name of each part of a run's state, beside its step, and what JSON it is; `loop.state` and `training.supervised` collect the parts."""
MODEL, PROMPTS, TOKENS = "policy.model", "data.prompts", "data.prompts (as tokens)"
LAYOUT = "the checkpoint's files are divided and stored in that way"
FIXED = {
    "run.seed": "it gives the order of the data and every drawn response",
    "data.shuffle": "it gives the order of the data",
    "policy.dtype": "weights and optimizer states are stored in it",
    "policy.ranks": LAYOUT,
    "policy.zero_stage": LAYOUT,
    "policy.lora.rank": "other weights would learn",
    "policy.lora.alpha": "the same weights would make another policy",
    "policy.lora.target_modules": "other weights would learn",
    "policy.lora.quantize_base": "the adapted weights would be others",
    "algorithm.name": "another method keeps other state",
    "algorithm.reference": "another rule keeps other state",
    "algorithm.kl_placement": "the factor on the KL is part of the state",
    "training.batch_size": "it gives the order of the data",
}
"""Field -> why a run cannot go on when it changes."""
CONTENTS = {
    MODEL: "the model's configuration or weights are not those that the run began with, and it would become the reference",
    PROMPTS: "these are other prompts, or other weights, so some would be skipped or repeated",
    TOKENS: "the prompts become other tokens: the tokenizer, its chat template or a field of `data` has changed",
    "data.examples": "these are other examples, or other weights, so some would be skipped or repeated",
}
UNIMPORTANT = ("run.dir", "tracking.", "checkpoint.", "cluster.")
"""Fields that change nothing of what is learned."""


@dataclass(frozen=True)
class Start:
    """Where a run goes on.

    Attributes:
        step: steps already done.
        tag: of the checkpoint.
        state: what the run wrote into it.
        changes: settings that differ and may, in words.
        unchecked: what the checkpoint does not say, because an earlier version wrote it.
    """

    step: int
    tag: str
    state: dict[str, Any]
    changes: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()

    def words(self) -> Iterator[str]:
        """For people, a line each."""
        yield f"goes on after step {self.step}, from checkpoint {self.tag}"
        if self.changes:
            yield f"with other settings from there on: {'; '.join(self.changes)}"
        if self.unchecked:
            yield f"an earlier version wrote the checkpoint, which does not say: {', '.join(self.unchecked)}"


def remembered(settings: Section, contents: Mapping[str, str | None]) -> dict[str, Any]:
    """What a checkpoint keeps of the run that writes it, as JSON.

    Args:
        contents: field -> digest of what it names.
    """
    return {"settings": settings.model_dump(mode="json"), "contents": dict(contents)}


def run_contents(model: str, prompts: PromptSet) -> dict[str, str | None]:
    """The contents of an online run.

    Args:
        model: folder of the policy's starting weights.
    """
    ids, tokens = [prompt.id for prompt in prompts], hashlib.sha256()
    for prompt in prompts:
        tokens.update(json.dumps([prompt.token_ids, prompt.pair]).encode())
    return {
        MODEL: model_digest(model),
        PROMPTS: content_id([ids, prompts.shares] if prompts.shares else ids),
        TOKENS: tokens.hexdigest()[:16],
    }


def sft_contents(model: str, examples: ReadConversations) -> dict[str, str | None]:
    """The contents of supervised fine-tuning."""
    return {MODEL: model_digest(model), "data.examples": examples.fingerprint()}


def starting_point(settings: Tree, contents: Mapping[str, str | None], steps: int) -> Start | None:
    """The last checkpoint of a run that is to go on; None if nothing is recorded yet, so that it may begin.

    Args:
        settings: of now; `policy.dtype` may be `auto`, which keeps the run's type.
        contents: field -> digest of what it names now.
        steps: the last step of the run, as the settings stand.

    Raises:
        UserError: the folder holds no run; its checkpoint is damaged, missing, or of an earlier format that cannot be
            continued; or a setting has changed that cannot.
    """
    run_dir, field = settings.run.dir, "loop.steps" if isinstance(settings, Settings) else "training.epochs"
    check_run_folder(run_dir, resume=True)
    found = Checkpoints(run_dir, settings.checkpoint.keep).latest()
    if found is None:
        _require_nothing_recorded(run_dir)
        return None
    tag, state = found
    if RUN not in state and getattr(getattr(settings, "algorithm", None), "reference", None) == "extrapolated":
        raise UserError(
            f"run.dir={run_dir}: an earlier version wrote the checkpoint {tag}, and it does not hold the last iterate's fp32 weights, from "
            "which `algorithm.reference: extrapolated` moves on. Finish the run with that version, or start a new one in another run.dir."
        )
    before = state[RUN] if RUN in state else _of_an_earlier_version(state)
    parts = ONLINE if isinstance(settings, Settings) else SUPERVISED
    if not _whole(before) or not all(isinstance(state.get(part), form) for part, form in parts.items()):
        raise UserError(
            f"run.dir={run_dir}: checkpoints/{tag}/state.json is not what a run writes there. Restore the folder, or start a new run in "
            "another run.dir."
        )
    now = remembered(decided(settings, before["settings"].get("policy", {}).get("dtype")), contents)
    refused, changes = differences(before, now)
    if refused:
        raise UserError(
            f"run.dir={run_dir}: the checkpoint {tag} was made with other settings, so the run cannot go on where it stopped:\n"
            + "".join(f"  {line}\n" for line in refused)
            + "Restore them (config.yaml in the folder has them), or start a new run in another run.dir."
        )
    if state["step"] > steps:
        raise UserError(
            f"run.dir={run_dir}: the run ends after step {steps} ({field}), but its last complete checkpoint is {tag}. Raise {field}, or "
            "delete the newer checkpoints to go on from an earlier one."
        )
    unchecked = [] if CHECKSUMS in state else ["the checksums of its files"]
    unchecked += [name for name in now["contents"] if name not in before["contents"]]
    unchecked += [field for field in FIXED if field not in flat(before["settings"]) and field in flat(now["settings"])]
    return Start(state["step"], tag, state, tuple(changes), tuple(unchecked))


def _whole(run: Any) -> bool:
    """Whether it has the form of what `remembered` returns."""
    if not isinstance(run, dict) or not all(isinstance(run.get(part), dict) for part in ("settings", "contents")):
        return False
    digests = run["contents"].values()
    return isinstance(run["settings"].get("policy", {}), dict) and all(isinstance(one, str | None) for one in digests)


def _require_nothing_recorded(run_dir: str) -> None:
    metrics = Path(run_dir) / "metrics.jsonl"
    steps = len(metrics.read_bytes().splitlines()) if metrics.is_file() else 0
    if steps:
        raise UserError(
            f"run.dir={run_dir}: --resume found no complete checkpoint, but {steps} recorded step{'s' if steps > 1 else ''}, which a new "
            "beginning would delete. Start a new run in another run.dir (and save more often: checkpoint.every), or delete the folder."
        )


def decided(settings: Tree, dtype: Dtype | None) -> Tree:
    """With the type that the run has, where the settings leave it open, and one learning rate."""
    policy = settings.policy
    if policy.dtype != "auto":
        dtype = policy.dtype
    return settings if dtype is None else settings.model_copy(update={"policy": policy.computing_in(dtype)})


def _of_an_earlier_version(state: Mapping[str, Any]) -> dict[str, Any]:
    """What the state says that was written before it held all settings."""
    identity = state.get("identity", {})
    contents = {PROMPTS: state.get("data"), "data.examples": identity.get("data.examples")}
    fields = {
        ("run", "seed"): state.get("seed", identity.get("run.seed")),
        ("training", "batch_size"): identity.get("training.batch_size"),
    }
    settings: dict[str, Any] = {}
    for (section, field), value in fields.items():
        if value is not None:
            settings.setdefault(section, {})[field] = value
    return {"settings": settings, "contents": {name: value for name, value in contents.items() if value is not None}}


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], fixed: Mapping[str, str] = FIXED
) -> tuple[list[str], list[str]]:
    """Changes that are refused, and others, in words.

    Args:
        before, now: as `remembered` describes a run.
        fixed: field -> why it may not change; other contents never may.
    """
    old, new = flat(before["settings"]), flat(now["settings"])
    others = [name for name in CONTENTS if _both_differ(before["contents"].get(name), now["contents"].get(name))]
    if PROMPTS in others and TOKENS in others:
        others.remove(TOKENS)  # it follows
    refused = [f"{name}: {_became(old.get(name), new.get(name))}{CONTENTS[name]}" for name in others]
    differ = [field for field in new if field in old and old[field] != new[field]]
    refused += [f"{field}: {_became(old[field], new[field])}{fixed[field]}" for field in differ if field in fixed]
    # The fields of another method are no changes of their own.
    same_method = old.get("algorithm.name") == new.get("algorithm.name")
    changes = [
        f"{field} {old[field]!r} -> {new[field]!r}"
        for field in differ
        if field not in fixed
        and not field.startswith(UNIMPORTANT)
        and (same_method or not field.startswith("algorithm."))
    ]
    return refused, changes


def _became(old: Any, new: Any) -> str:
    return f"was {old!r}, is {new!r}; " if None not in (old, new) and old != new else ""


def _both_differ(old: str | None, new: str | None) -> bool:
    return old is not None and new is not None and old != new


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every field by its name, `section.field`; free mappings are values."""
    fields: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and (not prefix or f"{prefix}{name}" == "policy.lora"):
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[f"{prefix}{name}"] = value
    return fields
