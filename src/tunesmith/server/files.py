"""Files: uploaded whole or in parts, listed, read, deleted."""

from __future__ import annotations

import asyncio
import hashlib
import re
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Annotated, Any, BinaryIO, Literal, TypeVar

import msgspec
import sqlalchemy as sql
from msgspec import Meta
from multipart import MultipartError, MultipartSegment, PushMultipartParser
from sqlalchemy import Connection
from starlette.responses import FileResponse, Response

from tunesmith.server import store as db
from tunesmith.server.app import Call, Route, digest
from tunesmith.server.leftovers import drop_parts
from tunesmith.server.protocol import (
    PURPOSES,
    Deleted,
    Expiry,
    File,
    Listing,
    NewUpload,
    Part,
    Refusal,
    Upload,
    WholeUpload,
    no_such,
)

T = TypeVar("T")
FIELDS = 16  # parts of a form
FIELD_BYTES = 4096
NAME = 255  # characters of a file's name that are kept
HOUR = 3600


class FilesQuery(msgspec.Struct):
    purpose: str | None = None
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None


def _file(row: dict[str, Any]) -> File:
    return File(
        row["id"], row["bytes"], row["created_at"], row["filename"], row["purpose"], expires_at=row["expires_at"]
    )


async def create_file(call: Call) -> File:
    """Take a file in."""
    id, fields = db.new_id("file-"), {}
    async with aside(call.service.blobs.writing(id)) as stream:
        fields = await _form(call, "file", stream, call.service.limits.file_bytes)
        purpose = fields.get("purpose")
        if purpose not in PURPOSES:
            words = (
                f"'{purpose}' is not one of {list(PURPOSES)}" if purpose else "Missing required parameter: 'purpose'"
            )
            raise Refusal(400, words, param="purpose")
        seconds = _expires(fields)
    size = int(fields["bytes"])
    now = int(time.time())
    row = {"bytes": size, "filename": fields["filename"], "purpose": purpose, "created_at": now}
    expires = None if seconds is None else now + seconds
    try:
        made = await asyncio.to_thread(call.store.add, db.files, id=id, owner=call.owner, expires_at=expires, **row)
    except Exception:
        await asyncio.to_thread(call.service.blobs.delete, id)
        raise
    return _file(made)


@asynccontextmanager
async def aside(manager: AbstractContextManager[T]) -> AsyncIterator[T]:
    """A context manager whose beginning and end wait for the disk: in a thread."""
    entered = await asyncio.to_thread(manager.__enter__)
    try:
        yield entered
    except BaseException:
        await asyncio.to_thread(manager.__exit__, *sys.exc_info())
        raise
    await asyncio.to_thread(manager.__exit__, None, None, None)


def _expires(fields: dict[str, str]) -> int | None:
    given = {k[14:-1]: v for k, v in fields.items() if re.fullmatch(r"expires_after\[\w+\]", k)}
    if not given:
        return None
    try:
        return int(msgspec.convert(given, Expiry, strict=False).seconds)
    except msgspec.ValidationError as error:
        raise Refusal(400, f"Invalid value for 'expires_after': {error}", param="expires_after") from None


async def _form(call: Call, wanted: str, out: BinaryIO, most: int) -> dict[str, str]:
    """A multipart body: its texts by name; the part `wanted` goes to `out` as it comes. Adds `filename` and `bytes`.

    Raises Refusal where a limit is passed, before another byte is written.
    """
    kind = call.request.headers.get("content-type", "")
    boundary = re.search(r'boundary="?([^";,]+)"?', kind)
    if not kind.startswith("multipart/form-data") or not boundary:
        raise Refusal(400, "Expected a multipart/form-data body")
    length = call.request.headers.get("content-length", "")
    said = int(length) if length.isdecimal() else 0
    if said > most + 64 * FIELD_BYTES:
        raise Refusal(413, f"The file is larger than {most} bytes", param=wanted)
    call.service.room(said)
    fields: dict[str, str] = {}
    name, size, seen, text = "", 0, False, bytearray()
    try:
        async for part in _segments(call, boundary[1]):
            if isinstance(part, MultipartSegment):
                name, text = part.name, bytearray()
                if name == wanted:
                    if seen:
                        raise Refusal(400, f"'{wanted}' came twice", param=wanted)
                    seen = True
                    fields["filename"] = _name(part.filename or "upload")
            elif part is None:
                if name != wanted and name not in ("filename", "bytes"):
                    fields[name] = text.decode("utf-8", "replace")
            elif name == wanted:
                size += len(part)
                if size > most:
                    raise Refusal(413, f"The file is larger than {most} bytes", param=wanted)
                if size % (16 << 20) < len(part):
                    call.service.room(0)
                out.write(part)
            else:
                text += part
                if len(text) > FIELD_BYTES:
                    raise Refusal(400, "A field of the form is too long", param=name)
    except MultipartError as error:
        raise Refusal(400, f"The multipart body is damaged: {error}") from None
    if not seen:
        raise Refusal(400, f"Missing required parameter: '{wanted}'", param=wanted, code="missing_required_parameter")
    fields["bytes"] = str(size)
    return fields


