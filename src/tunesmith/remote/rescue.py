"""Everything that an account holds at a service, brought here before it is gone: files, and each job as a run directory.

Done again, it goes on where it was stopped: what lies here whole is not fetched again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from tunesmith.backends import manifest
from tunesmith.data.write import begun, sync_folder, tidy, write_json
from tunesmith.errors import TunesmithError, UsageError, did_you_mean
from tunesmith.models import ModelFacts
from tunesmith.planning import Plan
from tunesmith.recipe import Recipe, fields
from tunesmith.remote.backend import ENDED, Link, take_in
from tunesmith.remote.service import Job, Service
from tunesmith.runs import Run, create, listing


class Rescued(msgspec.Struct):
    """What is here now, and what could not be had ("what: why"). `fetched`: files that were not here before."""

    folder: str
    base_url: str
    files: int = 0
    fetched: int = 0
    bytes: int = 0
    jobs: dict[str, str] = {}  # id: state
    models: list[str] = []
    missing: list[str] = []


def rescue(service: Service, folder: Path, say: Callable[[str], None] = lambda _: None) -> Rescued:
    """Bring everything into a folder: `files/ID/`, and a run directory for each job. Raises TunesmithError when the service
    stays out of reach; what cannot be had of one file or job is noted, and the others go on."""
    folder.mkdir(parents=True, exist_ok=True)
    tidy(folder)
    done = Rescued(str(folder), service.base_url)
    files = list(service.files())
    for number, file in enumerate(files, 1):
        _file(service, folder, file, done, lambda text, n=number: say(f"file {n}/{len(files)}: {text}"))  # type: ignore[misc]
    jobs = list(service.jobs())
    for number, job in enumerate(reversed(jobs), 1):  # the oldest first: they are lost first
        say(f"job {number}/{len(jobs)}: {job.id} ({job.status})")
        _job(service, folder, job, done)
    write_json(folder / "account.json", done)
    return done


# ---- files


def _file(service: Service, folder: Path, file: dict[str, Any], done: Rescued, say: Callable[[str], None]) -> None:
    place = folder / "files" / safe(file["id"])
    path = place / safe(str(file.get("filename") or "content"))
    done.files += 1
    try:
        if not path.exists():  # written whole or not at all
            say(f"{file['id']}, {file.get('bytes')} bytes")
            place.mkdir(parents=True, exist_ok=True)
            service.content(file["id"], path)
            done.fetched += 1
        write_json(place / "file.json", file)
        done.bytes += path.stat().st_size
    except TunesmithError as error:
        done.missing.append(f"file {file['id']} ({file.get('filename')}): {error.message}")


def safe(name: str) -> str:
    """A name from outside as the name of a file in one folder: no path, no control character, and no other's."""
    plain = re.sub(r"[^\w.-]", "_", name)[-100:].lstrip(".") or "_"
    return (
        plain if plain == name and plain != "file.json" else f"{hashlib.sha256(name.encode()).hexdigest()[:8]}-{plain}"
    )


def content(folder: Path, id: str) -> Path | None:
    """The bytes of a file that has been rescued."""
    found = [p for p in (folder / "files" / safe(id)).glob("*") if p.name != "file.json" and not p.name.startswith(".")]
    return found[0] if found else None


# ---- jobs


def _job(service: Service, folder: Path, job: Job, done: Rescued) -> None:
    run = Run(folder / safe(job.id))
    try:
        if not (run / "run.json").exists():
            _lay_out(service, folder, job, run.path)
        if run.state() not in ENDED:
            take_in(run, service)
        done.jobs[job.id] = run.state()
    except TunesmithError as error:
        done.missing.append(f"job {job.id}: {error.message}")
    if job.fine_tuned_model:
        done.models.append(job.fine_tuned_model)
    if job.training_file and content(folder, job.training_file) is None:
        done.missing.append(f"training file {job.training_file} of job {job.id}: not among the account's files")


