"""tunesmith runs list | show | tag | rm | watch | events | cancel | pause | resume."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.cli.options import Parser, confirm, show_json
from tunesmith.errors import Interrupted, RunError
from tunesmith.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith.cli.progress import Progress
    from tunesmith.runs import Run


def list_runs(argv: list[str]) -> int:
    parser = Parser("runs list", "Runs in a folder, newest first.").with_json()
    parser.add_argument("--runs-dir", help="where they are [fine_tuned_models, and the current folder]")
    parser.add_argument("--tag", metavar="NAME", help="only runs that have this tag")
    options = parser.parse_args(argv)
    from tunesmith.runs import listing

    runs = []
    folders = [options.runs_dir] if options.runs_dir else [Recipe().runs_dir, "."]
    for run in listing(*map(Path, folders)):
        try:
            if options.tag is None or options.tag in run.tags():
                runs.append(_told(run))
        except RunError as error:  # one damaged run must not hide the others
            print(f"warning: {error}", file=sys.stderr)
    if options.json:
        show_json(runs)
    elif not runs:
        tagged = "" if options.tag is None else f" with the tag {options.tag}"
        print(f"no runs in {' or '.join(folders)}{tagged}", file=sys.stderr)
    else:
        _list(runs)
    return 0


def _told(run: Run) -> dict[str, Any]:
    """A run's summary, and what the user has made of it."""
    return {**run.summary(), "tags": run.tags(), "version": run.version(), "removed": run.removed()}


def _list(runs: list[dict[str, Any]]) -> None:
    """A table on stdout; a column for tags and one for versions where any run has some."""
    from tunesmith.cli.progress import table

    columns = {
        "run": [r["run"] for r in runs],
        "status": [r["status"] + (", weights removed" if r["removed"] else "") for r in runs],
        "step": [f"{r['steps']}/{r['planned_steps']}" for r in runs],
        "model": [r["model"] for r in runs],
        "method": [r["method"] for r in runs],
        "best valid loss": [_number(r["best_valid_loss"]) for r in runs],
    }
    if any(r["version"] > 1 for r in runs):
        columns["version"] = [r["version"] for r in runs]
    if any(r["tags"] for r in runs):
        columns["tags"] = [" ".join(r["tags"]) for r in runs]
    print(table([tuple(columns), *zip(*columns.values(), strict=True)], ""))


def show(argv: list[str]) -> int:
    parser = Parser("runs show", "One run: how it stands, its losses, settings and warnings.").with_json()
    parser.add_argument("run", help="the run's directory")
    options = parser.parse_args(argv)
    from tunesmith import api
    from tunesmith.cli.curves import of_run
    from tunesmith.cli.evaluate import diagnosed
    from tunesmith.cli.progress import table
    from tunesmith.evaluation.diagnosis import curves

    run = api.find_run(options.run)
    manifest, summary, lineage = run.manifest(), run.summary(), run.lineage()
    found = curves(run.metrics("step"), run.metrics("eval"))
    if options.json:
        show_json(
            {
                **_told(run),
                **_at_service(run),
                "lineage": lineage,
                "evals": run.metrics("eval"),
                "recipe": manifest["recipe"],
                "origin": manifest["origin"],
                "versions": manifest["versions"],
                "diagnoses": found,
            }
        )
        return 0
    summary |= _at_service(run)
    if tags := run.tags():
        summary["tags"] = " ".join(tags)
    if run.removed():
        summary["weights"] = "removed"
    print(table([(k, _number(v)) for k, v in summary.items() if v is not None], ""))
    if len(lineage) > 1:
        print("\nlineage\n" + _lineage(lineage))
    evals = run.metrics("eval")
    width = max(20, min(60, shutil.get_terminal_size().columns - 12))  # the axis takes the rest
    for line in of_run(run.metrics("step"), evals, width):
        print(line)
    if evals:
        print("\nvalidation loss\n" + table([("step", "loss"), *((e["step"], f"{e['loss']:.4f}") for e in evals)]))
    print(
        "\nsettings given or worked out\n"
        + table([(k, manifest["recipe"][k], o) for k, o in manifest["origin"].items() if o != "default"])
    )
    for event in run.events():
        known = event["type"] in {d.name for d in found}
        if event["type"] in ("warning", "error", "overfitting") and not known:
            print(f"{event['type']}: {event['message']}")
    diagnosed(found)
    return 0


def _at_service(run: Run) -> dict[str, Any]:
    """Ids of job and files at a service, as far as it has them; {} for a run of this machine."""
    import msgspec

    try:
        link = msgspec.json.decode((run / "remote.json").read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError):  # what is wrong with it, `runs watch` says
        return {}
    files = link.get("files") or {}
    return {"job": link.get("job"), "training_file": files.get("train"), "validation_file": files.get("valid")}


def _lineage(lineage: list[dict[str, Any]]) -> str:
    """A table: this run first, what it all began with last."""
    from tunesmith.cli.progress import table

    rows: list[tuple[object, ...]] = [
        ("version", "run", "began from", "data set", "data hash", "method", "best valid loss")
    ]
    for r in lineage:
        digest, loss = (r["data_hash"] or "-")[:12], _number(r["best_valid_loss"])
        rows.append((r["version"], r["run"], r["model"], r["dataset"], digest, r["method"], loss))
    return table(rows)


