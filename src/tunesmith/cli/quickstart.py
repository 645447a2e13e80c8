"""tunesmith quickstart: the whole road on the sample persona, offline, in about two minutes on two cores."""

from __future__ import annotations

import sys
from pathlib import Path

from tunesmith.cli.options import Parser, show_json


def quickstart(argv: list[str]) -> int:
    parser = Parser(
        "quickstart", "Train the built-in model on the sample persona, compare it with the base, write a report."
    ).with_json()
    parser.add_argument("--output-dir", default="fine_tuned_models/quickstart", help="[fine_tuned_models/quickstart]")
    options = parser.parse_args(argv)
    from tunesmith import api
    from tunesmith.cli.evaluate import show
    from tunesmith.cli.progress import Bar, Progress
    from tunesmith.cli.train import preflight
    from tunesmith.data.read import SAMPLES
    from tunesmith.evaluation.evaluate import kept
    from tunesmith.runs import Run

    progress = Progress()
    run = Run(options.output_dir)
    try:
        if (Path(run) / "run.json").exists():  # run again: go on from where it stands
            print(f"{run} exists: showing it (remove it to train anew)", file=sys.stderr)
            run = api.resume(run, progress)
        else:
            run = api.train(
                SAMPLES / "echo.jsonl",
                model="starter",
                output_dir=options.output_dir,
                on_prepared=preflight,
                on_event=progress,
            )
    finally:
        progress.close()
    result = kept(run)
    if result is None:
        with Bar() as bar:
            result = api.evaluate(run, on_progress=bar)
    if options.json:
        show_json({"run": run.summary(), "evaluation": result})
        return 0
    show(result)
    print(f"\ntalk with it:    tunesmith chat {run:q}\nyour own data:   tunesmith train --dataset YOUR.jsonl")
    return 0