def _lay_out(service: Service, folder: Path, job: Job, path: Path) -> None:
    """A run directory as if the job had been begun from here."""
    names = {"train": job.training_file, "valid": job.validation_file}
    files = {side: id for side, id in names.items() if id}
    here = {side: found for side, id in files.items() if (found := content(folder, id))}
    rows = {side: _lines(here[side]) if side in here else 0 for side in ("train", "valid", "test")}
    building = begun(path)
    shutil.rmtree(building, ignore_errors=True)
    hashes = {side: hashlib.sha256(file.read_bytes()).hexdigest() for side, file in here.items()}
    with create(building, manifest(_plan(service, job, rows, here), hashes)) as run:
        for side, file in here.items():
            try:
                os.link(file, run / "data" / f"{side}.jsonl")
            except OSError:  # a file system without links
                shutil.copyfile(file, run / "data" / f"{side}.jsonl")
        write_json(run / "data" / "check.json", [])
        write_json(run / "job.json", job.as_sent)
        Link(base_url=service.base_url, mark=job.id, files=files, asked=True, job=job.id).save(run)
    building.replace(path)
    sync_folder(path.parent)


def _lines(path: Path) -> int:
    with path.open("rb") as stream:
        return sum(1 for line in stream if line.strip())


def _plan(service: Service, job: Job, rows: dict[str, int], here: dict[str, Path]) -> Plan:
    hyper = job.resolved()
    known = {
        ours: hyper[theirs] for theirs, ours in HYPERPARAMETERS.items() if isinstance(hyper.get(theirs), int | float)
    }
    said = {"provider": "openai", "model": job.model, "base_url": service.base_url, **known}
    said |= {"dataset": str(here["train"])} if "train" in here else {}
    said |= {"valid_fraction": 0.0, "test_fraction": 0.0} | ({} if job.seed is None else {"seed": job.seed})
    recipe = Recipe(**said)
    epochs, batch = (v if isinstance(v, int) else 1 for v in (recipe.epochs, recipe.batch_size))
    per_epoch = -(-rows["train"] // batch)
    return Plan(
        recipe,
        {name: "the job" if name in said else "default" for name in fields()},
        ModelFacts("", "hosted", parameters=0, layers=0, hidden=0, vocabulary=0, context=0),
        rows,
        tokens={},
        supervised_tokens={},
        longest=0,
        dropped=0,
        formats={},
        steps_per_epoch=per_epoch,
        steps=per_epoch * epochs,
        trainable_parameters=0,
        memory_mb=0,
        issues=[],
    )


HYPERPARAMETERS = {
    "n_epochs": "epochs",
    "batch_size": "batch_size",
    "learning_rate_multiplier": "learning_rate_multiplier",
}


# ---- the same again on this machine


def find(folder: Path, name: str) -> Run:
    """The rescued run of a tuned model, or of a job. Raises UsageError naming what is there."""
    models: dict[str, Run] = {}
    for run in listing(folder):
        if (run / "remote.json").exists():
            models |= {str(made): run for made in (run.last("done").get("model"), Link.of(run).job) if made}
    if name not in models:
        known = [model for model in models if model.startswith("ft:")]
        near = did_you_mean(name, known) or f"; there are {', '.join(known) or 'none'}"
        raise UsageError(f'no rescued model "{name}"{near}', where="--retrain", fix="name one of them")
    return models[name]


def as_local(run: Run, model: str, test_dataset: str | None = None) -> dict[str, Any]:
    """Settings of `train` that do a job's work on this machine: its rows, epochs, batch size and seed, from another base.

    Its validation rows are kept to judge on, as neither model has learnt them; so that this stays true nothing is chosen by
    them here (no early stopping). The learning rate is this machine's own rule: a multiplier is of a rate that nobody knows.
    Raises UsageError where the training file is lost.
    """
    recipe = run.manifest()["recipe"]
    train, valid = run / "data" / "train.jsonl", run / "data" / "valid.jsonl"
    if not train.exists():
        raise UsageError("its training file is lost", where=str(run), fix="train on other rows: tunesmith train")
    held_out = test_dataset or (str(valid) if valid.exists() else None)
    given = {"dataset": str(train), "provider": "huggingface", "model": model, "seed": recipe["seed"]}
    given |= {"valid_fraction": 0.0, "test_fraction": 0.0, "over_long": "truncate", "patience": 0}
    given |= {"test_dataset": held_out} if held_out else {}
    given |= {name: recipe[name] for name in ("epochs", "batch_size") if isinstance(recipe[name], int)}
    return given
