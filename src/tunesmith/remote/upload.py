"""Rows as a service takes them, and their way there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from tunesmith.conversation import Conversation
from tunesmith.data.check import HOSTED_ROWS
from tunesmith.data.split import Splits
from tunesmith.data.write import write_jsonl
from tunesmith.remote.service import Service, Unsure
from tunesmith.runs import Run

IN_PARTS = 512 * 1024 * 1024  # bytes: what is larger is no single file to the service
TRIES = 3


def write(splits: Splits, run: Run) -> None:
    """upload/train.jsonl and valid.jsonl of a run. The test rows stay here."""
    (run / "upload").mkdir()
    for side in ("train", "valid"):
        if len(splits[side]) >= HOSTED_ROWS:
            write_jsonl(run / "upload" / f"{side}.jsonl", (as_sent(row) for row in splits[side]))


def as_sent(row: Conversation) -> dict[str, Any]:
    """A row with nothing but what the format knows: metadata is an error there, and "developer" no role."""
    messages: list[dict[str, Any]] = msgspec.to_builtins(row.messages)
    for message in messages:
        if message["role"] == "developer":
            message["role"] = "system"
        if message["role"] != "assistant":
            message.pop("weight", None)
        elif not message["content"] and message.get("tool_calls"):
            message["content"] = None
    return {"messages": messages, **({"tools": row.tools} if row.tools else {})}


def send(service: Service, path: Path, name: str) -> str:
    """Send a file under a name that nobody else uses; its id. Where no answer came, a file of that name is looked for."""
    size = path.stat().st_size
    for number in range(1, TRIES + 1):
        try:
            return service.make(lambda client: _sent(client, path, name, size), f"sending {path.name}", size)
        except Unsure as lost:
            there = next((f for f in service.files() if f.get("filename") == name and f.get("bytes") == size), None)
            if there:
                return str(there["id"])
            if number == TRIES:
                raise lost.why from None
    raise AssertionError


def _sent(client: Any, path: Path, name: str, size: int) -> str:
    if size > IN_PARTS:
        upload = client.uploads.upload_file_chunked(
            file=path, filename=name, mime_type="application/jsonl", purpose="fine-tune", bytes=size
        )
        found = upload.file
    else:
        with path.open("rb") as stream:
            found = client.files.create(file=(name, stream), purpose="fine-tune")
    if not isinstance(found.id, str):
        raise ValueError("no file")
    return found.id
