"""Whole files or none: write to a temporary name, fsync, rename; JSONL of conversations."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import platform
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from tunesmith.conversation import Conversation
from tunesmith.errors import UsageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a write; no name comes with them
UNUSED = 30 * 86400  # seconds after which what is kept for later runs is removed


def refuse_output(path: Path) -> None:
    """UsageError unless a new file can be written at a path: asked before the work whose result it is to hold."""
    if path.exists() or path.is_symlink():
        raise UsageError("exists already", where=str(path), fix="choose another name, or remove it")
    if not path.parent.is_dir():
        raise UsageError("cannot be written there", where=str(path), fix="name a new file in a folder that is")
    refuse_unwritable(path.parent, "name a new file in a folder that this user may write")


def refuse_unwritable(path: Path, fix: str) -> None:
    """UsageError where a path, or what there is above it, may not be written."""
    above = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not os.access(above, os.W_OK):
        raise UsageError("may not be written", where=str(above), fix=fix)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` atomically: after a crash it is the old file or the new one."""
    _replace(path, [data])


def write_parts(path: Path, parts: Iterable[bytes], size: int | None = None) -> None:
    """The same with bytes that come in parts. ValueError, and nothing written, where they are not `size` in all."""

    def counted() -> Iterator[bytes]:
        total = 0
        for part in parts:
            total += len(part)
            yield part
        if size is not None and total != size:
            raise ValueError(f"{total} bytes of {size}")

    _replace(path, counted())


def safe_name(name: str, *taken: str) -> str:
    """A name from outside as that of a file in one folder: no path, no control character, of 120 bytes at most, and no other's
    (nor one that is `taken`): what had to be changed bears a hash of the name."""
    plain = re.sub(r"[^\w.-]", "_", name.encode("utf-8", "replace").decode())
    while len(plain.encode()) > 120:
        plain = plain[1:]
    plain = plain.lstrip(".") or "_"
    if plain == name and plain not in taken:
        return plain
    return f"{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}-{plain}"


def _replace(path: Path, parts: Iterable[bytes]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.writelines(parts)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        if str(error.filename) == str(temporary) or error.errno in FULL:
            error.filename = str(path)  # a name that its user knows
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def begun(path: Path) -> Path:
    """Where a process builds what will be `path`: NAME.HOST-PROCESS.tmp beside it."""
    return path.with_name(f"{path.name}.{host()}-{os.getpid()}.tmp")


@functools.cache
def host() -> str:
    """This machine, and of its containers the one we are in: within it the number of a process means that process."""
    name = platform.node().partition(".")[0]
    try:
        return f"{name}-{os.stat('/proc/self/ns/pid').st_ino:x}"
    except OSError:  # no Linux
        return name


def publish(building: Path, target: Path) -> None:
    """Give a finished folder its name, after every file in it has reached the disk. `target` is absent or empty."""
    sync_files(building)
    building.rename(target)
    sync_folder(target.parent)


def sync_files(folder: Path) -> None:
    """Have every file in a folder, and below it, reach the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def kept(what: str) -> Path:
    """The folder of a kind of things that are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith" / what


def tidy(folder: Path, unused: float = UNUSED) -> None:
    """Delete from a folder what processes that were killed on this machine had begun, and, as befits a cache, what nobody has
    used for so many seconds (its time of change is that of its last use)."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(OSError):  # another process may be at it too
            if time.time() - entry.stat().st_mtime > unused or abandoned(entry.name):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)


def abandoned(name: str) -> bool:
    """Whether a name of `begun` is of a process of this machine that is gone."""
    place, _, process = name.removesuffix(".tmp").rpartition(".")[2].rpartition("-")
    if not name.endswith(".tmp") or place != host() or not process.isdecimal():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        pass
    return False


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` last (a no-op where folders cannot be opened)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    _replace(path, (msgspec.json.encode(row) + b"\n" for row in rows))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows in the container that the name asks for: .jsonl, .json, .csv, .tsv or .parquet, the first four also packed.

    In CSV and Parquet, metadata and other objects stand as JSON. Raises UsageError for another name.
    """
    from tunesmith.data.read import PACKED, container

    kind, packing = container(path), path.suffix.lower() if path.suffix.lower() in PACKED else ""
    makers = {
        ".jsonl": _as_jsonl,
        ".ndjson": _as_jsonl,
        ".json": _as_json,
        ".csv": _as_csv,
        ".tsv": _as_tsv,
        ".parquet": _as_parquet,
    }
    if kind not in makers or kind == ".parquet" and packing:
        raise UsageError("no container of that name", where=str(path), fix=f"end the name with {', '.join(makers)}")
    data = makers[kind](rows)
    if packing == ".gz":
        import gzip

        data = gzip.compress(data, mtime=0)
    elif packing == ".zst":
        import zstandard

        data = zstandard.compress(data)
    write_bytes(path, data)


def _as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(msgspec.json.encode(row) + b"\n" for row in rows)


def _as_json(rows: list[dict[str, Any]]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(rows), indent=1) + b"\n"


def _as_csv(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    import csv
    import io

    out = io.StringIO()
    names = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(out, names, delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: v if isinstance(v, str) else msgspec.json.encode(v).decode() for k, v in row.items()})
    return out.getvalue().encode()


def _as_tsv(rows: list[dict[str, Any]]) -> bytes:
    return _as_csv(rows, "\t")


def _as_parquet(rows: list[dict[str, Any]]) -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    said = {"role", "content"}
    plain = all(turn.keys() == said for row in rows for turn in row.get("messages", ()))
    as_text = {"metadata", "tools", "conversations"} | (set() if plain else {"messages"})  # have many shapes
    flat = [{k: msgspec.json.encode(v).decode() if k in as_text else v for k, v in row.items()} for row in rows]
    names = list(dict.fromkeys(key for row in rows for key in row))
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{n: row.get(n) for n in names} for row in flat]), out)
    return out.getvalue()


def as_row(conversation: Conversation) -> dict[str, Any]:
    """A conversation as the `messages` format (plain text rows as `text`), which reads back as it was."""
    first = conversation.messages[0]
    if first.role == "text":
        row: dict[str, Any] = {"text": first.content}
    else:
        row = {"messages": list(msgspec.to_builtins(conversation.messages))}
    if conversation.tools:
        row["tools"] = conversation.tools
    if conversation.metadata:
        row["metadata"] = conversation.metadata
    return row


def sha256(path: Path) -> str:
    """Of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
