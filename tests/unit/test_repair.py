"""--fix: what is repaired, that every change is listed, and that nothing is overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import ROOT, write
from tunesmith.data.check import load
from tunesmith.data.repair import repair
from tunesmith.data.text import unmangle
from tunesmith.errors import UsageError


def test_everything_that_can_be_repaired_is(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": " It said “na\u00c3\u00afve”\x07 ",
            "completion": "Yes\u200b.\r\nTruly.",
            "id": 7,
            "more": {"deep": [" \x00x"]},
        },
        {
            "messages": [
                {"role": "User", "content": "a"},
                {"role": "bot", "content": "b"},
                {"role": "user", "content": " "},
            ]
        },
        {"conversations": [{"from": "Human", "value": "a"}, {"from": "GPT", "value": "b"}]},
        {"prompt": "same", "completion": "same"},
        {"prompt": "same", "completion": "same "},
    ]
    source = write(tmp_path / "d.jsonl", rows)
    with source.open("ab") as stream:
        stream.write(b"\r\n\r\nnot json\r\n")
    before = source.read_bytes()
    out = tmp_path / "fixed.jsonl"
    done = repair([str(source)], out)
    assert source.read_bytes() == before
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == [
        {"prompt": "It said “naïve”", "completion": "Yes.\nTruly.", "id": 7, "more": {"deep": [" \x00x"]}},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": "same", "completion": "same"},
    ]
    listed = [json.loads(line) for line in Path(done["log"]).read_text(encoding="utf-8").splitlines()]
    assert done == {"file": str(out), "log": f"{out}.changes.jsonl", "rows": 4, "changes": len(listed)}
    assert {(c["row"].rpartition(":")[2], c["code"]) for c in listed} == {
        ("1", "mojibake"), ("1", "control-character"), ("1", "outer-space"), ("1", "invisible-character"),
        ("2", "bad-role"), ("2", "empty-turn"), ("2", "outer-space"), ("3", "bad-role"),
        ("5", "outer-space"), ("5", "duplicate"), ("8", "not-json"),
    }  # fmt: skip
    first = next(c for c in listed if c["code"] == "mojibake")
    assert "Ã¯" in first["before"] and "naïve" in first["after"]
    assert not load(str(out)).errors()
    with pytest.raises(UsageError, match="exists already"):
        repair([str(source)], out)
    again = repair([str(out)], tmp_path / "again.jsonl")
    assert again["changes"] == 0 and (tmp_path / "again.jsonl").read_bytes() == out.read_bytes()


def test_code_and_what_is_not_said_stay_as_they_are(tmp_path: Path) -> None:
    rows = [
        {"prompt": 'def f(x):\n    """Half."""\n', "completion": "    return x / 2\n"},
        {"code": "\tif a:\n\t\tb()\n"},
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": " f", "arguments": " {} "}}],
                },
            ],
            "metadata": {"sep": "\n", "id": " 7 ", "deep": [[[[" "]]]]},
        },
    ]
    out = tmp_path / "out.jsonl"
    done = repair([str(write(tmp_path / "d.jsonl", rows))], out)
    fixed = [json.loads(line) for line in out.read_text().splitlines()]
    assert done["changes"] == 1 and fixed[1:] == rows[1:]
    assert fixed[0] == {**rows[0], "completion": "    return x / 2"}
    compile(fixed[0]["prompt"] + fixed[0]["completion"], "f", "exec")


def test_rows_nested_without_end_are_copied(tmp_path: Path) -> None:
    deep = '{"prompt": "a ", "completion": "b", "metadata": ' + '{"a":' * 900 + "1" + "}" * 900 + "}"
    (tmp_path / "d.jsonl").write_text(deep + "\n")
    assert repair([str(tmp_path / "d.jsonl")], tmp_path / "out.jsonl")["rows"] == 1


def test_a_copy_is_jsonl_in_a_folder_that_is_there(tmp_path: Path) -> None:
    source = str(write(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b"}]))
    for name, reason in (("f.csv", "a repaired copy is JSONL"), ("none/f.jsonl", "no such folder")):
        with pytest.raises(UsageError, match=reason):
            repair([source], tmp_path / name)


def test_nothing_is_left_behind_when_it_fails(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no such file"):
        repair([str(tmp_path / "none.jsonl")], tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "“été” dit-il — naïve, Ünïcödé, €5, ñandú, Łódź, Ærø",
        "日本語のテキスト と 中文 и русский текст ελληνικά עברית العربية हिन्दी ไทย",
        "👩‍💻 ✅ 🎉 ⚠️ ❤️‍🔥 🏳️‍🌈 – — … • ™ ® © ° ½ ² → ≤ ∞ √ ∑",
        "„Gänsefüßchen“ ‚einfach‘ «guillemets» ‹one› 'tick' `code`",
        "“Écoute”… ‚bas‘ Ça va? Òc. Ô rage! Übergröße",
    ],
)
def test_good_text_stays(text: str) -> None:
    assert unmangle(text) == text


@pytest.mark.parametrize("encoding", ["cp1252", "mac_roman", "latin-1"])
@pytest.mark.parametrize(
    "text", ["✅ done", "🎯 Step 1", "“quoted” and more", "a → b", "naïve café", "⚠️ careful", "Größe: 5 €"]
)
def test_mangled_text_is_restored(text: str, encoding: str) -> None:
    try:
        mangled = text.encode().decode(encoding)
    except UnicodeDecodeError:  # this encoding has no sign for one of the bytes
        return
    if encoding == "mac_roman" and ("é" in text or "ö" in text):
        return  # "√©" might be meant; only what spells a symbol is taken for one
    assert unmangle(f"Well: {mangled} it is.") == f"Well: {text} it is."


def test_the_seeds(tmp_path: Path) -> None:
    """The text of four guides as they came, two of them mangled: each wrapped as a row, flagged, and repaired."""
    seeds = sorted((ROOT.parent / "shared" / "seeds").glob("*.txt"))
    if not seeds:
        pytest.skip("the guides are not here")
    assert len(seeds) == 4
    found = {}
    for seed in seeds:
        row = {"prompt": "What does the guide say?", "completion": seed.read_text(encoding="utf-8")}
        path = write(tmp_path / f"{seed.stem}.jsonl", [row])
        out = tmp_path / f"{seed.stem}.fixed.jsonl"
        repair([str(path)], out)
        fixed = json.loads(out.read_text(encoding="utf-8"))["completion"]
        found[seed.name[:3]] = (
            load(str(path)).counts.get("mojibake", 0),
            load(str(out)).counts.get("mojibake", 0),
            fixed,
        )
    assert {name: counts[:2] for name, counts in found.items()} == {
        "000": (0, 0),
        "001": (1, 0),
        "002": (0, 0),
        "003": (1, 0),
    }
    assert "🎯 Step 1" in found["003"][2] and "✅ Created" in found["003"][2] and "📋 Overview" in found["003"][2]
    assert "✓ Data Format Validation" in found["001"][2]
    assert not set("ü√‚œÔ∏\uf8ff") & set(found["003"][2])
