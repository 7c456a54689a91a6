"""The doctor on a cluster of two nodes, with the real roles in its trial step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("doctor")
    file = folder / "findings.json"
    few = (
        "cluster.device=cpu",
        "rollout.engines=1",
        "policy.micro_batch_tokens=320",
        "data.eval_prompts=null",
        f"run.dir={folder}/run",
    )
    command = [sys.executable, "-m", "tests.preflight.two_nodes", str(file), *few]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.endswith("fit\n")
    return {finding["name"]: finding for finding in json.loads(file.read_text())["findings"]}


def test_the_nodes_talk(findings: dict[str, dict[str, Any]]) -> None:
    assert "2 node(s), 0 GPU(s)" in findings["Ray"]["seen"]
    assert findings["ports"]["state"] == "ok" and findings["ports"]["seen"].startswith("2 free port(s)")
    assert findings["collectives"]["state"] in ("ok", "warning")
    assert "gloo, 64 MiB over 2 processes on 2 node(s): all-reduce" in findings["collectives"]["seen"]


def test_the_trial_step_reaches_the_limits(findings: dict[str, dict[str, Any]]) -> None:
    """Two ranks, two prompts of 128 + 2 x 16 tokens each in 320; four responses to each prompt, none of which stops early."""
    step = findings["worst-case step"]
    assert step["state"] == "ok" and step["seen"].startswith(
        "4 prompts of up to 128 tokens, 256 response tokens at the full 16 each"
    )
