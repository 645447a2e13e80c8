"""How bytes come in: who waits for the disk."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tunesmith.server.files import aside
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
