"""How bytes come in: who waits for the disk."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tunesmith.backends import get
from tunesmith.server import store as db
from tunesmith.server.app import Call
from tunesmith.server.files import aside, cancel_upload, complete_upload
from tunesmith.server.protocol import Refusal, WholeUpload
from tunesmith.server.service import Caller, Service
from tunesmith.server.store import Folder


def test_the_event_loop_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs, threads = Folder(tmp_path), []

    def note(*_: int) -> None:
        threads.append(threading.current_thread())

    monkeypatch.setattr("os.fsync", note)

    async def act() -> None:
        async with aside(blobs.writing("a")) as stream:
            stream.write(b"whole")
        with pytest.raises(ValueError, match="cut off"):
            async with aside(blobs.writing("b")) as stream:
                stream.write(b"half")
                raise ValueError("cut off")

    asyncio.run(act())
    assert threads and threading.main_thread() not in threads
    assert (tmp_path / "a").read_bytes() == b"whole" and blobs.ids() == ["a"] and len(list(tmp_path.iterdir())) == 1


def test_an_upload_ends_once(tmp_path: Path) -> None:
    made = Service(tmp_path / "data", get("fake"), {})
    caller = Caller("ann", False)
    row = {"owner": "ann", "bytes": 3, "filename": "f", "purpose": "batch", "mime_type": "", "status": "pending"}
    made.store.add(db.uploads, id="upload_x", expires_at=2**40, **row)
    made.store.add(db.parts, id="part_x", upload_id="upload_x", bytes=3)
    with made.blobs.writing("part_x") as stream:
        stream.write(b"abc")
    request: Any = SimpleNamespace(path_params={"upload_id": "upload_x"})
    call = Call(request, made, caller, None)
    writing = made.blobs.writing

    @contextmanager
    def slow(id: str) -> Iterator[Any]:
        with writing(id) as stream:
            yield stream
        with pytest.raises(Refusal) as busy:  # the same, while it is written
            complete_upload(call, WholeUpload(["part_x"]))
        assert busy.value.status == 409
        cancel_upload(call)

    made.blobs.writing = slow  # type: ignore[method-assign]
    with pytest.raises(Refusal, match="is cancelled"):
        complete_upload(call, WholeUpload(["part_x"]))
    assert made.blobs.ids() == [] and not made.store.page(db.files, [], None, 10)[0]


def test_what_an_end_refuses_is_heard(tmp_path: Path) -> None:
    @contextmanager
    def full() -> Iterator[int]:
        yield 5
        raise OSError("no space left")

    async def act() -> None:
        async with aside(full()) as found:
            assert found == 5

    with pytest.raises(OSError, match="no space left"):
        asyncio.run(act())
