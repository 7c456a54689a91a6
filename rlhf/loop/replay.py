"""A run that kept its responses is run again from them: `rlhf train CONFIG --replay RUN`.

The loop and the policy are the real ones. In place of engines and judges stand two that give back what was recorded, in the order in which
the recorded run took it: the order of arrival is all that made it differ from another run of the same settings (`rlhf.loop.buffer`). So
a replay makes the same batches, in the same pieces, and its metrics and weights are the recorded run's, to the bit where the arithmetic
repeats itself. No weights are sent.
"""

from __future__ import annotations

import asyncio
import filecmp
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.cluster import LocalRef
from rlhf.config import Settings, UserError
from rlhf.engines.sampling import Sampling
from rlhf.loop.judged import JudgedRollout
from rlhf.policy import PolicyGroup
from rlhf.reward.serving.server import ServerInfo
from rlhf.tracking import jsonl
from rlhf.tracking.responses import Taken, TakenPrompt, read_prompts, read_starts, read_step, steps
from rlhf.training.resume import decided, differences, flat, remembered
from rlhf.types import Feedback, ModelSlot, Prompt, Rollout, Shipment

ORDER = "it gives the order in which prompts were taken"
FIXED = {
    "run.seed": "it gives the order of the prompts, and what is drawn when items are built",
    "data.shuffle": "it gives the order of the prompts",
    "policy.dtype": "weights and optimizer states are of this type",
    "algorithm.name": "another method asks for other responses",
    "loop.prompts_per_step": ORDER,
    "loop.refill": ORDER,
    "loop.staleness": ORDER,
    "loop.stream": ORDER,
}
"""Field -> why a run cannot be replayed when it changes."""
LEARNED = (
    "policy/",
    "critic/",
    "reward/",
    "rollout/",
    "dropped/",
    "refill/",
    "staleness/",
    "loop/epoch",
    "loop/prompts_trained",
)
"""How the names of those metrics begin that depend on nothing but what was learned from."""
UNRECORDED = ("policy/probe_gap", "policy/probe_gap_partner", "reward/canary_accuracy", "reward/canary_drift")
"""Those that only engines and reward servers give."""
BUILT = ("algorithm.", "reward.transforms")
"""Settings that decide which prompts teach nothing, and are replaced with `loop.refill`."""
REMEDY = "Something that decides on it has changed since: the package, an algorithm or transform of your own, or the record itself."


class ReplayError(UserError):
    """The recorded run cannot be replayed as this one is configured."""


class Recording:
    """What a run took, from its first step on. Knows which prompt was started when, and which was taken next."""

    def __init__(self, took: Sequence[Sequence[TakenPrompt]], read: Callable[[int], Sequence[Taken]]):
        """
        Args:
            took: the prompts of each step, in its order.
            read: the same of the step with this number, from 1, with their responses.
        """
        self._took, self._read = took, read
        # Each step takes the places after those of the step before. The numbers themselves may begin anew where a run was resumed.
        self._starts = [one.prompt_id for some in took for one in sorted(some, key=lambda one: one.place)]
        self._started = self._steps_read = 0
        self._left: list[Taken] = []  # of the last step that was read, the next one last

    def start(self, prompt_id: str) -> None:
        """A prompt is started, the next one in the order of start.

        Raises:
            ReplayError: the recorded run started another one here, or none.
        """
        expected = self._starts[self._started] if self._started < len(self._starts) else "none"
        if prompt_id != expected:
            raise ReplayError(
                f"--replay: prompt number {self._started + 1} is {prompt_id} here, and was {expected} in the recorded run. {REMEDY}"
            )
        self._started += 1

    def next(self) -> Taken | None:
        """The prompt that was taken next; None after the last."""
        while not self._left and self._steps_read < len(self._took):
            self._steps_read += 1
            self._left = list(reversed(self._read(self._steps_read)))
        return self._left.pop() if self._left else None

    def require(self, step: int, judged: Sequence[JudgedRollout]) -> None:
        """Make sure that a step took what it took in the recorded run, in the same order. Raises ReplayError."""
        here, there = [one.rollout.prompt.id for one in judged], [one.prompt_id for one in self._took[step - 1]]
        if here != there:
            raise ReplayError(
                f"--replay: step {step} took the prompts {', '.join(here)} here, and {', '.join(there)} in the recorded run. {REMEDY}"
            )


@dataclass(frozen=True)
class Replay:
    """A recorded run that can be run again as configured.

    Attributes:
        settings: of now, with the recorded run's type where it was left open.
        changes: settings that differ and may, in words: what depends on them comes out otherwise.
    """

    run: str
    settings: Settings
    recording: Recording
    changes: tuple[str, ...]

    def words(self) -> str:
        """For people."""
        also = f", with other settings: {'; '.join(self.changes)}" if self.changes else ""
        return f"replays the steps of {self.run}{also}"


