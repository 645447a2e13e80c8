"""How many planted near duplicates are found among many rows, and how many others are taken for one.

    python benchmarks/near_duplicates.py [--rows 100000]

One row in ten is a changed copy of another: words swapped, capitals, punctuation, or 5 % of the letters edited (the
changes of tests/unit/test_dedup.py). Prints recall for each kind, precision, and rows a second.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent / "tests"), str(Path(__file__).parent.parent / "tests" / "unit")]

from test_dedup import WORDS, edit, punctuate, shout, swap  # noqa: E402

from tunesmith.data.dedup import THRESHOLD, pairs, sketches  # noqa: E402

CHANGES = (swap, shout, punctuate, edit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    planted = options.rows // 10
    rows = [" ".join(rng.choices(WORDS, k=rng.randint(12, 120))) for _ in range(options.rows - planted)]
    want = {}
    for i in rng.sample(range(len(rows)), planted):
        change = CHANGES[len(want) % len(CHANGES)]
        want[i, len(rows)] = change.__name__
        rows.append(change(rows[i], rng))
    begun = time.perf_counter()
    found = {(a, b) for a, b, _ in pairs(sketches(rows))}
    seconds = time.perf_counter() - begun
    print(f"{len(rows):,} rows, {planted:,} planted, threshold {THRESHOLD}: {len(rows) / seconds:,.0f} rows/s")
    for change in CHANGES:
        kind = {pair for pair, name in want.items() if name == change.__name__}
        print(f"  recall {len(found & kind) / len(kind):7.2%}  {change.__name__}")
    both = found & want.keys()
    print(f"  recall {len(both) / len(want):7.2%}  all\n  precision {len(both) / len(found):.2%}")


if __name__ == "__main__":
    main()
