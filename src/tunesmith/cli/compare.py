"""tunesmith runs compare."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.cli.evaluate import settled
from tunesmith.cli.options import Parser, natural, show_json

if TYPE_CHECKING:
    from tunesmith.evaluation.compare import Table
    from tunesmith.evaluation.stats import Comparison

LONGEST = 36  # characters of a value in a table


def compare(argv: list[str]) -> int:
    parser = Parser(
        "runs compare",
        "Runs against one another: the settings that differ, validation losses in one chart, metrics with their intervals, "
        "and each run against the first, row by row, where both were evaluated on the same rows.",
    ).with_json()
    parser.add_argument(
        "runs", nargs="+", metavar="run", help="the runs' directories; the first is what others are held to"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write it as a page (.html), or the curves alone (.svg)")
    parser.add_argument("--seed", type=natural, default=0, help="seed of the intervals [0]")
    options = parser.parse_args(argv)
    from tunesmith.evaluation.compare import table
    from tunesmith.runs import Run

    if options.output:
        from tunesmith.evaluation.compare_page import refuse, write

        refuse(Path(options.output))
    found = table([Run(path) for path in options.runs], options.seed)
    if options.output:
        write(found, Path(options.output))
    if options.json:
        show_json(found)
    else:
        show(found)
        if options.output:
            print(f"\nwritten: {options.output}")
    return 0


def show(found: Table) -> None:
    """The tables and the chart on stdout."""
    from tunesmith.cli.curves import several
    from tunesmith.cli.progress import table
    from tunesmith.evaluation.compare import steep
    from tunesmith.evaluation.compare_page import by_metric

    rows: list[tuple[object, ...]] = [
        ("", "run", "status", "model", "parameters", "method", "rank", "preset", "steps", "best valid loss")
    ]
    for r in found.runs:
        best = "-" if r.best_loss is None else f"{r.best_loss:.4f} at {r.best_step}"
        size = f"{r.parameters:,}" if r.parameters else "-"
        rank = "-" if r.rank is None else str(r.rank)
        name, model = (text if len(text) <= LONGEST else "…" + text[1 - LONGEST :] for text in (r.run, r.model or "-"))
        rows.append((r.letter, name, r.status, model, size, r.method or "-", rank, r.preset or "-", r.steps, best))
    print(table(rows, ""))
    for r in found.runs:
        for problem in r.problems:
            print(f"{r.letter}: {problem}")
    letters = [r.letter for r in found.runs]
    if found.settings:
        print("\nsettings that differ")
        print(table([("setting", *letters), *((n, *map(_short, values)) for n, values in found.settings.items())]))
    else:
        print("\nno setting differs")
    curves = [r.curve for r in found.runs]
    width = max(20, min(72, shutil.get_terminal_size().columns - 12))
    if lines := several(curves, "".join(letters), width, steep=steep(curves)):
        print("\nvalidation loss (nats per token" + (", logarithmic)" if steep(curves) else ")"))
        print("\n".join(lines))
    if metrics := by_metric(found):
        print("\nevaluations, each run against its own base")
        rows = [("metric", "", "base", "tuned", "difference", "95 % interval", "verdict")]
        for name, shown in metrics.items():
            for i, (letter, m) in enumerate(shown):
                rows.append(("" if i else name, letter, *_figures(m)))
        print(table(rows))
    print(f"\nagainst A ({found.runs[0].run}), row by row")
    for pair in found.pairs:
        if not (told := pair.comparison):
            print(f"  {pair.letter}  cannot be paired: {pair.reason}")
            continue
        _, _, difference, interval, word = _figures(told)
        told_of = f"{told.metric}: {difference}, 95 % interval {interval}, on {told.rows} rows: {word}{settled(told)}"
        print(f"  {pair.letter}  {told_of}")


def _figures(m: Comparison) -> tuple[str, str, str, str, str]:
    interval = "-" if m.low is None else f"{m.low:+.4f} … {m.high:+.4f}"
    return f"{m.base:.4f}", f"{m.tuned:.4f}", f"{m.difference:+.4f}", interval, m.verdict or "-"


def _short(value: object) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
