"""A run without its weights: the space is freed, the record stays (run.json, events, rows, evaluations, report, card, logs).

The event "removed" is the first thing that is written: where a kill cuts the work off, the run is known as removed, and
`remove` ends the work when it is asked again.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tunesmith.errors import RunError, UsageError
from tunesmith.render import TOKENIZER_FILES
from tunesmith.runs import Run, listing
from tunesmith.tokens import PARTS

MODEL_FILES = ("config.json", "adapter_config.json", *TOKENIZER_FILES)  # of a model's folder, beside its weights


def refuse(run: Run, force: bool = False) -> None:
    """UsageError where a run's weights are not ours to delete, or in use; with `force` other runs may need them."""
    if run.manifest()["provider"] == "openai":
        fix = "delete the model there; what is here is the record alone"
        raise UsageError("the weights of this run are at a service", where=str(run), fix=fix)
    if run.busy():
        raise RunError("a process is at work on this run", where=str(run), fix=f"tunesmith runs cancel {run:q}")
    if not force and (needing := begun_from(run)):
        names = ", ".join(other.path.name for other in needing)
        raise RunError(f"needed by {names}, which began from it", where=str(run), fix="remove those first, or --force")


def begun_from(run: Run) -> list[Run]:
    """Runs in the same folder that have weights and began from this one's: they resume from these and are compared with them,
    and an adapter cannot be loaded without."""
    here, found = run.path.resolve(), []
    for other in listing(here.parent):
        with suppress(RunError):  # a damaged one tells nothing
            parent = other.parent()
            if parent and parent.path.resolve() == here and not other.removed():
                found.append(other)
    return found


def remove(run: Run, force: bool = False) -> int:
    """Free the space of a run for good; the bytes. Raises UsageError as `refuse`."""
    refuse(run, force)
    with run.lock(wait=0):
        if not run.removed():
            run.append("removed")
        return free(run)


def free(run: Run) -> int:
    """Delete all weights of a run, and the tokens of its rows; the bytes."""
    tokens = (path for part in PARTS for path in (run / "data").glob(f"*.{part}.npy"))
    return delete([*published(run), run / "checkpoints", *tokens])


def published(run: Run) -> list[Path]:
    """All that makes a run loadable besides its checkpoints: its own folder's model files first, then the folders."""
    own = [
        *(run / name for name in MODEL_FILES),
        *run.path.glob("*.safetensors"),
        *run.path.glob("*.safetensors.index.json"),
    ]
    begun = [path for path in run.path.glob(".*.tmp") if path.is_dir()]
    return [*own, run / "best_model", run / "final_model", *begun]


def delete(paths: Iterable[Path]) -> int:
    """Delete files and folders that there may be. The bytes this frees: a file counts once, and not while it has other names."""
    there = [path for path in paths if path.exists() or path.is_symlink()]
    folder = {path: path.is_dir() and not path.is_symlink() for path in there}  # of a link, the link alone goes
    files = [file for path in there for file in (path.rglob("*") if folder[path] else (path,)) if not file.is_dir()]
    stats = [file.lstat() for file in files]
    names = Counter((stat.st_dev, stat.st_ino) for stat in stats)
    sizes = {key: stat.st_size for stat in stats if names[key := (stat.st_dev, stat.st_ino)] == stat.st_nlink}
    for path in there:
        shutil.rmtree(path) if folder[path] else path.unlink()
    return sum(sizes.values())
