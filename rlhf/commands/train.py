"""`rlhf train` and `rlhf sft`: the run itself is the loop's; here it gets its curve, and an end that says what to do next."""

from __future__ import annotations

import logging

from rlhf.config import Settings, UserError
from rlhf.config.sft import SftSettings
from rlhf.tracking.report import plot
from rlhf.tracking.summary import summary

log = logging.getLogger(__name__)


def train(settings: Settings, debug: bool, resume: bool) -> None:
    """Run the loop to its end. Raises UserError: something the user can put right."""
    from rlhf.loop.run import train as run

    run(settings, debug=debug, resume=resume)
    finish(settings)


def sft(settings: SftSettings, debug: bool, resume: bool) -> None:
    """Learn the configured examples. Raises UserError: something the user can put right."""
    from rlhf.loop.sft import sft as run

    run(settings, debug=debug, resume=resume)
    finish(settings)


def finish(settings: Settings | SftSettings) -> None:
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
