"""Runs against one another: what was set otherwise, how their losses fell, what their evaluations say.

Each run was judged against its own base. Two runs are compared with each other only where they were judged on the very same
rows: then row by row, as base and tuned are. Otherwise it is said why not. A run that failed, still runs, was trained by a
service or is damaged is shown with what it has.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec
import numpy as np

from tunesmith.data.scan import conversations
from tunesmith.errors import RunError, TunesmithError, UsageError
from tunesmith.evaluation.likelihood import learnt_bytes
from tunesmith.evaluation.stats import Comparison, compare
from tunesmith.runs import Run

T = TypeVar("T")
MOST = 26  # runs, each named by a letter
PLACES = ("output_dir", "runs_dir")  # settings that say where a run lies: no two runs share them
BROKEN = (msgspec.MsgspecError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


class Entry(msgspec.Struct):
    """A run as far as it can be read. `problems`: what cannot, and why; `preset`: whose settings it began from.

    `parameters`: of the model, 0 where a service keeps it. `curve`: (step, validation loss in nats per token). `metrics`,
    `verdict`, `rows`: of its own evaluation, against `base`.
    """

    run: str
    letter: str
    status: str = "unknown"
    provider: str = ""
    model: str = ""
    parameters: int = 0
    method: str = ""
    rank: int | None = None
    preset: str = ""
    steps: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    seconds: float | None = None
    curve: list[tuple[int, float]] = []
    base: str = ""
    verdict: str = ""
    rows: int = 0
    metrics: list[Comparison] = []
    problems: list[str] = []


class Pair(msgspec.Struct, frozen=True):
    """A run against the first: by the loss on the same rows, `base` the first, `tuned` this one; or why it cannot be had."""

    run: str
    letter: str
    comparison: Comparison | None
    reason: str = ""


class Table(msgspec.Struct, frozen=True):
    """Runs in the order in which they were named. `settings`: those that differ, a value for each run, None where it is not
    known. `pairs`: each run but the first against the first."""

    runs: list[Entry]
    settings: dict[str, list[Any]]
    pairs: list[Pair]


class _Said(msgspec.Struct, frozen=True):
    """Of rows.jsonl, what one model made of a row."""

    loss: float | None = None
    tokens: int = 0


class _Row(msgspec.Struct, frozen=True):
    """A line of rows.jsonl, as far as it is needed here."""

    tuned: _Said
    digest: str = ""


class _Kept(msgspec.Struct, frozen=True):
    """Of result.json, what is shown here."""

    metrics: list[Comparison]
    verdict: str = ""
    base: str = ""
    rows: int = 0


def table(runs: Sequence[Run], seed: int = 0) -> Table:
    """The runs beside one another, two at least; the seed is that of the intervals. Raises UsageError where they are fewer or
    too many, RunError for what is no run at all."""
    if not 2 <= len(runs) <= MOST:
        fix = "one is shown by: tunesmith runs show" if len(runs) < 2 else "name fewer"
        raise UsageError(f"{len(runs)} runs: 2 to {MOST} can be compared", fix=fix)
    for run in runs:
        if not (run / "run.json").exists():
            raise RunError("not a run (no run.json)", where=str(run), fix="tunesmith runs list shows them")
    letters = [chr(ord("A") + i) for i in range(len(runs))]
    entries = [_entry(run, letter) for run, letter in zip(runs, letters, strict=True)]
    known = [_read(_settings, run, []) or {} for run in runs]
    judged = [_read(_rows, run, []) or [] for run in runs]
    pairs = [_pair(runs, entries, judged, i, seed) for i in range(1, len(runs))]
    return Table(entries, differing(known), pairs)


def _read(read: Callable[[Run], T], run: Run, problems: list[str]) -> T | None:
    """What is read of a run; where it is damaged None, and a word about it."""
    try:
        return read(run)
    except TunesmithError as error:
        problems.append(error.message)
    except BROKEN as error:
        problems.append(f"cannot be read: {type(error).__name__}: {str(error)[:80]}")
    return None


# ---- one run


def _entry(run: Run, letter: str) -> Entry:
    entry = Entry(str(run), letter, problems=[])
    for part in (_manifest, _log, _kept):
        _read(partial(part, entry), run, entry.problems)
    return entry


def _manifest(entry: Entry, run: Run) -> None:
    """Fill in what was asked of the run."""
    manifest, recipe = run.manifest(), _settings(run)
    entry.provider, entry.model = str(manifest["provider"]), str(recipe["model"])
    entry.method = "supervised" if entry.provider == "openai" else str(recipe["method"])
    entry.rank = int(recipe["lora_rank"]) if "lora" in entry.method and recipe.get("lora_rank") else None
    presets = {str(o) for o in manifest.get("origin", {}).values() if str(o).startswith("preset ")}
    entry.preset = ", ".join(sorted(o.removeprefix("preset ") for o in presets))
    entry.parameters = int((manifest.get("model") or {}).get("parameters", 0))


def _log(entry: Entry, run: Run) -> None:
    """Fill in what happened."""
    entry.status = run.state()
    if entry.status == "failed":
        entry.problems.append(f"failed: {run.last('error').get('message', 'see worker.log')}")
    evals = [(int(e["step"]), float(e["loss"])) for e in run.metrics("eval") if e.get("loss") is not None]
    entry.curve = [(step, loss) for step, loss in evals if math.isfinite(loss)]
    entry.steps = max((int(e["step"]) for e in run.metrics("step")), default=0)
    if entry.curve:
        entry.best_step, entry.best_loss = min(entry.curve, key=lambda point: point[1])
    entry.seconds = run.last("done").get("seconds")


def _kept(entry: Entry, run: Run) -> None:
    """Fill in the run's own evaluation."""
    path = run / "evaluation" / "result.json"
    if not path.exists():
        fix = f": tunesmith evaluate {run:q}" if entry.status == "succeeded" else ""
        entry.problems.append(f"not evaluated{fix}")
        return
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=_Kept)
    except (msgspec.MsgspecError, ValueError):
        entry.problems.append(f"its evaluation is damaged: tunesmith evaluate {run:q}")
        return
    entry.base, entry.verdict, entry.rows, entry.metrics = kept.base, kept.verdict, kept.rows, kept.metrics