def open_replay(run: str, settings: Settings, contents: Mapping[str, str | None]) -> Replay:
    """The recorded run in this folder, to be run again with these settings.

    Args:
        contents: of the run that is to begin (`rlhf.training.resume.run_contents`).

    Raises:
        ReplayError: it cannot be: other prompts, another model, settings that give another order, or steps without responses.
        UserError: it kept no responses, or its files are damaged.
    """
    *earlier, last = read_starts(run)
    settings = decided(settings, last["settings"].get("policy", {}).get("dtype"))
    now = remembered(settings, contents)
    fixed = FIXED | {
        field: ORDER for field in flat(now["settings"]) if settings.loop.refill and field.startswith(BUILT)
    }
    refused, changes = differences(last, now, fixed)
    if refused:
        raise ReplayError(
            f"--replay {run}: the recorded run had other settings, so it cannot be replayed with these:\n"
            + "".join(f"  {line}\n" for line in refused)
            + f"Replay it with its own: rlhf train {run}/config.yaml --replay {run} run.dir=..."
        )
    for start in earlier:
        changes += [
            f"(before it was resumed after step {last['after']}) {line}" for line in differences(start, last)[1]
        ]
    wanted, there = range(1, settings.loop.steps + 1), set(steps(run))
    if missing := [step for step in wanted if step not in there]:
        whole = f"Set loop.steps={missing[0] - 1}." if missing[0] > 1 else "A replay begins with step 1."
        raise ReplayError(
            f"--replay {run}: the responses of step {missing[0]} are not there, and loop.steps is {settings.loop.steps}. {whole}"
        )
    recording = Recording([read_prompts(run, step) for step in wanted], partial(read_step, run))
    return Replay(run, settings, recording, tuple(changes))


class RecordedRollouts:
    """In place of the engines: each prompt is answered when it is its turn, as it was."""

    engines = 1
    writing: Mapping[str, int] = {}
    missing: tuple[ModelSlot, ...] = ()

    def __init__(self, recording: Recording):
        self._recording = recording
        self._next = recording.next()
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._feedback: dict[str, Feedback] = {}

    async def sample(self, prompt: Prompt, samplings: Sequence[Sampling], with_pair: bool = False) -> Rollout:
        self._recording.start(prompt.id)
        turn = self._waiting[prompt.id] = asyncio.get_running_loop().create_future()
        self._call()
        await turn
        taken = self._next
        assert taken is not None and taken.prompt_id == prompt.id, "it was called"
        del self._waiting[prompt.id]
        self._feedback[prompt.id] = taken.feedback
        self._next = self._recording.next()
        self._call()  # it goes on after this one, which does not wait again before it has arrived
        infos = tuple(completion.info() for completion in taken.completions)
        return Rollout(prompt, infos, LocalRef(list(taken.completions)), taken.engine)

    def _call(self) -> None:
        """Whose turn it is, if it has been started."""
        turn = None if self._next is None else self._waiting.get(self._next.prompt_id)
        if turn is not None and not turn.done():
            turn.set_result(None)

    def feedback(self, prompt_id: str) -> Feedback:
        """What the judges said of the responses to this prompt that were given last."""
        return self._feedback[prompt_id]

    async def probe(self, prompt: Prompt, samplings: Sequence[Sampling]) -> dict[int, Rollout]:
        return {}

    async def receive(self, shipment: Shipment) -> None:
        """Nobody here needs weights."""

    def accept(self, shipment: Shipment, fingerprint: str) -> None:
        """Nobody here attests any."""

    async def offload(self) -> None:
        """No device is shared."""

    async def reload(self) -> None:
        """No device is shared."""


class RecordedRewards:
    """In place of the reward servers: says of each response what they said."""

    infos: Sequence[ServerInfo] = ()

    def __init__(self, rollouts: RecordedRollouts):
        self._rollouts = rollouts

    async def judge(self, rollout: Rollout) -> Feedback:
        return self._rollouts.feedback(rollout.prompt.id)

    async def check(self, step: int) -> dict[str, float]:
        return {}

    async def offload(self) -> None:
        """No device is shared."""

    async def reload(self) -> None:
        """No device is shared."""


class UnsentPolicy(PolicyGroup):
    """The policy of a replay, which has nobody to send weights to."""

    async def send_weights(self, shipment: Shipment) -> str:
        return ""


def compare(run: str, replay: str) -> str:
    """Whether a replay came out as the recorded run, in a sentence: the metrics of what was learned, and the exported weights."""
    recorded, again = (
        {line["step"]: line for line in jsonl.read(Path(folder) / "metrics.jsonl")} for folder in (run, replay)
    )
    common = sorted(recorded.keys() & again.keys())
    for step in common:
        one, other = _learned(recorded[step]), _learned(again[step])
        names = [name for name in one | other if one.get(name) != other.get(name)]
        if names:
            name = names[0]
            return (
                f"the replay differs from {run} from step {step} on: {name} was {one.get(name)} and is {other.get(name)}"
                + (f", and so are {len(names) - 1} further metrics" if names[1:] else "")
            )
    weights = [sorted((Path(folder) / "export").glob("*.safetensors")) for folder in (run, replay)]
    exported = all(weights) and [one.name for one in weights[0]] == [one.name for one in weights[1]]
    if exported and not all(filecmp.cmp(one, other, shallow=False) for one, other in zip(*weights, strict=True)):
        return f"the replay equals {run} in the metrics of all {len(common)} steps, but its exported weights differ"
    return f"the replay equals {run}: the metrics of all {len(common)} steps" + (
        " and every byte of the exported weights" if exported else ""
    )


def _learned(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name.startswith(LEARNED) and name not in UNRECORDED}
