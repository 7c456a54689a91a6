"""The end of `rlhf train` and `rlhf sft`: the curve, and a summary that says what to do next."""

from __future__ import annotations

import logging

from rlhf.config import Settings, UserError
from rlhf.config.sft import SftSettings
from rlhf.tracking.report import plot
from rlhf.tracking.summary import summary

log = logging.getLogger(__name__)


def report(settings: Settings | SftSettings) -> None:
    """Draw the curve and print the summary. The run is done: nothing here can make it a failure."""
    try:
        curve = str(plot(settings.run.dir))
    except UserError as error:
        curve = f"not drawn: {error}"
    except Exception as error:  # noqa: BLE001 - whatever the plotting library raises
        curve = f"not drawn: {error!r}"
    if settings.tracking.console == "off":
        return
    try:
        print("", *summary(settings, curve), sep="\n", flush=True)
    except Exception as error:  # noqa: BLE001 - a torn file of the record, a terminal that went away
        log.warning("the run has ended well, but its summary could not be shown: %r", error)
