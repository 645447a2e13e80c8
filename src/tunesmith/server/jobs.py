"""Fine-tuning jobs, their events and checkpoints, and the models there are."""

from __future__ import annotations

import re
import secrets
import time
from typing import Annotated, Any

import msgspec
import sqlalchemy as sql
from msgspec import Meta

from tunesmith.runs import ENDED
from tunesmith.server import store as db
from tunesmith.server.app import Call, Route, digest
from tunesmith.server.files import own, page
from tunesmith.server.leftovers import free_deleted
from tunesmith.server.orders import wanted
from tunesmith.server.protocol import (
    Checkpoint,
    Deleted,
    Event,
    Hyperparameters,
    Job,
    JobError,
    Listing,
    Model,
    NewJob,
    Refusal,
    no_model,
    no_such,
)
from tunesmith.server.results import Told
from tunesmith.server.supervisor import tell

ORGANIZATION = "local"  # the third part of a fine-tuned model's name
AGAIN = 600  # seconds within which a request that is sent again, because its answer was lost, is the same one


class JobsQuery(msgspec.Struct):
    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    metadata: dict[str, str] = {}
    without_metadata: bool = False


class EventsQuery(msgspec.Struct):
    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=1000)] = 20


class CheckpointsQuery(msgspec.Struct):
    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=100)] = 10


def _job(row: dict[str, Any]) -> Job:
    asked = msgspec.convert(row["request"], NewJob)
    values = msgspec.convert(row["hyperparameters"] or wanted(asked), Hyperparameters)
    shown = msgspec.to_builtins(values)
    return Job(
        id=row["id"],
        created_at=row["created_at"],
        model=asked.model,
        status=row["status"],
        training_file=asked.training_file,
        validation_file=asked.validation_file,
        hyperparameters=values,
        method={"type": "supervised", "supervised": {"hyperparameters": shown}},
        seed=row["seed"],
        organization_id=ORGANIZATION,
        result_files=[row["result_file"]] if row["result_file"] else [],
        error=msgspec.convert(row["error"], JobError) if row["error"] else None,
        fine_tuned_model=row["model"] if row["status"] == "succeeded" else None,
        finished_at=row["finished_at"],
        trained_tokens=row["trained_tokens"],
        estimated_finish=row["estimated_finish"],
        metadata=asked.metadata,
        user_provided_suffix=asked.suffix,
    )


def create_job(call: Call, body: NewJob) -> Job:
    """Create a fine-tuning job. It is answered at once; its files are checked after."""
    _refuse(body)
    base = call.service.folder(body.model, call.caller)  # refuses a model that is not there, or another's
    call.service.room(
        sum(file.stat().st_size for file in base.glob("*.safetensors"))
    )  # as much at least will be written
    for name in ("training_file", "validation_file"):
        if (file := getattr(body, name)) is not None:
            row = call.store.get(db.files, file, None if call.caller.admin else call.owner)
            if row is None:
                raise Refusal(400, f"Invalid file ID: {file}", param=name, code="invalid_file_id")
            if row["purpose"] != "fine-tune":
                raise Refusal(400, f"The purpose of {file} is {row['purpose']}, not fine-tune", param=name)
    known, now = digest(body), int(time.time())
    id = db.new_id("ftjob-")
    files = f"training file: {body.training_file}"
    files += f" and validation file: {body.validation_file}" if body.validation_file else ""
    with call.store.begin() as connection:
        mine = db.jobs.c.owner == call.owner
        if call.request.headers.get("x-stainless-retry-count", "0").lstrip("0").isdecimal():
            recent = sql.select(db.jobs).where(mine, db.jobs.c.digest == known, db.jobs.c.created_at > now - AGAIN)
            if known_row := connection.execute(recent.order_by(db.jobs.c.seq.desc())).mappings().first():
                return _job(dict(known_row))
        active = sql.select(sql.func.count()).where(mine, db.jobs.c.status.not_in(ENDED))
        most = call.service.limits.jobs
        if most and (connection.scalar(active) or 0) >= most:
            raise Refusal(429, f"{most} jobs wait or run already", type="requests", code="rate_limit_exceeded")
        seed = body.seed if body.seed is not None else secrets.randbelow(2**31)
        name = f"ft:{_base_name(body.model)}:{ORGANIZATION}:{_slug(body.suffix)}:{db.new_id('', 8)}"
        request = msgspec.to_builtins(body)
        row = {"owner": call.owner, "request": request, "digest": known, "seed": seed, "model": name, "created_at": now}
        made = db.add(connection, db.jobs, id=id, status="validating_files", read=0, attempts=0, **row)
        tell(connection, id, Told("created", f"Created fine-tuning job: {id}"))
        tell(connection, id, Told("validating", f"Validating {files}"))
    return _job(made)


