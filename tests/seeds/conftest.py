"""Pages for those who come from somewhere else: every row of their tables is done as it says. None is skipped."""

from __future__ import annotations

import contextlib
import io
import shlex
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Protocol

import pytest

from tunesmith import cli


class Said(Protocol):
    """What a command did."""

    code: int
    out: str
    err: str


class Done:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """Type a `tunesmith …` line of a page, in this process and in the test's own folder; more words may shorten it.
    `status`: what it must end with."""
    monkeypatch.chdir(tmp_path)

    def run(line: str, *more: object, status: int | None = 0) -> Said:
        program, *words = shlex.split(line.replace("\\\n", " "))
        assert program == "tunesmith", line
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main([*words, *map(str, more)])
        assert status is None or code == status, (line, code, out.getvalue(), err.getvalue())
        return Done(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """Have a small model stand in for one of the Hub, in a cache of the test's own: `hub("gpt2", folder)`."""
    from huggingface_hub import constants

    cache = tmp_path / "hub-cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))

    def place(name: str, folder: Path) -> None:
        at = cache / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, at / "snapshots" / "0")
        (at / "refs").mkdir()
        (at / "refs" / "main").write_text("0")

    return place


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
    """A skipped row is one that nobody has tried."""
    report = yield
    if report.skipped:
        report.outcome, report.longrepr = "failed", f"skipped: {report.longrepr}"
    return report
