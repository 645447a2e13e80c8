"""chat with two models: who hears what, in a terminal and out of one."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, Result, rows, write
from hostile import KEY, Hostile
from training import fit
from tunesmith import api
from tunesmith.cli.chat import chat, in_turn
from tunesmith.conversation import Message
from tunesmith.errors import DataError
from tunesmith.runs import Run

Cli = Callable[..., Result]


class Fake:
    """Says its name, how many messages it was shown, and the last one; each piece when it is asked for, noted in `log`."""

    def __init__(self, name: str, context: int, log: list[str]) -> None:
        self.name, self.context, self.log = name, context, log
        self.shown: list[tuple[Message, ...]] = []
        self.how: list[tuple[int, float, int]] = []

    def room(self, messages: tuple[Message, ...]) -> int:
        return self.context - sum(len(m.content) for m in messages)

    def stream(self, messages: tuple[Message, ...], max_tokens: int, temperature: float, seed: int) -> Iterator[str]:
        self.shown.append(messages)
        self.how.append((max_tokens, temperature, seed))
        if self.room(messages) < 1:
            raise DataError("the prompt is too long", fix="shorten it")
        for piece in (self.name, " ", str(len(messages)), "\n", messages[-1].content):
            self.log.append(self.name)
            yield piece


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    log: list[str] = []
    made = {"one": Fake("one", 1000, log), "two": Fake("two", 100, log)}
    monkeypatch.setattr(api, "completer", lambda name, beside=None: made[name])
    return made


def say(monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return chat(["one", "--against", "two", *arguments])


def test_each_side_has_its_own_history(
    fakes: dict[str, Fake], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert say(monkeypatch, "Hi\nAnd\n/reset\nAgain\n\nnever\n", "--system", "Be.", "--json", "--seed", "5") == 0
    out = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert out == [
        {"prompt": "Hi", "answer": "one 2\nHi", "against": "two 2\nHi"},
        {"prompt": "And", "answer": "one 4\nAnd", "against": "two 4\nAnd"},
        {"prompt": "Again", "answer": "one 2\nAgain", "against": "two 2\nAgain"},
    ]
    for name in ("one", "two"):
        assert [m.content for m in fakes[name].shown[1]] == ["Be.", "Hi", f"{name} 2\nHi", "And"]
        assert fakes[name].how == [(256, 0.7, 5), (256, 0.7, 6), (256, 0.7, 7)]


def test_out_of_a_terminal_they_answer_in_turn(
    fakes: dict[str, Fake], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert say(monkeypatch, "Hi\n") == 0
    assert capsys.readouterr().out == "── one\none 1\nHi\n── two\ntwo 1\nHi\n"
    assert fakes["one"].log == ["one"] * 5 + ["two"] * 5
    assert say(monkeypatch, "", "--prompt", "Hi", "--max-tokens", "9", "--temperature", "0.5") == 0
    assert fakes["two"].how[-1] == (9, 0.5, 0)
    capsys.readouterr()
    assert say(monkeypatch, "", "--prompt", "Hi", "--json") == 0 and fakes["two"].how[-1] == (256, 0.0, 0)
    found = json.loads(capsys.readouterr().out)
    assert found == {"model": "one", "prompt": "Hi", "answer": "one 1\nHi", "against": "two 1\nHi"}


def test_the_side_whose_context_is_full_forgets_alone(
    fakes: dict[str, Fake], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert say(monkeypatch, "x" * 30 + "\n" + "y" * 30 + "\n", "--json") == 0
    assert [len(side.shown[1]) for side in fakes.values()] == [3, 1]
    assert "(two: the oldest turn no longer fits and is forgotten)" in capsys.readouterr().err
    with pytest.raises(DataError, match="two: the prompt is too long"):  # which of the two
        say(monkeypatch, "", "--prompt", "x" * 200)


def test_an_answer_steers_no_terminal_and_stays_as_it_is_elsewhere(
    fakes: dict[str, Fake], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steering = "\x1b]0;owned\x07\u202e"
    fakes["one"].name = fakes["two"].name = steering
    assert say(monkeypatch, "", "--prompt", "x") == 0 and steering in capsys.readouterr().out
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert say(monkeypatch, "", "--prompt", "x") == 0
    out = capsys.readouterr().out
    assert out.count("␛]0;owned␇\ufffd") == 2 and "\x1b" not in out


def test_in_turn() -> None:
    assert list(in_turn([iter("ab"), iter("x"), iter("")])) == [
        (0, "a"), (1, "x"), (2, None), (0, "b"), (1, None), (0, None),
    ]  # fmt: skip


def terminal(folder: Path, columns: int, questions: list[str], *arguments: object) -> str:
    """What `tunesmith chat` writes in a terminal so wide, where somebody asks."""
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    hidden = {"COLUMNS", "LINES", "NO_COLOR"}
    env = {k: v for k, v in os.environ.items() if k not in hidden} | {"TERM": "xterm", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "tunesmith", "chat", *map(str, arguments)]
    said, deadline = b"", time.monotonic() + 120
    with subprocess.Popen(command, stdin=there, stdout=there, stderr=there, cwd=folder, env=env) as process:
        os.close(there)
        asked = 0
        while time.monotonic() < deadline:
            if select.select([here], [], [], 0.2)[0]:
                try:
                    said += os.read(here, 65536)
                except OSError:  # the other end is closed
                    break
            if said.count(b"> ") > asked:
                os.write(here, ([*questions, ""][asked] + "\n").encode())
                asked += 1
        assert process.wait(30) == 0, said
    os.close(here)
    return said.decode()


def test_in_a_terminal_they_stand_side_by_side(tiny: Path, tmp_path: Path) -> None:
    wide = terminal(tmp_path, 80, ["Hello", "/reset", "Again"], tiny, "--against", "starter", "--max-tokens", 12)
    assert "Traceback" not in wide and wide.count("─┼─") == 2
    title = re.search(r"(\S+)\x1b\[K\x1b\[39G │ starter", wide)
    assert title and str(tiny).startswith(title[1]) and len(title[1]) <= 38
    assert wide.count("\x1b[39G │ ") > 4 and "── starter" not in wide
    narrow = terminal(tmp_path, 79, ["Hello"], tiny, "--against", "starter", "--max-tokens", 12)
    assert "\x1b[" not in narrow.replace("\x1b[?2004", "") and "│" not in narrow
    assert narrow.index(f"── {tiny}") < narrow.index("── starter")


def test_both_say_what_each_says_alone(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    """Two models that write piece by piece in turn do not disturb one another."""
    common = ("--prompt", "Who are you?", "--max-tokens", 20, "--json", "--temperature", 1, "--seed", 3)
    alone = [cli("chat", name, *common).json()["answer"] for name in (tiny, "starter")]
    both = cli("chat", tiny, "--against", "starter", *common).json()
    assert [both["answer"], both["against"]] == alone and len(set(alone)) == 2
    assert cli("chat", tiny, "--against", "no-such-model", *common).code == 2


def test_a_base_without_template_answers_in_the_form_of_the_run(tiny: Path, tmp_path: Path) -> None:
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare)
    (bare / "chat_template.jinja").unlink()
    run = fit(tmp_path / "run", write(tmp_path / "d.jsonl", rows(40)), bare, task="instruct", max_steps=1)
    assert run.template()
    asked = (Message("user", "Hi"),)
    for name, beside, same in ((bare, run, True), (bare, None, False), (bare, tiny, False), (tiny, run, False)):
        made: Any = api.completer(str(name), str(beside) if beside else None)
        ids = made.renderer.prompt_ids(asked)
        assert (made.renderer.decode(ids).startswith("### Instruction:")) == same


def test_a_models_service_is_asked_for_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    service = Hostile()
    service.answer = lambda body: f"{body['model']} heard {len(body['messages'])}"
    try:
        data = write(tmp_path / "rows.jsonl", rows(60))
        run = api.train(data, provider="openai", model="base", base_url=service.url, output_dir=tmp_path / "run")
        assert isinstance(run, Run) and run.state() == "succeeded"
        assert chat([str(run), "--against", "base", "--prompt", "Hi", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["answer"], found["against"]) == ("ft:base:org::000 heard 1", "base heard 1")
        monkeypatch.setenv("OPENAI_BASE_URL", service.url)
        assert chat(["ft:base:org::000", "--against", "starter", "--prompt", "Hi", "--max-tokens", "2"]) == 0
        assert capsys.readouterr().out.startswith("── ft:base:org::000\nft:base:org::000 heard 1\n── starter\n")
    finally:
        service.close()
