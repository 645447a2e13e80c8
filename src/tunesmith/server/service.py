"""What all endpoints share: settings, who may what, limits, the models there are, figures for those who watch."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import sqlalchemy as sql
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tunesmith.backends import Backend
from tunesmith.server import store as db
from tunesmith.server.entry import hashed, opened
from tunesmith.server.inference import Inference
from tunesmith.server.leftovers import free_deleted, sweep
from tunesmith.server.orders import Orders
from tunesmith.server.protocol import Model, Refusal, busy, no_model
from tunesmith.server.store import Blobs, Folder
from tunesmith.server.supervisor import Supervisor

KEYS_SECONDS = 2.0  # after which the keys are looked up again


class Limits(msgspec.Struct, frozen=True):
    """What one key, or one request, may use. 0 for `rows`, `rate` and `jobs`: no limit."""

    file_bytes: int = 512 << 20
    upload_bytes: int = 8 << 30
    part_bytes: int = 64 << 20
    rows: int = 1_000_000  # of a training file
    rate: int = 0  # requests a minute
    jobs: int = 100  # that wait or run
    free_bytes: int = 1 << 30  # of disk, that stay free
    models: int = 4  # bases in memory
    answers: int = 256  # written at once for each of them
    queue: int = 1000  # answers that wait


class Caller(msgspec.Struct, frozen=True):
    """Whose request it is: a key's id, or "" where the server asks for none. An administrator sees everything."""

    owner: str
    admin: bool


class Service:
    """The server without its routes. `bases`: models that may be used and tuned, folder by name."""

    def __init__(
        self,
        data_dir: Path,
        backend: Backend,
        bases: dict[str, Path],
        max_jobs: int = 1,
        config: str | None = None,
        limits: Limits | None = None,
        blobs: Blobs | None = None,
    ) -> None:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.data_dir, self.bases, self.limits = data_dir, bases, limits or Limits()
        self.store = opened(data_dir)
        self.blobs: Blobs = blobs or Folder(data_dir / "files")
        self.inference = Inference(self.limits.models, self.limits.answers, self.limits.queue)
        orders = Orders(data_dir, self.store, self.blobs, bases, config, self.limits.rows, max_jobs)
        self.supervisor = Supervisor(self.store, self.blobs, backend, orders, max_jobs)
        self.draining = False
        self._keys: dict[str, Caller] = {}
        self._keys_at = -KEYS_SECONDS
        self.host = "localhost"  # where it listens
        self.keyed = False  # whether keys are asked for: once there were any, until the server starts again
        self._held: dict[str, object] = {}
        self._rates: dict[str, tuple[float, float]] = {}
        self._watch()

    async def start(self) -> None:
        sweep(self.store, self.blobs)  # before anything new comes
        free_deleted(self.store, self.data_dir)
        self.inference.start()
        self._task = asyncio.create_task(self.supervisor.run())

    async def stop(self) -> None:
        """Let no job go on without its checkpoint, then end."""
        self.draining = True
        self.supervisor.end()
        await self._task
        await self.inference.stop()
        await self.supervisor.stop()

    # ---- who

    def caller(self, authorization: str) -> Caller:
        """Whose key it is. Where there are no keys at all, everybody is one owner. Raises Refusal 401."""
        if time.monotonic() - self._keys_at > KEYS_SECONDS:
            with self.store.reading() as connection:
                rows = connection.execute(sql.select(db.keys)).mappings().all()
            self._keys = {row["hash"]: Caller(row["id"], bool(row["admin"])) for row in rows}
            self._keys_at = time.monotonic()
        self.keyed = self.keyed or bool(self._keys)
        if not self.keyed:
            return Caller("", True)
        key = authorization.partition(" ")[2].strip()
        found = self._keys.get(hashed(key))
        if found is None:
            what = "Incorrect API key provided" if key else "You didn't provide an API key"
            raise Refusal(401, what, code="invalid_api_key")
        return found

    def limit_rate(self, caller: Caller) -> None:
        """A bucket of `rate` requests that fills in a minute. Raises Refusal 429 where it is empty."""
        rate, now = self.limits.rate, time.monotonic()
        if not rate:
            return
        left, at = self._rates.get(caller.owner, (float(rate), now))
        left = min(rate, left + (now - at) * rate / 60)
        if left < 1:
            raise busy(f"Rate limit of {rate} requests a minute", max(1, round((1 - left) * 60 / rate)))
        self._rates[caller.owner] = (left - 1, now)

    def room(self, more: int) -> None:
        """Raises Refusal where so many bytes more would fill the disk."""
        if shutil.disk_usage(self.data_dir).free - more < self.limits.free_bytes:
            never = {"x-should-retry": "false"}
            raise Refusal(507, "The server's disk is full", type="server_error", code="disk_full", headers=never)

    @contextmanager
    def alone(self, id: str) -> Iterator[None]:
        """Let one request at a time do what takes long. Raises Refusal 409, after which clients come again."""
        if self._held.setdefault(id, me := object()) is not me:  # atomic
            raise Refusal(409, f"{id} is being worked on", headers={"retry-after": "1"})
        try:
            yield
        finally:
            del self._held[id]

    # ---- models

    def folder(self, name: str, caller: Caller) -> Path:
        """Where a model lies that the caller may use: a base, or a fine-tuned one of its own. Raises Refusal 404."""
        if name in self.bases:
            return self.bases[name]
        row = self.store.get(db.models, name, None if caller.admin else caller.owner)
        if row is None or not (self.data_dir / str(row["folder"])).is_dir():  # a checkpoint goes before its row
            raise no_model(name)
        return self.data_dir / str(row["folder"])

    def model(self, row: dict[str, object] | None, name: str) -> Model:
        """A model as the protocol shows it; a base where there is no row."""
        if row is None:
            return Model(name, int(self.bases[name].stat().st_mtime), "system")
        return Model(name, int(str(row["created_at"])), "local")

    # ---- figures

    def _watch(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter("tunesmith_requests", "Requests", ["method", "path", "status"], registry=self.registry)
        buckets = (0.005, 0.02, 0.1, 0.5, 2, 10, 60)
        self._seconds = Histogram(
            "tunesmith_request_seconds", "Until the headers", ["path"], buckets=buckets, registry=self.registry
        )
        tokens = Gauge("tunesmith_tokens_total", "Tokens written", registry=self.registry)
        tokens.set_function(lambda: self.inference.tokens)
        self._jobs = Gauge("tunesmith_jobs", "Jobs by status", ["status"], registry=self.registry)
        for name, at in (("models", 0), ("answers", 1), ("answers_waiting", 2)):
            made = Gauge(f"tunesmith_{name}", f"{name.replace('_', ' ')} now".capitalize(), registry=self.registry)
            made.set_function(lambda at=at: self.inference.load()[at])  # type: ignore[misc]

    def counted(self, method: str, path: str, status: int, seconds: float) -> None:
        self._requests.labels(method, path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def count_jobs(self) -> None:
        """Bring the number of jobs of each status up to date."""
        with self.store.reading() as connection:
            found = connection.execute(sql.select(db.jobs.c.status, sql.func.count()).group_by(db.jobs.c.status)).all()
        counts: dict[str, int] = defaultdict(int, {row[0]: row[1] for row in found})
        for status in ("validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"):
            self._jobs.labels(status).set(counts[status])
