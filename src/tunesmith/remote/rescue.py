"""Everything that an account holds at a service, brought here before it is gone: files, and each job as a run directory.

Done again, it goes on where it was stopped: what lies here whole is not fetched again.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from tunesmith.data.write import begun, safe_name, sync_folder, tidy, write_json
from tunesmith.errors import TunesmithError, UsageError, did_you_mean
from tunesmith.layout import create, manifest
from tunesmith.models import ModelFacts
from tunesmith.planning import Plan
from tunesmith.recipe import Recipe, fields
from tunesmith.remote.backend import HYPERPARAMETERS, Link, take_in
from tunesmith.remote.objects import Job, as_job, number
from tunesmith.remote.service import Service, named
from tunesmith.runs import ENDED, Run, listing


class Rescued(msgspec.Struct):
    """What of an account is here now."""

    folder: str  # where it is
    base_url: str  # of the service
    files: int = 0  # that are here now
    fetched: int = 0  # of them, those that were not here before
    bytes: int = 0  # of all of them
    jobs: dict[str, str] = {}  # id: state
    models: list[str] = []  # names of fine-tuned models
    missing: list[str] = []  # what could not be had, "what: why"


def rescue(service: Service, folder: Path, say: Callable[[str], None] = lambda _: None) -> Rescued:
    """Bring everything into a folder: `files/ID/`, and a run directory for each job. Raises TunesmithError when the service
    stays out of reach; what cannot be had of one file or job is noted, and the others go on."""
    named(service.base_url)
    folder.mkdir(parents=True, exist_ok=True)
    tidy(folder, math.inf)  # only what a killed process had begun: nothing here is a cache
    for begun_once in folder.glob("*.tmp"):  # also in a container that is no more: nobody holds its lock
        old = time.time() - begun_once.stat().st_mtime > 60  # one that is just being given its name has no lock either
        if old and (begun_once / ".lock").exists() and not Run(begun_once).busy():
            shutil.rmtree(begun_once, ignore_errors=True)
    done = Rescued(str(folder), service.base_url)
    files = list(service.files())
    for n, file in enumerate(files, 1):
        _file(service, folder, file, done, lambda text: say(f"file {n}/{len(files)}: {text}"))  # noqa: B023 (called at once)
    jobs = list(service.jobs())
    for n, job in enumerate(reversed(jobs), 1):  # the oldest first: they are lost first
        say(f"job {n}/{len(jobs)}: {service.hidden(job.id)} ({service.hidden(job.status)})")
        _job(service, folder, job, done)
    write_json(folder / "account.json", done)
    return done


# ---- files


def _file(service: Service, folder: Path, file: dict[str, Any], done: Rescued, say: Callable[[str], None]) -> None:
    place = folder / "files" / safe_name(file["id"])
    name, size = service.hidden(file.get("filename") or "content"), file.get("bytes")
    path = place / safe_name(str(file.get("filename") or "content"), "file.json")
    exact = (
        size if isinstance(size, int) and file.get("purpose") != "fine-tune-results" else None
    )  # those come in base64
    done.files += 1
    try:
        if not path.exists():  # written whole or not at all
            say(f"{service.hidden(file['id'])}, {name}, {size} bytes")
            place.mkdir(parents=True, exist_ok=True)
            service.content(file["id"], path, exact)
            done.fetched += 1
        write_json(place / "file.json", service.clean(file))
        done.bytes += path.stat().st_size
    except (TunesmithError, OSError, ValueError) as error:  # one file's trouble is not the others'
        done.missing.append(f"file {service.hidden(file['id'])} ({name}): {getattr(error, 'message', error)}")


def content(folder: Path, id: str) -> Path | None:
    """The bytes of a file that has been rescued."""
    found = (folder / "files" / safe_name(id)).glob("*")
    return next((p for p in found if p.name != "file.json" and not p.name.startswith(".")), None)


# ---- jobs


def _job(service: Service, folder: Path, job: Job, done: Rescued) -> None:
    run, name = Run(folder / safe_name(job.id, "files", "account.json")), service.hidden(job.id)
    try:
        if not (run / "run.json").exists():
            _lay_out(service, folder, job, run.path)
        if run.state() not in ENDED:
            take_in(run, service)
        write_json(run / "job.json", service.clean(job.as_sent))
        done.jobs[name] = run.state()
    except (TunesmithError, OSError, ValueError) as error:
        done.missing.append(f"job {name}: {getattr(error, 'message', error)}")
    if job.fine_tuned_model:
        done.models.append(service.hidden(job.fine_tuned_model))
    if job.training_file and content(folder, job.training_file) is None:
        file = service.hidden(job.training_file)
        done.missing.append(f"training file {file} of job {name}: not among the account's files")


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
        Link(base_url=service.base_url, mark=job.id, files=files, asked=job.created_at, job=job.id).save(run)
    building.replace(path)
    sync_folder(path.parent)


def _lines(path: Path) -> int:
    with path.open("rb") as stream:
        return sum(1 for line in stream if line.strip())


def _plan(service: Service, job: Job, rows: dict[str, int], here: dict[str, Path]) -> Plan:
    known = _hyperparameters(job)
    said: dict[str, Any] = {"provider": "openai", "model": job.model, "base_url": service.base_url, **known}
    said |= {"api_key_file": service.key_file} if service.key_file else {}
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


def _hyperparameters(job: Job) -> dict[str, Any]:
    """A job's hyperparameters under our names, those that are numbers in the Recipe's range."""
    found: dict[str, Any] = {}
    for theirs, ours in HYPERPARAMETERS.items():
        value = number(job.resolved().get(theirs))
        if value is not None and value > 0 and (ours == "learning_rate_multiplier" or value == int(value)):
            found[ours] = value if ours == "learning_rate_multiplier" else int(value)
    return found


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
    train, valid = run / "data" / "train.jsonl", run / "data" / "valid.jsonl"
    if not train.exists():
        raise UsageError("its training file is lost", where=str(run), fix="train on other rows: tunesmith train")
    job = as_job(msgspec.json.decode((run / "job.json").read_bytes()))
    held_out = test_dataset or (str(valid) if valid.exists() else None)
    given: dict[str, Any] = {"dataset": str(train), "provider": "huggingface", "model": model}
    given |= {"valid_fraction": 0.0, "test_fraction": 0.0, "over_long": "truncate", "patience": 0}
    given |= {"test_dataset": held_out} if held_out else {}
    given |= {"seed": job.seed} if job.seed is not None and job.seed >= 0 else {}
    return given | {name: value for name, value in _hyperparameters(job).items() if name != "learning_rate_multiplier"}
