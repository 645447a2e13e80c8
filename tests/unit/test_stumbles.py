"""What a first user types wrong, and what the commands say of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from tunesmith import api, cli
from tunesmith.cli.init import template
from tunesmith.cli.progress import table
from tunesmith.data.repair import repair
from tunesmith.data.write import write_bytes
from tunesmith.errors import UsageError, counted
from tunesmith.evaluation import rates
from tunesmith.recipe import fields
from tunesmith.settings import resolve

Captured = pytest.CaptureFixture[str]


def refused(capsys: Captured, *words: str, status: int = 2) -> str:
    assert cli.main([*words]) == status
    return capsys.readouterr().err


def test_a_port_has_16_bits(capsys: Captured) -> None:
    assert "from 0 to 65535, not '99999'" in refused(capsys, "serve", "--port", "99999")


def test_an_ended_model_is_refused_before_the_key(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    words = ("--dataset", "echo", "--provider", "openai", "--model", "gpt-3.5-turbo")
    for command in (("train", *words), ("plan", *words, "--no-probe")):
        said = refused(capsys, *command)
        assert "gpt-3.5-turbo: the service has ended this model on 2026-10-23" in said and "key" not in said
        assert "tunesmith train --dataset echo --provider huggingface" in said


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (("--epochs", "three"), "--epochs: is 'three'"),
        (("--num-epochs=three",), "--num-epochs: is 'three'"),
        (("--report-to", "tensorboard"), "--report-to: is 'tensorboard'"),
        (
            ("--provider", "openai", "--model", "gpt-4.1", "--learning-rate", "1"),
            "--learning-rate: learning_rate means",
        ),
        (("--valid-fraction", "0.6", "--test-fraction", "0.6"), "--valid-fraction: valid_fraction + test_fraction"),
    ],
)
def test_a_place_is_the_option_as_typed(capsys: Captured, words: tuple[str, ...], place: str) -> None:
    assert refused(capsys, "plan", "--dataset", "echo", *words).startswith(f"error: {place}")


def test_a_place_is_the_argument_from_python() -> None:
    with pytest.raises(UsageError, match=r"^epochs: is 'three'"):
        api.plan("echo", epochs="three")
    with pytest.raises(UsageError, match="did you mean") as told:
        api.plan("echo", epochz=3)
    assert "--help" not in str(told.value)


def test_every_line_of_the_config_file_can_be_uncommented() -> None:
    lines = template("data.jsonl").splitlines()
    commented = [i for i, line in enumerate(lines) if re.match(r"# \w+ = ", line)]
    assert len(commented) == len(fields()) - 1
    for i in commented:
        name, value = next(iter(tomllib.loads(lines[i].removeprefix("# ")).items()))
        resolve({name: value})
        tomllib.loads("\n".join([*lines[:i], lines[i].removeprefix("# "), *lines[i + 1 :]]))


@pytest.mark.parametrize(
    "words",
    [
        ("init", "-o"),
        ("lr-find", "--dataset", "echo", "--plot"),
        ("runs", "compare", "no-run", "-o"),
        ("data", "stats", "echo", "--report"),
        ("data", "preview", "echo", "--html"),
        ("data", "check", "echo", "--report"),
    ],
)
def test_a_place_that_cannot_be_written_is_said_first(capsys: Captured, tmp_path: Path, words: tuple[str, ...]) -> None:
    path = tmp_path / "missing" / "x.html"
    assert refused(capsys, *words, str(path)).startswith(f"error: {path}: cannot be written there")


def test_a_type_of_event_is_one_that_there_is(capsys: Captured) -> None:
    assert 'no type "stepp" (did you mean "step"?)' in refused(capsys, "runs", "events", "no-run", "--type", "stepp")


def test_values_that_no_machine_can_do(capsys: Captured) -> None:
    assert "4096 at most" in refused(capsys, "plan", "--dataset", "echo", "--threads", "100000")
    for value in ("-1", "1e9", "nan"):
        assert "from 0 to 2" in refused(capsys, "chat", f"--temperature={value}")
    assert "--dataset echo" in refused(capsys, "plan")


def test_the_nearest_name_is_told(capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    assert 'did you mean "echo"?' in refused(capsys, "data", "check", "ehco", status=3)
    assert 'did you mean "starter"?' in refused(capsys, "plan", "--dataset", "echo", "--model", "startr")
    assert "gpt-4o-mini" in refused(capsys, "data", "stats", "echo", "--model", "gtp-4o-mini")
    assert 'did you mean "--help"?' in refused(capsys, "--hlep")
    assert "--dataset echo" in refused(capsys, "train", "echo")
    config = tmp_path / "c.toml"
    config.write_text("[traning]\nepochs = 1\n")
    said = refused(capsys, "plan", "--dataset", "echo", "--config", str(config))
    assert said.startswith(f"error: {config}: no group of settings [traning]") and 'did you mean "training"?' in said


def test_one_is_no_plural() -> None:
    assert (counted(1, "error"), counted(0, "error"), counted(2, "step")) == ("1 error", "0 errors", "2 steps")


def test_one_error_is_told_as_one(capsys: Captured, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\nno row\n')
    assert cli.main(["data", "check", str(tmp_path / "d.jsonl")]) == 3
    said = capsys.readouterr().out
    assert "1 usable, 1 error," in said and "1 error: training" in said


def test_a_task_of_evaluation_is_told_as_one(capsys: Captured) -> None:
    assert "tunesmith evaluate: --task persona" in refused(capsys, "plan", "--dataset", "echo", "--task", "persona")


def test_a_run_fits_a_narrow_terminal(capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = api.train("echo", provider="fake", output_dir=tmp_path / "run")
    monkeypatch.setenv("COLUMNS", "40")
    assert cli.main(["runs", "show", str(run)]) == 0
    said = capsys.readouterr().out
    assert "settings given or worked out" in said and "not defaults" not in said
    chart = [line for line in said.splitlines() if "┤" in line or "└" in line]
    assert chart and max(map(len, chart)) <= 40


def test_a_table_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("batch_size", 4, "auto: small sets need many steps, large ones even ones"), ("seed", 42, "default")]
    whole = table(rows)
    assert whole.splitlines() == [
        f"  batch_size   4  {rows[0][2]}",
        "  seed        42  default",
    ]  # elsewhere a row is a line
    monkeypatch.setenv("COLUMNS", "45")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    lines = table(rows).splitlines()
    told = ["auto: small sets need many", "steps, large ones even ones"]
    assert lines == [f"  batch_size   4  {told[0]}", " " * 18 + told[1], "  seed        42  default"]
    assert max(map(len, lines)) == 45
    path = "my/customer-support/data-set.jsonl"  # can be pasted
    assert table([("a", f"{path} and more words")]).splitlines() == [f"  a  {path} and", "     more words"]
    monkeypatch.setenv("COLUMNS", "30")  # too narrow to be of use
    assert table(rows) == whole


@pytest.mark.parametrize(("command", "left"), [("evaluate", "no verdict is written"), ("chat", "")])
def test_what_an_interruption_leaves_is_said(
    command: str, left: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", stop)
    said = refused(capsys, command, status=130)
    assert said.startswith("interrupted") and left in said and bool(left) == (said != "interrupted\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [("--version",), ("--help",), ("data", "check", "chat"), ("frob", "--json")])
def test_output_that_nobody_takes(words: tuple[str, ...], unbuffered: str) -> None:
    expected = 2 if words[0] == "frob" else 0
    reader, gone = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    for stdout, status, lines in ((gone, (expected, expected and 1), 0), (full, (expected or 1, 1), 1)):
        done = subprocess.run(
            [sys.executable, "-m", "tunesmith", *words],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
        os.close(stdout)
        assert done.returncode in status and done.stderr.count("\n") == (1 if expected else lines), done.stderr
        assert "error: " in done.stderr or not done.stderr


def test_help_of_a_command_by_either_way(capsys: Captured) -> None:
    assert cli.main(["help", "train"]) == 0
    said = capsys.readouterr().out
    assert cli.main(["train", "--help"]) == 0 and said == capsys.readouterr().out and "--lora-rank" in said
    assert "tunesmith train --help" in refused(capsys, "train", "help")


def test_a_server_s_folder_that_cannot_be_used(capsys: Captured, tmp_path: Path) -> None:
    for place in ("folder", "text"):
        (tmp_path / place).mkdir()
    (tmp_path / "folder" / "tunesmith.db").mkdir()
    (tmp_path / "text" / "tunesmith.db").write_text("no database at all" * 100)
    for place in ("folder", "text"):
        said = refused(capsys, "keys", "add", "bob", "--data-dir", str(tmp_path / place))
        assert said.startswith(f"error: {tmp_path / place / 'tunesmith.db'}: no database") and said.count("\n") == 1


def test_a_config_that_is_no_file(capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("quick_test").mkdir()
    for config, told in (
        ("configs/missing.toml", "no such file or preset"),
        ("../findings", "no such file or preset"),
        ("quick_tests", 'no such file or preset (did you mean "quick_test"?)'),
        ("folder", "not a file"),
        ("/dev/null", "not a file"),
    ):
        said = refused(capsys, "plan", "--dataset", "echo", "--config", config)
        assert said.startswith(f"error: {config}: {told} -- ") and said.endswith(
            "low_resource, production, quick_test\n"
        )
    assert "preset quick_test" in resolve({}, "quick_test")[1].values()
    Path("c.toml").touch()
    monkeypatch.setattr(Path, "open", lambda *a, **k: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(UsageError, match=r"^c\.toml: cannot be read: Permission denied -- "):
        resolve({}, "c.toml")


@pytest.mark.parametrize("form", ["text", "code"])
def test_a_format_that_holds_nothing_of_the_rows(capsys: Captured, tmp_path: Path, form: str) -> None:
    target = tmp_path / "lossy.jsonl"
    words = ("data", "convert", "chat", "--to", form, "-o", str(target))
    said = refused(capsys, *words, "--lossy", status=3)
    assert said == f"error: chat: no row is left: {form} cannot hold who says what -- --to messages\n"
    assert "--lossy" not in refused(capsys, *words, status=3) and not target.exists()
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"text": "plain"}\n')
    assert cli.main(["data", "convert", str(tmp_path / "d.jsonl"), "--to", form, "-o", str(target), "--lossy"]) == 0
    told = capsys.readouterr()
    (tmp_path / "t.jsonl").write_text('{"text": "plain"}\n')
    words = ("data", "convert", str(tmp_path / "t.jsonl"), "-o", str(tmp_path / "x.jsonl"))
    assert refused(capsys, *words, status=3).endswith("-- --to text\n")
    assert "in 1 row\n1 of 2 rows left out" in told.err and told.out.endswith("1 row\n")


@pytest.mark.parametrize(
    "words",
    [
        ("init", "-o"),
        ("lr-find", "--dataset", "echo", "--plot"),
        ("data", "convert", "echo", "-o"),
        ("data", "split", "echo", "-o"),
        ("data", "stats", "echo", "--report"),
    ],
)
def test_a_folder_that_may_not_be_written_is_said_first(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    assert refused(capsys, *words, f"{tmp_path}/x.svg").startswith(f"error: {tmp_path}: may not be written -- ")


def test_a_run_that_may_not_be_written_is_not_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = api.train("echo", provider="fake", output_dir=tmp_path / "run")
    pair = SimpleNamespace(base="starter", tuned=str(run / "final_model"))
    monkeypatch.setattr("tunesmith.evaluation.evaluate.sides", lambda *a: pair)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != run.path)
    for against in (None, "starter"):
        with pytest.raises(UsageError, match="run: may not be written"):
            api.evaluate(run, against=against)


def test_the_advice_is_told_before_the_picture_is_written(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = rates.Advice(1e-3, True, "better", [[(1e-3, 1, 2.0), (2e-3, 1, 3.0)]])
    monkeypatch.setattr(api, "lr_find", lambda *a, **k: found)
    (tmp_path / "folder").mkdir()
    words = ("lr-find", "--dataset", "echo", "--plot", f"{tmp_path}/folder/x.svg")
    monkeypatch.setattr("tunesmith.local.machine.tune", lambda: (tmp_path / "folder").rmdir())  # gone meanwhile
    assert cli.main([*words]) == 1
    assert "take: --learning-rate 0.001" in capsys.readouterr().out
    assert "end the name with .svg" in refused(capsys, *words[:-1], f"{tmp_path}/x.png")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("train --dataset", "--dataset: needs a value -- tunesmith train --help"),
        ("data check chat --json=3", "--json: takes no value -- "),
        ("data split chat -o x --valid x", "--valid: expected a number, not 'x' -- "),
        ("data split chat -o x --valid 1.5", "--valid: a share of 1.5 leaves nothing"),
        ("data split chat -o x --valid 0.6 --test 0.6", "--valid and --test: a share of 1.2 leaves nothing"),
        ("data convert chat", "data convert: needs -o/--output -- tunesmith data convert --help"),
        ("plan --dataset echo --task chta", "--task: is 'chta' (did you mean \"chat\"?); expected one of chat"),
        ("plan --dataset echo --method lorra", "--method: is 'lorra' (did you mean \"lora\"?)"),
        ("data check --task chta chat", '--task: no "chta" (did you mean "chat"?) -- known: chat, code'),
        ("data preview chat --worst lnog", '--worst: no "lnog" (did you mean "long"?)'),
        ("completion basj", 'shell: no "basj" (did you mean "bash"?) -- known: bash, zsh, fish'),
        (
            "data stats echo --model gpt-4o-min",
            "--model: gpt-4o-min is not among the hosted models that can be trained (did",
        ),
        ("serve --allow-model foo=", "--allow-model foo=: names no model -- --allow-model ALIAS=FOLDER"),
        ("serve --allow-model =foo", "--allow-model =foo: names no model"),
    ],
)
def test_the_words_of_a_wrong_value(capsys: Captured, line: str, told: str) -> None:
    said = refused(capsys, *line.split())
    assert said.startswith(f"error: {told}") and " -- " in said


def test_a_metric_that_is_measured_anyway(tmp_path: Path) -> None:
    run = api.train("echo", provider="fake", output_dir=tmp_path / "run")
    for spec, where in (
        ("chrf", "chrF is measured in every task"),
        ("loss", "loss (nats per token) is measured in every"),
    ):
        with pytest.raises(UsageError, match=rf"^--metric {spec}: {re.escape(where)}.*re:PATTERN$"):
            api.evaluate(run, metric=spec)


def test_an_error_of_a_temporary_file_names_the_file(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "x.jsonl", tmp_path):
        with pytest.raises(OSError, match=r"missing|directory") as told:
            write_bytes(path, b"x")
        assert told.value.filename == str(path)


def test_a_repaired_copy_in_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UsageError, match="may not be written -- "):
        repair(["chat"], tmp_path / "x.jsonl")


def test_a_config_for_no_data(capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    Path("folder").mkdir()
    for name in ("nofile.jsonl", "empty.jsonl", "folder"):
        assert refused(capsys, "init", name, "-o", "q.toml", status=3).startswith(f"error: {name}: ")
    assert cli.main(["init", "chat", "-o", "-"]) == 0 and capsys.readouterr().out == template("chat")
    assert cli.main(["init"]) == 0 and sorted(path.name for path in tmp_path.iterdir())[-1] == "tunesmith.toml"
    assert not Path("q.toml").exists() and not Path("-").exists()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("run list", "runs list"),
        ("rns lst", "runs list"),
        ("runs lits", "runs list"),
        ("key add x", "keys add"),
        ("dat check", "data check"),
        ("run", "runs"),
        ("trian --dataset x", "train"),
        ("evaluat my_run", "evaluate"),
        ("version", "--version"),
        ("-v", "--version"),
    ],
)
def test_a_slip_in_a_command_is_met_with_what_was_meant(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within its group: never with the command that deletes, because its name is short."""
    assert f'(did you mean "{meant}"?)' in refused(capsys, *typed.split())
    assert "did you mean" not in refused(capsys, "runs", "xyzzy")
