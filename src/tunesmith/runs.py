"""Run: a directory that is the whole truth about one training run.

    run.json       manifest: recipe with the origin of each value, plan, data hashes, versions (written once)
    events.jsonl   one JSON object a line, appended: state, step, eval, checkpoint, … (docs/events.md)
    data/          the splits as used, their token ids, the chat template that is not the model's own
    remote.json    of a run at a service: its address, and the ids of files and job; upload/, results/ the files themselves
    row_losses.npy each training row's loss in each epoch
    evaluation/    result.json, and what its figures come from (evaluation/evaluate.py); other evaluations in folders of their own
    report.html    the evaluation, to be read
    checkpoints/  logs/
    best_model/    weights at the lowest validation loss;  final_model/  after the last step

Whoever wants to know how a run is doing reads this directory; nothing asks a process.
"""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from tunesmith.data.write import host
from tunesmith.errors import RunError, UsageError
from tunesmith.recipe import Recipe

Event = dict[str, Any]  # an object of events.jsonl
TEMPLATE = "data/chat_template.jinja"
ENDED = ("succeeded", "failed", "cancelled")  # states that stay, of a run and of a job
GOING = ("queued", "preparing", "running")
RISE = 1.02  # of a validation loss over the lowest: less is within what a few hundred rows waver
ROW_LOSSES = "row_losses.npy"
STARTING = 60.0  # seconds that a worker may take to hold the run's lock; at most two were seen, beside other work
_MODEL = re.compile(r"best_model|final_model|checkpoint-step-\d+")  # folders of a run that hold one


