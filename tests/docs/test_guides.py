"""Guides whose every block is executed, in order, in one folder with `data.jsonl`: a block that cannot be says why before it.

`sh`: each line is a `tunesmith` command, run as written on a small model and cut short; a line's comment may end in
"status N". `python` is run, `toml`, `json` and `jsonl` are read. `text` is what a program prints: what of it another model
and a shorter run would print as well (TOLD) has been printed by a block before it, figures apart. A block after
`<!-- not run: reason -->` is left alone.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from conftest import ROOT
from tunesmith import cli

OWN_TESTS = ("deploying", "evaluating", "services", "serving", "several-gpus")  # in test_docs.py
GUIDES = [p for p in sorted((ROOT / "docs/guides").glob("*.md")) if p.stem not in OWN_TESTS]
REASONS = ("needs a GPU", "needs a key", "needs a network", "another program", "waits for ever")
# Words that a command gets where it does not say otherwise itself
SHORTER: dict[str, dict[str, str]] = {
    "train": {"--model": "TINY", "--max-steps": "2"},
    "plan": {"--model": "TINY"},
    "lr-find": {"--model": "TINY", "--trial-steps": "1"},
    "evaluate": {"--rows": "4", "--samples": "0", "--weighed": "8", "--max-tokens": "8"},
    "export": {"--prompts": "1"},
    "parity": {"--prompts": "1"},
    "chat": {"--max-tokens": "8"},
    "test": {"--max-tokens": "8"},
}
SHELL = re.compile(r"\s+#\s")
TOLD = re.compile(
    r"^(?:error|warning|info) .*\[[a-z-]+\] -- .+|^error: .+|^grade: .+|^  estimate .+|^\S+: \d+ rows, \d+ changes, .+"
    r"|\([^()]+ nats, [^()]+\)",
    re.M,
)


def blocks(text: str) -> list[tuple[str, str, str]]:
    """(kind, text, why it is not run) of each block."""
    found = re.findall(r"(?:<!-- not run: ([^>]*?) -->\n+)?```(\w*)\n(.*?)```", text, re.S)
    return [(kind, body, why) for why, kind, body in found]


def lines_of(body: str) -> list[tuple[str, int]]:
    """(command, status that it ends with)."""
    found = []
    for line in body.replace("\\\n", " ").splitlines():
        command, *comment = SHELL.split(line, maxsplit=1)
        status = re.search(r"status (\d+)$", comment[0]) if comment else None
        if command.strip() and not command.startswith("#"):
            found.append((command.strip(), int(status[1]) if status else 0))
    return found


def shortened(words: list[str], tiny: Path) -> list[str]:
    added = []
    if "--resume" not in words:
        for option, value in SHORTER.get(words[0], {}).items():
            if option not in words:
                added += [option, value.replace("TINY", str(tiny))]
    return [*words, *added]


def alike(text: str) -> str:
    """A text without its figures."""
    return re.sub(r"[-+]?\d[\d.,:]*(?:e-?\d+)?", "#", text)


def test_there_are_guides() -> None:
    assert len(GUIDES) == 10


def test_what_doctor_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """The guide's excerpt has the same lines up to where it leaves some out, and ends alike."""
    text = (ROOT / "docs/guides/offline.md").read_text(encoding="utf-8")
    (shown,) = (body.splitlines() for kind, body, _ in blocks(text) if kind == "text" and body.startswith("python "))
    assert cli.main(["doctor"]) == 0
    printed, upto = capsys.readouterr().out.splitlines(), shown.index("  …")
    assert [line.split()[0] for line in shown[:upto]] == [line.split()[0] for line in printed[:upto]]
    assert shown[upto + 1 :] == printed[-1:]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda p: p.stem)
def test_a_guide(
    guide: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(ROOT / "src/tunesmith/assets/data/chat.jsonl", "data.jsonl")
    done, printed = 0, ""
    for kind, body, why in blocks(guide.read_text(encoding="utf-8")):
        if why:
            assert why.startswith(REASONS), f"{guide.name}: no such reason: {why}"
            continue
        if kind == "sh":
            for line, status in lines_of(body):
                program, *words = shlex.split(line)
                assert program == "tunesmith", f"{guide.name}: {line}: mark its block with a reason"
                code = cli.main(shortened(words, tiny))
                said = capsys.readouterr()
                assert code == status, (guide.name, line, code, said)
                printed += (said.out + said.err).replace(str(tiny), "starter")
                done += 1
        elif kind == "python":
            ran = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True)
            assert ran.returncode == 0, (guide.name, body, ran.stderr)
            done += 1
        elif kind == "toml":
            assert tomllib.loads(body)
        elif kind in ("json", "jsonl"):
            parts = body.splitlines() if kind == "jsonl" else [body]
            assert [json.loads(part) for part in parts]
        else:
            assert kind == "text", f"{guide.name}: a block of kind {kind!r}"
            for told in TOLD.findall(body):
                assert alike(told) in alike(printed), f"{guide.name}: nothing has printed {told!r}"
    assert done >= 2, f"{guide.name} has hardly a command"
