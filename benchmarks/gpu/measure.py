"""What one GPU does with this project's training side: one script, at most ten minutes, one JSON file and one table.

Needs torch 2.11 or later, transformers, peft and pydantic; no Ray, no vLLM, no download. The last part needs DeepSpeed and is left out
without it. Every part is a process of its own, so that one that fails or hangs costs only itself; the order is that of value, and
what does not fit into the time is left out and said so. `--smoke` runs all parts in miniature, also on a CPU, where the numbers mean
nothing.

Owns: the order, the time and the report. The parts themselves lie beside this file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIMIT_S = 570
"""Of all parts together: a little under ten minutes."""
LEAST_S = 20
"""A part is not begun with less time than this."""
PARTS: dict[str, int] = {
    "machine": 60,
    "equality": 180,
    "speed": 120,
    "logprobs": 60,
    "step": 150,
    "memory": 90,
    "ragged": 120,
    "deepspeed": 120,
}
"""Name, in the order of value -> seconds that it may take."""


@dataclass(frozen=True)
class Outcome:
    """What became of a part.

    Attributes:
        status: done, failed, timed out, or left out (no time, or something is not installed).
        why: the last lines of a failure.
        rows: what it measured until then.
    """

    status: str
    seconds: float
    rows: tuple[Mapping[str, Any], ...]
    why: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, after each part")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="which parts (default: all)")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help=f"seconds for all of them (default: {LIMIT_S})")
    parser.add_argument("--smoke", action="store_true", help="in miniature, also without a GPU")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.limit
    found: dict[str, Outcome] = {}
    for name in args.parts:
        command = [sys.executable, str(HERE / "parts.py"), name, *(["--smoke"] if args.smoke else [])]
        found[name] = run(command, min(PARTS[name], deadline - time.monotonic()))
        print(shown(name, found[name]), flush=True)
        if args.json is not None:
            report = {"smoke": args.smoke, "parts": {part: asdict(outcome) for part, outcome in found.items()}}
            args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(any(outcome.status in ("failed", "timed out") for outcome in found.values()))


def run(command: Sequence[str], limit_s: float) -> Outcome:
    """Run one part; its rows are JSON objects, one a line, in a file that it is given as the last argument."""
    if limit_s < LEAST_S:
        return Outcome("left out", 0.0, (), f"only {max(0, limit_s):.0f} s were left")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows, errors = Path(folder) / "rows.jsonl", Path(folder) / "errors.txt"
        rows.touch()
        with errors.open("w", encoding="utf-8") as stream:
            process = subprocess.Popen([*command, str(rows)], stdout=stream, stderr=subprocess.STDOUT)
            try:
                code: int | None = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = None
        measured = tuple(json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines())
        said = "\n".join(errors.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
    seconds = time.monotonic() - start
    if code is None:
        return Outcome("timed out", seconds, measured, said)
    if code:
        return Outcome("failed", seconds, measured, said)
    skipped = [row["left_out"] for row in measured if "left_out" in row]
    if skipped and len(skipped) == len(measured):
        return Outcome("left out", seconds, (), skipped[0])
    return Outcome("done", seconds, measured)


def shown(name: str, outcome: Outcome) -> str:
    """A part as a table."""
    lines = [f"\n{name}: {outcome.status}, {outcome.seconds:.0f} s"]
    columns = list(dict.fromkeys(key for row in outcome.rows for key in row))
    cells = [columns, *([_cell(row.get(key)) for key in columns] for row in outcome.rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    if outcome.rows:
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
    if outcome.why:
        lines += [f"  | {line}" for line in outcome.why.splitlines()]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