def _base_name(model: str) -> str:
    """The base of a model's name: that of a fine-tuned one is its own base."""
    return model.split(":")[1] if model.startswith("ft:") else model.replace(":", "-")


def _slug(suffix: str | None) -> str:
    return re.sub(r"[^a-z0-9-]+", "-", (suffix or "").lower()).strip("-")


def _refuse(body: NewJob) -> None:
    """What this server does not do is refused, never dropped."""
    if body.method and body.method.type != "supervised":
        raise Refusal(
            400, f"The method '{body.method.type}' is not offered here: use 'supervised'", param="method.type"
        )
    if body.method and (body.method.dpo is not None or body.method.reinforcement is not None):
        raise Refusal(400, "The method is supervised: its hyperparameters go under 'supervised'", param="method")
    if body.integrations:
        raise Refusal(400, "Integrations are not offered here", param="integrations")
    said = body.method.supervised.hyperparameters if body.method and body.method.supervised else None
    if said and body.hyperparameters and wanted(body) != wanted(msgspec.structs.replace(body, method=None)):
        raise Refusal(
            400, "'hyperparameters' and 'method' contradict each other: leave the first out", param="hyperparameters"
        )
    pairs = body.metadata or {}
    if len(pairs) > 16 or any(len(k) > 64 or len(v) > 512 for k, v in pairs.items()):
        raise Refusal(400, "At most 16 pairs, keys of 64 and values of 512 characters", param="metadata")


def get_job(call: Call) -> Job:
    """One job."""
    return _job(own(call, db.jobs, call.path["job_id"], "job"))


def list_jobs(call: Call) -> Listing:
    """The jobs, newest first; of those, the ones with some metadata."""
    query: JobsQuery = call.query
    where = [] if call.caller.admin else [db.jobs.c.owner == call.owner]
    for key, value in query.metadata.items():
        where.append(db.jobs.c.request[("metadata", key)].as_string() == value)
    if query.without_metadata:
        where.append(sql.func.json_extract(db.jobs.c.request, "$.metadata").is_(None))
    return page(call, db.jobs, where, query.after, query.limit, True, _job)


def _turn(call: Call, to: str, allowed: tuple[str, ...], told: Told | None) -> Job:
    """Give a job another status, where it has one of those from which it can. Raises Refusal 400: 409 would be sent again."""
    id = call.path["job_id"]
    with call.store.begin() as connection:
        row = db.get(connection, db.jobs, id, None if call.caller.admin else call.owner)
        if row is None:
            raise no_such("job", id)
        if row["status"] not in allowed:
            verb = {"cancelled": "cancelled", "paused": "paused", "queued": "resumed"}[to]
            raise Refusal(400, f"Job {id} is {row['status']} and cannot be {verb}", param="fine_tuning_job_id")
        if to == "queued" and not row["prepared"]:
            to = "validating_files"
        ended = int(time.time()) if to in ENDED else None
        db.change(connection, db.jobs, id, status=to, finished_at=ended, estimated_finish=None, attempts=0)
        if told:
            tell(connection, id, told)
        found = db.get(connection, db.jobs, id)
    assert found
    return _job(found)


def cancel_job(call: Call) -> Job:
    """Cancel a job."""
    words = Told("cancelled", "The job has been cancelled")
    return _turn(call, "cancelled", ("validating_files", "queued", "running", "paused"), words)


