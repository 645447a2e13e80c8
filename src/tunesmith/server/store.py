"""The server's memory: a database of files, jobs, events, checkpoints, models and keys, and where the bytes of files lie.

SQLite in WAL mode, each commit synced: what was acknowledged is there after a crash. Everything that a client may name is looked
up by its id together with its owner; no name from a client becomes a path.
"""

from __future__ import annotations

import os
import secrets
import string
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import sqlalchemy as sql
from sqlalchemy import Boolean, Column, ForeignKey, Integer, MetaData, Table, Text, UniqueConstraint
from sqlalchemy.types import JSON

from tunesmith.data.write import sync_folder

SIGNS = string.ascii_letters + string.digits
metadata = MetaData()


def _table(name: str, *columns: Any) -> Table:
    """A table whose rows have a number in the order of their coming (`seq`), an id and a time."""
    own = (Column("seq", Integer, primary_key=True), Column("id", Text, unique=True), Column("created_at", Integer))
    return Table(name, metadata, *own, *columns, sqlite_autoincrement=True)


def _owner() -> Column[str]:
    return Column("owner", Text, nullable=False, index=True)


keys = _table("keys", Column("name", Text, unique=True), Column("hash", Text, unique=True), Column("admin", Boolean))
files = _table(
    "files",
    _owner(),
    *(Column("bytes", Integer), Column("filename", Text), Column("purpose", Text), Column("expires_at", Integer)),
)
uploads = _table(
    "uploads",
    _owner(),
    *(Column("bytes", Integer), Column("filename", Text), Column("purpose", Text), Column("mime_type", Text)),
    *(Column("status", Text), Column("expires_at", Integer), Column("keep", Integer), Column("file", Text)),
)
parts = _table("parts", Column("upload_id", Text, ForeignKey("uploads.id"), index=True), Column("bytes", Integer))
jobs = _table(
    "jobs",
    _owner(),
    Column("request", JSON),  # as it was sent
    Column("digest", Text),  # of the request, to know it again
    Column("status", Text, index=True),
    Column("hyperparameters", JSON),  # resolved, once the files are validated
    Column("seed", Integer),
    Column("model", Text),  # the fine-tuned model's name, and since the job ended well also in `models`
    Column("error", JSON),
    Column("finished_at", Integer),
    Column("trained_tokens", Integer),
    Column("result_file", Text),
    Column("estimated_finish", Integer),
    Column("prepared", Boolean),  # its run directory is laid out
    Column("read", Integer),  # bytes of the run's event log that have become events here
    Column("attempts", Integer),  # times its worker ended without a word since it last got on
)
events = _table(
    "events",
    Column("job_id", Text, ForeignKey("jobs.id"), index=True),
    Column("name", Text),  # what it is about: none is told twice of a job
    Column("level", Text),
    Column("type", Text),
    Column("message", Text),
    Column("data", JSON),
    UniqueConstraint("job_id", "name"),
)
checkpoints = _table(
    "checkpoints",
    Column("job_id", Text, ForeignKey("jobs.id"), index=True),
    Column("step", Integer),
    Column("model", Text),
    Column("metrics", JSON),
    UniqueConstraint("job_id", "step"),
)
models = _table(  # the id is the model's name
    "models", _owner(), Column("job_id", Text, ForeignKey("jobs.id"), index=True), Column("folder", Text)
)


def new_id(prefix: str, length: int = 24) -> str:
    """An id that nobody can guess: "ftjob-" and so many letters and digits."""
    return prefix + "".join(secrets.choice(SIGNS) for _ in range(length))


