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
from tunesmith.data.formats import FORMATS, SHAREGPT_ROLES
from tunesmith.data.read import Row, read
from tunesmith.data.write import refuse_unwritable, sync_folder
from tunesmith.errors import UsageError

Change = dict[str, Any]  # row (its place), code, before, after
ROLE_NAMES: dict[str, str] = {**SHAREGPT_ROLES, "ai": "assistant", "sys": "system", "instruction": "system"}


def refuse_taken(out: Path) -> Path:
    """The change log's name for a repaired copy, when both can be written; UsageError where not."""
    log = out.with_name(f"{out.name}.changes.jsonl")
    if out.suffix != ".jsonl":
        raise UsageError("a repaired copy is JSONL", where=str(out), fix=f"name it {out.with_suffix('.jsonl')}")
    for path in (out, log):
        if path.exists() or path.is_symlink():
            raise UsageError("exists already", where=str(path), fix="choose another name, or remove it")
    if not out.parent.is_dir():
        raise UsageError("no such folder", where=str(out.parent), fix="make it first")
    refuse_unwritable(out.parent, "name a new file in a folder that this user may write")
    return log


def repair(datasets: list[str], out: Path) -> dict[str, Any]:
    """Write `out` and `out`.changes.jsonl. Returns their names and counts; UsageError where either exists already."""
    log = refuse_taken(out)
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
    value = {k: _text(v, item.where, found) if k in SAID and isinstance(v, str) else v for k, v in item.value.items()}
    for key in ("messages", "conversations"):
        if isinstance(value.get(key), list):
            value[key] = _turns([_turn(turn, item.where, found) for turn in value[key]], item.where, found)
    return value


SAID = frozenset().union(*(f.required | f.optional for f in FORMATS), {"system"}) - {
    "messages",
    "conversations",
    "tools",
}


def _turn(turn: Any, where: str, found: list[Change]) -> Any:
    """A turn whose text is repaired: the content alone, not names, ids or the arguments of tools."""
    if not isinstance(turn, dict):
        return turn
    return {
        k: _text(v, where, found) if k in ("content", "value") and isinstance(v, str) else v for k, v in turn.items()
    }


def _text(text: str, where: str, found: list[Change]) -> str:
    for code, mend in MENDERS.items():
        after = mend(text)
        if after != text:
            found.append(_change(where, code, text, after))
            text = after
    return text


def _turns(turns: list[Any], where: str, found: list[Change]) -> list[Any]:
    mended = []
    for turn in turns:
        name = "role" if isinstance(turn, dict) and "role" in turn else "from"
        known = ROLES if name == "role" else tuple(SHAREGPT_ROLES)
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


def _trim(text: str) -> str:
    """Without outer spaces, but for what may be code: an indent stays, and the last line break of several lines."""
    if "\n" in text.strip():
        return text.rstrip(" \t")
    indent = text[: len(text) - len(text.lstrip())]
    return (indent if _INDENT.fullmatch(indent) else "") + text.strip()


_LINE_ENDS = re.compile("\r\n?")
_INDENT = re.compile(" {2,}|\t+")

MENDERS: dict[str, Callable[[str], str]] = {
    "mojibake": texts.unmangle,
    "control-character": lambda text: texts.CONTROL.sub("", _LINE_ENDS.sub("\n", text)),
    "invisible-character": lambda text: text if text.isascii() else texts.INVISIBLE.sub("", text),
    "outer-space": _trim,
}