async def _segments(call: Call, boundary: str) -> AsyncIterator[Any]:
    """What the parser makes of the body as it comes: the head of a part, its bytes, None at its end."""
    with PushMultipartParser(boundary, max_segment_count=FIELDS, max_header_size=FIELD_BYTES) as parser:
        async for chunk in call.request.stream():
            for found in parser.parse(chunk):
                yield found
        if not parser.closed:
            for found in parser.parse(b""):
                yield found


def _name(given: str) -> str:
    """A file's name as it is kept and shown: never a path, and nothing that steers a terminal."""
    last = re.split(r"[/\\]", given)[-1]
    return "".join(c for c in last if c.isprintable())[:NAME] or "upload"


def list_files(call: Call) -> Listing:
    """The files, newest first."""
    query: FilesQuery = call.query
    where = [] if call.caller.admin else [db.files.c.owner == call.owner]
    if query.purpose is not None:
        where.append(db.files.c.purpose == query.purpose)
    return page(call, db.files, where, query.after, query.limit, query.order == "desc", _file, ends=True)


def page(
    call: Call,
    table: Any,
    where: list[Any],
    after: str | None,
    limit: int,
    newest_first: bool,
    show: Any,
    ends: bool = False,
) -> Listing:
    """A page of rows as objects. Raises Refusal for a cursor that is none of them."""
    try:
        rows, more = call.store.page(table, where, after, limit, newest_first)
    except LookupError:
        raise Refusal(400, f"No such cursor: {after}", param="after") from None
    found = Listing([show(row) for row in rows], more)
    if ends:
        found.first_id, found.last_id = (rows[0]["id"], rows[-1]["id"]) if rows else (None, None)
    return found


def own(call: Call, table: Any, id: str, what: str) -> dict[str, Any]:
    """A row that the caller may see. Raises Refusal 404 for any other."""
    row = call.store.get(table, id, None if call.caller.admin else call.owner)
    if row is None:
        raise no_such(what, id)
    return row


def get_file(call: Call) -> File:
    """One file."""
    return _file(own(call, db.files, call.path["file_id"], "File"))


def get_content(call: Call) -> Response:
    """Its bytes, as they came."""
    row = own(call, db.files, call.path["file_id"], "File")
    return FileResponse(call.service.blobs.path(row["id"]), media_type="application/octet-stream")


def delete_file(call: Call) -> Deleted:
    """Delete a file. Jobs that have begun keep what they have taken from it."""
    row = own(call, db.files, call.path["file_id"], "File")
    with call.store.begin() as connection:
        connection.execute(db.files.delete().where(db.files.c.id == row["id"]))
    call.service.blobs.delete(row["id"])
    return Deleted(row["id"], "file")


# ---- uploads in parts


def _upload(call: Call, row: dict[str, Any]) -> Upload:
    file = call.store.get(db.files, row["file"], None) if row["file"] else None
    names = ("id", "bytes", "created_at", "expires_at", "filename", "purpose", "status")
    return Upload(**{name: row[name] for name in names}, file=_file(file) if file else None)


def create_upload(call: Call, body: NewUpload) -> Upload:
    """Announce a file that comes in parts within an hour."""
    if body.bytes > call.service.limits.upload_bytes:
        raise Refusal(413, f"The file is larger than {call.service.limits.upload_bytes} bytes", param="bytes")
    call.service.room(2 * body.bytes)
    keep = body.expires_after.seconds if body.expires_after else None
    given = {
        "bytes": body.bytes,
        "filename": _name(body.filename),
        "purpose": body.purpose,
        "mime_type": body.mime_type,
    }
    row = {**given, "owner": call.owner, "status": "pending", "keep": keep, "expires_at": int(time.time()) + HOUR}
    return _upload(call, call.store.add(db.uploads, id=db.new_id("upload_"), **row))


def _pending(call: Call, connection: Connection) -> dict[str, Any]:
    """The upload of the path, in whose transaction it can be changed. Raises Refusal where it is none or has ended."""
    id = call.path["upload_id"]
    row = db.get(connection, db.uploads, id, None if call.caller.admin else call.owner)
    if row is None:
        raise no_such("Upload", id)
    status = "expired" if row["status"] == "pending" and row["expires_at"] < time.time() else row["status"]
    if status != "pending":
        raise Refusal(400, f"Upload {id} is {status}", param="upload_id")
    return row


def _sizes(connection: Connection, upload: str) -> dict[str, int]:
    """Bytes of an upload's parts."""
    mine = sql.select(db.parts.c.id, db.parts.c.bytes).where(db.parts.c.upload_id == upload)
    return {row[0]: row[1] for row in connection.execute(mine)}


def _refuse_more(call: Call, upload: dict[str, Any], there: int) -> None:
    """Raises Refusal where the parts are more than the file. One may come twice, when its answer was lost."""
    if there > upload["bytes"] + min(upload["bytes"], call.service.limits.part_bytes):
        raise Refusal(400, f"The parts have {there} bytes, {upload['bytes']} were announced", param="data")


