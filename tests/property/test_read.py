"""Whatever the bytes: rows, issues or a DataError, never a crash."""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.conversation import Issue
from tunesmith.data.check import load
from tunesmith.data.formats import convert
from tunesmith.data.read import Row
from tunesmith.data.write import as_row
from tunesmith.errors import DataError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=6), v, max_size=3),
)
keys = st.sampled_from(
    [
        "messages",
        "conversations",
        "prompt",
        "completion",
        "response",
        "instruction",
        "input",
        "output",
        "question",
        "answer",
        "code",
        "text",
        "chosen",
        "metadata",
        "tools",
        "system",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([".jsonl", ".json", ".csv", ".jsonl.gz", ".jsonl.zst", ".parquet"]))
def test_arbitrary_bytes(content: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"d{suffix}"
        path.write_bytes(content)
        try:
            found = load(str(path))
        except DataError as error:
            assert error.where and "\n" not in str(error)
        else:
            assert found.rows_in >= len(found.conversations)


@settings(max_examples=300)
@given(st.dictionaries(keys, json_values, max_size=4))
def test_arbitrary_rows(row: dict[str, object]) -> None:
    result = convert(Row("f:1", row), {})
    if isinstance(result, Issue):
        assert result.where == "f:1" and result.code and result.fix
    else:
        again = convert(Row("f:1", msgspec.json.decode(msgspec.json.encode(as_row(result[0])))), {})
        assert not isinstance(again, Issue) and again[0].messages == result[0].messages
