"""tunesmith runs list | show | watch."""

from __future__ import annotations

import sys
from pathlib import Path

from tunesmith.cli.options import Parser, show_json
from tunesmith.errors import RunError


def list_runs(argv: list[str]) -> int:
    parser = Parser("runs list", "Runs in a folder, newest first.").with_json()
    parser.add_argument("--runs-dir", default="fine_tuned_models", help="where they are [fine_tuned_models]")
    options = parser.parse_args(argv)
    from tunesmith.cli.progress import table
    from tunesmith.runs import listing

    runs = []
    for run in listing(Path(options.runs_dir)):
        try:
            runs.append(run.summary())
        except RunError as error:  # one damaged run must not hide the others
            print(f"warning: {error}", file=sys.stderr)
    if options.json:
        show_json(runs)
    elif not runs:
        print(f"no runs in {options.runs_dir}", file=sys.stderr)
    else:
        rows = [("run", "status", "step", "model", "method", "best valid loss")]
        rows += [
            (
                r["run"],
                r["status"],
                f"{r['steps']}/{r['planned_steps']}",
                r["model"],
                r["method"],
                _number(r["best_valid_loss"]),
            )
            for r in runs
        ]
        print(table(rows, ""))
    return 0


def show(argv: list[str]) -> int:
    parser = Parser("runs show", "One run: how it stands, its losses, settings and warnings.").with_json()
    parser.add_argument("run", help="the run's directory")
    options = parser.parse_args(argv)
    from tunesmith import api
    from tunesmith.cli.curves import of_run
    from tunesmith.cli.progress import table

    run = api.find_run(options.run)
    manifest, summary = run.manifest(), run.summary()
    if options.json:
        show_json(
            {
                **summary,
                "evals": run.metrics("eval"),
                "recipe": manifest["recipe"],
                "origin": manifest["origin"],
                "versions": manifest["versions"],
            }
        )
        return 0
    print(table([(k, _number(v)) for k, v in summary.items() if v is not None], ""))
    evals = run.metrics("eval")
    for line in of_run(run.metrics("step"), evals):
        print(line)
    if evals:
        print("\nvalidation loss\n" + table([("step", "loss"), *((e["step"], f"{e['loss']:.4f}") for e in evals)]))
    print(
        "\nsettings that are not defaults\n"
        + table([(k, manifest["recipe"][k], o) for k, o in manifest["origin"].items() if o != "default"])
    )
    for event in run.events():
        if event["type"] in ("warning", "error", "overfitting"):
            print(f"{event['type']}: {event['message']}")
    return 0


def watch(argv: list[str]) -> int:
    parser = Parser("runs watch", "Follow a run that another process trains, until it ends. Ctrl-C leaves it alone.")
    parser.add_argument("run", help="the run's directory")
    options = parser.parse_args(argv)
    import time

    from tunesmith import api
    from tunesmith.cli.progress import Progress

    run, offset, progress, word = api.find_run(options.run), 0, Progress(), "unknown"
    try:
        while True:
            busy = run.busy()  # asked before the events are read: none that came before the end is missed
            events, offset = run.events_from(offset)
            for event in events:
                progress(run, event)
                word = event["state"] if event["type"] == "state" else word
            state = "interrupted" if word in ("preparing", "running") and not busy else word
            if state not in ("queued", "preparing", "running"):
                break
            time.sleep(api.POLL_SECONDS)
    finally:
        progress.close()
    print(f"{run}  {state}")
    return 0 if state == "succeeded" else 1


def _number(value: object) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
