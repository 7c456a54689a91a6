"""Count the verdicts of the walk; see `python -m tests.bad_input --help`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

from tests.bad_input.place import Place, build_sources
from tests.bad_input.tables import all_cases
from tests.bad_input.walk import Verdict, nothing_starts, run


def main() -> int:
    """Returns 1 if an answer is not good."""
    parser = argparse.ArgumentParser(prog="python -m tests.bad_input", description="Count the verdicts of the walk.")
    parser.add_argument("parts", nargs="*", metavar="TEXT", help="run the cases whose names hold one of these")
    parser.add_argument("--failures", action="store_true", help="show each answer that is not good")
    parser.add_argument("--every", action="store_true", help="also cases that meet the same code as others")
    args = parser.parse_args()
    counts: dict[str, Counter[Verdict]] = defaultdict(Counter)
    seconds: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, nothing_starts():
        build_sources(Path(folder) / "sources")
        place = Place(Path(folder) / "place", Path(folder) / "sources")
        for case in all_cases(args.every):
            if args.parts and not any(part in case.name for part in args.parts):
                continue
            begun = time.process_time()
            answer = run(case, place)
            took = time.process_time() - begun
            kind = case.name.partition("/")[0]
            seconds[kind] += took
            counts[kind][answer.verdict] += 1
            if args.failures and not answer.good:
                print(f"## {case.name}\n{answer}\n", flush=True)
    total = sum(counts.values(), Counter())
    for kind, found in [*sorted(counts.items()), ("all", total)]:
        parts = ", ".join(f"{found[verdict]} {verdict.value}" for verdict in Verdict if found[verdict])
        print(f"{kind:12} {found.total():5} cases: {parts}; {seconds[kind] or seconds.total():.1f} s")
    return 0 if set(total) <= {Verdict.CLEAR, Verdict.RIGHT} else 1


if __name__ == "__main__":
    sys.exit(main())
