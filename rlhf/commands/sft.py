"""`rlhf sft`: what cannot work, then the training, then its report."""

from __future__ import annotations

from rlhf.config.sft import SftSettings


def sft(settings: SftSettings, debug: bool, resume: bool) -> None:
    """Learn the configured examples.

    Raises:
        UserError: something the user can put right; before anything starts, where it can be seen then.
    """
    _begin(settings, resume)
    from rlhf.preflight.sft import ready_sft

    ready_sft(settings, debug=debug, resume=resume)
    from rlhf.commands.report import report
    from rlhf.loop.sft import sft as run

    run(settings, debug=debug, resume=resume)
    report(settings)


def dry_run(settings: SftSettings, debug: bool, resume: bool) -> None:
    """Print what `sft` would do. Loads no weights. Raises UserError: as `sft` would before it starts."""
    _begin(settings, resume)
    from rlhf.preflight.sft import describe_sft

    print(describe_sft(settings, debug=debug, resume=resume))


def _begin(settings: SftSettings, resume: bool) -> None:
    """What can be said before anything is imported that takes seconds."""
    from rlhf.tracking.folder import check_run_folder

    check_run_folder(settings.run.dir, resume)
