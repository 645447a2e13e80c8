"""How answers are written: chat completions and completions, whole and as chunks of a stream."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import msgspec

from tunesmith.local.sampling import Token
from tunesmith.server import store as db
from tunesmith.server.inference import Host, Piece
from tunesmith.server.protocol import ChatRequest, CompletionRequest
from tunesmith.server.spelling import Spelling

FINGERPRINT = "fp_tunesmith"
OPENING = "<tool_call>"
CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)  # as Hermes and Qwen write it


class Written(msgspec.Struct):
    """One choice of an answer, whole. `characters`: those whose tokens have been told in a stream."""

    index: int
    text: str = ""
    tokens: list[Token] = []
    count: int = 0
    finish: str = ""
    characters: int = 0


def _before_calls(text: str) -> int:
    """How many characters stand before anything that is, or may become, the call of a tool."""
    if (at := text.find(OPENING)) >= 0:
        return at
    held = next((n for n in range(len(OPENING) - 1, 0, -1) if text.endswith(OPENING[:n])), 0)
    return len(text) - held


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON knows no infinity


class ChatForm:
    """How a chat completion is written."""

    def __init__(self, body: ChatRequest, host: Host) -> None:
        self._tools = bool(body.tools) and body.tool_choice != "none"
        self._spelling = Spelling(host.renderer) if body.logprobs else None
        common = {"id": db.new_id("chatcmpl-"), "created": int(time.time()), "model": body.model}
        self.head: dict[str, Any] = {"object": "chat.completion", **common, "system_fingerprint": FINGERPRINT}
        self.chunk: dict[str, Any] = {"object": "chat.completion.chunk", **common, "system_fingerprint": FINGERPRINT}

    def whole(self, choice: Written) -> dict[str, Any]:
        text, calls = self._called(choice.text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        finish = "tool_calls" if calls else choice.finish
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._told(choice.tokens),
            "finish_reason": finish,
        }

    def first(self, choice: Written) -> dict[str, Any]:
        return self._delta(choice, {"role": "assistant", "content": ""})

    def pieces(self, choice: Written, piece: Piece) -> list[dict[str, Any]]:
        found = []
        if self._tools:  # whether it is a call is known at its end only: from its first sign on, it is held back
            said = choice.text + piece.text
            if not piece.finish:
                upto = 0 if self._spelling else _before_calls(said)  # tokens go with the text that they are
                new, choice.characters = said[choice.characters : upto], max(upto, choice.characters)
                return [self._delta(choice, {"content": new})] if new else []
            _, calls = self._called(said)
            text = (CALL.sub("", said).rstrip() if calls else said)[choice.characters :]
            if text or self._spelling:
                found.append(self._delta(choice, {"content": text}, choice.tokens + piece.tokens))
            if calls:
                found.append(self._delta(choice, {"tool_calls": [{"index": i, **c} for i, c in enumerate(calls)]}))
            finish = "tool_calls" if calls else piece.finish
        else:
            if piece.text or piece.tokens:
                found.append(self._delta(choice, {"content": piece.text}, piece.tokens))
            finish = piece.finish
        if finish:
            found.append({**self._delta(choice, {}), "finish_reason": finish})
        return found

    def _delta(self, choice: Written, delta: dict[str, Any], tokens: list[Token] | None = None) -> dict[str, Any]:
        return {
            "index": choice.index,
            "delta": delta,
            "logprobs": self._told(tokens or []) if tokens else None,
            "finish_reason": None,
        }

    def _called(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """The text without the calls of tools in it, and these."""
        calls = []
        for found in CALL.finditer(text) if self._tools else ():
            try:
                said = json.loads(found[1])
                arguments = said.get("arguments", {})
                words = arguments if isinstance(arguments, str) else json.dumps(arguments)
                function = {"name": str(said["name"]), "arguments": words}
                calls.append({"id": db.new_id("call_"), "type": "function", "function": function})
            except (ValueError, KeyError, AttributeError):
                continue
        return (CALL.sub("", text).strip() if calls else text), calls

    def _told(self, tokens: list[Token]) -> dict[str, Any] | None:
        if (spelling := self._spelling) is None:
            return None

        def shown(id: int, logprob: float) -> dict[str, Any]:
            return {"token": spelling.text(id), "logprob": _finite(logprob), "bytes": list(spelling.data(id))}

        content = [{**shown(t.id, t.logprob or 0.0), "top_logprobs": [shown(id, p) for id, p in t.top]} for t in tokens]
        return {"content": content, "refusal": None}


class TextForm:
    """How a completion is written: chunks of a stream have the form of the whole."""

    def __init__(self, body: CompletionRequest, host: Host, prompts: list[list[int]]) -> None:
        self._renderer, self._prompts = host.renderer, prompts
        self._echo, self._spelling = bool(body.echo), None if body.logprobs is None else Spelling(host.renderer)
        common = {"created": int(time.time()), "model": body.model, "system_fingerprint": FINGERPRINT}
        self.head: dict[str, Any] = {"id": db.new_id("cmpl-"), "object": "text_completion", **common}
        self.chunk = self.head

    def whole(self, choice: Written) -> dict[str, Any]:
        text = self._before(choice) + choice.text
        return {
            "index": choice.index,
            "text": text,
            "logprobs": self._told(choice, choice.tokens),
            "finish_reason": choice.finish,
        }

    def first(self, choice: Written) -> dict[str, Any]:
        before = self._before(choice)
        return {"index": choice.index, "text": before, "logprobs": None, "finish_reason": None} if before else {}

    def pieces(self, choice: Written, piece: Piece) -> list[dict[str, Any]]:
        told = self._told(choice, piece.tokens) if piece.tokens else None
        return [{"index": choice.index, "text": piece.text, "logprobs": told, "finish_reason": piece.finish or None}]

    def _before(self, choice: Written) -> str:
        return self._renderer.decode(self._prompts[choice.index]) if self._echo else ""

    def _told(self, choice: Written, tokens: list[Token]) -> dict[str, Any] | None:
        if (spelling := self._spelling) is None:
            return None
        asked = any(t.top for t in tokens)
        offsets, choice.characters = spelling.places([t.id for t in tokens], choice.characters)
        return {
            "tokens": [spelling.text(t.id) for t in tokens],
            "token_logprobs": [None if t.logprob is None else _finite(t.logprob) for t in tokens],
            "top_logprobs": [  # of tokens that look alike the likeliest stays
                {spelling.text(id): _finite(p) for id, p in reversed(t.top)} for t in tokens
            ]
            if asked
            else None,
            "text_offset": offsets,
        }
