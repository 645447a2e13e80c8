"""A corpus of deliberately damaged files: each gets the code it deserves, none a traceback."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tunesmith.data.check import load
from tunesmith.data.findings import table
from tunesmith.data.repair import repair
from tunesmith.errors import DataError

GOOD = {"prompt": "What is a kettle?", "completion": "A pot with a lid and a spout."}
LONG = "The old lamp stood by the window, and every evening its yellow light fell on the table with the letters."
Case = tuple[str, str, bytes]  # expected code, file name, content
KINDS: dict[str, Any] = {"null": None, "true": True, "int": 7, "float": 1.5, "list": ["a"], "object": {"a": 1}}


def lines(*items: Any) -> bytes:
    return b"".join(i if isinstance(i, bytes) else json.dumps(i).encode() + b"\n" for i in items)


def chat(*turns: Any, **more: Any) -> dict[str, Any]:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return {"messages": [{"role": names[t[0]], "content": t[1]} if isinstance(t, tuple) else t for t in turns], **more}


def bytes_and_encodings() -> Iterator[Case]:
    text = json.dumps({"prompt": "café", "completion": "naïve"}, ensure_ascii=False)
    for name in ("utf-16", "utf-16-be", "utf-16-le", "latin-1", "cp1252", "mac_roman", "cp437"):
        bom = b"\xfe\xff" if name == "utf-16-be" else b"\xff\xfe" if name == "utf-16-le" else b""
        yield "not-utf8", "d.jsonl", bom + (text + "\n").encode(name)
    for bad in (b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\xc0\x80", b"\xed\xa0\x80", b"\x80", b"\xff"):
        yield "not-utf8", "d.jsonl", b'{"prompt": "a' + bad + b'", "completion": "b"}\n'
    for half in ("\\ud83d", "\\udc00", "\\ud83d\\ud83d", "\\ud800x"):
        yield "lone-surrogate", "d.jsonl", b'{"prompt": "a' + half.encode() + b'", "completion": "b"}\n'
    for raw in (b"\x00", b"\x01", b"\x1f", b"\t", b"\n"):
        yield "not-json", "d.jsonl", b'{"prompt": "a' + raw + b'", "completion": "b"}\n'
    yield "unreadable-file", "d.jsonl", b""
    yield "unreadable-file", "d.jsonl", b"\n\r\n  \n"
    yield "unreadable-file", "d.jsonl.gz", b"plain text"
    yield "unreadable-file", "d.jsonl.gz", gzip.compress(lines(GOOD) * 50)[:-12]
    yield "unreadable-file", "d.jsonl.zst", b"plain text"
    yield "unreadable-file", "d.parquet", b"PAR1 and no more"
    yield "unreadable-file", "d.json", b"[]"


def json_itself() -> Iterator[Case]:
    for text in (
        "{", "}", '{"prompt": "a"', '{"prompt": "a",}', "{'prompt': 'a'}", '{prompt: "a"}', '{"prompt": a}', "not json",
        '{"prompt": "a"} {"prompt": "b"}', '{"prompt": "a"},', '{"prompt": NaN}', '{"prompt": Infinity}', '{"prompt": 01}',
        '{"prompt": "a" "completion": "b"}', '{"prompt": "\\x"}', '{"prompt": "\\u12"}', "// comment", "<html>", "-", '"open',
        "[" * 5000, '{"a":' * 5000,
    ):  # fmt: skip
        yield "not-json", "d.jsonl", lines(GOOD) + text.encode() + b"\n"
    for value in ("1", "1.5", "true", "null", '"text"', "[1]"):
        yield "not-an-object", "d.jsonl", lines(GOOD) + value.encode() + b"\n"
    yield "not-json", "d.json", b'[{"prompt": "a", "completion": "b"}, {"prompt": "a" ]'
    yield "csv-columns", "d.csv", b"prompt,completion\na,b,c\n"
    yield "csv-columns", "d.csv", b"prompt,completion\na\n"
    yield "not-utf8", "d.csv", b"prompt,completion\ncaf\xe9,b\n"


def structure() -> Iterator[Case]:
    for ask, answer in (("prompt", "completion"), ("prompt", "response"), ("input", "output"), ("question", "answer")):
        for field in (ask, answer):
            for value in KINDS.values():
                yield "wrong-type", "d.jsonl", lines({ask: "a", answer: "b", field: value})
    for field in ("instruction", "output"):
        for value in KINDS.values():
            yield "wrong-type", "d.jsonl", lines({"instruction": "a", "output": "b", field: value})
    for key in ("text", "code"):
        yield "wrong-type", "d.jsonl", lines({key: 5})
    for value in (None, 5, "text", {}, []):
        yield "no-messages", "d.jsonl", lines({"messages": value})
        yield "no-messages", "d.jsonl", lines({"conversations": value})
    for turn in ("text", None, 5, {}, {"content": "a"}):
        yield "no-role", "d.jsonl", lines({"messages": [turn]})
    for role in ("User", "human", "bot", "text", "", 5, None, ["user"]):
        yield "bad-role", "d.jsonl", lines(chat({"role": role, "content": "a"}, ("a", "b")))
    for content in (5, None, {}, True):
        yield "wrong-type", "d.jsonl", lines(chat(("u", "a"), {"role": "assistant", "content": content}))
    for part in ({"type": "image_url", "image_url": {}}, {"type": "text"}, "text", 5):
        yield "not-text", "d.jsonl", lines(chat({"role": "user", "content": [part]}, ("a", "b")))
    for weight in (2, 0.5, "1", True, -1):
        turn = {"role": "assistant", "content": "b", "weight": weight}
        yield ("bad-weight" if weight is not True else "few-rows"), "d.jsonl", lines(chat(("u", "a"), turn))
    for calls in ("f()", 5, {"name": "f"}, ["f"]):
        yield (
            "wrong-type",
            "d.jsonl",
            lines(chat(("u", "a"), {"role": "assistant", "tool_calls": calls, "content": ""})),
        )
    for turn in ({"from": "alien", "value": "a"}, {"from": 5, "value": "a"}):
        yield "bad-role", "d.jsonl", lines({"conversations": [turn]})
    yield "no-role", "d.jsonl", lines({"conversations": [{"from": "human"}]})
    for row in ({"a": "b"}, {}, {"prompt": "a"}, {"completion": "a"}, {"question": "a", "reply": "b"}):
        yield "unknown-columns", "d.jsonl", lines(row)
    yield "ambiguous-columns", "d.jsonl", lines({"prompt": "a", "completion": "b", "question": "c", "answer": "d"})
    yield "preference-row", "d.jsonl", lines({"prompt": "a", "chosen": "b", "rejected": "c"})
    yield "preference-row", "d.jsonl", lines({"input": {}, "preferred_output": [], "non_preferred_output": []})
    yield "wrong-type", "d.jsonl", lines(chat(("u", "a"), ("a", "b"), tools="none"))


def semantics() -> Iterator[Case]:
    for empty in ("", " ", "\n\t ", "\u00a0"):
        yield "empty-answer", "d.jsonl", lines({"prompt": "a", "completion": empty})
        yield "empty-text", "d.jsonl", lines({"prompt": empty, "completion": "b"})
    yield "no-answer", "d.jsonl", lines(chat(("u", "a")))
    yield "no-answer", "d.jsonl", lines(chat(("u", "a"), {"role": "assistant", "content": "b", "weight": 0}))
    yield "trailing-turn", "d.jsonl", lines(chat(("u", "a"), ("a", "b"), ("u", "c")))
    yield "same-role-twice", "d.jsonl", lines(chat(("u", "a"), ("u", "b"), ("a", "c")))
    yield "late-system", "d.jsonl", lines(chat(("u", "a"), ("s", "b"), ("a", "c")))
    yield "duplicate", "d.jsonl", lines(GOOD, GOOD)
    yield "contradiction", "d.jsonl", lines(GOOD, {**GOOD, "completion": "A kind of boat."})
    yield "contradiction", "d.jsonl", lines(GOOD, {"prompt": "what is a  KETTLE?", "completion": "A kind of boat."})
    for other in (LONG.upper(), LONG.replace(",", ""), LONG.replace("yellow", "golden"), LONG.replace("e", "a", 3)):
        rows = [{"prompt": "Go on, please.", "completion": LONG}, {"prompt": "And then?", "completion": other}]
        yield "near-duplicate", "d.jsonl", lines(*rows)
    yield "few-rows", "d.jsonl", lines(GOOD)
    yield "too-few-rows", "d.jsonl", lines(GOOD)
    yield "some-rows", "d.jsonl", lines(*({"prompt": f"{i}?", "completion": f"{i * i}."} for i in range(60)))
    for token in (
        "<|im_end|>",
        "<|endoftext|>",
        "<|fim_suffix|>",
        "</s>",
        "[INST]",
        "<<SYS>>",
        "<start_of_turn>",
        "<eos>",
    ):
        yield "special-token", "d.jsonl", lines({"prompt": "a", "completion": f"b {token} c"})
    secrets = (
        "sk-proj-abcdefghijkl0123456789mn", "AKIAABCDEFGHIJKLMNOP", "ghp_" + "a1" * 18, "github_pat_" + "a" * 30,
        "glpat-" + "a" * 20, "hf_" + "a" * 34, "xoxb-123456789012-abc", "AIza" + "aB3" * 11 + "xy", "https://bob:hunter22@host/x",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghijk", "-----BEGIN RSA PRIVATE KEY-----",
    )  # fmt: skip
    for secret in secrets:
        yield "secret", "d.jsonl", lines({"prompt": "a", "completion": f"use {secret} here"})
    for private in (
        "bob@site.org",
        "4111 1111 1111 1111",
        "+49 30 123 4567",
        "(212) 555-0187 99",
        "DE89 3704 0044 0532 0130 00",
    ):
        yield "personal-data", "d.jsonl", lines({"prompt": "a", "completion": f"mine is {private}, really"})
    for no in (
        "As an AI language model, I have no view.",
        "I'm sorry, but I can't do that.",
        "I cannot assist with it.",
    ):
        yield "refusal", "d.jsonl", lines({"prompt": "a", "completion": no})
    for clean in ("“quoted” — naïve café", "✅ done 🎉", "Größe: 5 €", "日本語のテキスト"):
        for encoding in ("cp1252", "mac_roman", "latin-1"):
            try:
                broken = clean.encode().decode(encoding)
            except UnicodeDecodeError:
                continue
            yield "mojibake", "d.jsonl", lines({"prompt": "a", "completion": f"It is {broken} here."})
    yield "replacement-character", "d.jsonl", lines({"prompt": "a", "completion": "caf\ufffd"})
    yield "nul", "d.jsonl", lines({"prompt": "a", "completion": "b\x00"})
    for control in ("\x07", "\x1b[31m", "\x7f", "\x9d"):
        yield "control-character", "d.jsonl", lines({"prompt": "a", "completion": f"b{control}c"})
    for hidden in ("\u200b", "\ufeff", "\u202e", "\u2060", "\u00ad"):
        yield "invisible-character", "d.jsonl", lines({"prompt": "a", "completion": f"b{hidden}c"})
    yield "outer-space", "d.jsonl", lines({"prompt": " a", "completion": "b"})
    yield "unused-column", "d.jsonl", lines({"question": "q", "context": "c", "answer": "a"})
    yield "unused-column", "d.jsonl", lines({**chat(("u", "a"), ("a", "b")), "score": 1})
    yield (
        "unused-column",
        "d.jsonl",
        lines(chat(("u", "a"), {"role": "assistant", "content": "b", "reasoning_content": "c"})),
    )
    for answer in ({"tool_call_id": "other"}, {}):
        call = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
        }
        yield (
            "tool-result",
            "d.jsonl",
            lines(chat(("u", "a"), call, {"role": "tool", "content": "r", **answer}, ("a", "b"))),
        )
    yield "template", "d.jsonl", lines(*({"prompt": f"{LONG} Number {i}?", "completion": f"{i}"} for i in range(40)))
    yield "csv-columns", "d.csv", b"prompt,prompt,completion\na,b,c\n"
    yield "not-utf8", "d.csv", b"prompt,completion\na,b\nc,\xe9\ne,f\n"


CASES = [*bytes_and_encodings(), *json_itself(), *structure(), *semantics()]


def test_the_corpus_is_large_and_covers_the_table() -> None:
    assert len(CASES) >= 120
    elsewhere = {  # need a model, a run, several files or other languages: tested there
        "over-long", "cut", "no-supervised-token", "id-out-of-range", "no-end-of-turn", "idle-setting", "long-warmup", "leak",
        "empty-turn", "language-mix", "not-csv", "extra-field", "tool-calls-lost",
    }  # fmt: skip
    assert {code for code, _, _ in CASES} == set(table()) - elsewhere


@pytest.mark.parametrize(("code", "name", "content"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
def test_damage_is_named(code: str, name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    try:
        found = load(str(path))
    except DataError as error:
        assert code == "unreadable-file" and error.fix and str(path) in str(error)
        return
    assert code in found.counts, found.issues
    assert repair([str(path)], tmp_path / "fixed.jsonl")["changes"] >= 0  # nor does the repair stumble over it
    for issue in found.issues:
        assert issue.message and issue.where.startswith(str(path)) and issue.code in table()
    assert found.rows_in == found.usable + len({i.where for i in found.errors()})
