"""A repaired copy of a data set, with every change listed: what `data check --fix OUT` writes. The input is never touched.

Repaired are the rows as they stand in their file, whatever their format, so that every other field stays as it was:
texts (encoding, control and invisible characters, outer space), role names, trailing empty turns; exact duplicates and
rows that cannot be read are left out. OUT is JSONL in UTF-8 without a byte order mark, one row a line.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from tunesmith.conversation import ROLES, Issue
from tunesmith.data import text as texts
from tunesmith.data.formats import SHAREGPT_ROLES
from tunesmith.data.read import Row, read
from tunesmith.data.write import sync_folder
from tunesmith.errors import UsageError

Change = dict[str, Any]  # row (its place), code, before, after
ROLE_NAMES = {
    "ai": "assistant",
    "model": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
} | {
    "human": "user",
    "sys": "system",
    "instruction": "system",
}


def repair(datasets: list[str], out: Path) -> dict[str, Any]:
    """Write `out` and `out`.changes.jsonl. Returns their names and counts; UsageError where either exists already."""
    log = out.with_name(f"{out.name}.changes.jsonl")
    for path in (out, log):
        if path.exists():
            raise UsageError("exists already", where=str(path), fix="choose another name, or remove it")
    parts = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in (out, log)]
    rows, changes, seen = 0, 0, set()
    try:
        with parts[0].open("wb") as good, parts[1].open("wb") as listed:
            for item in (item for name in datasets for item in read(name)):
                found: list[Change] = []
                value = _row(item, found)
                if value is not None:
                    line = msgspec.json.encode(value)
                    digest = hashlib.sha256(line).digest()[:16]
                    if digest in seen:
                        found.append(_change(item.where, "duplicate", value, None))
                    else:
                        seen.add(digest)
                        good.write(line + b"\n")
                        rows += 1
                changes += len(found)
                listed.writelines(msgspec.json.encode(change) + b"\n" for change in found)
            for stream in (good, listed):
                stream.flush()
                os.fsync(stream.fileno())
        for part, path in zip(parts, (out, log), strict=True):
            part.replace(path)
        sync_folder(out.parent)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return {"file": str(out), "log": str(log), "rows": rows, "changes": changes}


def _change(where: str, code: str, before: Any, after: Any) -> Change:
    return {"row": where, "code": code, "before": before, "after": after}


def _row(item: Row | Issue, found: list[Change]) -> dict[str, Any] | None:
    """The repaired row, None for one that cannot be read; what was done goes to `found`."""
    if isinstance(item, Issue):
        found.append(_change(item.where, item.code, item.message, None))
        return None
    value: dict[str, Any] = _texts(item.value, item.where, found)
    for key, name in (("messages", "role"), ("conversations", "from")):
        if isinstance(value.get(key), list):
            value = {**value, key: _turns(value[key], name, item.where, found)}
    return value


def _texts(value: Any, where: str, found: list[Change]) -> Any:
    """Every string of a row, however deep, repaired."""
    if isinstance(value, str):
        for code, mend in MENDERS.items():
            after = mend(value)
            if after != value:
                found.append(_change(where, code, value, after))
                value = after
        return value
    if isinstance(value, list):
        return [_texts(item, where, found) for item in value]
    if isinstance(value, dict):
        return {key: _texts(item, where, found) for key, item in value.items()}
    return value


def _turns(turns: list[Any], name: str, where: str, found: list[Change]) -> list[Any]:
    known = ROLES if name == "role" else tuple(SHAREGPT_ROLES)
    mended = []
    for turn in turns:
        role = turn.get(name) if isinstance(turn, dict) else None
        if isinstance(role, str) and role not in known:
            plain = role.strip().lower()
            right = plain if plain in known else ROLE_NAMES.get(plain)
            if right:
                found.append(_change(where, "bad-role", role, right))
                turn = {**turn, name: right}
        mended.append(turn)
    while len(mended) > 1 and _silent(mended[-1]):
        found.append(_change(where, "empty-turn", mended.pop(), None))
    return mended


def _silent(turn: Any) -> bool:
    """A turn that says nothing and calls nothing."""
    if not isinstance(turn, dict) or turn.get("tool_calls") or turn.get("function_call"):
        return False
    content = turn.get("content", turn.get("value"))
    return content is None or isinstance(content, str) and not content.strip()


_LINE_ENDS = re.compile("\r\n?")

MENDERS: dict[str, Callable[[str], str]] = {
    "mojibake": texts.unmangle,
    "control-character": lambda text: texts.CONTROL.sub("", _LINE_ENDS.sub("\n", text)),
    "invisible-character": lambda text: text if text.isascii() else texts.INVISIBLE.sub("", text),
    "outer-space": str.strip,
}