def pause_job(call: Call) -> Job:
    """Let a job rest; its worker makes a checkpoint."""
    words = Told(f"paused-{time.time_ns()}", "The job has been paused")
    return _turn(call, "paused", ("validating_files", "queued", "running"), words)


def resume_job(call: Call) -> Job:
    """Let a paused job go on from its checkpoint."""
    words = Told(f"resumed-{time.time_ns()}", "The job has been resumed")
    return _turn(call, "queued", ("paused",), words)


def list_events(call: Call) -> Listing:
    """What has happened in a job, newest first."""
    job, query = own(call, db.jobs, call.path["job_id"], "job"), call.query
    where = [db.events.c.job_id == job["id"]]
    return page(call, db.events, where, query.after, query.limit, True, _event)


def _event(row: dict[str, Any]) -> Event:
    return Event(row["id"], row["created_at"], row["level"], row["message"], row["type"], row["data"] or {})


def list_checkpoints(call: Call) -> Listing:
    """The checkpoints of a job, the highest step first; each can be used as a model."""
    job, query = own(call, db.jobs, call.path["job_id"], "job"), call.query
    where = [db.checkpoints.c.job_id == job["id"]]
    return page(call, db.checkpoints, where, query.after, query.limit, True, _checkpoint, ends=True)


def _checkpoint(row: dict[str, Any]) -> Checkpoint:
    return Checkpoint(row["id"], row["created_at"], row["job_id"], row["model"], row["step"], row["metrics"])


# ---- models


def list_models(call: Call) -> Listing:
    """Every model that may be used: bases, fine-tuned ones, checkpoints."""
    where = [] if call.caller.admin else [db.models.c.owner == call.owner]
    rows, _ = call.store.page(db.models, where, None, 100_000, False)
    bases = [call.service.model(None, name) for name in call.service.bases]
    return Listing(bases + [call.service.model(row, row["id"]) for row in rows])


def get_model(call: Call) -> Model:
    """One model."""
    name = call.path["model"]
    if name in call.service.bases:
        return call.service.model(None, name)
    row = call.store.get(db.models, name, None if call.caller.admin else call.owner)
    if row is None:
        raise no_model(name)
    return call.service.model(row, name)


def delete_model(call: Call) -> Deleted:
    """Delete a fine-tuned model; with the last of a job's models its weights go too, once no other job needs them."""
    name = call.path["model"]
    if name in call.service.bases:
        raise Refusal(403, f"The base model {name} cannot be deleted", param="model", code="insufficient_permissions")
    row = call.store.get(db.models, name, None if call.caller.admin else call.owner)
    if row is None:
        raise no_model(name)
    with call.store.begin() as connection:
        connection.execute(db.models.delete().where(db.models.c.id == name))
    call.service.inference.forget(call.service.data_dir / row["folder"])
    free_deleted(call.store, call.service.data_dir)
    return Deleted(name, "model")


ROUTES = [
    Route("POST", "/fine_tuning/jobs", create_job, Job, NewJob),
    Route("GET", "/fine_tuning/jobs", list_jobs, Listing, query=JobsQuery),
    Route("GET", "/fine_tuning/jobs/{job_id}", get_job, Job),
    Route("POST", "/fine_tuning/jobs/{job_id}/cancel", cancel_job, Job),
    Route("POST", "/fine_tuning/jobs/{job_id}/pause", pause_job, Job),
    Route("POST", "/fine_tuning/jobs/{job_id}/resume", resume_job, Job),
    Route("GET", "/fine_tuning/jobs/{job_id}/events", list_events, Listing, query=EventsQuery),
    Route("GET", "/fine_tuning/jobs/{job_id}/checkpoints", list_checkpoints, Listing, query=CheckpointsQuery),
    Route("GET", "/models", list_models, Listing),
    Route("GET", "/models/{model:path}", get_model, Model),
    Route("DELETE", "/models/{model:path}", delete_model, Deleted),
]
