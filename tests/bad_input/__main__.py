"""Count the verdicts of the walk: `python -m tests.bad_input [--failures] [--all] [TEXT ...]`.

TEXT: a part of the names of the cases to run. `--all`: every value with every field of the schema, several times as many.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

from tests.bad_input.place import Place, build_sources
from tests.bad_input.tables import all_cases
from tests.bad_input.walk import Verdict, nothing_starts, run


def main(arguments: list[str]) -> int:
    show = "--failures" in arguments
    wanted = [argument for argument in arguments if not argument.startswith("--")]
    counts: dict[str, Counter[Verdict]] = defaultdict(Counter)
    seconds: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, nothing_starts():
        build_sources(Path(folder) / "sources")
        place = Place(Path(folder) / "place", Path(folder) / "sources")
        for case in all_cases(every="--all" in arguments):
            if not all(part in case.name for part in wanted):
                continue
            begun = time.process_time()
            answer = run(case, place)
            took = time.process_time() - begun
            kind = case.name.partition("/")[0]
            seconds[kind] += took
            counts[kind][answer.verdict] += 1
            if show and not answer.good:
                print(f"## {case.name}\n{answer}\n", flush=True)
    total = sum(counts.values(), Counter())
    for kind, found in [*sorted(counts.items()), ("all", total)]:
        parts = ", ".join(f"{found[verdict]} {verdict.value}" for verdict in Verdict if found[verdict])
        print(f"{kind:12} {found.total():5} cases: {parts}; {seconds[kind] or seconds.total():.1f} s")
    return 0 if set(total) <= {Verdict.CLEAR, Verdict.RIGHT} else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
