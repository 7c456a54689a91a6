"""The catalogue of methods: what each one chooses at each plug point, derived from the declaration that its default settings give.

Nothing here is written by hand per method, so the table cannot differ from the code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from rlhf.algorithms.algorithm import Algorithm, Source
from rlhf.algorithms.anchors import Ema, Extrapolated, Previous, UpdateRule
from rlhf.algorithms.contrast import Contrast, Preference
from rlhf.algorithms.policy_gradient import PolicyGradient
from rlhf.algorithms.registry import make
from rlhf.config import Settings
from rlhf.config.algorithm import METHODS

NONE = "-"


@dataclass(frozen=True)
class Row:
    """One method, in words. A column that does not apply is "-".

    Attributes:
        name: what `algorithm.name` says.
        sources: who writes the responses, and how many per prompt.
        feedback: what the responses are judged by.
        builder: how judged responses become training items.
        score: of a response, in a contrast.
        link: from a contrast to a loss; the terms joined by "+".
        anchor: how the reference changes, and the engines' second model where that is another.
        estimator: of the policy gradient.
    """

    name: str
    sources: str
    feedback: str
    builder: str
    score: str
    link: str
    anchor: str
    estimator: str


def rows() -> list[Row]:
    """One row for each built-in method, with its default settings."""
    return [describe(make(_defaults(name))) for name in METHODS]


def describe(algorithm: Algorithm) -> Row:
    """An algorithm's choices in words."""
    objective = algorithm.objective
    direct = objective if isinstance(objective, Preference) else None
    partner = "reference" if algorithm.partner is None else "partner"
    written = [_source(source, partner) for source in algorithm.sources]
    if algorithm.dataset_pairs:
        written.append("data set's pair")
    return Row(
        name=algorithm.name,
        sources=", ".join(written),
        feedback="scores or pairwise" if algorithm.judged else "data set's order",
        builder=_builder(algorithm.build),
        score=_score(direct) if direct else NONE,
        link=" + ".join(_link(term) for term in direct.terms) if direct else NONE,
        anchor=_anchor(algorithm),
        estimator=NONE if isinstance(objective, Preference) else _estimator(objective),
    )


def _defaults(name: str) -> Settings:
    """Settings whose every field is at its default; the three required ones are placeholders that are never opened."""
    nowhere: dict[str, Any] = {
        "data": {"prompts": "none"},
        "policy": {"model": "none"},
        "reward": {"path": "none:none"},
    }
    return Settings.model_validate({**nowhere, "algorithm": {"name": name}})


def _source(source: Source, partner: str) -> str:
    share = source.mixture
    writer = {0.0: "policy", 1.0: partner}.get(share, f"policy^{1 - share:g} {partner}^{share:g}")
    name = f"{source.name} by " if source.name != writer else ""
    return f"{source.n} {name}{writer}{' (greedy)' if source.greedy else ''}"


def _builder(build: Callable[..., Any]) -> str:
    """Name of the function; of builders inside one another, the inner first."""
    if not isinstance(build, partial):
        return build.__name__
    inner = [_builder(value) for value in build.keywords.values() if callable(value)]
    labels = [f"({value.kind} labels)" for key, value in build.keywords.items() if key == "labels"]
    return " ".join([*inner, build.func.__name__, *labels])


def _score(objective: Preference) -> str:
    term = objective.terms[0]
    return f"{term.reduce} of log pi{' - log ref' if term.anchored else ''}"


def _link(term: Contrast) -> str:
    if term.link == "linear":
        return f"{term.scale:g} x {'(log pi - log ref)' if term.anchored else 'log pi'}"
    offset = f", margin {term.scale * term.offset:g}" if term.offset else ""
    length = f", {term.length_coef:g} per token" if term.length_coef else ""
    strength = f"{term.scale:g}"
    if term.link == "hinge":
        strength = f"margin {term.margin:g}" if term.scale == 1 else f"{strength}, margin {term.margin:g}"
    return f"{term.link}({strength}{offset}{length})"


def _anchor(algorithm: Algorithm) -> str:
    objective = algorithm.objective
    if isinstance(objective, Preference):
        used = any(term.anchored for term in objective.terms)
    else:
        used = objective.kl_placement != "none"
    reference = _rule(algorithm.reference) if used else "none"
    return reference if algorithm.partner is None else f"{reference}; partner: {_rule(algorithm.partner)}"


def _rule(rule: UpdateRule) -> str:
    if isinstance(rule, Ema):
        return f"ema({rule.decay:g})"
    if isinstance(rule, Extrapolated):
        return f"extrapolated({rule.alpha:g})"
    return "previous" if isinstance(rule, Previous) else "fixed"


def _estimator(objective: PolicyGradient) -> str:
    if objective.critic is not None:
        parts = [f"GAE({objective.critic.lam:g})"]
    else:
        baseline = {"none": "return", "mean": "less mean", "leave_one_out": "less mean of others"}
        parts = [baseline.get(objective.baseline, "less mean, over std")]
    if objective.whiten:
        parts.append("whitened")
    if objective.kl_placement != "none":
        parts.append(f"{objective.kl_estimator} in {objective.kl_placement}")
    if objective.surrogate == "cispo":
        parts.append("clipped weights")
    elif objective.clip_low is not None:
        parts.append("clipped")
    if objective.correction != "none":
        parts.append(objective.correction)
    return ", ".join(parts)
