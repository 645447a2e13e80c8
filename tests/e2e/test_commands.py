"""The command line as its users meet it: what works, and what every mistake says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, Result, rows, write
from tunesmith.cli import COMMANDS
from tunesmith.runs import Run

Cli = Callable[..., Result]
GOOD = '{"prompt": "q", "completion": "a"}\n'
LONG = json.dumps({"prompt": "q", "completion": "word " * 3000}) + "\n"
# file content (None: no file), arguments, exit status, words in the one line of the error
MISTAKES: dict[str, tuple[bytes | None, list[str], int, list[str]]] = {
    "missing file": (None, [], 3, ["d.jsonl", "no such file"]),
    "empty file": (b"", [], 3, ["d.jsonl", "empty"]),
    "not JSON": ((GOOD + "oops\n").encode(), [], 3, ["d.jsonl:2", "not JSON"]),
    "unknown columns": (b'{"ask": "q", "say": "a"}\n', [], 3, ["d.jsonl:1", "ask, say", "--columns"]),
    "empty answer": ((GOOD * 2 + '{"prompt": "q", "completion": " "}\n').encode(), [], 3, ["d.jsonl:3", "empty"]),
    "all over-long": (
        "".join(LONG.replace('"q"', f'"q{i}"') for i in range(12)).encode(),
        [],
        3,
        ["over-long", "2048"],
    ),
    "too few rows": ((GOOD + GOOD.replace("q", "r")).encode(), [], 3, ["too few rows (2)", "--valid-fraction 0"]),
    "not UTF-8": ('{"prompt": "café", "completion": "a"}\n'.encode("latin-1"), [], 3, ["d.jsonl:1", "UTF-8", "iconv"]),
    "unknown option": (GOOD.encode(), ["--epoks", "3"], 2, ["--epoks", 'did you mean "--epochs"']),
    "bad value": (GOOD.encode(), ["--epochs", "many"], 2, ["--epochs: is 'many'"]),
    "missing model": (GOOD.encode(), ["--model", "./no-model"], 2, ["./no-model", "--model starter"]),
    "missing hub model": (GOOD.encode(), ["--model", "no-such-model"], 2, ["no-such-model", "--model starter"]),
    "missing config": (GOOD.encode(), ["--config", "nope.toml"], 2, ["nope.toml", "a preset: aggressive"]),
    "mapped column missing": (
        GOOD.encode(),
        ["--columns", "prompt=ask,completion=completion"],
        3,
        ["d.jsonl:1", 'no column "ask"'],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(name: str, tmp_path: Path, cli: Cli) -> None:
    content, arguments, code, words = MISTAKES[name]
    if content is not None:
        (tmp_path / "d.jsonl").write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    result = cli("train", "--dataset", "d.jsonl", "--output-dir", "out", *arguments)
    assert result.code == code, result.err
    assert len(result.err.strip().splitlines()) == 1 and result.err.startswith("error: ")
    assert all(word in result.err for word in words), result.err
    assert sorted(tmp_path.rglob("*")) == before and not result.out


def test_no_dataset_and_unknown_commands(cli: Cli) -> None:
    assert (cli("train").code, cli("trian").code, cli("data", "chekc").code) == (2, 2, 2)
    assert 'did you mean "train"' in cli("trian").err and 'did you mean "data check"' in cli("data", "chekc").err


def test_paths_that_cannot_be_used(tmp_path: Path, data: Path, cli: Cli) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for arguments in (
        ["init", "-o", "nowhere/x.toml"],
        ["plan", "--dataset", data, "--config", "folder"],
        ["data", "split", data, "-o", "file/x"],
        ["train", "--dataset", data, "--output-dir", "file/run", "--max-steps", 1],
        ["train", "--resume", "folder", "--prepare-only"],
    ):
        result = cli(*arguments)
        assert result.code in (1, 2), arguments
        assert result.err.splitlines()[-1].startswith("error: "), result.err


def test_errors_as_json(cli: Cli) -> None:
    result = cli("train", "--dataset", "nope.jsonl", "--json")
    assert result.code == 3 and result.json()["error"]["where"] == "nope.jsonl"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, cli: Cli) -> None:
    result = cli(*name.split(), "--help")
    assert result.code == 0 and f"usage: tunesmith {name}" in result.out and not result.err
    assert name in cli("--help").out


def test_the_road(tiny: Path, tmp_path: Path, data: Path, cli: Cli) -> None:
    """plan, train, list, show, evaluate, chat; JSON on stdout, progress on stderr; an occupied directory refused."""
    common = [
        "--dataset",
        data,
        "--base-model",
        tiny,
        "--num-epochs",
        2,
        "--per-device-train-batch-size",
        8,
        "--output-dir",
        "out",
    ]
    plan = cli("plan", *common, "--no-probe", "--json").json()
    assert (plan["steps"], plan["rows"]["train"], plan["origin"]["epochs"]) == (12, 48, "flag")
    assert "auto: " in cli("plan", *common).out and not (tmp_path / "out").exists()

    done = cli("train", *common, "--json")
    assert done.code == 0, done.err
    summary = done.json()
    assert {
        "run",
        "status",
        "steps",
        "epochs",
        "tokens",
        "supervised_tokens",
        "seconds",
        "tokens_per_second",
        "peak_memory_mb",
        "best_step",
        "best_valid_loss",
        "final_train_loss",
    } <= set(summary)
    assert (summary["status"], summary["steps"], summary["tokens"]) == ("succeeded", 12, 2 * plan["tokens"]["train"])
    assert "ETA" in done.err and "tokens/s" in done.err and "⟦" in done.err
    assert list((tmp_path / "out" / "logs").glob("events.out.tfevents.*"))
    info = json.loads((tmp_path / "out" / "model_info.json").read_text())
    assert (info["training_examples"], info["validation_examples"], info["base_model"]) == (48, 6, str(tiny))
    assert "word" not in (tmp_path / "out" / "worker.log").read_text()

    again = cli("train", *common)
    assert again.code == 2 and "holds another run" in again.err and "--resume" in again.err
    assert cli("runs", "list", "--runs-dir", ".", "--json").json()[0]["run"] == "out"
    assert "succeeded" in cli("runs", "list", "--runs-dir", ".").out
    assert "validation loss" in cli("runs", "show", "out").out
    assert cli("runs", "show", "nope").code == 2

    judged = cli("evaluate", "out", "--json")
    assert judged.code == 0 and judged.json()["verdict"] in ("better", "worse", "cannot tell")
    assert (tmp_path / "out" / "report.html").exists()
    once = cli("chat", "out", "--prompt", "Hi", "--max-tokens", 5, "--json").json()
    assert once["prompt"] == "Hi" and isinstance(once["answer"], str)
    talk = cli("chat", "out", "--max-tokens", 5, stdin="Hello\n/reset\nAgain\n\n")
    assert talk.code == 0
    piped = cli("chat", "out", "--max-tokens", 5, "--json", stdin="Hello\nAgain\n").out.splitlines()
    assert [json.loads(line)["prompt"] for line in piped] == ["Hello", "Again"]
    assert cli("chat", "out", "--max-tokens", 5, "--prompt", "caf\udce9").code == 0  # a byte that is not UTF-8
    long = cli("chat", "out", "--prompt", "word " * 600)
    assert long.code == 3 and "the model's context 512" in long.err and not long.out.strip()
    lines = "\n".join("word " * 100 for _ in range(6))
    assert "the oldest turn no longer fits" in cli("chat", "out", "--max-tokens", 5, stdin=lines).err
    assert cli("chat", "out", "--max-tokens", 0).code == 2 and cli("evaluate", "out", "--seed", -1).code == 2
    assert (
        cli("chat", "out", "--max-tokens", 5, "--seed", 1, "--temperature", 1, stdin="Hello\n").out
        != cli("chat", "out", "--max-tokens", 5, "--temperature", 1, "--seed", 2, stdin="Hello\n").out
    )


def test_a_damaged_run_hides_no_other(tmp_path: Path, data: Path, cli: Cli) -> None:
    assert cli("train", "--provider", "fake", "--dataset", data, "--output-dir", "whole").code == 0
    for name, content in (("cut", "{"), ("bare", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(content)
        assert "run.json is damaged" in cli("runs", "show", name).err
        assert cli("train", "--resume", name).code == 2
    found = cli("runs", "list", "--runs-dir", ".", "--json")
    assert [r["run"] for r in found.json()] == ["whole"] and found.err.count("run.json is damaged") == 2
    assert (
        cli("train", "--resume", "").code == 2
        and cli("train", "--resume", "whole/checkpoints/checkpoint-step-9").code == 2
    )


def test_going_on_with_other_settings(tmp_path: Path, data: Path, tiny: Path, cli: Cli) -> None:
    """What decides what is learnt is refused; what does not is taken, and kept in the run."""
    settings = ("--dataset", data, "--model", tiny, "--batch-size", 4, "--epochs", 2, "--learning-rate", "1e-3")
    saving = ("--save-steps", 4, "--save-total-limit", 9, "--patience", 0)
    assert cli("train", *settings, *saving, "--runs-dir", "runs").code == 0
    run = tmp_path / "runs" / "chat_data"
    Run(run).append("state", state="paused")
    refused = cli("train", "--resume", "checkpoint-step-8", "--runs-dir", "runs", "--learning-rate", 1)
    assert refused.code == 2 and "learning_rate 1.0 is not the run's 0.001" in refused.err
    assert cli("train", "--resume", "checkpoint-step-7", "--runs-dir", "runs").err.startswith(
        "error: the runs in runs: no ch"
    )
    given = ("--resume", "checkpoint-step-8", "--runs-dir", "runs", "--save-steps", 3, "--nproc", 1)
    done = cli("train", *given, *settings)
    assert done.code == 0, done.err
    made = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    start = next(i for i, e in enumerate(made) if e["type"] == "resumed")
    assert made[start]["step"] == 8 and next(e for e in made if e["type"] == "changed")["settings"] == {"save_steps": 3}
    assert next(e["step"] for e in made[start:] if e["type"] == "checkpoint") == 9


def test_the_live_line_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from tunesmith.cli.progress import fit

    for width in range(20, 200):
        monkeypatch.setattr(shutil, "get_terminal_size", lambda width=width: os.terminal_size((width, 24)))
        text = fit(0.5, "step 500/1000", "epoch 1.50", ["loss 4.1234  valid 4.5678", "4100 tokens/s", "ETA 1:15"])
        assert len(text) < width and text.startswith(("[█", "step 500/1000"))
        assert ("ETA 1:15" in text) == (width > 65) and ("[" in text) == (width >= 74)


def test_tensorboard_files_hold_the_curves(tiny: Path, tmp_path: Path, data: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from training import fit, losses

    run = fit(tmp_path / "run", data, tiny)
    found = EventAccumulator(str(run / "logs"))
    found.Reload()
    assert [round(e.value, 4) for e in found.Scalars("train/loss")] == [round(x, 4) for x in losses(run)]
    assert [e.step for e in found.Scalars("valid/loss")] == [0, 12]


def test_prepare_only(tmp_path: Path, data: Path, cli: Cli) -> None:
    result = cli("train", "--dataset", data, "--prepare-only", "--output-dir", "prepared", "--json")
    files = [Path(f) for f in result.json()["files"]]
    assert [f.name for f in files] == ["train.jsonl", "valid.jsonl", "test.jsonl"]
    assert [len((tmp_path / f).read_text().splitlines()) for f in files] == [48, 6, 6]
    assert not (tmp_path / "prepared" / "run.json").exists()


def test_data_commands(tmp_path: Path, data: Path, cli: Cli) -> None:
    found = cli("data", "check", data, "--json").json()
    assert (found["rows"], found["usable"], found["errors"], found["formats"]) == (60, 60, 0, {"prompt-completion": 60})
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": ""}])
    result = cli("data", "check", bad, "--json")
    assert result.code == 3
    first: dict[str, Any] = result.json()["issues"][0]
    assert (first["code"], first["severity"], first["file"], first["line"]) == ("empty-answer", "error", str(bad), 2)
    assert "bad.jsonl:2" in cli("data", "check", bad).out
    assert "known by completion and prompt" in cli("data", "check", data, "--explain").out
    told = cli("data", "check", data, "--explain", "--json").json()
    assert told["known_by"]["prompt-completion"]["required"] == ["completion", "prompt"]
    long = write(tmp_path / "long.jsonl", [*rows(60), {"prompt": "q", "completion": "word " * 3000}])
    assert cli("data", "check", long).code == 0 and cli("data", "check", long, "--model", "starter").code == 3

    parts = cli("data", "split", data, "-o", "out/mine", "--valid", 0.1, "--test", 0.2, "--json").json()
    assert parts["rows"] == {"train": 42, "valid": 6, "test": 12}
    assert (tmp_path / "out" / "mine_val.jsonl").exists()
    assert "exists already" in cli("data", "split", data, "-o", "out/mine").err
    assert cli("data", "split", data, "-o", "x", "--valid", 1.5).code == 2

    seen = cli("data", "preview", data, "--row", 2)
    assert "⟦word1 word1.<|im_end|>⟧" in seen.out and "<|im_start|>user" in seen.out
    assert cli("data", "preview", data, "--rows", 4, "--json").json()[3]["where"] == f"{data}:4"
    assert "rows are 1 to 60" in cli("data", "preview", data, "--row", 61).err


def test_init_writes_a_config_that_works(tmp_path: Path, data: Path, cli: Cli) -> None:
    assert cli("init", data).code == 0
    plan = cli("plan", "--config", "tunesmith.toml", "--no-probe", "--json").json()
    assert plan["recipe"]["dataset"] == str(data)
    text = (tmp_path / "tunesmith.toml").read_text()
    (tmp_path / "all.toml").write_text(
        "\n".join(
            line.removeprefix("# ")
            if " = " in line and not line.endswith("; not set") and "# columns" not in line
            else line
            for line in text.splitlines()
        )
    )
    assert (
        cli("plan", "--config", "all.toml", "--no-probe", "--json").json()["recipe"] == plan["recipe"]
    )  # uncommented, every default is accepted as it stands
    assert cli("init", data).code == 2


def test_doctor(cli: Cli) -> None:
    facts = cli("doctor", "--json").json()
    assert facts["missing"] == [] and facts["packages"]["torch"] and facts["cores"] >= 1
    assert "ready to train" in cli("doctor").out


def test_version_and_module(cli: Cli) -> None:
    assert cli("--version").out == "tunesmith 0.1.0\n"


def test_a_run_is_cancelled_from_another_process(tiny: Path, tmp_path: Path, data: Path, cli: Cli) -> None:
    """It makes its checkpoint, and who was watching it is told how to go on."""
    run = Run(tmp_path / "out")
    words = ["train", "--dataset", data, "--model", tiny, "--epochs", 50, "--output-dir", run, "--patience", 0]
    with subprocess.Popen(
        [sys.executable, "-m", "tunesmith", *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 120
        while not run.metrics("step") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert cli("runs", "pause", run).code == 2
        done = cli("runs", "cancel", run, "--json")
        assert done.code == 0 and done.json() == {"run": str(run), "status": "paused"}
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and f"train --resume {run}" in said
    assert list((run / "checkpoints").glob("checkpoint-step-*")) and run.state() == "paused"
    assert cli("runs", "cancel", run).code == 0  # again: nothing happens
    told = cli("runs", "events", run, "--type", "state", "--json").out.splitlines()
    assert json.loads(told[-1])["state"] == "paused" and len(told) == len(
        [e for e in run.events() if e["type"] == "state"]
    )


def test_help_fits_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.cli import HELP_WIDTH, overview

    pages = sorted((ROOT / "src/tunesmith/assets/help").glob("*.txt"))
    long = [
        (p.name, line) for p in pages for line in p.read_text(encoding="utf-8").splitlines() if len(line) > HELP_WIDTH
    ]
    assert len(pages) >= 25 and not long
    for width in (40, 60, 80):
        monkeypatch.setenv("COLUMNS", str(width))
        assert max(map(len, overview().splitlines())) <= width


def test_the_completion_of_bash() -> None:
    """Commands, those of a group, options and their choices, as bash itself asks for them; files elsewhere."""
    script = subprocess.run([sys.executable, "-m", "tunesmith", "completion", "bash"], capture_output=True, text=True)
    asks = 't() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _tunesmith; echo "${COMPREPLY[*]}"; }\n'
    tries = {
        "tunesmith tr": "train",
        "tunesmith data ''": "check stats convert split preview",
        "tunesmith runs re": "resume",
        "tunesmith train --lora-ra": "--lora-rank",
        "tunesmith train --method ''": "full lora qlora freeze",
        "tunesmith data split --method ''": "hash threshold shuffle",
        "tunesmith data split --val": "--valid",
        "tunesmith evaluate my": "",
        "tunesmith train --base-m": "--base-model",
        "tunesmith train --config quick": "quick_test",
        "tunesmith plan --provider ''": "huggingface openai fake",
        "tunesmith export --quantize q8": "q8_0",
        "tunesmith evaluate --task per": "persona",
        "tunesmith runs events --type ste": "step",
        "tunesmith chat --no-such": "",
        "tunesmith completion ''": "bash zsh fish",
        "tunesmith data convert --to prompt-c": "prompt-completion",
        "tunesmith data split --drop-codes forg": "forgotten",
        "tunesmith train --chat-template ins": "instruct",
        "tunesmith train --method = lo": "lora",  # where = breaks words
        "tunesmith train --method =": "full lora qlora freeze",
        "tunesmith train --method=lo": "--method=lora",  # where it does not
    }
    lines = "\n".join(f"t {words}" for words in tries)
    done = subprocess.run(["bash", "-c", script.stdout + "\n" + asks + lines], capture_output=True, text=True)
    assert done.stdout.split("\n")[:-1] == list(tries.values()), done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_script_knows_every_command_and_option(shell: str) -> None:
    from tunesmith.cli.completion import tables

    script = subprocess.run([sys.executable, "-m", "tunesmith", "completion", shell], capture_output=True, text=True)
    words, choices = tables()
    assert len(words) == len(COMMANDS) + 4 and len(choices) >= 40 and len(words["train"]) >= 70
    for option in {word for known in words.values() for word in known}:
        assert (option.removeprefix("--") if shell == "fish" else option) in script.stdout, option
    for value in {value for known in choices.values() for value in known}:
        assert value in script.stdout, value
