"""Whether a run may sample ahead: what the settings alone do not say (`rlhf.config.ahead_checks` has the rest)."""

from __future__ import annotations

import logging

from rlhf.algorithms import Algorithm, PolicyGradient
from rlhf.cluster.devices import takes_turns
from rlhf.config import Settings
from rlhf.config.algorithm import OwnAlgorithm
from rlhf.preflight.finding import PlanError

log = logging.getLogger(__name__)


def check_ahead(settings: Settings, algorithm: Algorithm, debug: bool) -> None:
    """A user's own policy gradient without importance weights gives a warning.

    Raises:
        PlanError: engines would have to sample while the policy learns on their GPU, as in debug mode; or a user's own algorithm samples
            nothing.
    """
    loop = settings.loop
    if takes_turns(settings, debug) and (loop.staleness or loop.stream == "always"):
        field, off = ("staleness", "0") if loop.staleness else ("stream", "auto")
        raise PlanError(
            f"`loop.{field}`: engines would have to sample while the policy learns, but with `--debug` all share one GPU and take turns. "
            f"Set `loop.{field}: {off}`, or leave `--debug` out"
        )
    if not loop.staleness or not isinstance(settings.algorithm, OwnAlgorithm):
        return
    if not algorithm.sources:
        raise PlanError(
            f"`loop.staleness`: the Algorithm of `{settings.algorithm.name}` has no `sources`, so nothing is sampled that could be in "
            "advance. Set `loop.staleness: 0`"
        )
    objective = algorithm.objective
    if isinstance(objective, PolicyGradient) and objective.correction == "none":
        log.warning(
            "loop.staleness: the PolicyGradient of `%s` has `correction` none, so it learns from responses of older weights as if the "
            'present ones had written them. Give it `correction="tis"` with its bounds, or set `loop.staleness: 0`',
            settings.algorithm.name,
        )
