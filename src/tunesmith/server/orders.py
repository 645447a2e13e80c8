"""From a job's request to what is trained: files, base model, settings of the Recipe."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import msgspec

from tunesmith.data.spread import cores
from tunesmith.errors import TunesmithError
from tunesmith.models import facts
from tunesmith.server import store as db
from tunesmith.server.prepare import Order
from tunesmith.server.protocol import NewJob
from tunesmith.server.results import CHECKPOINTS
from tunesmith.server.store import Blobs, Store
from tunesmith.settings import resolve

LARGE = 200_000_000  # parameters: from here on jobs train adapters, unless the operator's settings say otherwise


class Orders:
    """What a server makes of requests. `config`: the operator's settings, a file or a preset; `at_once`: jobs that share the
    machine."""

    def __init__(
        self,
        data_dir: Path,
        store: Store,
        blobs: Blobs,
        bases: dict[str, Path],
        config: str | None,
        most_rows: int,
        at_once: int,
    ) -> None:
        self.data_dir, self._store, self._blobs, self._bases = data_dir, store, blobs, bases
        self._config, self._most_rows = config, most_rows
        self._threads = max(1, cores() // at_once)  # two trainings on the same cores slow each other down many times

    def order(self, job: dict[str, Any], folder: Path) -> Order:
        """What to prepare for a job; its files stand in `folder` under names that say what they are."""
        asked = msgspec.convert(job["request"], NewJob)
        files = {}
        for name in ("training_file", "validation_file"):
            if id := getattr(asked, name):
                files[name] = folder / f"{name}.jsonl"
                with contextlib.suppress(FileExistsError):
                    files[name].symlink_to(self._blobs.path(id).resolve())
        given = wanted(asked)
        known = {"n_epochs": "epochs", "batch_size": "batch_size"}
        settings = {ours: given[theirs] for theirs, ours in known.items() if given[theirs] != "auto"}
        base, early = self.folder(asked.model), given["n_epochs"] == "auto" and asked.validation_file is not None
        whole = facts(base).parameters < LARGE or (base / "adapter_config.json").exists()
        settings |= {
            "model": str(base),
            "seed": job["seed"],
            "method": "full" if whole else "lora",
            "valid_fraction": 0.0,
            "test_fraction": 0.0,
            "over_long": "truncate",  # as the protocol's rules have it
            "patience": 3 if early else 0,
            "save_total_limit": CHECKPOINTS,
            "token_accuracy": True,
            "threads": self._threads,
        }
        if self._config:  # what the operator has set is not overruled by what only stands in for it
            origin = resolve({}, self._config)[1]
            settings = {
                k: v
                for k, v in settings.items()
                if k not in ("method", "over_long", "threads") or origin[k] == "default"
            }
        multiplier = given["learning_rate_multiplier"]
        return Order(
            str(files["training_file"]),
            str(files["validation_file"]) if "validation_file" in files else None,
            self._config,
            settings,
            1.0 if multiplier == "auto" else float(multiplier),
            self._most_rows,
        )

    def folder(self, name: str) -> Path:
        """Where a model lies that a job may begin from. (Whether its owner may use it was asked when the job came.)"""
        if name in self._bases:
            return self._bases[name]
        row = self._store.get(db.models, name, None)
        if row is None:
            raise TunesmithError(f"the model {name} is gone", fix="begin from another: GET /v1/models lists them")
        return self.data_dir / str(row["folder"])


def wanted(asked: NewJob) -> dict[str, Any]:
    """The hyperparameters of a request, "auto" where nothing is said; `method` goes before the older way."""
    said = asked.method.supervised.hyperparameters if asked.method and asked.method.supervised else None
    said = said or asked.hyperparameters
    return {
        name: "auto" if said is None or getattr(said, name) is None else getattr(said, name)
        for name in ("n_epochs", "batch_size", "learning_rate_multiplier")
    }
