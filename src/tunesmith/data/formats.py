"""Raw rows to Conversations: one table of formats, each with the keys it is known by.

A row's format is the one whose required keys it holds; its other keys become metadata. Where two
formats fit, the one that explains more keys wins; a tie is an error that asks for `--columns`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Any, Literal, cast

import msgspec

from tunesmith.conversation import ROLES, Conversation, Issue, Message, Role
from tunesmith.data.findings import finding
from tunesmith.data.read import Row

SHAREGPT_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "function",
}


class Bad(Exception):
    """A row that does not hold what its format says: code, message, fix."""

    def __init__(self, code: str, message: str, fix: str) -> None:
        self.issue = (code, message, fix)


class Format(msgspec.Struct, frozen=True):
    """`required` keys identify the format; `optional` ones are read too; `parse` makes the messages."""

    name: str
    required: frozenset[str]
    optional: frozenset[str]
    parse: Callable[[dict[str, Any]], tuple[Message, ...]]


def text(row: dict[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise Bad("wrong-type", f'field "{key}" is {_kind(value)}, not text', f'make "{key}" a string')
    return value


def _kind(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "true/false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def _pair(ask: str, answer: str) -> Callable[[dict[str, Any]], tuple[Message, ...]]:
    def parse(row: dict[str, Any]) -> tuple[Message, ...]:
        if isinstance(row[ask], list) and isinstance(row[answer], list):  # conversational prompt and completion
            return _messages({"messages": row[ask] + row[answer]})
        return (Message("user", text(row, ask)), Message("assistant", text(row, answer)))

    return parse


def _instruction(row: dict[str, Any]) -> tuple[Message, ...]:
    ask, extra = text(row, "instruction"), row.get("input") or ""
    if not isinstance(extra, str):
        raise Bad("wrong-type", f'field "input" is {_kind(extra)}, not text', 'make "input" a string')
    return (Message("user", f"{ask}\n\n{extra}" if extra.strip() else ask), Message("assistant", text(row, "output")))


def _plain(key: str) -> Callable[[dict[str, Any]], tuple[Message, ...]]:
    return lambda row: (Message("text", text(row, key)),)


def _content(value: Any, place: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):  # content parts; only text can be trained on here
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise Bad("not-text", f"{place}.content holds a part that is not text", "keep text parts only")
        return "".join(part["text"] for part in value)
    raise Bad("wrong-type", f"{place}.content is {_kind(value)}, not text", "make it a string")


def _objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _messages(row: dict[str, Any]) -> tuple[Message, ...]:
    items = row["messages"]
    if not isinstance(items, list) or not items:
        raise Bad("no-messages", '"messages" is not a list of messages', 'write [{"role": "user", "content": …}, …]')
    return tuple(_message(item, f"messages[{i}]") for i, item in enumerate(items))


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, dict) or "role" not in item:
        raise Bad("no-role", f"{place} has no role", f"roles are {', '.join(ROLES)}")
    role = item["role"]
    if not isinstance(role, str) or role not in ROLES:
        raise Bad("bad-role", f"{place}.role is {role!r}", f"roles are {', '.join(ROLES)}")
    calls, weight, content = item.get("tool_calls"), item.get("weight"), item.get("content")
    if not calls and isinstance(item.get("function_call"), dict):  # the older way to write one call
        calls = [{"type": "function", "function": item["function_call"]}]
    if content is None and calls:
        content = ""
    for key in ("name", "tool_call_id"):
        if not isinstance(item.get(key), str | None):
            raise Bad("wrong-type", f"{place}.{key} is {_kind(item[key])}, not text", f'make "{key}" a string')
    if calls is not None and not _objects(calls):
        raise Bad("wrong-type", f"{place}.tool_calls is not a list of objects", "write the calls as a list")
    if not isinstance(weight, int | float | None) or weight not in (None, 0, 1):
        raise Bad("bad-weight", f"{place}.weight is {weight!r}", "a weight is 0 or 1")
    return Message(
        cast(Role, role),
        _content(content, place),
        weight=None if weight is None else 1 if weight else 0,
        tool_calls=calls,
        tool_call_id=item.get("tool_call_id"),
        name=item.get("name"),
    )


def _sharegpt(row: dict[str, Any]) -> tuple[Message, ...]:
    items = row["conversations"]
    if not isinstance(items, list) or not items:
        raise Bad("no-messages", '"conversations" is not a list of turns', 'write [{"from": "human", "value": …}, …]')
    turns = []
    for i, item in enumerate(items):
        place = f"conversations[{i}]"
        if isinstance(item, dict) and "role" in item:
            turns.append(_message(item, place))
            continue
        if not isinstance(item, dict) or "from" not in item or "value" not in item:
            raise Bad("no-role", f'{place} has no "from" and "value"', 'write {"from": "human", "value": …}')
        if not isinstance(item["from"], str) or item["from"] not in SHAREGPT_ROLES:
            raise Bad("bad-role", f"{place}.from is {item['from']!r}", f"known: {', '.join(SHAREGPT_ROLES)}")
        weight = item.get("weight")
        if not isinstance(weight, int | float | None) or weight not in (None, 0, 1):
            raise Bad("bad-weight", f"{place}.weight is {weight!r}", "a weight is 0 or 1")
        learnt: Literal[0, 1] | None = None if weight is None else 1 if weight else 0
        turns.append(Message(SHAREGPT_ROLES[item["from"]], _content(item["value"], place), learnt))
    return tuple(turns)


def _format(name: str, required: str, optional: str, parse: Callable[[dict[str, Any]], tuple[Message, ...]]) -> Format:
    return Format(name, frozenset(required.split()), frozenset(optional.split()), parse)


FORMATS = (
    _format("messages", "messages", "tools", _messages),
    _format("sharegpt", "conversations", "tools", _sharegpt),
    _format("prompt-completion", "prompt completion", "", _pair("prompt", "completion")),
    _format("prompt-response", "prompt response", "", _pair("prompt", "response")),
    _format("instruction", "instruction output", "input", _instruction),
    _format("input-output", "input output", "", _pair("input", "output")),
    _format("question-answer", "question answer", "", _pair("question", "answer")),
    _format("code", "code", "", _plain("code")),
    _format("text", "text", "", _plain("text")),
)
BY_NAME = {f.name: f for f in FORMATS}
PREFERENCE = ({"chosen", "rejected"}, {"preferred_output", "non_preferred_output"})


def detect(keys: set[str]) -> Format | Bad:
    """The format of a row with these keys, or why there is none."""
    if any(pair <= keys for pair in PREFERENCE):
        return Bad(
            "preference-row",
            "a preference row (chosen and rejected answers)",
            "supervised training needs one answer: --columns prompt=prompt,completion=chosen",
        )
    fits = [f for f in FORMATS if f.required <= keys]
    if len(fits) > 1:  # plain text or code only where nothing says more; else the format that explains more keys
        fits = [f for f in fits if f.name not in ("code", "text")] or fits
        most = max(len((f.required | f.optional) & keys) for f in fits)
        fits = [f for f in fits if len((f.required | f.optional) & keys) == most]
    if len(fits) == 1:
        return fits[0]
    listed = ", ".join(sorted(keys)) or "none"
    if fits:
        return Bad(
            "ambiguous-columns",
            f"fits {' and '.join(f.name for f in fits)} (columns: {listed})",
            "say which with --columns prompt=…,completion=…",
        )
    return Bad(
        "unknown-columns",
        f"no known format has these columns: {listed}",
        "map yours, e.g. --columns prompt=YOUR_QUESTION,completion=YOUR_ANSWER",
    )


def convert(row: Row, columns: dict[str, str]) -> tuple[Conversation, str] | Issue:
    """A raw row as (Conversation, name of its format), or the Issue that says why not.

    `columns` maps our field names to the file's own; then nothing is guessed from other columns.
    """
    value = row.value
    if columns:
        missing = [theirs for theirs in columns.values() if theirs not in value]
        if missing:
            return finding(
                "unknown-columns",
                row.where,
                f'no column "{missing[0]}" here (columns: {", ".join(sorted(value))})',
                "correct --columns",
            )
        mapped = {ours: value[theirs] for ours, theirs in columns.items()}
        rest = {k: v for k, v in value.items() if k not in columns.values()}
    else:
        mapped, rest = value, {}
    known = detect({name for name, held in mapped.items() if held is not None})  # null: a column that other rows fill
    known = detect(set(mapped)) if isinstance(known, Bad) else known
    if isinstance(known, Bad):
        return finding(known.issue[0], row.where, *known.issue[1:])
    tools = mapped.get("tools") or None
    if tools is not None and not _objects(tools):
        return finding("wrong-type", row.where, '"tools" is not a list of objects', "write the tools as a list")
    used = known.required | known.optional
    try:
        messages = known.parse(mapped)
        system = mapped.get("system")
        if isinstance(system, str) and system.strip() and messages[0].role in ("user", "assistant"):
            messages = (Message("system", system), *messages)
            used = used | {"system"}
    except Bad as bad:
        return finding(bad.issue[0], row.where, *bad.issue[1:])
    empty = {k for k in ("metadata", "system") if mapped.get(k) in (None, "", {})}
    extra = {k: v for k, v in mapped.items() if k not in used | empty} | rest
    metadata = extra.pop("metadata") if isinstance(extra.get("metadata"), dict) else {}
    return Conversation(messages, metadata={**extra, **metadata}, source=row.where, tools=tools), known.name


class Chat(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A row of the `messages` format with nothing beside it: decoded in one step, 3 times as fast as `convert`."""

    messages: tuple[Message, ...]
    metadata: dict[str, Any] = {}
    tools: list[dict[str, Any]] | None = None


