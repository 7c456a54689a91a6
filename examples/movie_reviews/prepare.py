"""Get ready for the demo: fetch models and data, and train the reward model unless an up-to-date one is there.

`python examples/movie_reviews/prepare.py [--output FOLDER] [--method ridge|full] [--threads N]`
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

from rlhf.config.loader import UserError
from rlhf.config.reward_training_checks import load_reward_training
from rlhf.data.assets import resolve

ASSETS = ("asset:smollm2-135m-instruct", "asset:minilm-l6-v2", "asset:movie-reviews/reward_train.jsonl")
STAMP = "made_from.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="runs/demo/reward_model", help="folder of the reward model")
    parser.add_argument(
        "--method", choices=("ridge", "full"), default="ridge", help="full judges better and takes about twice as long"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    options = parser.parse_args()
    try:
        prepare(Path(options.output), options.method, options.threads)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(output: Path, method: str, threads: int | None) -> None:
    """Leave the reward model in `output`, with a stamp of what it was made from."""
    for asset in ASSETS:
        print(f"{asset}: {resolve(asset)}", flush=True)
    wanted = _stamp(method)
    if (output / STAMP).is_file() and json.loads((output / STAMP).read_text()) == wanted:
        print(f"the reward model in {output} is up to date", flush=True)
        return
    print(
        f"training the reward model ({method} on MiniLM, human ratings of film-review sentences); a few minutes",
        flush=True,
    )
    from rlhf.reward.training.train import train

    given = {
        "run.dir": ("--output", str(output)),
        "model.path": ("--model", "asset:minilm-l6-v2"),
        "data.train": ("--train", "asset:movie-reviews/reward_train.jsonl"),
        "data.test": ("--test", "asset:movie-reviews/reward_test.jsonl"),
        "training.method": ("--method", method),
    }
    if threads is not None:
        given["cluster.threads"] = ("--threads", threads)
    train(load_reward_training(None, flags=given))
    (output / STAMP).write_text(json.dumps(wanted) + "\n")


def _stamp(method: str) -> dict[str, str]:
    """What decides whether a reward model is up to date: method, data and encoder."""
    files = {
        "data": Path(resolve("asset:movie-reviews/reward_train.jsonl")),
        "encoder": Path(resolve("asset:minilm-l6-v2")) / "model.safetensors",
    }
    return {"method": method} | {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


if __name__ == "__main__":
    raise SystemExit(main())