class Run:
    """A run directory. `str(run)`, `run / "best_model"` and `os.fspath(run)` give its path.

    `silent`: `append` does nothing, for those of several processes whose events are the first one's too.
    """

    def __init__(self, path: str | os.PathLike[str], silent: bool = False) -> None:
        self.path, self.silent = Path(path), silent

    def __fspath__(self) -> str:
        return str(self.path)

    __str__ = __fspath__

    def __format__(self, spec: str) -> str:
        """The path; with "q" as a shell takes it: for the commands that messages name."""
        if spec != "q":
            return format(str(self), spec)
        import shlex

        return shlex.quote(str(self))

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.state()})"

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    # ---- what was asked

    def manifest(self) -> dict[str, Any]:
        """run.json. Raises RunError where there is none, or no whole one."""
        try:
            found = msgspec.json.decode((self / "run.json").read_bytes(), type=dict[str, Any])
            if missing := {"provider", "recipe", "plan", "created"} - set(found):
                raise msgspec.DecodeError(f"no {sorted(missing)[0]}")
            return found
        except (FileNotFoundError, NotADirectoryError):
            raise RunError("not a run (no run.json)", where=str(self), fix="tunesmith runs list shows them") from None
        except msgspec.DecodeError as error:
            raise RunError(
                f"run.json is damaged: {error}", where=str(self), fix="train again from its data/ folder"
            ) from None

    def recipe(self) -> Recipe:
        """What is trained: the manifest's settings, with those that were changed when it was gone on with."""
        changed = {k: v for e in self.events("changed") for k, v in e["settings"].items()}
        try:
            return msgspec.convert(self.manifest()["recipe"] | changed, Recipe)
        except msgspec.ValidationError as error:
            raise RunError(f"run.json is of another version: {error}", where=str(self), fix="train anew") from None

    def job(self) -> str | None:
        """The id of its job, where a service has one."""
        try:
            found = msgspec.json.decode((self / "remote.json").read_bytes(), type=dict[str, Any]).get("job")
            return None if found is None else str(found)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def template(self) -> str | None:
        """The chat template that the rows were rendered with, where it is not the base model's own."""
        path = self / TEMPLATE
        return path.read_text(encoding="utf-8") if path.exists() else None

    # ---- what happened

    def events(self, *kinds: str) -> Iterator[Event]:
        """All events, or those of some kinds. A last line that is still being written is not there yet."""
        return (event for event, _ in self.events_with_offsets(0, *kinds))

    def events_from(self, offset: int) -> tuple[list[Event], int]:
        """Events from a byte offset of the log on, and the offset to ask from next time."""
        found = list(self.events_with_offsets(offset))
        return [event for event, _ in found], found[-1][1] if found else offset

    def events_with_offsets(self, offset: int, *kinds: str) -> Iterator[tuple[Event, int]]:
        """Whole events from a byte offset on, each with the offset of what comes after it; those of some kinds, where any is
        named: then no line without the name is decoded, which is most of the time."""
        names = [msgspec.json.encode(kind) for kind in kinds]
        try:
            with (self / "events.jsonl").open("rb") as stream:
                stream.seek(offset)
                for line in stream:
                    if not line.endswith(b"\n"):
                        return
                    offset += len(line)
                    if names and not any(name in line for name in names):
                        continue
                    if (event := _decode(line)) is not None and (not kinds or event["type"] in kinds):
                        yield event, offset
        except FileNotFoundError:
            return

    def last(self, kind: str) -> Event:
        """The newest event of a kind, {} where there is none."""
        found = deque(self.events(kind), maxlen=1)
        return found[0] if found else {}

    def log_size(self) -> int:
        """Bytes of the event log: where events to come will begin."""
        return (self / "events.jsonl").stat().st_size if (self / "events.jsonl").exists() else 0

    def append(self, kind: str, **fields: Any) -> None:
        """Add an event with the time of now: one write of a whole line, in the place of a half one that a kill has left."""
        if self.silent:
            return
        import fcntl

        line = msgspec.json.encode({"type": kind, "time": round(time.time(), 3), **fields}) + b"\n"
        with (self / "events.jsonl").open("ab+") as stream:
            with suppress(OSError):  # a disk that knows no locks
                fcntl.flock(stream, fcntl.LOCK_EX)  # what another process is writing is no half line
            if (end := _whole(stream)) < stream.seek(0, os.SEEK_END):
                stream.truncate(end)
            stream.write(line)
            stream.flush()
            with suppress(OSError):  # said in words: a process that was forked meanwhile would keep it
                fcntl.flock(stream, fcntl.LOCK_UN)

    def state(self) -> str:
        """queued, preparing, running, paused, succeeded, failed or cancelled; "interrupted" when its process is gone."""
        last = self.last("state")
        if last.get("state") in GOING and not self.busy():
            return standing(self.last("state"), busy=False)  # read again: it may have ended in between
        return str(last.get("state", "unknown"))

    def metrics(self, kind: str) -> list[Event]:
        """Events of a kind, one for each step, of the history that led to where the run stands: what was done after the step
        that a resume went on from is no part of it."""
        found: dict[int, Event] = {}
        for event in self.events("resumed", kind):
            if event["type"] == "resumed":
                found = {step: e for step, e in found.items() if step <= event["step"]}
            else:
                found[event["step"]] = event
        return [found[step] for step in sorted(found)]

    def busy(self) -> bool:
        """Whether a process holds this run's lock."""
        import fcntl

        try:
            with (self / ".lock").open("rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def holder(self) -> int | None:
        """The process that holds this run's lock, where there is one and it is on this machine."""
        try:
            found = msgspec.json.decode((self / ".lock").read_bytes(), type=tuple[str, int])
        except (OSError, msgspec.DecodeError):
            return None
        return found[1] if self.busy() and found[0] == host() else None

    def lock(self, wait: float = 10.0) -> Any:
        """Hold the run until the returned file is closed or the process ends. Raises RunError when it stays taken."""
        import fcntl

        path, deadline = self / ".lock", time.monotonic() + wait
        stream = path.open("ab")
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(stream.fileno()).st_ino != path.stat().st_ino:  # deleted since, and made anew by another
                    stream.close()
                    stream = path.open("ab")
                    continue
                stream.truncate(0)
                stream.write(msgspec.json.encode((host(), os.getpid())))
                stream.flush()
                return stream
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RunError(
                        "another process is training this run", where=str(self), fix="wait for it, or stop it first"
                    ) from None
                time.sleep(0.1)

    def tags(self) -> list[str]:
        """What the user calls the run, in the order of giving."""
        found: dict[str, None] = {}
        for event in self.events("tagged", "untagged"):
            if event["type"] == "tagged":
                found |= dict.fromkeys(event["tags"])
            else:
                found = {tag: None for tag in found if tag not in event["tags"]}
        return list(found)

    def tag(self, *tags: str) -> None:
        """Give tags; one that it has already is no error."""
        if wrong := [tag for tag in tags if not re.fullmatch(r"[\w.-]{1,64}", tag)]:
            raise UsageError(f"{wrong[0]!r} is no tag", where=str(self), fix="letters, digits, . _ and -, 64 at most")
        if new := [tag for tag in dict.fromkeys(tags) if tag not in self.tags()]:
            self.append("tagged", tags=new)

    def untag(self, *tags: str) -> None:
        """Take tags back. Raises RunError where it lacks one."""
        had = self.tags()
        if missing := [tag for tag in tags if tag not in had]:
            raise RunError(f'no tag "{missing[0]}"', where=str(self), fix=f"it has: {', '.join(had) or 'none'}")
        self.append("untagged", tags=list(dict.fromkeys(tags)))

    def removed(self) -> bool:
        """Whether its weights are gone, or about to go (removal.py)."""
        return bool(self.last("removed"))

    # ---- summary

    def parent(self) -> Run | None:
        """The run whose model this one began from. A folder in a recipe is absolute; any other name is the Hub's."""
        model = self.manifest()["recipe"]["model"]
        return run_of(model) if os.path.isabs(model) else None

    def forebears(self) -> list[Run]:
        """Its parent, the parent's, and so on: up to one that began from no run, is damaged, or stands in the line already."""
        line = [self]
        with suppress(RunError):
            while (run := line[-1].parent()) and run.path.resolve() not in {r.path.resolve() for r in line}:
                run.manifest()
                line.append(run)
        return line[1:]

    def version(self) -> int:
        """1, and 1 for each run that it descends from."""
        return 1 + len(self.forebears())

    def lineage(self) -> list[dict[str, Any]]:
        """This run and its forebears, each with the model that it began from, its data, method, best loss and version."""
        line = [self, *self.forebears()]
        found = []
        for i, run in enumerate(line):
            known = run.summary()
            shown = {key: known[key] for key in ("run", "model", "dataset", "method", "best_valid_loss")}
            data_hash = (run.manifest().get("data_hashes") or {}).get("train")
            found.append({"version": len(line) - i, "data_hash": data_hash, **shown})
        return found

    def summary(self) -> dict[str, Any]:
        """The run in one object: state, steps, losses, seconds, the best step."""
        manifest = self.manifest()
        steps, evals = self.metrics("step"), self.metrics("eval")
        best = next((e for e in reversed(evals) if e["best"]), None)
        done, last = self.last("done"), steps[-1] if steps else {}
        return {
            "run": str(self),
            "status": self.state(),
            "model": manifest["recipe"]["model"],
            "job": self.job(),
            "fine_tuned_model": done.get("model"),
            "task": manifest["recipe"]["task"],
            "method": "supervised" if manifest["provider"] == "openai" else manifest["recipe"]["method"],
            "dataset": manifest["recipe"]["dataset"],
            "created": manifest["created"],
            "steps": last.get("step", 0),
            "planned_steps": last.get("total_steps", manifest["plan"]["steps"]),
            "epochs": last.get("epoch") if last else 0,
            "tokens": last.get("total_tokens", done.get("tokens", 0)),
            "supervised_tokens": last.get("total_supervised_tokens") if last else 0,
            "seconds": done.get("seconds"),
            "tokens_per_second": done.get("tokens_per_second"),
            "peak_memory_mb": done.get("peak_memory_mb"),
            "best_step": best["step"] if best else None,
            "best_valid_loss": best["loss"] if best else None,
            "final_train_loss": last.get("loss"),
            "stopped_early": done.get("stopped_early", False),
        }


def standing(last: Event, busy: bool) -> str:
    """How a run stands by its last event of state, and whether a process holds its lock."""
    word = str(last.get("state", "unknown"))
    gone = word in GOING and (word != "queued" or time.time() - last["time"] > STARTING)
    return "interrupted" if gone and not busy and last.get("at") != "service" else word


def _whole(stream: BinaryIO) -> int:
    """Where the last whole line of a file ends."""
    end = stream.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        stream.seek(start)
        if (found := stream.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0


def _decode(line: bytes) -> Event | None:
    """None for a line that a kill or a full disk cut short."""
    try:
        return msgspec.json.decode(line)  # type: ignore[no-any-return]
    except msgspec.DecodeError:
        return None


def open_run(path: str | os.PathLike[str]) -> Run:
    """An existing run; RunError if there is none."""
    run = Run(path)
    run.manifest()
    return run


def listing(*folders: Path) -> list[Run]:
    """Runs in these folders, newest first."""
    runs = [Run(p.parent) for folder in folders if folder.is_dir() for p in folder.glob("*/run.json")]
    return sorted(runs, key=lambda r: (r / "run.json").stat().st_mtime, reverse=True)


def run_of(path: str | os.PathLike[str]) -> Run | None:
    """The run that a folder is or belongs to: a checkpoint, a model folder (also one that is gone). None where there is none."""
    here = Path(path)
    if not here.is_dir() and not _MODEL.fullmatch(here.name):
        return None
    near = (here, *list(here.parents)[:2], *list(here.resolve().parents)[:2])  # "." has no parents
    return next((Run(folder) for folder in near if (folder / "run.json").exists()), None)


def refuse_removed(*paths: str | os.PathLike[str]) -> None:
    """RunError where one of the paths is of a run whose weights have been removed."""
    for path in paths:
        if (run := run_of(path)) and run.removed():
            when = time.strftime("%Y-%m-%d", time.localtime(run.last("removed")["time"]))
            fix = f"train anew; its settings and rows are kept: tunesmith runs show {run:q}"
            raise RunError(f"its weights were removed on {when}", where=str(run), fix=fix)