class Store:
    """The database of a data directory."""

    def __init__(self, url: str) -> None:
        self.engine = sql.create_engine(url, json_serializer=_to_json, json_deserializer=_from_json)
        if self.engine.dialect.name == "sqlite":
            sql.event.listen(self.engine, "connect", _tune)
            sql.event.listen(self.engine, "begin", _start)
        self._reading = self.engine.execution_options(reading=True)
        self._migrate()

    def _migrate(self) -> None:
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with self.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    @contextmanager
    def begin(self) -> Iterator[sql.Connection]:
        """A transaction: all of it lasts, or nothing."""
        with self.engine.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sql.Connection]:
        """To look only: sees one state, and keeps nobody from writing."""
        with self._reading.begin() as connection:
            yield connection

    def add(self, table: Table, **values: Any) -> dict[str, Any]:
        """A new row; the row as it then stands."""
        with self.begin() as connection:
            return add(connection, table, **values)

    def get(self, table: Table, id: str, owner: str | None) -> dict[str, Any] | None:
        """A row by its id, where it belongs to `owner` (None: to anyone)."""
        with self.reading() as connection:
            return get(connection, table, id, owner)

    def page(
        self, table: Table, where: list[Any], after: str | None, limit: int, newest_first: bool = True
    ) -> tuple[list[dict[str, Any]], bool]:
        """(rows after a cursor, whether there are more), in the order of their coming. An unknown cursor: LookupError."""
        query = sql.select(table).where(*where).limit(limit + 1)
        query = query.order_by(table.c.seq.desc() if newest_first else table.c.seq)
        with self.reading() as connection:
            if after is not None:
                seq = connection.scalar(sql.select(table.c.seq).where(table.c.id == after, *where))
                if seq is None:
                    raise LookupError(after)
                query = query.where(table.c.seq < seq if newest_first else table.c.seq > seq)
            rows = [dict(row) for row in connection.execute(query).mappings()]
        return rows[:limit], len(rows) > limit

    def change(self, table: Table, id: str, **values: Any) -> None:
        with self.begin() as connection:
            change(connection, table, id, **values)


def add(connection: sql.Connection, table: Table, **values: Any) -> dict[str, Any]:
    values = {"created_at": int(time.time()), **values}
    connection.execute(table.insert().values(**values))
    found = get(connection, table, values["id"])
    assert found is not None
    return found


def get(connection: sql.Connection, table: Table, id: str, owner: str | None = None) -> dict[str, Any] | None:
    query = sql.select(table).where(table.c.id == id)
    if owner is not None:
        query = query.where(table.c.owner == owner)
    row = connection.execute(query).mappings().first()
    return dict(row) if row else None


def change(connection: sql.Connection, table: Table, id: str, **values: Any) -> None:
    connection.execute(table.update().where(table.c.id == id).values(**values))


def _tune(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions begin where SQLAlchemy says so, not where the driver guesses
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=30000", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _start(connection: sql.Connection) -> None:
    """A transaction that writes takes the lock at once: it cannot be refused in its middle."""
    reading = connection.get_execution_options().get("reading")
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


def _to_json(value: Any) -> str:
    import msgspec

    return msgspec.json.encode(value).decode()


def _from_json(text: str) -> Any:
    import msgspec

    return msgspec.json.decode(text)


# ---- bytes


class Blobs(Protocol):
    """Where bytes lie, by id. A directory here; whoever keeps them elsewhere implements this."""

    def writing(self, id: str) -> AbstractContextManager[BinaryIO]:
        """To write new bytes into: there, whole, when the `with` ends well; else nothing of them."""
        ...

    def path(self, id: str) -> Path:
        """A file on this machine that holds the bytes."""
        ...

    def delete(self, id: str) -> None: ...

    def ids(self) -> list[str]:
        """Of all bytes that are kept."""
        ...


class Folder:
    """Bytes as files of a directory, named by ids that this server made."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        for left in folder.glob("*.tmp"):  # of a process that was killed
            left.unlink(missing_ok=True)

    @contextmanager
    def writing(self, id: str) -> Iterator[BinaryIO]:
        temporary = self._folder / f"{id}.tmp"
        try:
            with temporary.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(self.path(id))
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(self._folder)

    def path(self, id: str) -> Path:
        return self._folder / id

    def delete(self, id: str) -> None:
        self.path(id).unlink(missing_ok=True)

    def ids(self) -> list[str]:
        return [path.name for path in self._folder.iterdir() if path.suffix != ".tmp"]
