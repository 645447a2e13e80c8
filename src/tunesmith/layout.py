"""A new run directory: claimed by one process, filled, and a run only once run.json, the last file, is there."""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from tunesmith.data.write import as_row, sync_files, write_bytes, write_json, write_jsonl
from tunesmith.errors import RunError
from tunesmith.recipe import Recipe, need_dataset
from tunesmith.runs import TEMPLATE, Run

if TYPE_CHECKING:
    from tunesmith.planning import Plan, Prepared

VERSIONS = ("tunesmith", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "numpy")
LAID_OUT = re.compile(  # files that there may be before run.json is written
    r"\.lock|events\.jsonl|remote\.json|upload/(train|valid)\.jsonl"
    r"|data/((train|valid|test)\.\w+(\.npy)?|check\.json|chat_template\.jinja)|(data/|upload/)?\.[\w.]+\.tmp"
)


def create_run(prepared: Prepared, path: Path, fill: Callable[[Run], None] = lambda _: None) -> Run:
    """A run directory with manifest and splits: the same for every backend, which may `fill` in its own files."""
    with create(path, manifest(prepared.plan, prepared.hashes)) as run:
        for side, rows in prepared.splits.items():
            if len(rows):
                write_jsonl(run / "data" / f"{side}.jsonl", (as_row(row) for row in rows))
        write_json(run / "data" / "check.json", prepared.plan.issues)
        if prepared.renderer and not prepared.renderer.is_own:
            write_bytes(run / TEMPLATE, prepared.renderer.template.encode())
        fill(run)
    return run


def manifest(plan: Plan, hashes: dict[str, str]) -> dict[str, Any]:
    """What run.json says. `hashes`: of each side's rows."""
    return {
        "version": 1,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "provider": plan.recipe.provider,
        "recipe": plan.recipe,
        "origin": plan.origin,
        "plan": {
            "steps": plan.steps,
            "steps_per_epoch": plan.steps_per_epoch,
            "rows": plan.rows,
            "tokens": plan.tokens,
            "dropped": plan.dropped,
            "supervised_tokens": plan.supervised_tokens,
            "longest": plan.longest,
            "memory_mb": plan.memory_mb,
            "bill": plan.bill,
        },
        "model": plan.model,
        "data_hashes": hashes,
        "versions": {
            "python": platform.python_version(),
            **{name: version_of(name) for name in VERSIONS},
        },
    }


def version_of(package: str) -> str | None:
    """Of an installed package, None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def output_path(recipe: Recipe) -> Path:
    """Where the run goes: exactly --output-dir, else RUNS_DIR/TASK_DATASET, with -2, -3 … when that is taken."""
    if recipe.output_dir:
        return Path(recipe.output_dir).expanduser()
    name = Path(need_dataset(recipe).rstrip("/")).name.split(".")[0]
    base = Path(recipe.runs_dir).expanduser() / f"{recipe.task}_{name}"
    path, number = base, 2
    while not is_free(path):
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path


@contextmanager
def create(path: Path, manifest: dict[str, Any]) -> Iterator[Run]:
    """A new run directory, to be filled inside the `with`: run.json, which makes it a run, is written last.

    Raises RunError if the path holds something else, or if another process is just taking it.
    """
    refuse_taken(path)
    path.mkdir(parents=True, exist_ok=True)
    run = Run(path)
    try:
        claim = run.lock(wait=0)
    except (RunError, FileNotFoundError):  # it may be gone again, where that process has failed
        raise RunError(
            "another process is taking this directory", where=str(path), fix="choose another --output-dir"
        ) from None
    with claim:
        refuse_taken(path, ours=True)
        try:
            for left in path.iterdir():  # by a process that was killed here
                if left.name != ".lock":
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            for folder in ("data", "checkpoints", "logs"):
                (run / folder).mkdir()
            yield run
            sync_files(path)
            run.append("state", state="queued")
            write_json(run / "run.json", manifest)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise


def refuse_taken(path: Path, ours: bool = False) -> None:
    """RunError unless `path` is free and can be written. `ours`: its lock is held by this process."""
    above = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not os.access(above, os.W_OK):
        raise RunError("cannot be written", where=str(above), fix="choose another --output-dir")
    if path.is_file():
        raise RunError("the output directory is a file", where=str(path), fix="choose another --output-dir")
    if not is_free(path, ours):
        what = "holds another run" if (path / "run.json").exists() else "is not empty"
        fix = "choose another --output-dir (--runs-dir is a folder for many)"
        fix += f", or go on with --resume {Run(path):q}" if "run" in what else ""
        raise RunError(f"the output directory {what}", where=str(path), fix=fix)


def is_free(path: Path, ours: bool = False) -> bool:
    """Whether it is absent, an empty folder, or what a process left that was killed while it laid out a run there."""
    return not path.exists() or path.is_dir() and (not any(path.iterdir()) or _left(path, ours))


def _left(path: Path, ours: bool) -> bool:
    """Whether a folder is a run that was not laid out whole, by a process that is gone: never one that was begun, and has lost
    its run.json."""
    lock, run = path / ".lock", Run(path)
    try:  # it names the process that had begun; empty where that came no further
        msgspec.json.decode(lock.read_bytes() or b'["", 0]', type=tuple[str, int])
        link = msgspec.json.decode((path / "remote.json").read_bytes()) if (path / "remote.json").exists() else {}
    except (OSError, msgspec.DecodeError):
        return False
    every = [entry for entry in path.rglob("*") if entry.is_symlink() or not entry.is_dir()]
    known = all(LAID_OUT.fullmatch(str(entry.relative_to(path))) and not entry.is_symlink() for entry in every)
    begun = len(list(run.events())) > 1 or link.get("job") or link.get("asked")
    return known and not begun and (lock.stat().st_size > 0 or every == [lock]) and (ours or not run.busy())
