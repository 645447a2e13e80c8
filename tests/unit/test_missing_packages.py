"""An install without an extra says which one is missing, in one line."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from tunesmith import api, cli
from tunesmith.errors import UsageError
from tunesmith.local import backend


@pytest.mark.parametrize(("package", "extra"), [("torch", "local"), ("sqlalchemy.orm", "serve"), ("openai", "remote")])
def test_a_missing_package_is_one_line(
    package: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(words: list[str]) -> int:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(["evaluate", "my_run"]) == 2
    missing = f"this needs {package.partition('.')[0]}, which is not installed"
    assert capsys.readouterr().err == f"error: evaluate: {missing} -- pip install 'tunesmith[{extra}]'\n"


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(words: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'tunesmith.nothing'", name="tunesmith.nothing")

    monkeypatch.setattr(cli, "_run", run)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["plan"])


def test_without_torch_no_run_is_begun(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs torch"):
        api.train(data, output_dir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_on_windows_it_says_where_to_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.setattr(sys, "platform", "win32")
    assert cli.main(["train", "--dataset", "echo"]) == 2
    assert "run it in WSL 2" in capsys.readouterr().err
