"""What a service sends, made safe at this one border: every field has its type or its default, whatever came."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from tunesmith.conversation import harmless


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What we need of a fine-tuning job; everything else is kept as it came, in `as_sent`."""

    id: str
    status: str = "unknown"
    model: str = ""
    training_file: str = ""
    validation_file: str | None = None
    fine_tuned_model: str | None = None
    created_at: float = 0
    finished_at: float | None = None
    trained_tokens: int | None = None
    result_files: list[str] = []
    error: dict[str, Any] | None = None
    hyperparameters: dict[str, Any] | None = None
    method: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    seed: int | None = None
    as_sent: dict[str, Any] = {}

    def resolved(self) -> dict[str, Any]:
        """The hyperparameters as far as they are known: `method` says them first, the older field stands in."""
        method = self.method or {}
        about = method.get(str(method.get("type")))
        inside = about.get("hyperparameters") if isinstance(about, dict) else None
        return dict(inside if isinstance(inside, dict) and inside else self.hyperparameters or {})

    def failure(self) -> dict[str, str]:
        """code, message, param as far as they are said; {} for a healthy job, whose `error` may be an object of nulls."""
        return {name: text(value) for name, value in (self.error or {}).items() if isinstance(value, str) and value}


def as_job(sent: Any) -> Job:
    """A job, from an SDK object or what it holds. Raises ValueError where it is none; a field of another type is left out."""
    found = plain(sent)
    known: dict[str, Any] = {}
    for field in msgspec.structs.fields(Job):
        if field.name != "as_sent" and found.get(field.name) is not None:
            try:
                known[field.name] = msgspec.convert(found[field.name], field.type)
            except msgspec.ValidationError:
                continue
    if not known.get("id"):
        raise ValueError("no job")
    return Job(**known, as_sent=found)


def page(sent: Any) -> tuple[list[dict[str, Any]], bool]:
    """(objects, whether there may be more) of a list. Raises ValueError where it is none."""
    found = plain(sent)
    items = found.get("data")
    if not isinstance(items, list) or not all(isinstance(i, dict) and isinstance(i.get("id"), str) for i in items):
        raise ValueError("no list")
    return items, found.get("has_more") is not False


def plain(sent: Any) -> dict[str, Any]:
    """What came, as JSON objects. Raises ValueError for anything else than an object."""
    found = sent.to_dict(mode="json", warnings=False) if hasattr(sent, "to_dict") else sent
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found


def text(value: Any) -> str:
    """A text from outside, in one line."""
    return harmless(re.sub(r"\s", " ", str(value)), keep="")


def number(value: Any) -> float | None:
    """A number, None for anything else."""
    fine = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15
    return value if fine else None


def hidden(said: str, key: str) -> str:
    """A text from outside without a key in it; services repeat a wrong one, or parts of it."""
    said = text(said).replace(key, "[key]") if len(key) > 7 else text(said)
    return re.sub(r"\b(sk|tsk)-[\w*-]{6,}", "[key]", said)
