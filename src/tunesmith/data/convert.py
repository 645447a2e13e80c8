"""Conversations in other row formats, chosen, changed and mixed: what `data convert` and `data split` do.

Converting loses nothing: reading the written row gives the same conversation again (a property test holds it to that).
Where a format cannot hold something, `to_row` says what would be lost.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import msgspec

from tunesmith.conversation import Conversation, Message
from tunesmith.data.formats import SHAREGPT_ROLES
from tunesmith.data.write import as_row

Item = TypeVar("Item")
PAIRS = {  # format: its field for what is asked and for the answer
    "prompt-completion": ("prompt", "completion"),
    "prompt-response": ("prompt", "response"),
    "instruction": ("instruction", "output"),
    "input-output": ("input", "output"),
    "question-answer": ("question", "answer"),
}
FORMATS = ("messages", "sharegpt", *PAIRS, "text", "code")
_SHAREGPT = {"user": "human", "assistant": "gpt", "system": "system", "tool": "tool", "function": "function"}
assert all(SHAREGPT_ROLES[theirs] == ours for ours, theirs in _SHAREGPT.items())


def to_row(row: Conversation, name: str) -> tuple[dict[str, Any], list[str]]:
    """(the conversation as a row of the format, what is lost: [] for nothing)."""
    if name == "messages" and row.messages[0].role != "text":
        return as_row(row), []
    lost: list[str] = []
    if name in ("text", "code"):
        if row.messages[0].role != "text":
            return {}, ["who says what"]
        written: dict[str, Any] = {name: row.messages[0].content}
    elif row.messages[0].role == "text":
        return {}, ["plain text, which has no turns"]
    elif name == "sharegpt":
        lost = [f"the role {m.role}" for m in row.messages if m.role not in _SHAREGPT][:1]
        lost += _beyond_text(row.messages)
        turns = [{"from": _SHAREGPT.get(m.role, m.role), "value": m.content} for m in row.messages]
        written = {"conversations": turns, **({"tools": row.tools} if row.tools else {})}
    else:
        ask, answer = PAIRS[name]
        said = [m for m in row.messages if m.role in ("user", "assistant")]
        if len(said) != len(row.messages):
            lost.append("the messages of " + ", ".join(sorted({m.role for m in row.messages} - {"user", "assistant"})))
        if [m.role for m in said[-2:]] != ["user", "assistant"]:
            return {}, ["a conversation that does not end with a question and its answer"]
        if len(said) > 2:
            lost.append(f"{len(said) - 2} earlier turns")
        lost += _beyond_text(row.messages) + ["the tools"] * bool(row.tools)
        written = {ask: said[-2].content, answer: said[-1].content}
    if row.metadata:
        written["metadata"] = row.metadata
    return written, lost


def _beyond_text(messages: tuple[Message, ...]) -> list[str]:
    """What of the messages is more than role and text."""
    names = {"weight": "weights", "tool_calls": "tool calls", "tool_call_id": "ids of tool calls", "name": "names"}
    return [word for field, word in names.items() if any(getattr(m, field) is not None for m in messages)]


def with_system(row: Conversation, text: str | None, how: str) -> Conversation:
    """`how`: add (where there is none), replace (or add), strip. Rows of plain text stay as they are."""
    if row.messages[0].role == "text":
        return row
    has = row.messages[0].role in ("system", "developer")
    if how == "add" and has:
        return row
    rest = row.messages[1:] if has else row.messages
    return msgspec.structs.replace(row, messages=rest if how == "strip" else (Message("system", text or ""), *rest))


def emoji_in(text: str) -> int:
    """How many emoji a text has; a sequence that shows as one sign counts as one."""
    if text.isascii() or not _PERHAPS.search(text):
        return 0
    import emoji

    return int(emoji.emoji_count(text))


_PERHAPS = re.compile(
    "[©®\u203c-\U000e007f]"
)  # a text without any of these has none: letters with accents, curly quotes


def max_emoji(most: int) -> Callable[[Conversation], bool]:
    """Whether no answer of a conversation has more emoji than that."""
    return lambda row: all(emoji_in(m.content) <= most for m in row.messages if m.role == "assistant")


def sample(rows: Sequence[Item], amount: float, seed: int) -> list[Item]:
    """So many rows (1 and more: a number; less: a share), chosen by the seed, in their order."""
    count = min(len(rows), int(amount) if amount >= 1 else round(amount * len(rows)))
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), count))]


def mix(sources: list[list[Conversation]], weights: list[float], seed: int) -> list[Conversation]:
    """Each source as often as its weight (2.5: every row twice, half of them once more), shuffled by the seed."""
    return _shuffled(
        [row for rows, weight in zip(sources, weights, strict=True) for row in _times(rows, weight, seed)], seed
    )


def _times(rows: list[Conversation], weight: float, seed: int) -> Iterator[Conversation]:
    for _ in range(int(weight)):
        yield from rows
    if rest := weight - int(weight):
        yield from sample(rows, max(rest, 1e-9), seed) if round(rest * len(rows)) else ()


def _shuffled(rows: list[Conversation], seed: int) -> list[Conversation]:
    random.Random(seed).shuffle(rows)
    return rows
