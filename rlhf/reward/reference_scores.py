"""What the reference's responses to each prompt scored: the file between `rlhf reward calibrate` and the transforms that read it.

JSON lines. The first says who wrote and who judged (`Origin`), each other one holds a prompt's responses:

    {"prompt": id, "n_tokens": [K], "cut": [K], "scores": {"reward": [K], MEMBER: [K], ...}}

"reward" is what the whole judge said, before `reward.transforms`; with `kind: several` each member's own scores stand beside it.
Owns the format and what must fit; knows nothing of engines and servers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.config import Settings
from rlhf.config.reward import RewardSettings
from rlhf.config.transforms import REFERENCED
from rlhf.reward.errors import RewardError
from rlhf.reward.transforms import Scored, needs_references
from rlhf.types import Prompt

REWARD = "reward"
"""Under this name stand the scores of the whole judge."""


@dataclass(frozen=True)
class Origin:
    """Who wrote the responses, and who judged them.

    Attributes:
        model: `policy.model`, the reference.
        sampling: how it was sampled; must be as in training, or the ranks mean something else.
        judge: the judge in words, and the hash of what decides its scores.
    """

    model: str
    sampling: Mapping[str, Any]
    judge: Mapping[str, Any]


@dataclass(frozen=True)
class Reference:
    """The reference's responses to one prompt.

    Attributes:
        scores: name -> [K].
        n_tokens, cut: of the responses, [K].
    """

    prompt_id: str
    scores: Mapping[str, Sequence[float]]
    n_tokens: Sequence[int]
    cut: Sequence[bool]

    def scored(self, name: str) -> list[Scored]:
        """The responses with the scores that `name` gave."""
        return [Scored(*one) for one in zip(self.scores[name], self.n_tokens, self.cut, strict=True)]

    def line(self) -> str:
        """This prompt's line of the file."""
        row = {"prompt": self.prompt_id, "n_tokens": self.n_tokens, "cut": self.cut, "scores": self.scores}
        return json.dumps(row) + "\n"


@dataclass(frozen=True)
class ReferenceScores:
    """A file that was read."""

    path: str
    origin: Origin
    by_prompt: Mapping[str, Reference]

    def of(self, prompt_id: str, name: str) -> list[Scored]:
        """The reference's responses to a prompt, scored by `name`. Raises KeyError for a prompt that is not there."""
        return self.by_prompt[prompt_id].scored(name)

    def require(self, prompts: Sequence[Prompt], settings: Settings) -> None:
        """Check that the file is about these prompts and this reference.

        Raises:
            RewardError: prompts are missing, or another model or sampling wrote the responses.
        """
        missing = [prompt.id for prompt in prompts if prompt.id not in self.by_prompt]
        if missing:
            raise RewardError(
                f"`reward.reference_scores`: {len(missing)} of {len(prompts)} prompts are not in {self.path} (the first: {missing[0]}). "
                f"{_again(self.path)}"
            )
        for field, here, there in (
            ("policy.model", settings.policy.model, self.origin.model),
            ("rollout", sampling_of(settings), dict(self.origin.sampling)),
        ):
            if here != there:
                raise RewardError(
                    f"`reward.reference_scores`: {self.path} was made with `{field}` {there}, but it is {here}. {_again(self.path)}"
                )

    def require_judge(self, reward: RewardSettings, fingerprint: str | None) -> None:
        """Check that the judge is the one that scored the reference.

        Raises:
            RewardError: it is another one, or its weights have changed.
        """
        here = judge_of(reward, fingerprint)
        if here != dict(self.origin.judge):
            raise RewardError(
                f"`reward.reference_scores`: {self.path} was scored by {dict(self.origin.judge)}, but the judge is {here}. "
                f"{_again(self.path)}"
            )


def read_reference_scores(path: str) -> ReferenceScores:
    """Read a file.

    Raises:
        RewardError: there is none, or it is not what `rlhf reward calibrate` writes.
    """
    file = Path(path)
    if not file.is_file():
        raise RewardError(
            f"`reward.reference_scores`: there is no file {path}. Make it with `rlhf reward calibrate CONFIG --output {path}`."
        )
    first, *lines = file.read_text(encoding="utf-8").splitlines() or [""]
    try:
        origin = Origin(**json.loads(first))
        references = [json.loads(line) for line in lines]
        by_prompt = {
            row["prompt"]: Reference(row["prompt"], row["scores"], row["n_tokens"], row["cut"]) for row in references
        }
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise RewardError(
            f"`reward.reference_scores`: {path} is not what `rlhf reward calibrate` writes ({error!r}). {_again(path)}"
        ) from None
    return ReferenceScores(path, origin, by_prompt)


def header(origin: Origin) -> str:
    """The first line of a file."""
    return json.dumps(asdict(origin)) + "\n"


def sampling_of(settings: Settings) -> dict[str, Any]:
    """What decides how a prompt is answered, besides the model."""
    rollout = settings.rollout
    sampling = {name: getattr(rollout, name) for name in ("max_tokens", "temperature", "top_p", "top_k")}
    return sampling | {"chat_template": settings.data.chat_template}


def judge_of(reward: RewardSettings, fingerprint: str | None) -> dict[str, Any]:
    """The judge in words, and the hash of what decides its scores (None for a function)."""
    named = {name: value for name in ("path", "url") if (value := getattr(reward, name)) is not None}
    return {"kind": reward.kind, **(named if fingerprint is None else {"fingerprint": fingerprint})}


def unreferenced(reward: RewardSettings) -> RewardSettings:
    """The judge without what reads reference scores: the one that can score the reference itself."""
    members = [
        member.model_copy(update={"transforms": [one for one in member.transforms if not isinstance(one, REFERENCED)]})
        for member in reward.members
    ]
    return reward.model_copy(update={"members": members, "transforms": [], "reference_scores": None})


def members_need_references(reward: RewardSettings) -> bool:
    """Whether the servers themselves read reference scores, so that held-out prompts need them too."""
    return any(needs_references(member.transforms) for member in reward.members)


def _again(path: str) -> str:
    return f"Make it again with `rlhf reward calibrate CONFIG --output {path}`."
