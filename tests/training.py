"""Train in this process, for tests: what a worker does, without the worker."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tunesmith import api
from tunesmith.local.backend import lay_out
from tunesmith.local.loop import train
from tunesmith.runs import Run


def fit(path: Path, dataset: Path | str, model: Path | str, **settings: Any) -> Run:
    """A finished run. Small and quick unless told otherwise."""
    defaults = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "threads": 2}
    prepared = api.prepare(str(dataset), model=str(model), **{**defaults, **settings})
    run = lay_out(prepared, path)
    train(run, lambda: False)
    return run


def losses(run: Run) -> list[float]:
    return [e["loss"] for e in run.metrics("step")]


def weights(folder: Path) -> str:
    """Hash of the weight files' bytes."""
    files = sorted(folder.glob("*.safetensors"))
    assert files, folder
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
