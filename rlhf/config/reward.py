"""`reward`: the servers that judge responses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from rlhf.config.base import MAX_S, MIN_S, PathText, Section
from rlhf.config.transforms import ScoreTransform, Transform

VERIFIERS = ("math", "instructions", "reasoning_gym", "regex", "code")
"""Names of the built-in verifiers (rlhf.reward.verifiers)."""

Kind = Literal[
    "model",
    "function",
    "verifier",
    "remote",
    "several",
    "pairwise_model",
    "pairwise_function",
    "pairwise_remote",
    "llm_judge",
]


@dataclass(frozen=True)
class KindOfJudge:
    """What is known of a kind of judge from its name. How one is made is in `rlhf.reward.judges.make`.

    Attributes:
        by: who judges.
        reads: the fields of `SourceSettings` that it reads; the others would change nothing.
        compares: two responses are compared; otherwise each is scored.
        repeatable: its verdict on the same texts is always the same, so that it may be remembered (`reward.cache`).
    """

    by: Literal["model", "language model", "function", "verifier", "service", "members"]
    reads: tuple[str, ...]
    compares: bool = False
    repeatable: bool = False


KINDS: Mapping[Kind, KindOfJudge] = {
    "model": KindOfJudge("model", ("path", "input"), repeatable=True),
    "function": KindOfJudge("function", ("path",)),
    "verifier": KindOfJudge("verifier", ("path",), repeatable=True),
    "remote": KindOfJudge("service", ("url",)),
    "several": KindOfJudge("members", ("members",)),
    "pairwise_model": KindOfJudge("model", ("path",), compares=True, repeatable=True),
    "pairwise_function": KindOfJudge("function", ("path",), compares=True),
    "pairwise_remote": KindOfJudge("service", ("url",), compares=True),
    "llm_judge": KindOfJudge("language model", ("path", "url", "judge_prompt"), compares=True),
}


class SourceSettings(Section):
    """Who judges, and what."""

    kind: Kind = Field(
        "model",
        description="Who judges. `model`: a reward model; `function`: a Python function; `verifier`: one of "
        f"{', '.join(VERIFIERS)}, from what the prompt's line says is right; `remote`: a service that `rlhf "
        "reward serve` runs; `several`: the `members` together. Each scores one response. "
        "`pairwise_model`, `pairwise_function`, `pairwise_remote`: the same, but they compare two responses, in both orders. `llm_judge`: "
        "a language model that is asked which of two responses is better.",
    )
    path: PathText | None = Field(
        None,
        description="For a function its import path, `module:name`; for a model its folder or hub name, as `policy.model` "
        "(a transformers sequence classifier, or what `rlhf reward train` writes); for a verifier its name; for an LLM judge the model's "
        "folder or hub name, or, with `url`, the name that the endpoint knows it by.",
    )
    url: str | None = Field(
        None,
        description="Where a remote judge answers, such as `http://host:8000`; its token is in the environment "
        "variable `RLHF_REWARD_TOKEN`. For an LLM judge: an OpenAI-compatible endpoint, such as `http://host:8000/v1`; its key is in "
        "`OPENAI_API_KEY`.",
    )
    judge_prompt: PathText | None = Field(
        None,
        description="Text file that an LLM judge is asked with; {prompt}, {a} and {b} in it stand for the prompt and the two "
        "responses, and the answer to it must be A or B. Null: the built-in question.",
    )
    input: Literal["response", "conversation"] = Field(
        "response",
        description="What a reward model reads: the response alone, or all turns of the prompt and the response.",
    )

    @property
    def known(self) -> KindOfJudge:
        """What its kind says of it."""
        return KINDS[self.kind]

    @property
    def compares(self) -> bool:
        """Two responses are compared; otherwise each is scored."""
        return self.known.compares

    @property
    def is_function(self) -> bool:
        """`path` is the import path of a function."""
        return self.known.by == "function"

    @property
    def named(self) -> str:
        """`path`, for the kinds that need one."""
        assert self.path is not None, "refused when the configuration is loaded"
        return self.path

    @property
    def model(self) -> str | None:
        """The folder or name of the model that a server loads; None if it loads none."""
        own = self.known.by == "model" or (self.known.by == "language model" and self.url is None)
        return self.path if own else None


class MemberSettings(SourceSettings):
    """One judge of an ensemble."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="Its scores are logged as reward/NAME.")
    weight: float = Field(
        1.0,
        ge=-1e6,
        le=1e6,
        description="Its factor in a `sum`. 0, with any `combine`: an observer, whose scores are logged and count for nothing.",
    )
    transforms: list[ScoreTransform] = Field(
        [], description="What is done to its scores before they are combined: `clip`, `log_sigmoid` or `calibrate`."
    )


