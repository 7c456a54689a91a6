"""Every metric that a run can log: its name, what it means, how it is reduced, its unit, and which runs have it.

Owns the meaning of a metric's name. docs/metrics.md, the digits of the console and the labels of curve and summary are made from it;
`tests/tracking/test_catalogue.py` compares it with the names that the package writes. Does not know how a number is computed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Reduction = Literal["mean", "sum", "last", "max"]
SIGNED = "signed"
"""A `Metric.form`: with its sign, see `signed`."""


@dataclass(frozen=True)
class Metric:
    """One metric, or a family of metrics with a part of the name in braces: `dropped/{reason}`.

    Attributes:
        meaning: one sentence; may use Markdown.
        reduction, over: how the line's value comes from the values of a step: the mean over its tokens, the sum over its responses.
            Metrics of the optimizer are reduced over all visits of the step: every micro-batch, rank, update and epoch.
        unit: empty for a number without one; "0 to 1" for a share.
        given: which methods and settings have it; empty: every run.
        page: the page of the documentation that says more, within docs/.
        form: its digits, a format specification or `SIGNED`.
        label: its short name on terminal and curve; empty: the unit says what it is.
    """

    name: str
    meaning: str
    reduction: Reduction = "mean"
    over: str = ""
    unit: str = ""
    given: str = ""
    page: str = ""
    form: str = ".4g"
    label: str = ""

    def shown(self, value: float | None) -> str:
        """The value in its digits; `-` for one that is missing or was not finite."""
        if value is None:
            return "-"
        return signed(value) if self.form == SIGNED else format(value, self.form)

    def matches(self, name: str) -> bool:
        """Whether this is the metric's name, or one of the family's."""
        parts = re.split(r"\{\w+\}", self.name)
        return re.fullmatch("[^/]+".join(map(re.escape, parts)), name) is not None


SHARE = "0 to 1"
NATS = "nats per token"
CONTRAST = "methods that contrast responses"
GRADIENT = "policy-gradient methods"
CRITIC = "`ppo`"
AHEAD = "`loop.staleness` above 0"
SFT = "`rlhf sft`, `rlhf reward train`"

METRICS: tuple[Metric, ...] = (
    # What the judges said
    Metric(
        "reward/mean",
        "reward of the responses that have one",
        "mean",
        "responses",
        "reward",
        form=SIGNED,
        label="reward",
    ),
    Metric("reward/std", "standard deviation of these rewards", "last", unit="reward"),
    Metric(
        "reward/invalid", "responses that the judge calls invalid, so that they have no reward", "sum", unit="responses"
    ),
    Metric("reward/failed", "responses whose judge failed, so that they have no reward", "sum", unit="responses"),
    Metric("reward/timed_out", "responses without a verdict at `reward.deadline_s`", "sum", unit="responses"),
    Metric(
        "reward/tied", "share of the prompts with several rewards whose rewards are all equal", "mean", "prompts", SHARE
    ),
    Metric(
        "reward/shaped_mean",
        "reward that is learned from, after the transforms",
        "mean",
        "responses",
        "reward",
        "`reward.transforms`",
        "reward_shaping.md",
    ),
    Metric(
        "reward/shaped_std",
        "standard deviation of the rewards that are learned from, after the transforms",
        "last",
        unit="reward",
        given="`reward.transforms`",
        page="reward_shaping.md",
    ),
    Metric(
        "reward/{source}",
        "reward of the responses of one source; `chosen` and `rejected` are the data set's",
        "mean",
        "responses",
        "reward",
        "methods with several sources",
    ),
    Metric(
        "reward/{member}",
        "score of one member of an ensemble",
        "mean",
        "responses",
        "score",
        "`reward.members`",
        "reward_shaping.md",
    ),
    Metric(
        "reward/{member}/{measure}",
        "what a member of an ensemble measures itself, under the names of this table",
        "mean",
        "verdicts",
        "",
        "`reward.members`",
        "reward_shaping.md",
    ),
    Metric(
        "reward/disagreement",
        "standard deviation of the members' scores of one response",
        "mean",
        "responses",
        "score",
        "`reward.members`",
        "reward_shaping.md",
    ),
    Metric(
        "reward/cache_hits",
        "share of the verdicts that a server remembered",
        "mean",
        "verdicts",
        SHARE,
        "`reward.cache`",
        "reward_servers.md",
    ),
    Metric(
        "reward/canary_accuracy",
        "share of the canaries whose two responses are in the right order",
        "mean",
        "canaries and servers",
        SHARE,
        "`reward.canaries`",
        "reward_servers.md#canaries",
    ),
    Metric(
        "reward/canary_drift",
        "how far a canary's verdict has moved since the start",
        "max",
        "canaries and servers",
        "reward",
        "`reward.canaries`",
        "reward_servers.md#canaries",
    ),
    Metric(
        "reward/position_bias",
        "p(i, j) + p(j, i) - 1: 0 for a judge that ignores the place of a response, 1 for one that always takes the first, -1 for the "
        "second; it is removed from P_ij, but a large one means a poor judge",
        "mean",
        "pairs",
        given="judges that compare two responses",
        page="llm_judge.md#what-is-logged",
    ),
    Metric(
        "reward/undecided",
        "share of the pairs whose two orders name different winners",
        "mean",
        "pairs",
        SHARE,
        "judges that compare two responses",
        "llm_judge.md#what-is-logged",
    ),
    # What was sampled
    Metric("rollout/responses", "sampled responses, without those of a data set", "sum", unit="responses", form=".0f"),
    Metric("rollout/length", "length of a response", "mean", "responses", "tokens", form=".1f", label="length"),
    Metric("rollout/tokens", "response tokens", "sum", "responses", "tokens", form=".0f"),
    Metric("rollout/logprob", "log-prob of the sampled tokens, averaged over each response", "mean", "responses", NATS),
    Metric(
        "rollout/truncated", "share of the responses that were cut at `rollout.max_tokens`", "mean", "responses", SHARE
    ),
    # What was learned
    Metric("policy/loss", "loss of the method", "mean", "prompts", form=".4f", label="loss"),
    Metric(
        "policy/kl",
        "log-ratio of policy and reference, both at `rollout.temperature`, on the learned tokens that the policy itself sampled, before it "
        "moved. So it is the KL of the distribution that was sampled from; a builder that selects responses selects here too (the "
        "evaluation's does not), and with `top_p` or `top_k` the tokens are those of the truncated distribution",
        "mean",
        "tokens",
        NATS,
        form=".4f",
        label="KL",
    ),
    Metric("policy/kl_response", "the same, summed over a response", "mean", "responses", "nats per response"),
    Metric("policy/kl_k3", "the same, by an estimator that is never negative and varies less", "mean", "tokens", NATS),
    Metric(
        "policy/logprob_gap",
        "absolute difference between the engine's and the trainer's log-probs of the same tokens, where both are of the same distribution",
        "mean",
        "tokens",
        NATS,
        "`rollout.top_p` 1, `rollout.top_k` 0, `rollout.temperature` above 0",
        "rollout.md",
    ),
    Metric(
        "policy/probe_gap",
        "the same on a probe that each engine answers with the policy",
        "max",
        "engines",
        NATS,
        "several engines, mixtures and truncated sampling, with `run.invariants`",
        "rollout.md",
    ),
    Metric(
        "policy/probe_gap_partner",
        "the same on a probe that each engine answers with its second model",
        "max",
        "engines",
        NATS,
        "mixtures, with `run.invariants`",
        "rollout.md",
    ),
    Metric("policy/grad_norm", "norm of the gradient before clipping", "mean", "updates"),
    Metric("policy/learning_rate", "learning rate of the optimizer", "mean", "updates", form=".2e"),
    Metric(
        "policy/accuracy",
        "share of the pairs whose chosen response the policy prefers more than the reference does",
        "mean",
        "pairs",
        SHARE,
        CONTRAST,
    ),
    Metric(
        "policy/margin", "difference of the pair's implicit rewards (scaled log-ratios)", "mean", "pairs", "", CONTRAST
    ),
    Metric("policy/chosen_reward", "implicit reward of the chosen response", "mean", "items", "", CONTRAST),
    Metric("policy/rejected_reward", "implicit reward of the rejected response", "mean", "pairs", "", CONTRAST),
    Metric(
        "policy/reference_accuracy",
        "share of the pairs whose chosen response the reference finds likelier",
        "mean",
        "pairs",
        SHARE,
        CONTRAST,
    ),
    Metric(
        "policy/chosen_rose",
        "share of the chosen responses that are likelier than under the reference; where this falls, both responses lose",
        "mean",
        "items",
        SHARE,
        CONTRAST,
    ),
    Metric("policy/chosen_logprob", "log-prob of the chosen responses", "mean", "tokens", NATS, CONTRAST),
    Metric("policy/rejected_logprob", "log-prob of the rejected responses", "mean", "tokens", NATS, CONTRAST),
    Metric(
        "policy/bonus",
        "score of the responses that a bonus or likelihood term acts on, before its factor",
        "mean",
        "items",
        "nats",
        "`selm`, `xpo`, `slic`, `raft`",
    ),
    Metric("policy/ratio", "ratio of the policy to the policy that sampled", "mean", "tokens", "", GRADIENT),
    Metric("policy/clip_fraction", "share of the tokens whose ratio is clipped", "mean", "tokens", SHARE, GRADIENT),
    Metric(
        "policy/kl_old",
        "distance of the policy from the one that sampled, by the estimator that is never negative",
        "mean",
        "tokens",
        NATS,
        GRADIENT,
    ),
    Metric("policy/entropy", "entropy of the policy's distribution", "mean", "tokens", NATS, GRADIENT),
    Metric("policy/advantage", "advantage", "mean", "tokens", "", GRADIENT),
    Metric("policy/advantage_size", "absolute value of the advantage", "mean", "tokens", "", GRADIENT),
    Metric(
        "policy/mismatch_ratio",
        "the trainer's over the engine's probability of a sampled token",
        "mean",
        "tokens",
        "",
        GRADIENT,
    ),
    Metric(
        "policy/mismatch_corrected",
        "share of the tokens whose importance weight was bounded or set to 0",
        "mean",
        "tokens",
        SHARE,
        GRADIENT,
    ),
    Metric(
        "policy/kl_coef",
        "factor on the KL in this step",
        "last",
        given=f"{GRADIENT} with a KL (`algorithm.kl_placement`)",
    ),
    Metric("critic/loss", "loss of the critic", "mean", "tokens", "", CRITIC),
    Metric("critic/value", "value that the critic predicted before the step", "mean", "tokens", "reward", CRITIC),
    Metric("critic/return", "return that the critic learns from", "mean", "tokens", "reward", CRITIC),
    Metric(
        "critic/explained_variance",
        "1 - Var(return - value) / Var(return) over the step's tokens: 1 is a perfect critic, 0 one that knows no more than the mean",
        "last",
        given=CRITIC,
    ),
    Metric("critic/grad_norm", "norm of the critic's gradient before clipping", "mean", "updates", "", CRITIC),
    Metric(
        "critic/learning_rate", "learning rate of the critic's optimizer", "mean", "updates", "", CRITIC, form=".2e"
    ),
    # Where the time went, and what the step was made of
    Metric("time/generate", "sampling", "sum", unit="s", form=".1f"),
    Metric("time/reward", "waiting for verdicts after the last response", "sum", unit="s", form=".1f"),
    Metric("time/train", "learning", "sum", unit="s", form=".1f"),
    Metric("time/sync", "weight transfer to the engines", "sum", unit="s", form=".1f"),
    Metric("time/step", "the whole step", "sum", unit="s", form=".1f"),
    Metric(
        "throughput/tokens_per_s",
        "tokens of the step (`rlhf train`: of its responses) over its whole time",
        "last",
        unit="tokens/s",
        form=".0f",
    ),
    Metric(
        "throughput/train_tflops",
        "operations of the forward and backward passes of policy and critic per second of learning and rank; those of the reference, of "
        "activations that are computed again and of fused experts are not counted",
        "last",
        unit="TFLOP/s",
        given="`rlhf train`",
        page="plan.md#model-flops-utilisation",
    ),
    Metric(
        "throughput/mfu",
        "the same over what the GPU's data sheet says of dense bf16 arithmetic",
        "last",
        unit=SHARE,
        given="`rlhf train` on GPUs that `rlhf plan` knows",
        page="plan.md#model-flops-utilisation",
        form=".1%",
        label="MFU",
    ),
    Metric(
        "time/wait",
        "the learning side waits for prompts that are being sampled or judged",
        "sum",
        unit="s",
        given="`rlhf train`",
        form=".1f",
    ),
    Metric(
        "idle/engines",
        "share of the step in which an engine has no prompt to answer; where it is paused in the middle of one it is not idle",
        "mean",
        "engines",
        SHARE,
        "`rlhf train`",
        "run_folder.md#spansjsonl",
    ),
    Metric(
        "idle/policy",
        "share of the step in which the policy's ranks neither learn nor publish",
        "last",
        unit=SHARE,
        given="`rlhf train`",
        page="run_folder.md#spansjsonl",
    ),
    Metric("loop/epoch", "passes over the prompts so far", "last", given="`rlhf train`"),
    Metric("loop/prompts_trained", "prompts that the step learned from", "sum", unit="prompts", form=".0f"),
    Metric(
        "dropped/{reason}",
        "prompts that the step could not learn from, by reason, for example `tie` or `truncated`",
        "sum",
        unit="prompts",
        given="where there are any",
        page="concepts.md#prompts-that-teach-nothing",
        form=".0f",
    ),
    Metric(
        "refill/prompts",
        "further prompts that were asked for in place of those that taught nothing",
        "sum",
        unit="prompts",
        given="`loop.refill`",
        form=".0f",
    ),
    Metric(
        "refill/rounds", "rounds in which they were asked for", "sum", unit="rounds", given="`loop.refill`", form=".0f"
    ),
    # How far sampling is ahead
    Metric(
        "staleness/mean",
        "weight versions between the oldest token of a response and the weights that learn from it",
        "mean",
        "responses",
        "versions",
        AHEAD,
        "ahead.md",
    ),
    Metric("staleness/max", "the same of the oldest response", "max", "responses", "versions", AHEAD, "ahead.md"),
    Metric(
        "staleness/mixed",
        "share of the responses that several versions of the weights wrote",
        "mean",
        "responses",
        SHARE,
        AHEAD,
        "ahead.md",
    ),
    Metric(
        "loop/ahead",
        "prompts that had been started for later steps when the step began",
        "last",
        unit="prompts",
        given=AHEAD,
        page="ahead.md",
        form=".0f",
    ),
    Metric(
        "loop/ready",
        "of these, prompts that had been answered and judged",
        "last",
        unit="prompts",
        given=AHEAD,
        page="ahead.md",
        form=".0f",
    ),
    # Supervised training
    Metric(
        "train/loss",
        "loss of the learned tokens, or of the rated texts",
        "mean",
        "update",
        NATS,
        SFT,
        form=".4f",
        label="loss",
    ),
    Metric("train/grad_norm", "norm of the gradient before clipping", "last", given=SFT, form=".3g", label="gradient"),
    Metric("train/learning_rate", "learning rate of the optimizer", "last", given=SFT, form=".2e", label="rate"),
    Metric("train/epoch", "passes over the examples so far", "last", given=SFT),
    Metric("train/tokens", "tokens of the step, context included", "sum", unit="tokens", given=SFT, form=".0f"),
    Metric("heldout/loss", "loss on the held-out examples", "mean", "tokens", NATS, SFT, form=".4f", label="loss"),
)
BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}


def find(name: str) -> Metric | None:
    """The metric of this name, or the first family that it belongs to; None: no run logs it.

    Under `reward/` a name that is no other metric's may be a source's, a member's or a measure of a judge that is a service: it cannot be
    told from the name alone.
    """
    return BY_NAME.get(name) or next((metric for metric in METRICS if metric.matches(name)), None)


def shown(line: Mapping[str, Any], name: str) -> str:
    """The metric's value in this line of the record, in its digits."""
    return BY_NAME[name].shown(line.get(name))


def phrase(line: Mapping[str, Any], name: str) -> str:
    """The same with its short name, or with its unit if it has none: `loss 0.6931`, `855 tokens/s`."""
    metric = BY_NAME[name]
    value = metric.shown(line.get(name))
    return f"{metric.label.lower()} {value}" if metric.label else f"{value} {metric.unit}"


def axis(name: str) -> str:
    """What stands beside a curve of the metric: `mean loss (nats per token)`."""
    metric = BY_NAME[name]
    title = f"mean {metric.label}" if metric.reduction == "mean" else metric.label
    return title if metric.unit in ("", metric.label) else f"{title} ({metric.unit})"


def signed(value: float) -> str:
    """Three decimals, or three significant digits where these would show little or nothing of it."""
    return format(value, "+.3f" if value == 0 or abs(value) >= 0.1 else "+.3g")