_CHAT = msgspec.json.Decoder(Chat)
_WITH_MORE = msgspec.json.Decoder(dict[str, msgspec.Raw])
_TURNS = msgspec.json.Decoder(tuple[Message, ...])


def plain_chat(line: bytes) -> tuple[Chat, Collection[str]] | None:
    """What most rows are: a chat without any structural finding, and its further columns. None for what only `convert`
    can tell.

    Plain: at most one system message, first; user and assistant in turn, the assistant last; no empty text, no weights.
    A property test holds it to what `convert` makes of the line.
    """
    more: Collection[str] = ()
    try:
        chat = _CHAT.decode(line)
    except msgspec.ValidationError:  # well-formed, but another format, or with more columns
        found = _with_more(line)
        if found is None:
            return None
        chat, more = found, found.metadata
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    chat.tools = chat.tools or None  # as `convert` has it
    for m in chat.messages:
        if m.weight is not None or not m.content.strip():
            return None
    return (chat, more) if in_turn(tuple([m.role for m in chat.messages])) else None


def _with_more(line: bytes) -> Chat | None:
    """A chat with further columns, which become metadata; None where they may mean something else."""
    try:
        parts = _WITH_MORE.decode(line)
        if not _only_columns(frozenset(parts)):
            return None
        messages = _TURNS.decode(parts.pop("messages"))
        return Chat(messages, {key: msgspec.json.decode(value) for key, value in parts.items()})
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


@lru_cache(4096)
def _only_columns(keys: frozenset[str]) -> bool:
    """Whether a row of these keys is a chat with nothing that `convert` looks at beside it."""
    known = detect(set(keys))
    return not isinstance(known, Bad) and known.name == "messages" and not keys & {"tools", "metadata", "system"}


def unused(row: dict[str, Any], known: Format) -> list[str]:
    """Columns and message fields of a raw row that nothing is made of: they are kept as metadata, or not at all."""
    names = [key for key in row if key not in known.required | known.optional | {"metadata", "system"}]
    for key in ("messages", "conversations"):
        for turn in row[key] if key in known.required and isinstance(row[key], list) else ():
            names += [f"{key}[].{field}" for field in turn if field not in FIELDS] if isinstance(turn, dict) else []
    return list(dict.fromkeys(names))


FIELDS = (*Message.__struct_fields__, "function_call", "from", "value")


@lru_cache(4096)
def in_turn(roles: tuple[str, ...]) -> bool:
    """System first or absent, then user and assistant in turn, the assistant last."""
    turns = roles[1:] if roles[:1] in (("system",), ("developer",)) else roles
    return len(turns) % 2 == 0 and bool(turns) and turns == ("user", "assistant") * (len(turns) // 2)
