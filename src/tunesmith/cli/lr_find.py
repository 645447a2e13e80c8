"""tunesmith lr-find."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.cli.options import Parser, add_settings, positive, settings, show_json
from tunesmith.errors import UsageError

if TYPE_CHECKING:
    from tunesmith.evaluation.rates import Advice
    from tunesmith.local.lr_finder import Trial


def lr_find(argv: list[str]) -> int:
    parser = Parser(
        "lr-find", "Try learning rates in short real runs, the better ones for longer, and recommend one."
    ).with_json()
    parser.add_argument("--trial-steps", type=positive, default=15, metavar="N", help="steps of the shortest runs [15]")
    parser.add_argument("--plot", metavar="OUT.svg", help="write the losses as a picture")
    add_settings(parser)
    options = parser.parse_args(argv)
    from tunesmith import api
    from tunesmith.cli.progress import clock
    from tunesmith.local import loading

    with loading():
        from tunesmith.local.machine import tune
    if options.plot:
        from tunesmith.data.write import refuse_output

        refuse_output(Path(options.plot))
        if not options.plot.endswith(".svg"):
            raise UsageError("the picture is an SVG file", where=options.plot, fix="end the name with .svg")
    tune()
    began, done = time.monotonic(), 0

    def tell(trial: Trial) -> None:
        nonlocal done
        done += trial.steps
        eta = (time.monotonic() - began) / done * (23 * options.trial_steps - done)  # 7 + 4 x 2 + 2 x 4 shortest runs
        print(
            f"{trial.steps} steps at {trial.rate:.2e}: validation loss {trial.loss():.4f}  ETA {clock(max(0, eta))}",
            file=sys.stderr,
        )

    advice = api.lr_find(options.trial_steps, tell, config=options.config, **settings(options))
    if options.json:
        show_json(advice)
    else:
        _show(advice)
    if options.plot:  # after what took the time is told
        from tunesmith.data.write import write_bytes
        from tunesmith.evaluation.rates import chart

        write_bytes(Path(options.plot), chart(advice).encode())
    return 0


def _show(advice: Advice) -> None:
    from tunesmith.cli.progress import table

    low = min((loss for trials in advice.rounds for _, _, loss in trials if loss is not None), default=0.0)
    rows: list[tuple[object, ...]] = [("steps", "rate", "validation loss", "")]
    for trials in advice.rounds:
        for rate, steps, loss in sorted(trials):
            bar = "diverged" if loss is None else "█" * min(30, 1 + round(30 * (loss - low) / low))
            rows.append((steps, f"{rate:.2e}", "" if loss is None else f"{loss:.4f}", bar))
    print(table(rows))
    print(f"{'take' if advice.certain else 'perhaps'}: --learning-rate {advice.rate:.2g}  ({advice.reason})")
