"""How answers with calls of tools are told piece by piece: text as it comes, a call whole at the end."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.server.forms import ChatForm, Written
from tunesmith.server.inference import Piece
from tunesmith.server.protocol import ChatRequest

CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "look"}}


def told(pieces: list[str], **more: Any) -> list[dict[str, Any]]:
    messages = [{"role": "user", "content": "hi"}]
    body = ChatRequest(model="m", messages=messages, **{"tools": [TOOL], **more})
    form = ChatForm(body, None)  # type: ignore[arg-type]
    choice, found = Written(0), []
    for number, text in enumerate(pieces):
        piece = Piece(text, [], "stop" if number == len(pieces) - 1 else "")
        found += form.pieces(choice, piece)
        choice.text += text
    return found


@pytest.mark.parametrize("size", [1, 3, 500])
def test_text_comes_at_once_and_a_call_at_the_end(size: int) -> None:
    text = f"I look. a < b {CALL}"
    found = told([text[i : i + size] for i in range(0, len(text), size)])
    deltas = [f["delta"] for f in found]
    assert "".join(d.get("content", "") for d in deltas).rstrip() == "I look. a < b"
    assert len([d for d in deltas if "content" in d]) >= (5 if size < 9 else 1)
    (calls,) = [d["tool_calls"] for d in deltas if "tool_calls" in d]
    assert [(c["index"], c["function"]) for c in calls] == [(0, {"name": "look", "arguments": '{"at": "sky"}'})]
    assert found[-1]["finish_reason"] == "tool_calls"


def test_what_only_looks_like_a_call_is_text() -> None:
    for text in ("<tool_call> no JSON </tool_call> then", "ends with <tool_", "<tool_call>{}</tool_call>"):
        found = told(list(text))
        assert "".join(f["delta"].get("content", "") for f in found) == text and found[-1]["finish_reason"] == "stop"


def test_no_calls_where_none_are_wanted() -> None:
    found = told([CALL], tool_choice="none")
    assert [f["delta"].get("content") for f in found] == [CALL, None] and found[-1]["finish_reason"] == "stop"
