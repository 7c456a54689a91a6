"""The run record, on disk first.

Owns: everything in the run folder that describes the run: `config.yaml`, `manifest.json`, `metrics.jsonl`,
`evaluations.jsonl`, `samples.jsonl`, `spans.jsonl` (`record.py`, `manifest.py`, `jsonl.py`; `folder.py`: may it), `responses/`
(`responses.py`), and what is made from these files: the console (`console.py`), Weights & Biases (`wandb.py`), the curve and the
before/after table (`report.py`). Owns too what each metric means (`catalogue.py`, `metrics_page.py`).
Does not own: checkpoints and exports, which lie in the same folder. Does not know: how a number is computed.
Rule: after the run has started nothing in this room can stop it; what fails here is warned about, once.
"""

from rlhf.tracking.record import Record

__all__ = ["Record"]
