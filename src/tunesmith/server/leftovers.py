"""What nobody needs any more is deleted: parts of uploads, bytes without a row, weights of jobs that came to nothing."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sql

from tunesmith.local.checkpoint import existing, number
from tunesmith.removal import delete, free, published
from tunesmith.runs import ENDED, Run
from tunesmith.server import store as db
from tunesmith.server.store import Blobs, Store

LOST = ("failed", "cancelled")
log = logging.getLogger("tunesmith.server")


def drop_parts(store: Store, blobs: Blobs, upload: str) -> None:
    """Forget the parts of an upload that has ended, and their bytes."""
    with store.begin() as connection:
        mine = db.parts.c.upload_id == upload
        ids = connection.execute(sql.select(db.parts.c.id).where(mine)).scalars().all()
        connection.execute(db.parts.delete().where(mine))
    for id in ids:
        blobs.delete(id)


def sweep(store: Store, blobs: Blobs) -> None:
    """Delete bytes that no row knows: their request was cut off by the end of the server."""
    with store.reading() as connection:
        known = {id for table in (db.files, db.parts) for id in connection.execute(sql.select(table.c.id)).scalars()}
    for id in set(blobs.ids()) - known:
        blobs.delete(id)


def expire(store: Store, blobs: Blobs) -> None:
    """Delete the files, and end the uploads, whose time is over."""
    now = int(time.time())
    with store.reading() as connection:
        over = connection.execute(sql.select(db.files.c.id).where(db.files.c.expires_at < now)).scalars().all()
        late = sql.select(db.uploads.c.id).where(db.uploads.c.status == "pending", db.uploads.c.expires_at < now)
        uploads = connection.execute(late).scalars().all()
    for id in over:
        with store.begin() as connection:
            connection.execute(db.files.delete().where(db.files.c.id == id))
        blobs.delete(id)
    for id in uploads:
        with store.begin() as connection:
            still = (db.uploads.c.id == id, db.uploads.c.status == "pending")
            ended = connection.execute(db.uploads.update().where(*still).values(status="expired"))
        if ended.rowcount:  # else it was completed meanwhile
            drop_parts(store, blobs, id)


def free_deleted(store: Store, data_dir: Path) -> None:
    """Delete the weights of jobs whose models have all been deleted; logs and rows stay. Weights that another job began from
    stay too, for as long as that may go on, or has a model: it resumes from them, and an adapter cannot be loaded without."""
    jobs = db.jobs
    has = sql.exists().where(db.models.c.job_id == jobs.c.id)
    with store.reading() as connection:
        begun = sql.select(jobs.c.id, jobs.c.model, jobs.c.request["model"].as_string(), has, jobs.c.status)
        known = connection.execute(begun).all()
    parent = {name: origin.partition(":ckpt-step-")[0] for _, name, origin, _, _ in known}
    needed: set[str] = set()
    for _, name, _, has_models, status in known:
        while (has_models or status not in ENDED) and (name := parent.get(name, "")) and name not in needed:
            needed.add(name)
    for id, name, _, has_models, status in known:
        run = Run(data_dir / "jobs" / id / "run")
        if not has_models and status in ENDED and name not in needed and not run.busy():
            try:
                free(run)
            except OSError:  # again when the next model is deleted, or the server starts
                log.exception("weights stay", extra={"about": {"job": id}})


def tidy(store: Store, run: Run, job: dict[str, Any]) -> None:
    """After a job's end: the optimizer's state goes; where it failed or was cancelled, all weights but the last checkpoint's."""
    if not (run / "checkpoints").is_dir():
        return
    if job["status"] != "succeeded":
        kept = _keep_last(store, job)
        for folder in existing(run):
            if number(folder) not in kept:
                shutil.rmtree(folder, ignore_errors=True)
        delete(published(run))
    for folder in existing(run):
        (folder / "optimizer.safetensors").unlink(missing_ok=True)
    for begun in (run / "checkpoints").glob(".*.tmp"):
        shutil.rmtree(begun, ignore_errors=True)


def _keep_last(store: Store, job: dict[str, Any]) -> set[int]:
    """Forget all checkpoints of a job but the last and those that other jobs begin from; the steps that stay."""
    table, mine = db.checkpoints, db.checkpoints.c.job_id == job["id"]
    with store.begin() as connection:
        models = {row[0]: row[1] for row in connection.execute(sql.select(table.c.step, table.c.model).where(mine))}
        begun = db.jobs.c.request["model"].as_string().in_(models.values())
        alive = sql.select(db.jobs.c.request["model"].as_string()).where(begun, ~db.jobs.c.status.in_(LOST))
        used = set(connection.execute(alive).scalars())
        kept = {step for step, model in models.items() if step == max(models) or model in used}
        for step in set(models) - kept:
            connection.execute(table.delete().where(mine, table.c.step == step))
            connection.execute(db.models.delete().where(db.models.c.id == models[step]))
    return kept
