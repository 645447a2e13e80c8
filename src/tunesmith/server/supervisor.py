"""Keeps workers and jobs in step: what should run is run, what a run says becomes events, what fell over is set up again.

The database says what is wanted of a job, its run directory what has become of it; this loop compares the two again and again,
so that nothing needs to be remembered in between. Killing the server, a worker or both at any moment loses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import sqlalchemy as sql

from tunesmith.backends import Backend
from tunesmith.data.write import sync_folder
from tunesmith.errors import TunesmithError
from tunesmith.runs import GOING, Run
from tunesmith.server import store as db
from tunesmith.server.leftovers import expire, tidy
from tunesmith.server.orders import Orders, wanted
from tunesmith.server.prepare import Prepared
from tunesmith.server.protocol import RESULTS, NewJob
from tunesmith.server.results import CHECKPOINTS, Told, results, translate
from tunesmith.server.store import Blobs, Store

log = logging.getLogger("tunesmith.server")
TICK = 0.2  # seconds
PREPARING = 3600  # seconds that checking a job's files may take
PATIENCE = 30.0  # seconds that a worker has for its last checkpoint
ATTEMPTS = 8  # times that a worker may end without having got on before its job fails
ERRORS = 11  # of this server's own with one job in a row, each waited for twice as long: after 17 minutes it fails


class Supervisor:
    """Runs the jobs of a store, `most` at a time, those of different owners in turn."""

    def __init__(self, store: Store, blobs: Blobs, backend: Backend, orders: Orders, most: int) -> None:
        self._store, self._blobs, self._backend, self._orders, self._most = store, blobs, backend, orders, most
        self._folder = orders.data_dir / "jobs"
        self._preparing: dict[str, subprocess.Popen[bytes]] = {}
        self._prepared_since = 0.0
        self._working: set[str] = set()  # jobs whose worker this process has started
        self._asked: dict[str, float] = {}  # those of them that were asked to end, and when
        self._turns: dict[tuple[str, str], float] = {}
        self._errors: dict[str, tuple[int, float]] = {}  # with jobs: how many in a row, and when to look at it again
        self._tidied = 0.0
        self._ending = False
        self._well = True  # nothing went wrong in this look
        self._thread = ThreadPoolExecutor(1, "supervisor")  # its own: requests that take long do not keep it waiting

    async def run(self) -> None:
        """Look again and again, until `end`."""
        while not self._ending:
            well = await asyncio.get_running_loop().run_in_executor(self._thread, self.look)
            await asyncio.sleep(TICK if well else 1)

    def end(self) -> None:
        """Let `run` return."""
        self._ending = True

    async def stop(self, patience: float = 60.0) -> None:
        """Ask every worker for a checkpoint and wait for its end; jobs stay as they are, to go on when the server starts.

        To be called when `run` has returned.
        """
        self._thread.shutdown()
        for id in list(self._preparing):
            self._end_preparing(id)
        left = [self._run(id) for id in self._working]
        for run in left:
            self._backend.cancel(run)
        deadline = time.monotonic() + patience
        while left and time.monotonic() < deadline:
            await asyncio.sleep(TICK)  # until its process is gone: a run is free a second before that
            left = [run for run in left if self._backend.poll(run) in GOING]
        for run in left:
            self._backend.cancel(run, at_once=True)

    def _run(self, id: str) -> Run:
        return Run(self._folder / id / "run")

    def look(self) -> bool:
        """One comparison of what should be with what is; whether nothing went wrong."""
        self._well = True
        jobs: list[dict[str, Any]] = []
        if self._safely(self._active, jobs):
            self._safely(self._stop_others, {job["id"] for job in jobs})
            for job in sorted(jobs, key=lambda job: self._turn("validate", job)):  # within an owner's, in order
                self._safely(self._see_to, job)
            self._safely(self._start, jobs)
        self._safely(self._tidy)
        self._safely(expire, self._store, self._blobs)
        return self._well

    def _safely(self, act: Callable[..., object], *given: Any) -> bool:
        """Whether something was done: what went wrong with it is no reason to leave other things undone."""
        try:
            act(*given)
            return True
        except Exception:
            log.exception("supervisor", extra={"about": {"at": getattr(act, "__name__", "")}})
            self._well = False
            return False

    def _active(self, jobs: list[dict[str, Any]]) -> None:
        """Add the jobs that are to get on."""
        with self._store.reading() as connection:
            active = sql.select(db.jobs).where(db.jobs.c.status.in_(("validating_files", "queued", "running")))
            jobs += [dict(row) for row in connection.execute(active.order_by(db.jobs.c.seq)).mappings()]

    def _see_to(self, job: dict[str, Any]) -> None:
        """What is to be done for a job now. An error of this server's own is none of the job's, and mostly passes."""
        errors, again = self._errors.pop(job["id"], (0, 0.0))
        try:
            if time.monotonic() < again:
                self._errors[job["id"]] = errors, again
            elif job["status"] == "validating_files":
                self._validate(job)
            elif job["status"] == "running":
                self._follow(job)
        except Exception as error:
            log.exception("job", extra={"about": {"job": job["id"]}})
            self._errors[job["id"]] = errors + 1, time.monotonic() + 2.0 ** min(errors, ERRORS)
            if (
                errors + 1 >= ERRORS and self._run(job["id"]).state() != "succeeded"
            ):  # what is trained is not thrown away
                words = f"The server had an error with this job: {type(error).__name__}"
                self._fail(job["id"], {"code": "server_error", "message": words, "param": None})

    def _stop_others(self, wanted: set[str]) -> None:
        """Workers of jobs that were cancelled or paused."""
        self._errors = {id: known for id, known in self._errors.items() if id in wanted}
        for id in [id for id in self._preparing if id not in wanted]:
            self._end_preparing(id)
        now = time.monotonic()
        for id in [id for id in self._working if id not in wanted or id in self._asked]:
            run, asked = self._run(id), self._asked.setdefault(id, now)
            if self._backend.poll(run) in GOING:
                self._backend.cancel(run, at_once=now - asked > PATIENCE)
            else:
                self._working.discard(id)
                self._asked.pop(id)

    # ---- files

    def _validate(self, job: dict[str, Any]) -> None:
        """Have a job's files checked by a process of its own; one job after the other."""
        id, done = job["id"], self._folder / job["id"] / "prepared.json"
        if done.exists():
            self._end_preparing(id)  # its last word has been read
            self._validated(job, msgspec.json.decode(done.read_bytes(), type=Prepared))
            return
        if id not in self._preparing:
            if not self._preparing and (started := self._prepare(job)):
                self._preparing[id] = started
                self._turns["validate", job["owner"]] = self._prepared_since = time.monotonic()
            return
        if self._preparing[id].poll() is None:
            if time.monotonic() - self._prepared_since > PREPARING:
                self._end_preparing(id)
                words = f"Checking the files took longer than {PREPARING} seconds"
                self._fail(id, {"code": "validation_timeout", "message": words, "param": None})
            return
        self._end_preparing(id)
        if not done.exists():
            self._failed_again(job, "The files could not be checked")

    def _end_preparing(self, id: str) -> None:
        """End the process that checks a job's files, where there is one, and those that it has started."""
        if process := self._preparing.pop(id, None):
            with contextlib.suppress(OSError):  # it is gone already
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                process.communicate()

    def _failed_again(self, job: dict[str, Any], why: str) -> None:
        """Count the ends of a job's processes that were not its fault; after ATTEMPTS of them in a row it fails."""
        attempts = (job["attempts"] or 0) + 1
        self._store.change(db.jobs, job["id"], attempts=attempts)
        if attempts >= ATTEMPTS:
            self._fail(job["id"], {"code": "server_error", "message": why, "param": None})

    def _prepare(self, job: dict[str, Any]) -> subprocess.Popen[bytes] | None:
        folder = self._folder / job["id"]
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(self._folder)
        try:
            order = self._orders.order(job, folder)
        except TunesmithError as error:
            self._fail(job["id"], {"code": "model_not_found", "message": error.message, "param": "model"})
            return None
        with (folder / "prepare.log").open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "tunesmith.server.prepare", str(folder)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        assert process.stdin
        with contextlib.suppress(BrokenPipeError):  # it stays open: that it closes tells the process of our end
            process.stdin.write(msgspec.json.encode(order) + b"\n")
            process.stdin.flush()
        return process

    def _validated(self, job: dict[str, Any], found: Prepared) -> None:
        if found.error:
            self._fail(job["id"], found.error)
            return
        given = wanted(msgspec.convert(job["request"], NewJob))
        multiplier = given["learning_rate_multiplier"]
        resolved = {
            "n_epochs": found.n_epochs,
            "batch_size": found.batch_size,
            "learning_rate_multiplier": 1.0 if multiplier == "auto" else multiplier,
        }
        with self._store.begin() as connection:
            if not _still(connection, job, "validating_files"):
                return
            db.change(
                connection, db.jobs, job["id"], status="queued", prepared=True, hyperparameters=resolved, attempts=0
            )
            tell(connection, job["id"], Told("queued", "Files validated, moving job to queued state"))

    # ---- workers

    def _start(self, jobs: list[dict[str, Any]]) -> None:
        """Start what is queued, of the owner with the fewest running jobs first, then the one that has waited longest."""
        running = [job["owner"] for job in jobs if job["status"] == "running"]
        queued = [job for job in jobs if job["status"] == "queued"]
        while queued and len(running) + len(self._asked) < self._most:
            job = min(queued, key=lambda job: (running.count(job["owner"]), self._turn("start", job), job["seq"]))
            queued.remove(job)
            if job["id"] in self._asked or self._run(job["id"]).busy():  # a worker that is still ending
                continue
            with self._store.begin() as connection:
                if not _still(connection, job, "queued"):
                    continue
                db.change(connection, db.jobs, job["id"], status="running")
            running.append(job["owner"])
            self._turns["start", job["owner"]] = time.monotonic()

    def _turn(self, what: str, job: dict[str, Any]) -> float:
        """When something was last done for a job's owner: who has waited longest is next."""
        return self._turns.get((what, job["owner"]), 0.0)

    def _follow(self, job: dict[str, Any]) -> None:
        """Note what a running job's worker has said; start one where there is none."""
        id, run = job["id"], self._run(job["id"])
        if id not in self._working:
            if run.busy():  # the worker of a server that was killed ends by itself
                return
            if run.state() != "succeeded":
                self._backend.resume(run)
            self._working.add(id)
        state = self._backend.poll(run)
        ended = state not in GOING
        last = run.last("error") if state == "failed" else {}
        failed = state == "failed" and not last.get("lost")
        events, offset = translate(run, job, int(job["read"] or 0), failed)
        got_on = self._note(job, events, offset)
        if not ended:
            return
        if state == "succeeded":
            self._succeed(job, run)
        elif failed:
            said = str(last.get("message", "training failed")).replace(str(self._folder.parent), "<server>")
            self._fail(id, {"code": "training_failed", "message": said, "param": None})
        else:  # it was killed, or stopped by who knows whom
            self._failed_again({**job, "attempts": 0} if got_on else job, "The worker was lost again and again")
        self._working.discard(id)

    def _note(self, job: dict[str, Any], events: list[Told], offset: int) -> bool:
        """Keep events and how far the log has been read, both or neither; whether anything was new, which ends a row of
        lost workers."""
        if offset == (job["read"] or 0):
            return False
        with self._store.begin() as connection:
            if not _still(connection, job, "running"):
                return False
            new = [tell(connection, job["id"], event) for event in events]
            left = next((event.left for event in reversed(events) if event.left is not None), None)
            finish = job["estimated_finish"] if left is None else int(time.time() + left)
            got_on = {"attempts": 0} if any(new) else {}
            db.change(connection, db.jobs, job["id"], read=offset, estimated_finish=finish, **got_on)
            for event in events:
                if event.checkpoint is not None:
                    _keep(connection, job, event)
        return any(new)

    def _succeed(self, job: dict[str, Any], run: Run) -> None:
        """All that a finished job leaves, in one transaction; the bytes of its result file first."""
        id, name = job["id"], job["model"]
        file = "file-" + id.removeprefix("ftjob-")  # the same when this is done again after a crash
        table = results(run)
        with self._blobs.writing(file) as stream:
            stream.write(table)
        summary = run.summary()
        early = bool(run.recipe().patience)
        folder, step = run / ("best_model" if early else "final_model"), summary["best_step" if early else "steps"]
        with self._store.begin() as connection:
            if not _still(connection, job, "running"):
                return
            row = {"owner": job["owner"], "bytes": len(table), "filename": "step_metrics.csv", "purpose": RESULTS}
            db.add(connection, db.files, id=file, **row)
            place = str(folder.relative_to(self._folder.parent))
            db.add(connection, db.models, id=name, owner=job["owner"], job_id=id, folder=place)
            mine = (db.checkpoints.c.job_id == id, db.checkpoints.c.step == step)
            connection.execute(db.checkpoints.update().where(*mine).values(model=name))
            if step == summary["planned_steps"]:  # announced under the model's own name
                connection.execute(db.models.delete().where(db.models.c.id == f"{name}:ckpt-step-{step}"))
            tell(connection, id, Told("model", f"New fine-tuned model created: {name}"))
            tell(connection, id, Told("succeeded", "The job has successfully completed"))
            now, tokens = int(time.time()), summary["tokens"]
            done = {"status": "succeeded", "finished_at": now, "trained_tokens": tokens, "result_file": file}
            db.change(connection, db.jobs, id, **done, estimated_finish=None)

    def _fail(self, id: str, error: dict[str, Any]) -> None:
        with self._store.begin() as connection:
            job = db.get(connection, db.jobs, id)
            if job and job["status"] in ("validating_files", "queued", "running"):
                ended = {"finished_at": int(time.time()), "estimated_finish": None}
                db.change(connection, db.jobs, id, status="failed", error=error, **ended)
                tell(connection, id, Told("failed", str(error["message"]), level="error"))

    def _tidy(self) -> None:
        """Delete what the jobs that have ended since the last time need no more; the first time of all."""
        began = time.time()
        with self._store.reading() as connection:
            ended = sql.select(db.jobs).where(db.jobs.c.finished_at >= int(self._tidied))
            jobs = [dict(row) for row in connection.execute(ended).mappings()]
        for job in jobs:
            working = job["id"] in self._working or self._run(job["id"]).busy()
            if working or not self._safely(tidy, self._store, self._run(job["id"]), job):
                began = min(began, job["finished_at"])  # again, when its worker is gone
        self._tidied = began - TICK


