"""`rlhf submit`: hand a run to a Ray cluster that is already there, through its jobs server, and follow it.

Owns what travels: the configuration as it was resolved and checked here, and the small files that it names by relative
path. Models, big data and the run folder do not travel: their paths must be absolute, on storage that all nodes share. The
job is `rlhf train` or `rlhf sft` on the cluster's head; nothing of the run happens in this process.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.config import Settings, UserError, show
from rlhf.config.data import HUB, hub_parts
from rlhf.config.reward import RewardSettings
from rlhf.config.sft import SftSettings

CONFIG = "config.yaml"
MAX_UPLOAD_MB = 100
POLL_S = 1.0


def submit(settings: Settings | SftSettings, address: str, follow: bool, resume: bool = False) -> int:
    """Submit a run as a Ray job.

    Args:
        address: the jobs server, such as `http://head:8265`.
        follow: print the job's output until it ends.
        resume: continue the run in `run.dir`.

    Returns:
        The driver's exit status; 0 if the job is not followed.

    Raises:
        UserError: the run cannot work from there, or the jobs server refuses.
    """
    files = travelling_files(settings)
    client = _connect(address)
    with tempfile.TemporaryDirectory(prefix="rlhf-submit-") as folder:
        pack(settings, files, Path(folder))
        command = "sft" if isinstance(settings, SftSettings) else "train"
        entrypoint = f"python -m rlhf.cli {command} {CONFIG}" + (" --resume" if resume else "")
        try:
            job = client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": folder})
        except RuntimeError as error:
            raise UserError(f"--address {address}: the jobs server refused the job: {error}") from None
    sent = ", ".join([CONFIG, *map(str, files)])
    print(f"submitted {job} with {sent}; the run folder is {settings.run.dir}")
    hint = (
        f"follow it: ray job logs --address {address} --follow {job}\nstop it:   ray job stop --address {address} {job}"
    )
    if not follow:
        print(hint)
        return 0
    try:
        return _follow(client, job)
    except KeyboardInterrupt:
        print(f"\nThe job goes on without this terminal.\n{hint}", file=sys.stderr)
        raise


def travelling_files(settings: Settings | SftSettings, here: Path | None = None) -> list[Path]:
    """Files that the configuration names by relative path, relative to `here` (by default the current folder).

    Raises:
        UserError: a path that would mean something else on the cluster, or too much to upload.
    """
    here = here or Path.cwd()
    if settings.cluster.device == "auto":
        raise UserError(
            "cluster.device: `auto` would ask the cluster's head, which often has no GPU. Say cluster.device=cuda, or cpu"
        )
    if not Path(settings.run.dir).is_absolute():
        raise UserError(
            f"run.dir={settings.run.dir}: a relative path ends in a temporary folder of the job. Give an absolute path on storage "
            "that all nodes share"
        )
    folders: dict[str, str | None] = {"policy.model": settings.policy.model}
    if isinstance(settings, Settings):
        folders |= {f"{place}.path": source.model for place, source in settings.reward.sources()}
    for field, path in folders.items():
        if path is not None and not Path(path).is_absolute() and os.path.exists(here / path):
            raise UserError(
                f"{field}={path}: a relative path, and the model does not travel with the job. Give its absolute path on storage that "
                "all nodes share"
            )
    for field, name in settings.data.files().items():
        folder = hub_parts(name)[0]
        if name.startswith(HUB) and not Path(folder).is_absolute() and os.path.isdir(here / folder):
            raise UserError(
                f"data.{field}={name}: a data set in a folder does not travel with the job. Give its absolute path on storage that all "
                "nodes share"
            )
    files = list(_files(settings, here))
    size = sum((here / file).stat().st_size for file in files) / 2**20
    if size > MAX_UPLOAD_MB:
        raise UserError(
            f"{', '.join(map(str, files))}: {size:.0f} MB would travel with the job, more than {MAX_UPLOAD_MB}. Put the data on storage "
            "that all nodes share and give its absolute path"
        )
    return files


def pack(settings: Settings | SftSettings, files: list[Path], folder: Path) -> None:
    """Write the job's working directory: the settings, and the files under the paths that the settings give."""
    cluster = settings.cluster.model_copy(update={"address": "auto"})  # the one the job runs in
    (folder / CONFIG).write_text(show(settings.model_copy(update={"cluster": cluster})), encoding="utf-8")
    for file in files:
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def _files(settings: Settings | SftSettings, here: Path) -> Iterator[Path]:
    named: dict[str, str | None] = {f"data.{field}": name for field, name in settings.data.files().items()}
    if isinstance(settings, Settings):
        named |= _reward_files(settings.reward)
    for field, name in named.items():
        if name is None or Path(name).is_absolute() or not os.path.isfile(here / name):
            continue
        if ".." in Path(name).parts:
            raise UserError(f"{field}={name}: leads out of this folder, which is what travels. Give an absolute path")
        yield Path(name)
    own_code = _own_code(settings) if isinstance(settings, Settings) else []
    for top in sorted({name.partition(":")[0].partition(".")[0] for name in own_code} - {"rlhf"}):
        if (here / f"{top}.py").is_file():
            yield Path(f"{top}.py")
        else:
            yield from sorted(path.relative_to(here) for path in (here / top).rglob("*.py"))


def _reward_files(reward: RewardSettings) -> dict[str, str | None]:
    return {
        "reward.canaries": reward.canaries,
        "reward.common_set": reward.common_set,
        "reward.reference_scores": reward.reference_scores,
        **{f"{place}.judge_prompt": source.judge_prompt for place, source in reward.sources()},
    }


def _own_code(settings: Settings) -> list[str]:
    """Import paths of the user's own algorithm and reward functions."""
    algorithm = [settings.algorithm.name] if ":" in settings.algorithm.name else []
    return algorithm + [source.path for _, source in settings.reward.sources() if source.is_function]


def _connect(address: str) -> Any:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except ConnectionError:
        raise UserError(
            f"--address {address}: no jobs server answers there. It is part of Ray's dashboard: start the head with "
            "--include-dashboard=true --dashboard-host=0.0.0.0, and give http://HEAD:8265"
        ) from None
    except AuthenticationError as error:
        raise UserError(
            f"--address {address}: Ray refused the token. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a copy of the cluster's "
            f"token. Ray says: {error}"
        ) from None


def _follow(client: Any, job: str) -> int:
    """Print the job's output until it ends; the driver's exit status."""
    from ray.job_submission import JobStatus

    asyncio.run(_print_output(client, job))
    while not (details := client.get_job_info(job)).status.is_terminal():
        time.sleep(POLL_S)
    print(f"{job} {details.status.lower()}: {details.message}")
    if details.status == JobStatus.SUCCEEDED:
        return 0
    return details.driver_exit_code or 1


async def _print_output(client: Any, job: str) -> None:
    async for text in client.tail_job_logs(job):
        print(text, end="", flush=True)
