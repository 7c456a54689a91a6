"""The table in docs/plan.md: what the planner proposes for three models on named clusters. `python -m rlhf.preflight.table` writes it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf.algorithms import make
from rlhf.cluster.gpus import gpu_kind
from rlhf.preflight.estimate import Cluster
from rlhf.preflight.propose import CannotFit, Proposal, propose
from rlhf.preflight.report import shape_of, typical

PAGE = Path(__file__).parents[2] / "docs" / "plan.md"
START, END = "<!-- table: python -m rlhf.preflight.table -->", "<!-- end of the table -->"
HEADER = (
    "| model | cluster | layout | policy GPU | engine GPU | seconds a step: generate + learn + publish + turns | response tokens/s |",
    "| --- | --- | --- | --- | --- | --- | --- |",
)
LORA = ("policy.lora.rank=16",)
CASES: tuple[tuple[str, tuple[str, ...], int, int, str], ...] = (
    ("llama-3.1-8b", (), 1, 8, "a100-80gb"),
    ("llama-3.1-8b", (), 1, 4, "h100-80gb"),
    ("llama-3.1-8b", (), 1, 8, "h100-80gb"),
    ("llama-3.1-8b", (), 2, 8, "h100-80gb"),
    ("llama-3.1-8b", LORA, 1, 1, "h100-80gb"),
    ("llama-3.1-8b", LORA, 1, 8, "l40s-48gb"),
    ("llama-3.1-70b", (), 2, 8, "h100-80gb"),
    ("llama-3.1-70b", (), 8, 8, "h100-80gb"),
    ("llama-3.1-70b", (), 2, 8, "b200-192gb"),
    ("llama-3.1-70b", LORA, 1, 8, "h100-80gb"),
    ("llama-3.1-405b", (), 16, 8, "h100-80gb"),
    ("llama-3.1-405b", (), 16, 8, "h200-141gb"),
    ("llama-3.1-405b", (), 16, 8, "b200-192gb"),
    ("llama-3.1-405b", LORA, 4, 8, "h200-141gb"),
)
"""Model, overrides, nodes, GPUs of each, their kind."""


def rows() -> Iterator[str]:
    """The table's lines, the header first."""
    yield from HEADER
    for model, overrides, nodes, gpus, kind in CASES:
        settings = typical(model, overrides)
        cluster = Cluster(nodes, gpus, gpu_kind(kind))
        name = model + (", LoRA 16" if overrides else "")
        where = f"{nodes} x {gpus} {kind}"
        try:
            best = propose(settings, shape_of(model), make(settings), cluster)[0]
        except CannotFit:
            yield f"| {name} | {where} | does not fit | | | | |"
        else:
            yield f"| {name} | {where} | {' | '.join(_cells(best))} |"


def _cells(best: Proposal) -> Sequence[str]:
    settings, made = best.settings, best.estimate
    policy, rollout, time = settings.policy, settings.rollout, made.time
    saved = [f"ZeRO {policy.zero_stage}", f"micro-batch {policy.micro_batch_tokens}"]
    saved += ["checkpointing"] * policy.gradient_checkpointing
    saved += ["optimizer on hosts"] * (policy.offload_optimizer != "none")
    saved += ["weights on hosts"] * (policy.offload_parameters != "none")
    layout = (
        f"{settings.cluster.placement}; {_n(policy.ranks, 'rank')} ({', '.join(saved)}); {_n(rollout.engines, 'engine')} x "
        f"{_n(rollout.tensor_parallel_size, 'GPU')}"
    )
    parts = f"{time.generate:.0f} + {time.learn:.0f} + {time.publish:.1f} + {time.turns:.1f}"
    tokens = settings.loop.prompts_per_step * 2 * rollout.max_tokens / time.total
    return (
        layout,
        f"{made.learning / 1e9:.0f} GB",
        f"{made.generating / 1e9:.0f} GB; {made.sequences:,} sequences",
        f"{time.total:.0f} = {parts}",
        f"{tokens:,.0f}",
    )


def _n(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def with_table(page: str) -> str:
    """The page with a new table."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return "\n".join([before + START, "", *rows(), "", END + after])


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"wrote {PAGE}\n")
