"""`rlhf train`: checks that take no model, then what cannot work, then the run, then its report; and whether a replay came out the same."""

from __future__ import annotations

import sys

from rlhf.config import Settings
from rlhf.config.method_checks import method_warnings


def train(settings: Settings, debug: bool, resume: bool, replay: str | None = None) -> None:
    """Run the loop to its end.

    Args:
        replay: folder of a recorded run to replay.

    Raises:
        UserError: something the user can put right; before anything starts, where it can be seen then.
    """
    _begin(settings, resume)
    from rlhf.preflight.ready import ready

    if refusal := ready(settings, debug=debug, resume=resume).gpu_fit.refusal():
        print(f"warning: {refusal}. This is an estimate, and the run goes on; the dry run refuses it", file=sys.stderr)
    from rlhf.commands.report import report
    from rlhf.loop.run import train as run

    run(settings, debug=debug, resume=resume, replay=replay)
    report(settings)
    if replay is not None:
        from rlhf.loop.replay import compare

        print(compare(replay, settings.run.dir))


def dry_run(settings: Settings, debug: bool, resume: bool, replay: str | None = None) -> None:
    """Print what `train` would do. Loads no weights. Raises UserError: as `train` would before it starts."""
    _begin(settings, resume)
    from rlhf.preflight.plan import describe

    print(describe(settings, debug=debug, resume=resume))
    if replay is not None:
        from rlhf.loop.run import check_replay

        print(f"\nReplay\n  {check_replay(settings, debug, replay)}")


def _begin(settings: Settings, resume: bool) -> None:
    """Warnings, and what can be said before anything is imported that takes seconds."""
    from rlhf.tracking.folder import check_run_folder

    for warning in method_warnings(settings):
        print(f"warning: {warning}", file=sys.stderr)
    check_run_folder(settings.run.dir, resume)