# ---- rows


def tell(connection: sql.Connection, job: str, told: Told) -> bool:
    """Keep an event, unless it was kept before; whether it was new."""
    known = sql.select(db.events.c.seq).where(db.events.c.job_id == job, db.events.c.name == told.name)
    if connection.scalar(known) is not None:
        return False
    values = {"name": told.name, "level": told.level, "type": told.type, "message": told.message, "data": told.data}
    db.add(
        connection, db.events, id=db.new_id("ftevent-"), job_id=job, created_at=told.time or int(time.time()), **values
    )
    return True


def _still(connection: sql.Connection, job: dict[str, Any], status: str) -> bool:
    """Whether a job has not been cancelled or paused meanwhile."""
    now = db.get(connection, db.jobs, job["id"])
    return now is not None and now["status"] == status


def _keep(connection: sql.Connection, job: dict[str, Any], told: Told) -> None:
    """A checkpoint and its model, unless it is known; of more than three the oldest goes."""
    step, metrics = told.checkpoint or (0, {})
    table = db.checkpoints
    known = sql.select(table.c.seq).where(table.c.job_id == job["id"], table.c.step == step)
    if connection.scalar(known) is not None:
        return
    name = f"{job['model']}:ckpt-step-{step}"
    db.add(connection, table, id=db.new_id("ftckpt_"), job_id=job["id"], step=step, model=name, metrics=metrics)
    place = f"jobs/{job['id']}/run/checkpoints/checkpoint-step-{step}"
    db.add(connection, db.models, id=name, owner=job["owner"], job_id=job["id"], folder=place)
    steps = connection.execute(sql.select(table.c.step).where(table.c.job_id == job["id"])).scalars().all()
    for old in sorted(steps)[:-CHECKPOINTS]:
        connection.execute(table.delete().where(table.c.job_id == job["id"], table.c.step == old))
        connection.execute(db.models.delete().where(db.models.c.id == f"{job['model']}:ckpt-step-{old}"))
