"""A tokenizer.json as the fields of a GGUF file."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from tunesmith.errors import ModelError
from tunesmith.render import Renderer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # gguf's TokenType


class Vocabulary(msgspec.Struct, frozen=True):
    """`model`: "gpt2" (byte-level BPE) or "llama" (SentencePiece's); `pre`: how text is cut into words, of the first only.
    `scores`: of the second, which merges by them instead of by `merges`."""

    model: str
    tokens: list[str]
    types: list[int]
    add_bos: bool
    bos: int | None
    eos: list[int]
    pad: int
    unknown: int | None
    pre: str = "default"
    merges: list[str] = []
    scores: list[float] = []
    space_prefix: bool = False


def vocabulary(renderer: Renderer, size: int, pretokenizers: dict[str, list[str]]) -> Vocabulary:
    """The vocabulary of a model whose embedding has `size` rows. ModelError for a tokenizer that llama.cpp lacks."""
    path = renderer.folder / "tokenizer.json"
    known = json.loads(path.read_bytes())
    model = known["model"]
    if model["type"] != "BPE":
        raise _lacking(path, f"a tokenizer of the type {model['type']}")
    pieces = bool(model.get("byte_fallback"))
    by_id = {number: token for token, number in model["vocab"].items()}
    added = {token["id"]: token for token in known.get("added_tokens", [])}
    by_id |= {number: token["content"] for number, token in added.items()}
    if max(by_id) >= size:
        reason = f"its tokenizer knows {max(by_id) + 1} tokens, its embedding {size}"
        raise ModelError(reason, where=str(path), fix="put the tokenizer there that the model was trained with")
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(size)]
    unknown = model["vocab"].get(model.get("unk_token"))
    types = [_type(i, by_id, added, unknown, pieces) for i in range(size)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    bos = renderer.tokenizer.token_to_id(renderer.special["bos_token"]) if renderer.special["bos_token"] else None
    shared: dict[str, Any] = {
        "tokens": tokens,
        "types": types,
        "add_bos": renderer.adds_bos,
        "bos": bos,
        "eos": renderer.stop_ids,
        "pad": renderer.pad_id,
        "unknown": unknown,
    }
    if not pieces:
        return Vocabulary("gpt2", pre=_pre(known, path, pretokenizers), merges=merges, **shared)
    rank = {merge.replace(" ", ""): -float(i) for i, merge in reversed(list(enumerate(merges)))}
    scores = [0.0 if types[i] != NORMAL else rank.get(token, -1e6) for i, token in enumerate(tokens)]
    return Vocabulary("llama", scores=scores, space_prefix=_prefixes(known), **shared)


def _type(number: int, by_id: dict[int, str], added: dict[int, Any], unknown: int | None, pieces: bool) -> int:
    if number not in by_id:
        return UNUSED
    if number == unknown:
        return UNKNOWN
    if number in added:
        return CONTROL if added[number]["special"] else USER_DEFINED
    text = by_id[number]
    return BYTE if pieces and len(text) == 6 and text.startswith("<0x") and text.endswith(">") else NORMAL


def _steps(node: dict[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences unfolded."""
    if not node:
        return []
    return list(chain(*(_steps(n, parts) for n in node[parts]))) if node["type"] == "Sequence" else [node]


def _pre(known: dict[str, Any], path: Path, pretokenizers: dict[str, list[str]]) -> str:
    """llama.cpp's name for the way that this tokenizer cuts text."""
    found = []
    for step in _steps(known.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Split":
            found.append(step["pattern"].get("Regex", step["pattern"].get("String")))
        elif step["type"] == "ByteLevel":
            found += ["byte-level"] if step.get("use_regex", True) else []
        elif step["type"] == "Digits" and step.get("individual_digits"):
            found.append("digits")
        else:
            found.append(step["type"])
    name = next((name for name, steps in pretokenizers.items() if steps == found), None)
    if name is None:
        raise _lacking(path, f"a pre-tokenizer of {found}")
    return name


def _prefixes(known: dict[str, Any]) -> bool:
    """Whether a space is put before a text, as SentencePiece does."""
    steps = _steps(known.get("normalizer"), "normalizers") + _steps(known.get("pre_tokenizer"), "pretokenizers")
    return any(
        step["type"] == "Prepend" or step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in steps
    )


def _lacking(path: Path, what: str) -> ModelError:
    return ModelError(
        f"GGUF: llama.cpp has no {what.removeprefix('a ')}", where=str(path), fix="export --format merged"
    )