class RewardSettings(SourceSettings):
    """The judge, or the ensemble of judges, and its servers."""

    members: list[MemberSettings] = Field([], description="With `kind: several`, the judges; each scores.")
    combine: Literal["mean", "sum", "worst", "uncertainty"] = Field(
        "mean",
        description="With `kind: several`: the mean of the members' scores; their weighted sum (of log-sigmoids: all must be "
        "content); the lowest (worst-case optimisation); or the mean less `uncertainty_penalty` times the variance.",
    )
    uncertainty_penalty: float = Field(
        0.1, ge=0, le=1e6, description="Factor on the variance over members (unbiased) with `combine: uncertainty`."
    )
    common_set: PathText | None = Field(
        None,
        description="File of rows with `response`, with or without `prompt` (text) or `messages`, "
        "that every member scores at the start; its scores are then "
        "brought to mean 0 and standard deviation 1 on it. Other fields are the payload.",
    )
    transforms: list[Transform] = Field(
        [],
        description="What is done to a score, in this order, before it is learned from: `clip`, `length_penalty`, `missing_eos`, "
        "`overlong`, `normalise`, `log_sigmoid`, `calibrate`.",
    )
    reference_scores: PathText | None = Field(
        None,
        description="Scores of the starting policy's responses to each training prompt, as `rlhf reward calibrate` writes them; "
        "`log_sigmoid` and `calibrate` read them.",
    )
    servers: int = Field(1, ge=1, le=1024, description="Number of reward servers.")
    restarts: int = Field(
        1,
        ge=0,
        le=1000,
        description="How often each server is started again after its process has died; with the same weights, or not.",
    )
    gpus: float = Field(
        0.0,
        ge=0,
        le=64,
        description="GPUs that each server reserves; a fraction shares one GPU between servers. 0: servers judge on CPUs; but with "
        "`cluster.placement: colocated` a model uses the GPU of a policy rank, in turns with it, and lies in host memory while the policy "
        "learns.",
    )
    batch_size: int = Field(32, ge=1, le=10**6, description="Most responses a server judges in one batch.")
    batch_tokens: int | None = Field(
        None,
        ge=1,
        le=2**30,
        description="Most tokens in one batch of a model, of responses with what else the model reads. A longer one is judged alone. "
        "Where texts are padded (on a GPU, or with a model that cannot do without), padding counts: the longest times their number. "
        "null: 16384 on a GPU, 1024 on a CPU, there 384 with padding.",
    )
    max_wait_ms: float = Field(
        10.0, ge=0, le=60_000, description="How long a server waits for a batch to fill, in milliseconds."
    )
    max_waiting: int = Field(
        256,
        ge=1,
        le=10**6,
        description="Most responses that one server holds. The loop waits before it sends more; `rlhf reward serve` refuses "
        "them, to be sent again.",
    )
    cache: int = Field(
        0,
        ge=0,
        le=10**8,
        description="Verdicts that each server remembers by content, so that a repeated response is not judged again; for models "
        "and verifiers. 0: none.",
    )
    deadline_s: float = Field(
        60.0,
        ge=MIN_S,
        le=MAX_S,
        description="Longest wait for a verdict, in seconds, from when a server has got the response; after it the outcome is "
        "`TimedOut`.",
    )
    max_failed_fraction: float = Field(
        0.5,
        ge=0,
        le=1,
        description="A step in which more than this fraction of the outcomes failed or timed out, or in which the builder of your own "
        "algorithm failed for more of the prompts, stops the run.",
    )
    canaries: PathText | None = Field(
        None,
        description="File of pairs that the judge must tell apart: `good`, `bad`, with or without `prompt` (text) or "
        "`messages`; other fields are the "
        "payload. Every server judges them at the start and now and then.",
    )
    canaries_every: int = Field(
        10,
        ge=1,
        le=10**9,
        description="Steps from one judging of the `canaries` to the next; a changed verdict ends the run.",
    )
    canaries_wrong: int = Field(
        0, ge=0, le=10**9, description="How many of the `canaries` may come out in the wrong order at the start."
    )
    canaries_tolerance: float = Field(
        1e-3, ge=0, le=1e6, description="How far the verdict on one of the `canaries` may move during a run."
    )

    def sources(self) -> list[tuple[str, SourceSettings]]:
        """All judges that a server makes, each with the place of its fields in the configuration."""
        if self.kind != "several":
            return [("reward", self)]
        return [(f"reward.members[{number}]", member) for number, member in enumerate(self.members)]
