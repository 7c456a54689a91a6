"""The factor on the KL to the reference: what it is, and how it follows what was measured. Pure.

It is the driver's, so that all ranks learn with the same one: the loop gives each step the present factor and tells afterwards what the
step measured.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlhf.algorithms import PolicyGradient
from rlhf.algorithms.algorithm import Objective
from rlhf.algorithms.kl import AdaptiveKl


class KlController:
    """The controller of a run. Objectives without a KL, and contrasts, have no factor: then it is 0 and nothing is recorded of it."""

    def __init__(self, objective: Objective):
        self._factor: AdaptiveKl | None = None
        self._warmup_steps = 0
        if isinstance(objective, PolicyGradient) and objective.kl_placement != "none":
            self._factor = AdaptiveKl(objective.kl_coef, objective.kl_target, objective.kl_horizon)
            self._warmup_steps = 0 if objective.critic is None else objective.critic.warmup_steps

    @property
    def coef(self) -> float:
        """The factor that the next step learns with."""
        return 0.0 if self._factor is None else self._factor.coef

    def after(self, step: int, metrics: Mapping[str, float], n_responses: int) -> dict[str, float]:
        """Follow what a step measured. While only the critic learns there is nothing to steer.

        Args:
            step: loop step, from 1.
            metrics: of the step; policy/kl_response is the mean KL of a response in nats.
            n_responses: how many responses it was measured on.

        Returns:
            policy/kl_coef: the factor that the step learned with.
        """
        if self._factor is None:
            return {}
        used = {"policy/kl_coef": self._factor.coef}
        if "policy/kl_response" in metrics and step > self._warmup_steps:
            self._factor.update(metrics["policy/kl_response"], n_responses)
        return used

    def state(self) -> dict[str, float]:
        """As JSON."""
        return {} if self._factor is None else {"kl_coef": self._factor.coef}

    def restore(self, state: Mapping[str, float]) -> None:
        """Take over what `state` returned. A factor that nothing steers, or steered, is that of the present settings."""
        if self._factor is not None and self._factor.target is not None:
            self._factor.coef = state.get("kl_coef", self._factor.coef)