def tag(argv: list[str]) -> int:
    parser = Parser(
        "runs tag", "Give a run tags, by which runs list finds it; they are kept in its event log."
    ).with_json()
    parser.add_argument("run", help="the run's directory")
    parser.add_argument("names", nargs="+", metavar="NAME", help="letters, digits, . _ and -, 64 at most")
    parser.add_argument("--remove", action="store_true", help="take them back")
    options = parser.parse_args(argv)
    from tunesmith import api

    run = api.find_run(options.run)
    (run.untag if options.remove else run.tag)(*options.names)
    if options.json:
        show_json({"run": str(run), "tags": run.tags()})
    else:
        print(f"{run}  {' '.join(run.tags()) or '(no tags)'}")
    return 0


def rm(argv: list[str]) -> int:
    parser = Parser(
        "runs rm",
        "Delete a run's weights: checkpoints, model folders, tokens. Its record stays: settings, events, rows, evaluations, "
        "report. After a kill it is done again.",
    ).with_json()
    parser.add_argument("run", help="the run's directory")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--force", action="store_true", help="also where other runs began from it")
    options = parser.parse_args(argv)
    from tunesmith import api
    from tunesmith.removal import refuse, remove

    run = api.find_run(options.run)
    refuse(run, options.force)
    if not (options.yes or confirm(f"delete the weights of {run} for good?", "weights do not come back", str(run))):
        raise Interrupted("nothing was deleted", where=str(run), fix=f"see what is there: tunesmith runs show {run:q}")
    freed = remove(run, options.force)
    if options.json:
        show_json({"run": str(run), "freed_bytes": freed})
    else:
        print(f"{run}  weights removed, {freed:,} bytes freed; the record stays")
    return 0


def watch(argv: list[str]) -> int:
    parser = Parser(
        "runs watch",
        "Follow a run until it ends: one that another process trains here, or a job at a service, whose events and results "
        "come into the run. Ctrl-C leaves it alone.",
    ).with_json()
    parser.add_argument("run", help="the run's directory")
    options = parser.parse_args(argv)
    import time

    from tunesmith import api, backends
    from tunesmith.cli.progress import Progress

    run, progress = api.find_run(options.run), Progress()
    try:
        if run.manifest()["provider"] == "openai":
            events, offset = run.events_from(0)
            for event in events:
                progress(run, event)
            state = backends.watch(run, backends.get("openai"), progress, offset).state()
        else:
            state = _watch_here(run, progress, lambda: time.sleep(backends.POLL_SECONDS))
    finally:
        progress.close()
    if options.json:
        show_json(run.summary())
    else:
        print(f"{run}  {state}")
    return 0 if state == "succeeded" else 1


def _watch_here(run: Run, progress: Progress, wait: Callable[[], None]) -> str:
    """Follow the log of a run on this machine; the state it ends in."""
    from tunesmith.runs import standing

    offset, last = 0, dict[str, Any]()
    while True:
        busy = run.busy()  # asked before the events are read: none that came before the end is missed
        events, offset = run.events_from(offset)
        for event in events:
            progress(run, event)
            last = event if event["type"] == "state" else last
        state = standing(last, busy)
        if state not in ("queued", "preparing", "running"):
            return state
        wait()


def cancel(argv: list[str]) -> int:
    return _act(argv, "cancel", "Stop a run: a job at a service for good, a run on this machine with a checkpoint.")


def pause(argv: list[str]) -> int:
    return _act(argv, "pause", "Pause a job at a service.")


def resume(argv: list[str]) -> int:
    return _act(argv, "resume", "Have a service go on with a job that is paused.")


def _act(argv: list[str], what: str, about: str) -> int:
    parser = Parser(f"runs {what}", about).with_json()
    parser.add_argument("run", help="the run's directory")
    options = parser.parse_args(argv)
    from tunesmith import api, backends

    run = api.find_run(options.run)
    state = backends.get(run.manifest()["provider"]).act(run, what)
    if options.json:
        show_json({"run": str(run), "status": state})
    else:
        print(f"{run}  {state}")
    return 0


def events(argv: list[str]) -> int:
    parser = Parser(
        "runs events", "What a run has told, oldest first; of a job at a service, what is new is fetched before."
    ).with_json()
    parser.add_argument("run", help="the run's directory")
    parser.add_argument(
        "--type", metavar="TYPE", help="those of one type: step, eval, message, warning, error, state …"
    )
    options = parser.parse_args(argv)
    import time

    import msgspec

    from tunesmith import api, backends

    refuse_type(options.type)
    run = api.find_run(options.run)
    if run.manifest()["provider"] == "openai" and api.has_job(run):
        backends.get("openai").poll(run)
    for event in run.events():
        if options.type and event["type"] != options.type:
            continue
        if options.json:
            print(msgspec.json.encode(event).decode())
            continue
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
        rest = {k: v for k, v in event.items() if k not in ("type", "time", "event") and v is not None}
        said = rest.pop("message", "")
        print(f"{when}  {event['type']:10}  {said}{' ' if said and rest else ''}{_fields(rest)}")
    return 0


def refuse_type(name: str | None) -> None:
    """UsageError for a type of which no run has events."""
    import tomllib

    from tunesmith.errors import UsageError, did_you_mean
    from tunesmith.recipe import FACTS

    known = tomllib.loads((FACTS / "events.toml").read_text(encoding="utf-8"))
    if name is not None and name not in known:
        fix = f"known: {', '.join(known)}"
        raise UsageError(f'no type "{name}"{did_you_mean(name, list(known))}', where="--type", fix=fix)


def _fields(values: dict[str, object]) -> str:
    return "  ".join(f"{name} {_number(value)}" for name, value in values.items())


def _number(value: object) -> str:
    if isinstance(value, float):  # a learning rate is often under 0.0001
        return f"{value:.3g}" if 0 < abs(value) < 0.01 else f"{value:.4f}"
    return "-" if value is None else str(value)
