"""The bytes of a token, also of one that is only a part of a character."""

from __future__ import annotations

import json
import re
from typing import Any

from tunesmith.render import Renderer

SPACE = "▁"  # what stands for a space in SentencePiece's vocabularies
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a token of its byte fallback


def _signs() -> dict[str, int]:
    """The byte of each sign of a byte-level vocabulary: printable ones stand for themselves, others from U+0100 on (GPT-2)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


SIGNS = _signs()


class Spelling:
    """How a tokenizer's tokens are written."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer, self._tokenizer = renderer, renderer.tokenizer
        decoder = self._tokenizer.decoder
        state: dict[str, Any] = json.loads(decoder.__getstate__()) if decoder else {}
        steps = state.get("decoders", [state])
        self._kinds = {step.get("type") for step in steps}
        self._spaced = any(SPACE in json.dumps(step, ensure_ascii=False) for step in steps)
        self._added = set(self._tokenizer.get_added_tokens_decoder())

    def data(self, token: int) -> bytes:
        """What a token adds to the bytes of a text."""
        sign = self._tokenizer.id_to_token(token)
        if sign is None:  # the model's table is longer than the vocabulary
            return b""
        if token in self._added:
            return str(sign).encode()
        if "ByteLevel" in self._kinds and all(s in SIGNS for s in sign):
            return bytes(SIGNS[s] for s in sign)
        if "ByteFallback" in self._kinds and (byte := _BYTE.fullmatch(sign)):
            return bytes.fromhex(byte[1])
        if self._spaced:
            return str(sign).replace(SPACE, " ").encode()
        return self._renderer.decode([token], special=True).encode()

    def text(self, token: int) -> str:
        """The same as text; half a character becomes U+FFFD."""
        return self.data(token).decode(errors="replace")

    def places(self, tokens: list[int], at: int) -> tuple[list[int], int]:
        """The character of a text in which each token begins, where `at` come before it, and how many there are then."""
        found = []
        for data in map(self.data, tokens):
            found.append(max(0, at - (data[:1] != b"" and _follows(data[0]))))
            at += sum(not _follows(byte) for byte in data)
        return found, at


def _follows(byte: int) -> bool:
    """Whether a byte goes on with the character of the one before it (UTF-8)."""
    return 0x80 <= byte < 0xC0