def _settings(run: Run) -> dict[str, Any]:
    """What is trained: the settings, as they were changed when the run was gone on with, and of the data how many training rows
    there are, with the beginning of their hash."""
    manifest = run.manifest()
    changed = {k: v for e in run.events("changed") for k, v in e["settings"].items()}
    rows, digest = (
        (manifest["plan"].get("rows") or {}).get("train"),
        (manifest.get("data_hashes") or {}).get("train", ""),
    )
    data = {} if rows is None else {"training rows": f"{rows} ({digest[:8]})" if digest else str(rows)}
    return {**manifest["recipe"], **changed, **data}


def differing(known: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs of which they are known, a value for each run."""
    names = dict.fromkeys(name for settings in known for name in settings if name not in PLACES)
    found = {name: [settings.get(name) for settings in known] for name in names}
    told = {name: [settings[name] for settings in known if settings and name in settings] for name in names}
    return {name: values for name, values in found.items() if any(v != told[name][0] for v in told[name])}


def steep(curves: Sequence[Sequence[tuple[int, float]]]) -> bool:
    """Whether losses are so far apart (ten times, one that diverged) that only a logarithmic scale shows the others."""
    losses = [loss for curve in curves for _, loss in curve]
    return bool(losses) and min(losses) > 0 and max(losses) > 10 * min(losses)


# ---- two runs


def _rows(run: Run) -> list[_Row]:
    """Of the run's own evaluation."""
    lines = (run / "evaluation" / "rows.jsonl").read_bytes().splitlines()
    return [msgspec.json.decode(line, type=_Row) for line in lines]


def _pair(runs: Sequence[Run], entries: Sequence[Entry], judged: Sequence[list[_Row]], at: int, seed: int) -> Pair:
    """Run `at` against the first, by the loss of the tuned models on each row."""

    def without(reason: str) -> Pair:
        return Pair(entries[at].run, entries[at].letter, None, reason)

    for i in (at, 0):
        if not judged[i]:
            return without(f"{entries[i].letter} has no evaluated rows that can be read")
    first, other = judged[0], judged[at]
    for rows, letter in ((first, "A"), (other, entries[at].letter)):
        if not all(row.digest for row in rows):
            return without(f"the evaluation of {letter} does not say which rows it was on: evaluate it again")
    ours, theirs = (sorted(rows, key=lambda row: row.digest) for rows in (first, other))
    digests = [row.digest for row in ours]
    if digests != [row.digest for row in theirs]:
        common = (Counter(digests) & Counter(row.digest for row in theirs)).total()
        return without(f"judged on other rows: {common} of {len(first)} and {len(other)} are the same")
    losses = [[row.tuned.loss for row in side] for side in (ours, theirs)]
    unread = sum(None in pair for pair in zip(*losses, strict=True))
    if 0 < unread < len(ours):
        return without(
            f"{unread} of {len(ours)} rows have no loss: they are longer than the context of one of the models"
        )
    if unread:
        return without("a service does not say how likely a reference is to its model: there is no loss to compare")
    tokens = [[row.tuned.tokens for row in side] for side in (ours, theirs)]
    name, weight = "loss (nats per token)", tokens[0]
    if tokens[0] != tokens[1]:  # other tokenizers: a nat per token is not the same to both
        lengths = _read(_bytes, runs[0], []) or {}
        if not lengths.keys() >= {*digests}:
            return without("they count tokens otherwise, and the rows' texts are not in data/test.jsonl")
        name, weight = "loss (nats per byte)", [lengths[digest] for digest in digests]
    before, after = (np.array(list(zip(side, weight, strict=True)), np.float64) for side in losses)
    return Pair(entries[at].run, entries[at].letter, compare(name, before, after, lower_is_better=True, seed=seed))


def _bytes(run: Run) -> dict[str, int]:
    """UTF-8 bytes that a model is scored on in each of the run's test rows, by the row's digest."""
    return {row.digest(): learnt_bytes(row) for row in conversations(str(run / "data" / "test.jsonl"))}
