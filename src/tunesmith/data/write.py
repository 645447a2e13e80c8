"""Whole files or none: write to a temporary name, fsync, rename; JSONL of conversations."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from tunesmith.conversation import Conversation


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` atomically: after a crash it is the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


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
    write_bytes(path, b"".join(msgspec.json.encode(row) + b"\n" for row in rows))


def as_row(conversation: Conversation) -> dict[str, Any]:
    """A conversation as the `messages` format (plain text rows as `text`), which reads back as it was."""
    first = conversation.messages[0]
    if first.role == "text":
        row: dict[str, Any] = {"text": first.content}
    else:
        row = {"messages": [_message(m) for m in msgspec.to_builtins(conversation.messages)]}
    if conversation.tools:
        row["tools"] = conversation.tools
    if conversation.metadata:
        row["metadata"] = conversation.metadata
    return row


def _message(message: dict[str, Any]) -> dict[str, Any]:
    train = message.pop("train", None)
    return message if train is None else {**message, "weight": int(train)}
