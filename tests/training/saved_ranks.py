"""One of the ranks of a policy group, a process of its own: saves checkpoints and exports the same policy, in several ways.

`python -m tests.training.saved_ranks RANK RANKS PORT FOLDER`: FOLDER holds the models, and `CASE/run.yaml` of each case; CASE/checkpoints
and CASE/export are written there.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from rlhf.algorithms import make
from rlhf.config import Settings, load
from rlhf.config.cluster import ClusterSettings
from rlhf.data.model_identity import model_digest
from rlhf.policy import rank as policy_rank
from rlhf.policy.rank import PolicyRank
from rlhf.training.checkpoints import Checkpoints
from rlhf.training.packing import pack_sequences
from rlhf.training.ranks import Member, join, leave
from rlhf.training.resume import MODEL, RUN, remembered


def save(settings: Settings, rank: int) -> None:
    """Two steps of a likelihood on other rows on each rank; then a checkpoint and an export."""
    member = PolicyRank(rank, settings, make(settings), 2)
    member.setup("", 0)
    row = pack_sequences([np.arange(5 + rank, 17 + rank)], [np.arange(12) > 0], member.device)
    for _ in range(2):
        member.policy.backward(-member.policy.forward(row)[0].sum())
        member.policy.step()
    checkpoints = Checkpoints(settings.run.dir, keep=1)
    tag = checkpoints.tag(2)
    torch.distributed.barrier()
    member.save(str(checkpoints.folder), tag)
    member.export(str(Path(settings.run.dir) / "export"))
    torch.distributed.barrier()
    if rank == 0:
        contents = {MODEL: model_digest(settings.policy.model)}
        checkpoints.complete(tag, {"step": 2, RUN: remembered(settings, contents)})


def main(rank: int, ranks: int, port: int, folder: Path) -> None:
    join(Member(rank, ranks, "127.0.0.1", port), ClusterSettings(device="cpu"))
    policy_rank.join = lambda *_: None  # one group serves all cases
    for config in sorted(folder.glob("*/run.yaml")):
        settings = load(config)
        if settings.policy.ranks == ranks:
            save(settings, rank)
    (folder / f"done-{ranks}-{rank}.json").write_text(json.dumps(True))
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    sys.stderr.flush()
    os._exit(0)  # threads of gloo that still run when the interpreter is taken down abort the process now and then
