"""Run folders that `--resume` is asked to go on from, of which one file is damaged."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.training.checkpoints import sha256
from tests.bad_input.place import Place
from tests.bad_input.walk import Case

Damage = Callable[[Path], object]
STEP = "checkpoints/step-000002"
STATE, SUMS = f"{STEP}/state.json", f"{STEP}/SHA256SUMS"
WEIGHTS = f"{STEP}/mp_rank_00_model_states.pt"


def _made(place: Place) -> Path:
    """A run folder after two steps, but for its weights: what the driver writes, by the driver's own code."""
    import torch

    from rlhf.config import load, show
    from rlhf.loop.run import Training
    from rlhf.training.checkpoints import Checkpoints

    folder = place.work / "runs" / "walk"
    saved = place.folder / "saved"
    if not saved.exists():
        settings = load("run.yaml")
        training = Training(settings, debug=False, resume=False)
        checkpoints = Checkpoints(str(folder), settings.checkpoint.keep)
        (checkpoints.folder / checkpoints.tag(2)).mkdir(parents=True)
        torch.save({"module": {}}, folder / WEIGHTS)
        checkpoints.complete("step-000002", training.state.state() | {"step": 2})
        (folder / "manifest.json").write_text('{"run_id": "walk", "resumed": []}')
        (folder / "config.yaml").write_text(show(settings))
        (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
        shutil.move(folder, saved)
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    return folder


def _write(name: str, content: str | bytes) -> Damage:
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content

    def damage(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)

    return damage


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def _state(*path: str, value: Any = ...) -> Damage:
    """One value of the state; `...` removes it. Its checksum is right, as of one who has written it so."""

    def damage(folder: Path) -> None:
        state = json.loads((folder / STATE).read_text())
        inner = state
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        if value is ...:
            del inner[path[-1]]
        (folder / STATE).write_text(json.dumps(state))
        sums = (folder / SUMS).read_text()
        (folder / SUMS).write_text(re.sub(r"\w{64}(?=  state\.json)", sha256(folder / STATE), sums))

    return damage


def _without(name: str) -> Damage:
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def _folder(name: str) -> Damage:
    return lambda folder: ((folder / name).unlink(), (folder / name).mkdir())


WRONG: Mapping[str, Any] = {
    "null": None,
    "text": "x",
    "list": [],
    "number": 3,
    "negative": -1,
    "huge": 10**30,
    "nested": {"a": {"b": []}},
}


def _damages() -> Iterator[tuple[str, Damage]]:
    yield "folder/missing", lambda folder: shutil.rmtree(folder)
    yield "folder/empty", lambda folder: (shutil.rmtree(folder), folder.mkdir())
    yield "folder/a-file", lambda folder: (shutil.rmtree(folder), folder.write_text("x"))
    yield "manifest/missing", _without("manifest.json")
    yield "manifest/folder", _folder("manifest.json")
    for name in ("manifest.json", STATE):
        what = "manifest" if name == "manifest.json" else "state"
        yield f"{what}/empty", _write(name, "")
        yield f"{what}/half", _write(name, '{"step": 2, "led')
        yield f"{what}/a-list", _write(name, "[]")
        yield f"{what}/null", _write(name, "null")
        yield f"{what}/number", _write(name, "3")
        yield f"{what}/binary", _write(name, bytes(range(256)))
        yield f"{what}/deep", _write(name, "[" * 100_000)
        yield f"{what}/deep-closed", _write(name, '{"a":' * 100_000 + "1" + "}" * 100_000)
        yield f"{what}/int-of-5000-digits", _write(name, '{"step": ' + "9" * 5000 + "}")
        yield f"{what}/nan", _write(name, '{"step": NaN}')
    for how, text in {
        "empty": "",
        "not-yaml": "{",
        "list": "[]",
        "binary": "\x00\x01",
        "dtype": "policy: {dtype: banana}",
    }.items():
        yield f"config/{how}", _write("config.yaml", text)
    yield "state/empty-object", _write(STATE, "{}")
    yield "state/folder", _folder(STATE)
    yield "state/fifo", lambda folder: ((folder / STATE).unlink(), os.mkfifo(folder / STATE))
    yield "weights/missing", _without(WEIGHTS)
    yield "weights/empty", _write(WEIGHTS, b"")
    yield "weights/half", _bytes(WEIGHTS, lambda data: data[: len(data) // 2])
    yield "weights/longer", _bytes(WEIGHTS, lambda data: data + b"\0")
    yield "weights/one-byte-changed", _bytes(WEIGHTS, lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    yield "weights/folder", _folder(WEIGHTS)
    yield "weights/pickle", _write(WEIGHTS, b"cos\nsystem\n(S'touch created'\ntR.")
    yield "step/removed", _without(STEP)
    yield "step/renamed", lambda folder: os.rename(folder / STEP, folder / "checkpoints/step-000009")
    yield "step/of-no-number", lambda folder: os.rename(folder / STEP, folder / "checkpoints/step-x")
    for key in ("step", "ledger", "run", "shaping", "policy", "files"):
        yield f"state/without-{key}", _state(key)
        for how, value in WRONG.items():
            if (key, how) not in (("step", "number"),):
                yield f"state/{key}-{how}", _state(key, value=value)
    for key in ("settings", "contents"):
        yield f"state/run-without-{key}", _state("run", key)
        for how, value in WRONG.items():
            yield f"state/run-{key}-{how}", _state("run", key, value=value)
    for how, value in WRONG.items():
        yield f"state/seed-{how}", _state("run", "settings", "run", "seed", value=value)
        yield f"state/policy-settings-{how}", _state("run", "settings", "policy", value=value)
        yield f"state/prompts-digest-{how}", _state("run", "contents", "data.prompts", value=value)
    yield "state/file-above-the-folder", _state("files", value={"../../../../etc/passwd": 3})
    yield "state/file-absolute", _state("files", value={"/etc/passwd": 3})
    yield "state/file-nul", _state("files", value={"a\0b": 3})


MAY = {
    "config/dtype": "policy.dtype is given, so that of the record is not asked for",
    "state/shaping-list": "what a run without transforms writes",
    "state/ledger-nested": "its sums are right, and what is in it the ledger reads when the run goes on",
    "state/policy-nested": "its sums are right, and no key of it is asked for",
    "state/run-settings-nested": "fields that it does not say are named by the dry run",
    "state/policy-settings-nested": "fields that it does not say are named by the dry run",
    "state/prompts-digest-null": "a checkpoint of an earlier version does not say, and the dry run says so",
    "state/without-run": "a checkpoint of an earlier version does not say, and the dry run says so",
}
OVERRIDES = {
    "fewer-steps": ["loop.steps=1"],
    "another-seed": ["run.seed=3"],
    "another-model": ["policy.model=judge"],
    "another-method": ["algorithm.name=ipo_md"],
    "more-ranks": ["policy.ranks=2"],
    "another-stage": ["policy.zero_stage=2"],
    "other-prompts": ["data.prompts=pairs.jsonl"],
    "another-order": ["data.shuffle=false"],
    "lora": ["policy.lora.rank=4"],
    "elsewhere": ["run.dir=elsewhere"],
    "tilde": ["run.dir=~/elsewhere"],
}


def _resume(damage: Damage, *overrides: str) -> Callable[[Place], Sequence[str]]:
    def prepare(place: Place) -> Sequence[str]:
        damage(_made(place))
        return ["train", "run.yaml", *overrides, "--resume", "--dry-run"]

    return prepare


def cases(every: bool = False) -> Iterator[Case]:
    about = ("run.dir", "state.json", "manifest.json", "step-", "mp_rank")
    for name, damage in _damages():
        again = name.startswith("state/")  # of which most differ in the checksum alone
        yield Case(f"checkpoint/{name}", _resume(damage), about, right=MAY.get(name), again=again)
    for name, overrides in OVERRIDES.items():
        yield Case(
            f"checkpoint/with/{name}",
            _resume(lambda folder: None, *overrides),
            (*about, overrides[0].split("=")[0], "judge"),
        )
    more = _resume(lambda folder: None, "loop.steps=3")
    yield Case("checkpoint/good", more, about, right="a good checkpoint, and more steps", required=True)
