"""What is written in any format and container reads back as it was; what cannot be held is named."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.conversation import Conversation, Issue, Message
from tunesmith.data.check import load, structure
from tunesmith.data.convert import FORMATS, PAIRS, mix, sample, to_row, with_system
from tunesmith.data.formats import BY_NAME, convert, plain_chat, unused
from tunesmith.data.read import Row, record
from tunesmith.data.write import write_rows

texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1).filter(lambda t: bool(t.strip()))
metadata = st.dictionaries(st.sampled_from(["id", "topic", "n"]), st.one_of(texts, st.integers(-9, 9), st.booleans()))
turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=3)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    messages = [Message("system", draw(texts))] if draw(st.booleans()) else []
    for ask, answer in draw(turns):
        weight: Any = draw(st.sampled_from([None, None, 0, 1]))
        messages += [Message("user", ask), Message("assistant", answer, weight=weight)]
    return Conversation(tuple(messages), draw(metadata), "f:1")


@pytest.mark.parametrize("name", FORMATS)
@given(conversation=conversations(), plain=texts)
def test_nothing_is_lost_unsaid(name: str, conversation: Conversation, plain: str) -> None:
    if name in ("text", "code"):
        conversation = Conversation((Message("text", plain),), conversation.metadata, "f:1")
    row, lost = to_row(conversation, name)
    if lost:
        assert name != "messages" and name not in ("text", "code")
        return
    again = convert(Row("f:1", json.loads(json.dumps(row))), {})
    assert not isinstance(again, Issue), again
    assert again == (conversation, name)


@given(turns, metadata)
def test_a_pair_is_lost_nowhere(pairs: list[tuple[str, str]], extra: dict[str, Any]) -> None:
    (ask, answer), *_ = pairs
    one = Conversation((Message("user", ask), Message("assistant", answer)), extra)
    assert all(not to_row(one, name)[1] for name in ("messages", "sharegpt", *PAIRS))


QA = (Message("user", "u"), Message("assistant", "a"))


@pytest.mark.parametrize(
    ("messages", "name", "lost"),
    [
        ((Message("system", "s"), Message("user", "u"), Message("assistant", "a")), "prompt-completion", "messages of system"),
        ((*QA, *QA), "instruction", "2 earlier turns"),
        ((Message("user", "u"), Message("assistant", "a", weight=0)), "sharegpt", "weights"),
        ((Message("developer", "d"), Message("user", "u"), Message("assistant", "a")), "sharegpt", "the role developer"),
        ((Message("user", "u"), Message("assistant", "", tool_calls=[{"id": "1"}])), "sharegpt", "tool calls"),
        ((Message("user", "u"), Message("assistant", "a")), "text", "who says what"),
        ((Message("text", "t"),), "question-answer", "plain text"),
        ((Message("assistant", "a"),), "input-output", "does not end with a question"),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_named(messages: tuple[Message, ...], name: str, lost: str) -> None:
    assert lost in " ".join(to_row(Conversation(messages), name)[1])


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.zst"])
def test_every_container_reads_back(suffix: str, tmp_path: Path) -> None:
    rows = [
        Conversation(
            (Message("user", f"q, {i}\n“é” 🎉"), Message("assistant", f'a;\t"{i}"')),
            ({"n": i, "deep": {"x": [i]}}, {}, {"n": "text", "empty": {}}, {"other": None}, {"n": 1.5})[i],
        )
        for i in range(5)
    ]
    called = Message("assistant", "", tool_calls=[{"id": "1", "function": {"name": "f", "arguments": "{}"}}])
    tools = [[{"type": "function", "function": {"name": "f", "parameters": {name: 1}}}] for name in "xy"]
    for name in ("messages", "prompt-completion"):
        path = tmp_path / f"{name}{suffix}"
        write_rows(path, [to_row(row, name)[0] for row in rows])
        found = load(str(path)).conversations
        assert [(c.messages, c.metadata) for c in found] == [(c.messages, c.metadata) for c in rows]
    more = [Conversation((Message("user", "u"), called, Message("assistant", "a")), {}, "", t) for t in tools]
    path = tmp_path / f"tools{suffix}"
    write_rows(path, [to_row(row, "messages")[0] for row in (*more, rows[0])])
    found = load(str(path)).conversations
    assert [(c.messages, c.tools) for c in found] == [(c.messages, c.tools) for c in (*more, rows[0])]


loose = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-2, 2), st.sampled_from(["user", "assistant", "text", "", "hi", "é"])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["role", "content", "weight", "name", "tool_calls", "type", "text", "x"]), inner, max_size=4
        ),
    ),
    max_leaves=8,
)
almost = st.builds(
    lambda role, content, more: {"role": role, "content": content, **more},
    st.sampled_from(["system", "user", "assistant", "tool", "text", "User"]),
    st.one_of(st.text(string.ascii_letters, max_size=5), loose),
    st.dictionaries(
        st.sampled_from(["weight", "name", "tool_call_id", "tool_calls", "train", "refusal"]), loose, max_size=2
    ),
)


plain = st.tuples(st.text(max_size=5), st.text(max_size=5)).map(
    lambda pair: [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
)


@given(
    st.one_of(st.lists(almost, max_size=3), plain, st.tuples(almost, plain).map(lambda both: [both[0], *both[1]])),
    st.dictionaries(st.sampled_from(["metadata", "tools", "id", "system", "prompt"]), loose, max_size=2),
)
def test_the_fast_road_makes_what_the_slow_one_does(messages: list[Any], more: dict[str, Any]) -> None:
    line = json.dumps({"messages": messages, **more}).encode() + b"\n"
    row = record(line, "f:3")
    assert isinstance(row, Row)
    slow = convert(row, {})
    fast = plain_chat(line)
    if fast:
        chat, columns = fast
        made = Conversation(chat.messages, chat.metadata, "f:3", chat.tools)
        assert (made, "messages") == slow and not list(structure(made))
        assert sorted(columns) == sorted(unused(row.value, BY_NAME["messages"]))


def test_a_plain_chat_is_one_whole_row() -> None:
    row = b'{"messages":[{"role":"user","content":"u"},{"role":"assistant","content":"a"}]}'
    assert plain_chat(row) and plain_chat(row + b"\r")
    assert not plain_chat(row + row) and not plain_chat(row[:-1]) and not plain_chat(b"")


@given(st.integers(1, 40), st.floats(0.01, 60), st.integers(0, 99))
def test_samples(count: int, amount: float, seed: int) -> None:
    rows = [Conversation((Message("text", str(i)),)) for i in range(count)]
    found = sample(rows, amount, seed)
    assert len(found) == min(count, int(amount) if amount >= 1 else round(amount * count))
    assert found == [row for row in rows if row in found] and found == sample(rows, amount, seed)


def test_mixing_by_weight() -> None:
    a, b = ([Conversation((Message("text", f"{name}{i}"),)) for i in range(20)] for name in "ab")
    found = mix([a, b], [2.5, 0.25], 1)
    assert (sum(row in a for row in found), sum(row in b for row in found)) == (50, 5)
    assert found == mix([a, b], [2.5, 0.25], 1) != sorted(found, key=str)


def test_system_messages() -> None:
    bare = Conversation((Message("user", "u"), Message("assistant", "a")))
    said = Conversation((Message("system", "old"), *bare.messages))
    assert with_system(bare, "new", "replace") == with_system(said, "new", "replace") == with_system(bare, "new", "add")
    assert with_system(said, "new", "add") == said and with_system(said, None, "strip") == bare == with_system(
        bare, None, "strip"
    )
