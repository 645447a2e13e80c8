"""Every row format and container, read into conversations; every bad one named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from conftest import write
from tunesmith.conversation import Conversation, Issue, Message
from tunesmith.data.check import load
from tunesmith.data.formats import FORMATS, convert
from tunesmith.data.read import Row, samples
from tunesmith.data.write import as_row
from tunesmith.errors import DataError, UsageError

PAIR = (Message("user", "q"), Message("assistant", "a"))
GOOD: list[tuple[str, dict[str, Any], tuple[Message, ...]]] = [
    ("messages", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, PAIR),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": "a", "weight": 0},
            ]
        },
        (Message("user", "q"), Message("assistant", "a", weight=0)),
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "developer", "content": "s"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"},
            ],
            "tools": [],
        },
        (Message("developer", "s"), *PAIR),
    ),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, PAIR),
    ("prompt-completion", {"prompt": "q", "completion": "a"}, PAIR),
    ("prompt-completion", {"prompt": "q", "completion": "a", "system": "s"}, (Message("system", "s"), *PAIR)),
    (
        "prompt-completion",
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
        PAIR,
    ),
    ("prompt-response", {"prompt": "q", "response": "a"}, PAIR),
    ("input-output", {"input": "q", "output": "a"}, PAIR),
    ("instruction", {"instruction": "q", "output": "a"}, PAIR),
    (
        "instruction",
        {"instruction": "q", "input": "x", "output": "a"},
        (Message("user", "q\n\nx"), Message("assistant", "a")),
    ),
    ("instruction", {"instruction": "q", "input": "", "output": "a"}, PAIR),
    ("question-answer", {"question": "q", "answer": "a"}, PAIR),
    ("code", {"code": "x = 1"}, (Message("text", "x = 1"),)),
    ("text", {"text": "t"}, (Message("text", "t"),)),
]


@pytest.mark.parametrize(("name", "row", "messages"), GOOD)
def test_format(name: str, row: dict[str, Any], messages: tuple[Message, ...]) -> None:
    result = convert(Row("f:1", row), {})
    assert isinstance(result, tuple), result
    conversation, found = result
    assert (found, conversation.messages, conversation.source) == (name, messages, "f:1")
    again = convert(Row("f:1", as_row(conversation)), {})
    assert isinstance(again, tuple) and again[0] == conversation  # written and read back, it is the same


def test_every_format_is_tried() -> None:
    assert {name for name, _, _ in GOOD} == {f.name for f in FORMATS}
    assert len(FORMATS) == 9


BAD = [
    ("unknown-columns", {"a": "b"}),
    ("unknown-columns", {}),
    ("ambiguous-columns", {"prompt": "q", "completion": "a", "question": "q", "answer": "a"}),
    ("preference-row", {"prompt": "q", "chosen": "a", "rejected": "b"}),
    ("wrong-type", {"prompt": 3, "completion": "a"}),
    ("wrong-type", {"instruction": "q", "input": ["x"], "output": "a"}),
    ("no-messages", {"messages": []}),
    ("no-messages", {"messages": "hi"}),
    ("no-role", {"messages": [{"content": "x"}]}),
    ("bad-role", {"messages": [{"role": "usr", "content": "x"}]}),
    ("bad-weight", {"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}),
    ("wrong-type", {"messages": [{"role": "user", "content": None}]}),
    ("not-text", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    ("bad-role", {"conversations": [{"from": "alien", "value": "x"}]}),
    ("no-role", {"conversations": [{"value": "x"}]}),
    ("no-messages", {"conversations": []}),
]


@pytest.mark.parametrize(("code", "row"), BAD)
def test_bad_row(code: str, row: dict[str, Any]) -> None:
    issue = convert(Row("f:7", row), {})
    assert isinstance(issue, Issue)
    assert (issue.code, issue.where, issue.severity) == (code, "f:7", "error")
    assert issue.fix


def test_columns_map_and_extra_columns_become_metadata() -> None:
    row = {"ask": "q", "reply": "a", "topic": "t", "prompt": "not this one"}
    result = convert(Row("f:1", row), {"prompt": "ask", "completion": "reply"})
    assert isinstance(result, tuple)
    assert result[0].messages == PAIR
    assert result[0].metadata == {"topic": "t", "prompt": "not this one"}
    issue = convert(Row("f:1", row), {"prompt": "nope", "completion": "reply"})
    assert isinstance(issue, Issue) and 'no column "nope"' in issue.message


LINES = b'{"prompt": "q1", "completion": "a1"}\n{"prompt": "q2", "completion": "a2"}\n'
ARRAY = b'[{"prompt": "q1", "completion": "a1"}, {"prompt": "q2", "completion": "a2"}]'


def parquet() -> bytes:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["q1", "q2"], "completion": ["a1", "a2"]}), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".jsonl", LINES),
        (".jsonl", b"\xef\xbb\xbf" + LINES),
        (".jsonl", LINES.replace(b"\n", b"\r\n")),
        (".jsonl", b"\n\n" + LINES + b"\n"),
        (".jsonl", LINES.rstrip()),
        (".json", ARRAY),
        (".json", b"\xef\xbb\xbf" + ARRAY.replace(b", {", b",\n{")),
        (".json", LINES),
        (".jsonl", ARRAY.replace(b"[{", b"[\n{")),
        (".csv", b"prompt,completion\nq1,a1\nq2,a2\n"),
        (".csv", b'\xef\xbb\xbfprompt,completion\r\n"q1","a1"\r\n"q2","a2"\r\n'),
        (".csv", b'prompt;completion\n"q1";a1\nq2;a2\n'),
        (".tsv", b"prompt\tcompletion\nq1\ta1\nq2\ta2\n"),
        (".parquet", None),
    ],
)
def test_container(tmp_path: Path, suffix: str, content: bytes | None, packing: str) -> None:
    content = content or parquet()
    path = tmp_path / f"d{suffix}{packing}"
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packing](content))
    found = load(str(path))
    assert [[m.content for m in c.messages] for c in found.conversations] == [["q1", "a1"], ["q2", "a2"]]
    assert found.rows_in == 2


def test_folder_reads_every_file_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", [{"prompt": "2", "completion": "x"}])
    write(tmp_path / "a.jsonl", [{"prompt": "1", "completion": "x"}])
    (tmp_path / "notes.md").write_text("not data")
    assert [c.messages[0].content for c in load(str(tmp_path)).conversations] == ["1", "2"]
    (tmp_path / "c.jsonl").write_text("\n")
    (tmp_path / "d.jsonl").write_text("oops\n")
    assert [i.code for i in load(str(tmp_path)).errors()] == ["unreadable-file", "not-json"]  # one hides no other


def test_one_object_or_an_array_over_several_lines(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text('{\n "prompt": "q",\n "completion": "a"\n}\n')
    assert load(str(tmp_path / "one.json")).conversations[0].answer() == "a"
    (tmp_path / "bad.json").write_text('[\n{"prompt": "q", "completion": "a"},\n{"prompt": "q" "completion": "a"}\n]\n')
    assert load(str(tmp_path / "bad.json")).errors()[0].where.endswith("bad.json:3")


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text(f"prompt,completion\nq,{'x' * 200_000}\n")
    assert len(load(str(tmp_path / "d.csv")).conversations[0].answer()) == 200_000


def test_an_empty_name_is_not_this_folder() -> None:
    with pytest.raises(UsageError, match="the name is empty"):
        load("")


def test_line_separator_inside_a_string_is_text(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "a\u2028b\u0085c", "completion": "x"}\n', encoding="utf-8")
    assert load(str(path)).conversations[0].messages[0].content == "a\u2028b\u0085c"


@pytest.mark.parametrize(
    ("content", "code", "line"),
    [
        (b'{"prompt": "q", "completion": "a"}\nnot json\n', "not-json", 2),
        (b'{"prompt": "caf\xe9", "completion": "a"}\n', "not-utf8", 1),
        (b"\xff\xfe{\x00}\x00", "not-utf8", 1),
        (b'{"prompt": "\\ud83d", "completion": "a"}\n', "lone-surrogate", 1),
        (b'"text"\n', "not-an-object", 1),
        (b'{"prompt": "q", "completion": ""}\n', "empty-answer", 1),
        (b'{"prompt": "q", "completion": "  \\n"}\n', "empty-answer", 1),
        (b'{"prompt": "", "completion": "a"}\n', "empty-text", 1),
        (b'{"messages": [{"role": "user", "content": "q"}]}\n', "no-answer", 1),
        (b"[" * 100_000 + b"\n", "not-json", 1),
        (b'{"prompt": "q", "completion": NaN}\n', "not-json", 1),
    ],
)
def test_bad_file(tmp_path: Path, content: bytes, code: str, line: int) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    first = load(str(path)).errors()[0]
    assert (first.code, first.where) == (code, f"{path}:{line}")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.jsonl", b"", "empty"),
        ("d.jsonl", b"\n \n", "blank"),
        ("d.json", b"[]", "empty"),
        ("d.jsonl.gz", b"not gzip", "cannot be read"),
        ("d.parquet", b"PAR1junk", "cannot be"),
        ("d.jsonl.zst", b"junk", "cannot be unpacked"),
    ],
)
def test_unreadable_file(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        load(str(tmp_path / name))


@pytest.mark.parametrize("name", ["./nope.jsonl", "nope.jsonl", "no/such/folder", "unknown-dataset-name"])
def test_missing_data_says_what_to_do(name: str) -> None:
    with pytest.raises(DataError) as caught:
        load(name)
    assert caught.value.where == name and caught.value.fix


def test_warnings_and_nothing_lost(tmp_path: Path) -> None:
    items = [
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": "n\x00", "completion": "b\ufffd <|im_end|>"},
        {
            "messages": [
                {"role": "user", "content": "1"},
                {"role": "user", "content": "2"},
                {"role": "assistant", "content": "3"},
                {"role": "user", "content": "4"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "1"},
                {"role": "system", "content": "s"},
                {"role": "assistant", "content": "3"},
            ]
        },
        {"bad": 1},
    ]
    found = load(str(write(tmp_path / "d.jsonl", items)))
    assert {i.code for i in found.issues} == {
        "duplicate",
        "special-token",
        "nul",
        "replacement-character",
        "same-role-twice",
        "trailing-turn",
        "late-system",
        "unknown-columns",
        "few-rows",
        "too-few-rows",
    }
    assert found.rows_in == 6 == len(found.conversations) + len({i.where for i in found.errors()})


COUNTS = {"chat": 56, "code": 60, "domain": 50, "echo": 256, "emoji": 60, "instruct": 64}


def test_samples_are_clean() -> None:
    assert {name: load(name).rows_in for name in samples()} == COUNTS
    for name in samples():
        assert not [i for i in load(name).issues if i.severity != "info"], name
    assert load("echo").formats == {"prompt-completion": 256}
    assert load("code").formats == {"prompt-completion": 48, "code": 12}
    assert load("emoji").conversations[0].metadata["augmented"] is True


def test_emoji_sample_counts_can_be_recomputed() -> None:
    from conftest import STARTER
    from tunesmith.render import Renderer

    tokenizer = Renderer(STARTER).tokenizer
    changed = 0
    for row in load("emoji").conversations:
        m = row.metadata
        original, answer = (
            len(tokenizer.encode(t, add_special_tokens=False).ids) for t in (m["original"], row.answer())
        )
        assert (m["original_tokens"], m["augmented_tokens"], m["token_reduction"]) == (
            original,
            answer,
            original - answer,
        )
        changed += m["augmented"]
    assert changed == 54


def test_digest_is_of_what_is_said() -> None:
    one, two = Conversation(PAIR, source="a:1"), Conversation(PAIR, {"x": 1}, "b:2")
    assert one.digest() == two.digest() != Conversation(PAIR[:1]).digest()
    assert json.loads(json.dumps(as_row(one)))["messages"][0] == {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": ["a"], "value": "x"}]},
        {"messages": [{"role": {"a": 1}, "content": "x"}]},
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": "call"}]},
        {"messages": [{"role": "assistant", "content": "x", "name": 3}]},
        {"messages": [{"role": "assistant", "content": "x", "weight": "1"}]},
        {"messages": [{"role": "user", "content": "q"}], "tools": "none"},
    ],
)
def test_odd_inner_types_are_issues(row: dict[str, Any]) -> None:
    assert isinstance(convert(Row("f:1", row), {}), Issue)


def test_old_function_calls_are_kept() -> None:
    call = {"name": "f", "arguments": "{}"}
    row = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "function_call": call}]
    }
    result = convert(Row("f:1", row), {})
    assert isinstance(result, tuple) and result[0].messages[1].tool_calls == [{"type": "function", "function": call}]


def test_a_column_that_is_null_in_a_row_is_none_of_its_columns() -> None:
    """As in files of mixed rows with all columns in each."""
    found = convert(Row("f:1", {"messages": None, "prompt": None, "completion": None, "text": "hello there"}), {})
    assert isinstance(found, tuple) and found[1] == "text" and found[0].messages[0].content == "hello there"
    empty = convert(Row("f:1", {"prompt": "Hello?", "completion": None}), {})
    assert not isinstance(empty, tuple) and (empty.code, empty.severity) == ("wrong-type", "error")
