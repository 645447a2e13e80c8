"""Structural checks: what would waste a run is found first, with line, field and fix."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import msgspec

from tunesmith.conversation import Conversation, Issue
from tunesmith.data.formats import convert
from tunesmith.data.read import read
from tunesmith.errors import DataError

# Control tokens of common models, as text: tokenized as such, they would end turns or begin roles inside an answer
SPECIAL = re.compile(r"<\|[A-Za-z_ ]{1,30}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>")
FEW_ROWS = 50  # below this a fine-tune rarely generalises (OpenAI's guidance: start with 50 good examples)


class Loaded(msgspec.Struct):
    """What a data set holds. rows_in = len(conversations) + rows with an error."""

    dataset: str
    conversations: list[Conversation]
    issues: list[Issue]
    rows_in: int
    formats: dict[str, int]

    def errors(self) -> list[Issue]:
        return [i for i in self.issues if i.severity == "error"]

    def require(self) -> Loaded:
        """Itself, or DataError with the first error and the count of the others."""
        bad = self.errors()
        if bad:
            more = f" (and {len(bad) - 1} more; see: tunesmith data check {self.dataset})" if len(bad) > 1 else ""
            raise DataError(f"{bad[0].message} [{bad[0].code}]{more}", where=bad[0].where, fix=bad[0].fix)
        return self


def load(dataset: str, columns: dict[str, str] | None = None) -> Loaded:
    """Read and check a data set whole. Raises DataError only when nothing can be read at all."""
    found = Loaded(dataset, [], [], 0, {})
    formats: Counter[str] = Counter()
    first_seen: dict[str, str] = {}
    for row in read(dataset):
        found.rows_in += 1
        result = row if isinstance(row, Issue) else convert(row, columns or {})
        if isinstance(result, Issue):
            found.issues.append(result)
            continue
        conversation, name = result
        formats[name] += 1
        issues = list(check(conversation))
        digest = conversation.digest()
        if digest in first_seen:
            issues.append(
                Issue(
                    "warning",
                    "duplicate",
                    conversation.source,
                    f"the same as {first_seen[digest]}",
                    "remove one of them",
                )
            )
        first_seen.setdefault(digest, conversation.source)
        found.issues.extend(issues)
        if not any(i.severity == "error" for i in issues):
            found.conversations.append(conversation)
    found.formats = dict(formats)
    if not found.errors() and found.rows_in < FEW_ROWS:
        found.issues.append(
            Issue(
                "warning",
                "few-rows",
                dataset,
                f"{found.rows_in} rows; expect a model that memorises them",
                f"{FEW_ROWS} to 500 good rows are a better start",
            )
        )
    return found


def check(conversation: Conversation) -> Iterator[Issue]:
    """Findings about one conversation's structure and text."""
    where, messages = conversation.source, conversation.messages
    learnt = [m for m in messages if m.role == "text" or (m.role == "assistant" and m.train is not False)]
    if not learnt:
        yield Issue(
            "error",
            "no-answer",
            where,
            "nothing here is to be learnt: no assistant message",
            "add the answer the model should give",
        )
    for i, message in enumerate(messages):
        place = f"message {i + 1} ({message.role})"
        if not message.content.strip() and not message.tool_calls:
            code = "empty-answer" if message in learnt else "empty-text"
            yield Issue("error", code, where, f"{place} is empty", "write the text or remove the row")
        if mark := SPECIAL.search(message.content):
            yield Issue(
                "warning",
                "special-token",
                where,
                f"{place} holds {mark[0]!r}, which tokenizers read as a control token",
                "write it in another way, or remove it",
            )
        if "\x00" in message.content:
            yield Issue("warning", "nul", where, f"{place} holds a NUL character", "remove it")
        if "\ufffd" in message.content:
            yield Issue(
                "warning",
                "replacement-character",
                where,
                f"{place} holds U+FFFD, the mark of a lost character",
                "restore the text from its source",
            )
        if i and message.role == messages[i - 1].role and message.role in ("user", "assistant"):
            yield Issue(
                "warning",
                "same-role-twice",
                where,
                f"{place} follows another of the same role",
                "join them, or add the turn between",
            )
        if message.role == "system" and i:
            yield Issue("warning", "late-system", where, f"{place} is not the first", "put the system message first")
    if learnt and messages[-1].role == "user":
        yield Issue(
            "warning", "trailing-turn", where, "ends with a user turn that nothing answers", "remove the last turn"
        )
