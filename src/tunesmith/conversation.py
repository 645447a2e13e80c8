"""Conversation: the only shape of an example once a file has been read."""

from __future__ import annotations

import functools
import hashlib
from typing import Any, Literal

import msgspec

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
Role = Literal["system", "developer", "user", "assistant", "tool", "function", "text"]


class Message(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, gc=False):
    """One turn, as the OpenAI format writes it."""

    role: Role  # "text": a row of plain text, rendered without a template and learnt whole
    content: str  # the text
    weight: Literal[0, 1] | None = None  # 0: an assistant turn that is shown but not learnt
    tool_calls: list[dict[str, Any]] | None = None  # of an assistant, as OpenAI writes them
    tool_call_id: str | None = None  # which call a tool answers
    name: str | None = None  # of the tool, or the speaker


class Conversation(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """An example: the only shape of one, once a file has been read."""

    messages: tuple[Message, ...]  # in order
    metadata: dict[str, Any] = {}  # other columns of the row: never trained on
    source: str = ""  # its place, "file:line"
    tools: list[dict[str, Any]] | None = None  # functions that may be called, as JSON schemas

    def digest(self) -> str:
        """Hash of what is said, not of where it stood: equal for equal conversations."""
        return hashlib.sha256(msgspec.json.encode((self.messages, self.tools))).hexdigest()

    def prompt(self) -> tuple[Message, ...]:
        """The messages before the last assistant turn: what a model is asked when tested."""
        last = max((i for i, m in enumerate(self.messages) if m.role == "assistant"), default=0)
        return self.messages[:last]

    def answer(self) -> str:
        """The last assistant turn, '' when there is none."""
        return next((m.content for m in reversed(self.messages) if m.role == "assistant"), "")


class Issue(msgspec.Struct, frozen=True):
    """A finding about data or a plan."""

    severity: Literal["error", "warning", "info"]  # errors stop a run; warnings are shown and recorded
    code: str  # of data-findings.md
    where: str  # its place: "file:line", a file, a setting
    message: str  # what is wrong
    fix: str = ""  # what to do

    def line(self) -> str:
        mend = f" -- {self.fix}" if self.fix else ""
        place = f"{self.where}: " if self.where else ""
        return harmless(f"{place}{self.message} [{self.code}]{mend}", keep="")


def harmless(text: str, keep: str = "\n\t") -> str:
    """A text that steers no terminal and no page: control characters but those to `keep`, and what turns the direction of
    writing, as visible signs; a kept line end as \\n, halves of characters as "?"."""
    if "\n" in keep:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.translate(_signs(keep)).encode("utf-8", "replace").decode()


@functools.cache
def _signs(keep: str) -> dict[int, int]:
    """For str.translate: the picture of a control character, and the replacement character for one that has none."""
    pictures = {code: 0x2400 + code for code in range(32)} | {127: 0x2421}
    others = dict.fromkeys((*range(128, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)
    return {code: sign for code, sign in (pictures | others).items() if chr(code) not in keep}
