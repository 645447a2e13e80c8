"""What is decided before a server is there, without loading what serves: who has its folder, its keys, its bases."""

from __future__ import annotations

import fcntl
import hashlib
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sql

from tunesmith.errors import UsageError
from tunesmith.models import find
from tunesmith.server import store as db
from tunesmith.server.store import Store


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a data directory: before anything in it is looked at. Raises UsageError where another server has it."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / ".lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError("another server has it", where=str(folder), fix="choose another --data-dir") from None
        yield


def opened(folder: Path) -> Store:
    """The database of a data directory. Raises UsageError where it cannot be read and written."""
    path = folder / "tunesmith.db"
    try:
        return Store(f"sqlite:///{path}")
    except sql.exc.DatabaseError as error:
        fix = "check its owner and its rights, and the folder's: the server and keys write it as one user"
        raise UsageError(f"no database to write in: {error.orig}", where=str(path), fix=fix) from None


def has_keys(store: Store) -> bool:
    """Whether a server asks for keys at all."""
    return bool(store.page(db.keys, [], None, 1)[0])


def hashed(key: str) -> str:
    """A key as it is kept. Keys are 32 random signs: a plain hash cannot be guessed back."""
    return hashlib.sha256(key.encode()).hexdigest()


def add_key(store: Store, name: str, admin: bool = False) -> str:
    """Make a key; it is told once. Raises UsageError for a name that is taken."""
    key = "sk-" + secrets.token_urlsafe(32)
    try:
        store.add(db.keys, id=db.new_id("key_"), name=name, hash=hashed(key), admin=admin)
    except sql.exc.IntegrityError:
        raise UsageError(
            f'there is a key "{name}"', where="NAME", fix="choose another name, or remove that one"
        ) from None
    return key


def allowed(names: list[str]) -> dict[str, Path]:
    """Bases by name: the starter, and for each "PATH", "HUB/NAME" or "ALIAS=PATH" that the operator allows its folder."""
    found = {"starter": find("starter")}
    for word in names:
        alias, named, place = word.rpartition("=")
        if not place or named and not alias:
            raise UsageError("names no model", where=f"--allow-model {word}", fix="--allow-model ALIAS=FOLDER")
        folder = find(place).resolve()
        found[alias or (Path(place).name if Path(place).is_dir() else place)] = folder
    return found