async def add_part(call: Call) -> Part:
    """One part of an upload."""
    id = db.new_id("part_")
    upload = await asyncio.to_thread(_may_come, call)
    async with aside(call.service.blobs.writing(id)) as stream:
        fields = await _form(call, "data", stream, min(call.service.limits.part_bytes, upload["bytes"]))
    try:
        return await asyncio.to_thread(_add_part, call, id, int(fields["bytes"]))
    except Exception:
        await asyncio.to_thread(call.service.blobs.delete, id)
        raise


def _may_come(call: Call) -> dict[str, Any]:
    with call.store.reading() as connection:
        upload = _pending(call, connection)
        _refuse_more(call, upload, sum(_sizes(connection, upload["id"]).values()) + 1)
    return upload


def _add_part(call: Call, id: str, size: int) -> Part:
    with call.store.begin() as connection:
        upload = _pending(call, connection)
        _refuse_more(call, upload, sum(_sizes(connection, upload["id"]).values()) + size)
        row = db.add(connection, db.parts, id=id, upload_id=upload["id"], bytes=size)
    return Part(id, row["created_at"], upload["id"])


def complete_upload(call: Call, body: WholeUpload) -> Upload:
    """Put the parts together, in the order in which they are named. Asked again with the same parts: the same answer."""
    id = own(call, db.uploads, call.path["upload_id"], "Upload")["id"]
    with call.service.alone(id):
        known, file = own(call, db.uploads, id, "Upload"), "file-" + digest([id, body.part_ids])[:24]
        if known["status"] != "completed" or known["file"] != file:
            known = _put_together(call, body, file)
        return _upload(call, known)


def _put_together(call: Call, body: WholeUpload, file: str) -> dict[str, Any]:
    """Write the file, then end the upload, unless it has ended meanwhile."""
    with call.store.reading() as connection:
        upload = _pending(call, connection)
        sizes = _sizes(connection, upload["id"])
    for id in body.part_ids:
        if id not in sizes:
            raise no_such("Part", id)
    total = sum(sizes[id] for id in body.part_ids)
    if total != upload["bytes"]:
        raise Refusal(400, f"The parts have {total} bytes, {upload['bytes']} were announced", param="part_ids")
    _write(call, body, file)
    try:
        with call.store.begin() as connection:
            upload, now = _pending(call, connection), int(time.time())
            expires = None if upload["keep"] is None else now + upload["keep"]
            row = {name: upload[name] for name in ("bytes", "filename", "purpose", "owner")}
            db.add(connection, db.files, id=file, expires_at=expires, created_at=now, **row)
            db.change(connection, db.uploads, upload["id"], status="completed", file=file)
    except BaseException:
        call.service.blobs.delete(file)
        raise
    drop_parts(call.store, call.service.blobs, upload["id"])
    return own(call, db.uploads, upload["id"], "Upload")


def _write(call: Call, body: WholeUpload, file: str) -> None:
    md5 = hashlib.md5(usedforsecurity=False)
    with call.service.blobs.writing(file) as out:
        for piece in _pieces(call, body.part_ids):
            md5.update(piece)
            out.write(piece)
        if body.md5 is not None and body.md5.lower() != md5.hexdigest():
            raise Refusal(400, "The md5 of the parts is another", param="md5")


def _pieces(call: Call, ids: list[str]) -> Iterator[bytes]:
    for id in ids:
        try:
            stream = call.service.blobs.path(id).open("rb")
        except FileNotFoundError:
            raise Refusal(400, "The upload has ended meanwhile", param="upload_id") from None
        with stream:
            while piece := stream.read(1 << 20):
                yield piece


def cancel_upload(call: Call) -> Upload:
    """Give an upload up."""
    with call.store.begin() as connection:
        upload = _pending(call, connection)
        db.change(connection, db.uploads, upload["id"], status="cancelled")
    drop_parts(call.store, call.service.blobs, upload["id"])
    return _upload(call, {**upload, "status": "cancelled"})


_BYTES = {"type": "string", "format": "binary"}
_PURPOSE = {"type": "string", "enum": list(PURPOSES)}
FILE_FORM = {"type": "object", "required": ["file", "purpose"], "properties": {"purpose": _PURPOSE, "file": _BYTES}}
PART_FORM = {"type": "object", "required": ["data"], "properties": {"data": _BYTES}}

ROUTES = [
    Route("POST", "/files", create_file, File, form=FILE_FORM),
    Route("GET", "/files", list_files, Listing, query=FilesQuery),
    Route("GET", "/files/{file_id}", get_file, File),
    Route("DELETE", "/files/{file_id}", delete_file, Deleted),
    Route("GET", "/files/{file_id}/content", get_content),
    Route("POST", "/uploads", create_upload, Upload, NewUpload),
    Route("POST", "/uploads/{upload_id}/parts", add_part, Part, form=PART_FORM),
    Route("POST", "/uploads/{upload_id}/complete", complete_upload, Upload, WholeUpload),
    Route("POST", "/uploads/{upload_id}/cancel", cancel_upload, Upload),
]
