"""The bytes of tokens, for each way in which a vocabulary writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from tunesmith.models import STARTER
from tunesmith.render import Renderer
from tunesmith.server.spelling import Spelling

TEXT = "Grüße 🙂 an 世界, naïve"


def sentencepiece() -> Any:
    """A vocabulary with a byte for whatever it does not know, as Llama 2 has it."""
    words = ["<unk>", "</s>", "▁", *sorted(set("Gran, nave") - {" "}), *(f"<0x{b:02X}>" for b in range(256))]
    made = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_the_bytes_of_all_tokens_are_those_of_the_text(tmp_path: Path, kind: str) -> None:
    folder = STARTER
    if kind == "fallback":
        folder = tmp_path
        sentencepiece().save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    renderer = Renderer(folder)
    spelling = Spelling(renderer)
    ids = renderer.tokenizer.encode(TEXT, add_special_tokens=False).ids
    parts = [spelling.data(id) for id in ids]
    assert b"".join(parts) == TEXT.encode()
    assert any(spelling.text(id) == "\ufffd" for id in ids)  # a part of a character is told as such
    places, characters = spelling.places(ids, 7)
    begins = [7 + len(TEXT.encode()[: sum(map(len, parts[:i]))].decode(errors="ignore")) for i in range(len(ids))]
    assert places == begins and characters == 7 + len(TEXT)
    assert spelling.data(renderer.tokenizer.get_vocab_size() + 5) == b""


def test_a_special_token_is_written_as_it_is() -> None:
    renderer = Renderer(STARTER)
    token = renderer.stop_ids[0]
    assert Spelling(renderer).data(token).decode() == renderer.tokenizer.id_to_token(token)
