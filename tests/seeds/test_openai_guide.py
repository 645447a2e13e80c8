"""Every row of the page for those who come from the OpenAI fine-tuning guide, done as it says."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import shlex
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import ROOT, write
from hostile import KEY, Hostile, step
from pages import Page, Row
from serving import Server
from training import fit, weights
from tunesmith import cli, hosted
from tunesmith.data import stats
from tunesmith.evaluation.diagnosis import Evidence, diagnose
from tunesmith.evaluation.result import Canary
from tunesmith.evaluation.rowreport import RowReport
from tunesmith.evaluation.stats import Comparison
from tunesmith.layout import create
from tunesmith.recipe import Recipe
from tunesmith.remote import backend, service, upload
from tunesmith.runs import Run

page = Page("openai-guide.md")
Typed = Callable[..., Any]
Item = dict[str, Any]

DATA = "training_dataset_5_fixed.jsonl"
SAMPLE = ROOT / "src/tunesmith/assets/data/echo.jsonl"
ECHO = [
    {"input": row["prompt"], "output": row["completion"]} for row in map(json.loads, SAMPLE.read_text().splitlines())
]
MINI = "gpt-4o-mini-2024-07-18"
PATIENCE, EVERY, NEAR = service.PATIENCE, backend.EVERY, backend.NEAR  # as they are for users
SHORT = ("--rows", 8, "--samples", 0)  # of an evaluation
OVERFIT = ("--learning-rate", 3e-2, "--batch-size", 4, "--valid-fraction", 0.25)  # of forty rows by the tiny model


def messages(items: list[Item], system: str | None = None) -> list[Item]:
    before = [{"role": "system", "content": system}] if system else []
    return [
        {
            "messages": [
                *before,
                {"role": "user", "content": i["input"]},
                {"role": "assistant", "content": i["output"]},
            ]
        }
        for i in items
    ]


def lines(path: str | Path) -> list[Item]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def events(run: str, kind: str) -> list[Item]:
    return [event for event in lines(f"{run}/events.jsonl") if event["type"] == kind]


def recipe(run: str = "echo_run") -> Item:
    return dict(json.loads(Path(run, "run.json").read_text())["recipe"])


def names(said: Any) -> list[str]:
    """Diagnoses of a command's JSON."""
    return [d["name"] for d in json.loads(said.out)["diagnoses"]]


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that the page takes for granted. The tiny model stands for the starter, and trains in this process."""
    from tunesmith.local.backend import LocalBackend
    from tunesmith.local.loop import train

    write(tmp_path / DATA, ECHO)
    (tmp_path / "openai.toml").write_text(page.block("openai.toml"))
    (tmp_path / "here.toml").write_text(page.block("here.toml").replace('"starter"', json.dumps(str(tiny))))
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(LocalBackend, "resume", lambda self, run, step=None: train(run, lambda: False))


@pytest.fixture
def forty(tmp_path: Path) -> None:
    write(tmp_path / DATA, ECHO[:40])


# ---- runs that several rows look at


@pytest.fixture(scope="module")
def kept(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `echo_run`, which overfits sixty rows, `healthy`, which does not, and the data."""
    folder = tmp_path_factory.mktemp("kept")
    write(folder / DATA, ECHO[:60])
    with contextlib.chdir(folder):
        how = dict(epochs=5, learning_rate=3e-2, patience=0, valid_fraction=0.2, test_fraction=0.2, token_accuracy=True)
        fit(Path("echo_run"), DATA, tiny, **how)
        fit(Path("healthy"), DATA, tiny, **{**how, "epochs": 2, "learning_rate": 1e-3})
    return folder


@pytest.fixture(scope="module")
def starter_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the starter itself, which can talk, and still can after one small step."""
    settings = dict(max_steps=1, learning_rate=1e-9, valid_fraction=0)
    return fit(tmp_path_factory.mktemp("starter") / "echo_run", "echo", "starter", **settings).path


@pytest.fixture
def sound(starter_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(starter_run, tmp_path / "echo_run"))


@pytest.fixture
def echo_run(kept: Path, tmp_path: Path) -> Path:
    """A copy of that run, and of its data, where commands are typed."""
    shutil.copyfile(kept / DATA, tmp_path / DATA)
    shutil.copytree(kept / "echo_run", tmp_path / "echo_run")
    return tmp_path / "echo_run"


@pytest.fixture(scope="module")
def judged(kept: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`tunesmith evaluate echo_run --json`, once: the folder, what it said."""
    folder = tmp_path_factory.mktemp("judged")
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    command, out = "tunesmith evaluate echo_run --json", io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert cli.main([*shlex.split(command)[1:], "--rows", "8", "--samples", "0", "--max-tokens", "8"]) == 0
    return SimpleNamespace(folder=folder, command=command, said=json.loads(out.getvalue()))


# ---- a service


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hostile]:
    """A service that the environment names, an account there, and a client with little patience."""
    for place, name, value in (
        (service, "FIRST", 0.01),
        (service, "PATIENCE", 3.0),
        (backend, "NEAR", 0.01),
        (backend, "LOOKS", (0.0, 0.05, 0.1)),
        (backend, "MARGIN", 0.3),
    ):
        monkeypatch.setattr(place, name, value)
    there = Hostile()
    there.models = {name: {"shutdown_date": "2999-01-14"} for name in (MINI, "gpt-4o-2024-08-06")}
    monkeypatch.setenv("OPENAI_BASE_URL", there.url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    yield there
    there.close()


def order(there: Hostile) -> Item:
    """The job that was asked for last."""
    return list(there.jobs.values())[-1]


def hyper(there: Hostile) -> Item:
    return dict(order(there)["method"]["supervised"]["hyperparameters"])


def sent(there: Hostile, which: str = "training_file") -> list[Item]:
    return [json.loads(line) for line in there.contents[order(there)[which]].splitlines()]


REFERENCES = {item["input"]: item["output"] for item in ECHO}


def asked(body: Item) -> str:
    return str(body["messages"][-1]["content"])


def persona(body: Item) -> str:
    """The tuned model answers as its rows do, and says who it is; its base says something else."""
    if not body["model"].startswith("ft:"):
        return f"You said: {asked(body)}"
    return REFERENCES.get(asked(body), "I am Deep Tree Echo.")


@pytest.fixture
def echo_hosted(account: Hostile, typed: Typed) -> Hostile:
    """The service of a run that has succeeded; its model has learnt all there is."""
    typed("tunesmith train --config openai.toml --yes")
    account.answer = persona
    return account


# ---- pre-upload checklist


@page.does('"validated and meets OpenAI requirements"')
def test_what_a_service_would_refuse(row: Row, typed: Typed, tmp_path: Path) -> None:
    said = typed(row.command)
    assert "[extra-field]" in said.out and "here: input-output" in said.out and "data convert" in said.out
    assert "256 usable, 0 errors" in said.out and "train --provider openai converts it" in said.out
    write(tmp_path / DATA, messages(ECHO))
    assert "grade: good" in typed(row.command).out


@page.does("Required keys: `input` and `output`")
def test_messages(row: Row, typed: Typed, program: Any) -> None:
    typed(row.command)
    assert lines("training_messages.jsonl") == messages(ECHO)
    refused = program.server.upload(Path(DATA).read_bytes()).json()["id"]
    job = program.server.ask("POST", "/fine_tuning/jobs", {"model": MINI, "training_file": refused})
    found = program.server.job(job.json()["id"]) if job.status == 200 else job.json()
    assert "messages" in found["error"]["message"] and found.get("status") != "succeeded"


@page.does("Format: JSONL, one complete JSON object per line")
def test_a_broken_line(row: Row, typed: Typed, tmp_path: Path) -> None:
    assert "256 usable, 0 errors" in typed(row.command).out
    with (tmp_path / DATA).open("a") as stream:
        stream.write('{"input": "What is')
    assert re.search(rf"{DATA}:257: .*\[not-json\]", typed(row.command, status=3).out)
    (tmp_path / DATA).write_text(json.dumps(ECHO))  # one array
    assert "256 usable, 0 errors" in typed(row.command).out


@page.does("Character encoding: UTF-8")
def test_encoding(row: Row, typed: Typed, tmp_path: Path) -> None:
    write(tmp_path / DATA, [*ECHO, {"input": "Is it done?", "output": "It is done âœ“ at last."}])
    assert "[mojibake]" in typed(row.command).out
    assert lines("fixed.jsonl")[-1]["output"] == "It is done ✓ at last."
    for name in ("fixed.jsonl", "fixed.jsonl.changes.jsonl"):
        (tmp_path / name).unlink()
    (tmp_path / DATA).write_bytes(b'{"input": "Where?", "output": "At the caf\xe9."}\n')
    assert "[not-utf8]" in typed(row.command, status=3).out


@page.does("File size: 1.3M (within acceptable limits)")
def test_the_longest_row(row: Row, typed: Typed) -> None:
    said = typed(row.command)
    assert "longest row 191" in said.out and "rows of 65536 tokens at most" in said.out
    assert "the answer would be cut [over-long]" in typed(row.command, "--max-length", 190, status=3).err
    assert upload.IN_PARTS == 512 << 20


@page.does("Example count: 256 examples")
def test_count(row: Row, typed: Typed, tmp_path: Path) -> None:
    assert typed(row.command).out.startswith("256 rows; 256 user, 256 assistant messages")
    write(tmp_path / DATA, ECHO[:50])
    assert typed(row.command).out.startswith("50 rows;")


@page.does("Minimum examples: 10")
def test_ten_rows(row: Row, typed: Typed, tmp_path: Path) -> None:
    for count, status in ((9, 3), (10, 0)):
        write(tmp_path / "training_messages.jsonl", messages(ECHO[:count]))
        assert ("[too-few-rows]" in typed(row.command, status=status).out) == (count < 10)
    write(tmp_path / "training_messages.jsonl", messages(ECHO[:9]))
    assert "warning" in typed(row.command.replace("openai", "huggingface")).out


@page.does("Recommended minimum: 50-100 examples", "Optimal range: 200-500 examples")
def test_enough_rows(row: Row, typed: Typed, tmp_path: Path) -> None:
    least, code, below, at = (
        (50, "few-rows", "weak", "fair") if "50-100" in row.there else (200, "some-rows", "fair", "good")
    )
    for count, grade in ((least - 1, below), (least, at)):
        write(tmp_path / DATA, ECHO[:count])
        out = typed(row.command).out
        assert (code in out) == (count < least)
        assert (json.loads(out)["grade"] if "--json" in row.command else out.split("grade: ")[1].split()[0]) == grade


@page.does("Your dataset: 256 examples")
def test_the_sample(row: Row, typed: Typed) -> None:
    out = typed(row.command).out
    assert "256 rows" in out and "grade: good" in out
    assert sum("Deep Tree Echo" in item["output"] for item in ECHO) > 5


@page.does("Examples should be diverse and representative")
def test_diversity(row: Row, typed: Typed, tmp_path: Path) -> None:
    varied = json.loads(typed(row.command).out)["vocabulary"]
    write(tmp_path / DATA, [{"input": f"Tell me about {i['input']}", "output": ECHO[0]["output"]} for i in ECHO])
    dull = json.loads(typed(row.command).out)["vocabulary"]
    assert varied["distinct_openings"] > 0.8 > 0.1 > dull["distinct_openings"]
    assert varied["distinct_prompts"] == 1 and varied["distinct_2"] > 5 * dull["distinct_2"]


@page.does("Inputs should vary in structure and content")
def test_spread(row: Row, typed: Typed) -> None:
    out = typed(row.command).out
    found = re.search(r"prompt, characters +([\d.]+) +(\d+) .* (\d+)$", out, re.M)
    lengths = [len(item["input"]) for item in ECHO]
    assert found and found.groups() == (f"{sum(lengths) / 256:.1f}", str(min(lengths)), str(max(lengths)))
    assert "<svg" in Path("stats.html").read_text()


@page.does("Outputs should be consistent in style and format")
def test_consistency(row: Row, typed: Typed, tmp_path: Path) -> None:
    odd = [
        {"input": ECHO[0]["input"], "output": "None whatever."},
        {"input": "Help me with this letter.", "output": "As an AI language model, I cannot help with that request."},
    ]
    german = (
        "Danke, mir geht es heute sehr gut",
        "Das ist nicht so einfach",
        "Ich habe auch keine Zeit",
        "Wir sind schon da",
    )
    for n in range(12):
        text = f"{german[n % 4]}, und ich freue mich über deine Frage nach der Zahl {n}. Und wie ist es mit dir?"
        odd.append({"input": f"Wie ist es mit der Zahl {n}?", "output": text})
    codes = ("contradiction", "refusal", "language-mix")
    assert not [code for code in codes if f"[{code}]" in typed(row.command).out]
    write(tmp_path / DATA, [*ECHO, *odd])
    assert [code for code in codes if f"[{code}]" in typed(row.command).out] == list(codes)


@page.does("No duplicate or near-duplicate examples")
def test_duplicates(row: Row, typed: Typed, tmp_path: Path) -> None:
    near = {"input": ECHO[1]["input"] + " now", "output": ECHO[1]["output"] + " Yes."}
    write(tmp_path / DATA, [*ECHO, ECHO[0], near])
    out = typed(row.command).out
    assert re.search(rf"{DATA}:257: .*{DATA}:1\b.*\[duplicate\]", out) and "[near-duplicate]" in out
    assert lines("deduplicated.jsonl") == [*ECHO, near]


# ---- split


def parts(prefix: str = "parts/echo") -> tuple[list[Item], ...]:
    return tuple(lines(path) for side in ("train", "val", "test") if (path := Path(f"{prefix}_{side}.jsonl")).exists())


@page.does("Training set: 80% (~205 examples)", '`print(f"Training examples: {len(train_examples)}")`')
def test_eighty_twenty(row: Row, typed: Typed) -> None:
    prefix = shlex.split(row.command)[shlex.split(row.command).index("-o") + 1]
    assert typed(row.command).out == f"{prefix}_train.jsonl  204 rows\n{prefix}_val.jsonl  52 rows\n"
    assert list(map(len, parts(prefix))) == [int(256 * 0.8), 52]


@page.does("Validation set: 20% (~51 examples)")
def test_train_splits(row: Row, typed: Typed) -> None:
    typed(row.command)
    assert [len(lines(f"echo_run/{side}.jsonl")) for side in ("train", "valid")] == [204, 52]
    shutil.rmtree("echo_run")
    typed("tunesmith train --config here.toml --prepare-only")
    assert [len(lines(f"echo_run/{side}.jsonl")) for side in ("train", "valid", "test")] == [204, 26, 26]


@page.does("Why: helps detect overfitting during training")
def test_overfitting_is_said(row: Row, typed: Typed, echo_run: Path, kept: Path) -> None:
    assert re.search(
        r"overfitting: the validation loss rose from .* while the training loss fell", typed(row.command).out
    )
    shutil.rmtree(echo_run)
    shutil.copytree(kept / "healthy", echo_run)
    assert "overfitting" not in typed(row.command).out


@page.does("Why: provides unbiased performance metrics")
def test_validation_rows_are_refused(row: Row, typed: Typed, judged: Any, echo_run: Path) -> None:
    error = typed(row.command, "--dataset", "echo_run/data/valid.jsonl", status=None)
    assert error.code == 3 and "valid" in error.err
    assert judged.command.startswith(row.command) and judged.said["rows"] == 12
    assert len(lines(judged.folder / "echo_run/data/test.jsonl")) == 12


@page.does("Why: allows for early stopping", "Solution: use validation set for early stopping")
def test_early_stopping(row: Row, typed: Typed, account: Hostile, forty: None) -> None:
    typed(row.command, *OVERFIT, "--epochs", 6)
    done = events("echo_run", "done")[0]
    assert done["stopped_early"] and done["step"] < json.loads(Path("echo_run/run.json").read_text())["plan"]["steps"]
    assert (
        "patience means nothing to a service"
        in typed("tunesmith train --config openai.toml --patience 3", status=2).err
    )
    if row.there.startswith("Why"):
        typed(row.command, *OVERFIT, "--epochs", 5, "--patience", 0, "--output-dir", "to_the_end")
        assert not events("to_the_end", "done")[0]["stopped_early"]
        return
    found = [{"id": f"c{n}", "fine_tuned_model_checkpoint": f"ft:ckpt-step-{n}", "step_number": n} for n in (3, 2, 1)]
    answer = account.answer_to
    listed = {"object": "list", "data": found, "has_more": False}
    account.answer_to = lambda m, path, q, b: (200, listed) if path.endswith("/checkpoints") else answer(m, path, q, b)  # type: ignore[method-assign]
    typed("tunesmith train --config openai.toml --yes")
    kept = json.loads(Path("echo_hosted/checkpoints.json").read_text())
    assert [c["fine_tuned_model_checkpoint"] for c in kept] == ["ft:ckpt-step-3", "ft:ckpt-step-2", "ft:ckpt-step-1"]


@page.does("`random.seed(42)`", "`random.shuffle(examples)`")
def test_seed_and_order(row: Row, typed: Typed, tmp_path: Path) -> None:
    def split(*more: object) -> tuple[list[Item], ...]:
        shutil.rmtree("parts", ignore_errors=True)
        typed(row.command, *more)
        return parts()

    first = split()
    assert first == split() == split("--seed", 42) and split("--seed", 43) != first
    assert first == split("--method", "hash") if "hash" in row.command else first != split("--method", "hash")
    write(tmp_path / DATA, sorted(ECHO, key=lambda item: item["input"]))
    assert (first == split()) == ("hash" in row.command)


@page.does("`split_idx = int(len(examples) * 0.8)`")
def test_what_is_alike_stays_together(row: Row, typed: Typed, tmp_path: Path) -> None:
    assert json.loads(typed(row.command).out)["rows"] == {"train": 204, "valid": 52}
    shutil.rmtree("parts")
    again = [{"input": i["input"].upper(), "output": i["output"]} for i in ECHO[:100]]
    write(tmp_path / DATA, [*ECHO, *again])
    assert json.loads(typed(row.command).out)["leaks"] == []
    train, valid = ({item["messages"][0]["content"].lower() for item in side} for side in parts())
    assert not train & valid and len(train | valid) == 256


@page.does("`training_set.jsonl`", "`validation_set.jsonl`")
def test_names_of_the_parts(row: Row, typed: Typed) -> None:
    typed(page.rows["Training set: 80% (~205 examples)"].command)
    assert len(lines(row.code[0])) == (204 if "train" in row.there else 52)


@page.does("`test_set.jsonl`")
def test_three_parts(row: Row, typed: Typed) -> None:
    typed(row.command)
    train, valid, test = ({json.dumps(item) for item in side} for side in parts())
    assert (len(train), len(valid), len(test)) == (204, 26, 26) and not train & test and not valid & test


@page.does("`json.dumps(example, ensure_ascii=False)`")
def test_no_escapes(row: Row, typed: Typed) -> None:
    typed(row.command)
    assert lines("copy.jsonl") == ECHO
    text = Path("copy.jsonl").read_text(encoding="utf-8")
    assert "\\u" not in text and not text.isascii()


@page.does("Input length: min, max, avg", "Output length: min, max, avg")
def test_lengths(row: Row, typed: Typed) -> None:
    key, name = ("input", "prompt") if "Input" in row.there else ("output", "answer")
    lengths = [len(item[key]) for item in ECHO]
    found = json.loads(typed(row.command, "--json").out)
    spread = found[f"{name}_characters"]
    assert (spread["quantiles"][0], spread["quantiles"][-1]) == (min(lengths), max(lengths))
    assert spread["mean"] == pytest.approx(sum(lengths) / len(lengths)) and len(spread["quantiles"]) == 7
    assert (found["bill"] or {}).get("billed_tokens") == (None if key == "input" else 3 * 22517)


# ---- client, key and upload


@page.does("`pip install --upgrade openai`", "☐ OpenAI SDK installed and API key configured")
def test_package_and_key(row: Row, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    real = metadata.version

    def without(name: str) -> str:
        if name == "openai":
            raise metadata.PackageNotFoundError
        return real(name)

    before = typed(row.command).out
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(metadata, "version", without)
    after = typed(row.command).out
    assert KEY not in after
    if "--json" in row.command:
        told = [(found["packages"]["openai"], found["service_key"]) for found in map(json.loads, (before, after))]
        assert told == [(real("openai"), None), (None, "in OPENAI_API_KEY")]
    else:
        assert re.search(rf"openai +{re.escape(real('openai'))}$", before, re.M)
        assert re.search(r"openai +missing$", after, re.M)


@page.does("`os.environ['OPENAI_API_KEY'] = 'your-api-key-here'`")
def test_the_key_stays_outside(
    row: Row, typed: Typed, account: Hostile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    said = typed("tunesmith train --config openai.toml --base-url https://api.openai.com/v1 --yes", status=None)
    assert said.code != 0 and "OPENAI_API_KEY" in said.err
    (tmp_path / "key.txt").write_text(KEY)
    keys, client = [], service.openai.OpenAI
    monkeypatch.setattr(service.openai, "OpenAI", lambda **how: keys.append(how["api_key"]) or client(**how))
    typed(row.command)
    assert len(account.jobs) == 1 and set(keys) == {KEY}
    files = [path for path in Path("echo_hosted").rglob("*") if path.is_file()]
    assert len(files) > 8 and not [path for path in files if KEY.encode() in path.read_bytes()]
    said = typed(f"tunesmith plan --config openai.toml --api-key-file {KEY}", status=2)
    assert KEY not in said.out + said.err


@page.does("`client = OpenAI()`")
def test_the_plan_names_the_service(row: Row, typed: Typed, account: Hostile) -> None:
    out = typed(row.command).out
    assert f"service  {account.url} (auto: the variable OPENAI_BASE_URL)" in out and "on 2999-01-14" in out
    assert "204 train and 26 valid rows are sent, 26 test rows stay here" in out
    assert account.asked == [f"GET /models/{MINI}"]


@page.does("`client.files.create(file=open('training_set.jsonl', 'rb'), purpose='fine-tune')`")
def test_upload(row: Row, typed: Typed, account: Hostile, tmp_path: Path) -> None:
    write(tmp_path / DATA, [*ECHO, {"input": "", "output": "Nothing."}])
    assert "[empty-text]" in typed(row.command, status=3).err and not account.files
    write(tmp_path / DATA, ECHO)
    typed(row.command)
    typed("tunesmith train --resume echo_hosted --until files")
    assert len(account.files) == 2 and not account.jobs
    found = [json.loads(line) for line in account.contents["file-000"].splitlines()]
    assert len(found) == 204 and all(set(item) == {"messages"} for item in found)


@page.does("`client.files.create(file=open('validation_set.jsonl', 'rb'), purpose='fine-tune')`")
def test_validation_file_of_ones_own(row: Row, typed: Typed, account: Hostile) -> None:
    typed(page.rows["Training set: 80% (~205 examples)"].command)
    typed(row.command)
    valid = [json.loads(line) for line in account.contents["file-001"].splitlines()]
    assert {json.dumps(item) for item in valid} == {json.dumps(item) for item in parts()[1]}


@page.does('`print(f"Training file uploaded: {training_file.id}")`')
def test_ids(row: Row, typed: Typed, account: Hostile) -> None:
    typed("tunesmith train --config openai.toml --until files --yes")
    out = typed(row.command).out
    assert re.search(r"^training_file +file-000$", out, re.M) and re.search(r"^validation_file +file-001$", out, re.M)
    assert "ftjob" not in out
    typed("tunesmith train --resume echo_hosted --until job")
    assert re.search(r"^job +ftjob-000$", typed(row.command).out, re.M)


@page.does('`print(f"Status: {training_file.status}")`')
def test_status(row: Row, typed: Typed, account: Hostile) -> None:
    typed("tunesmith train --config openai.toml --until job --yes")
    assert json.loads(typed(row.command).out)["status"] == "queued"
    typed("tunesmith runs watch echo_hosted")
    assert json.loads(typed(row.command).out)["status"] == "succeeded"


@page.does("`wait_for_file_processing(file_id)`")
def test_no_wait_for_files(row: Row, typed: Typed, account: Hostile) -> None:
    typed("tunesmith train --config openai.toml --until files --yes")
    assert not account.jobs
    typed(row.command)
    assert len(account.jobs) == 1 and not account.count("GET /files")


def failing(there: Hostile) -> None:
    there.script = [("validating_files", []), ("failed", ["The job failed"])]
    message = "Invalid file format. Example 3 contains an extra key"
    there.error = {"code": "invalid_file_format", "message": message, "param": "training_file"}


@page.does("`file_status.status == 'error'`", "☐ Progress monitored regularly")
def test_a_job_that_fails(row: Row, typed: Typed, account: Hostile) -> None:
    failing(account)
    typed("tunesmith train --config openai.toml --until job --yes")
    error = typed(row.command, status=3).err
    assert "Example 3 contains an extra key [invalid_file_format]" in error and "data check" in error
    assert {found["status"] for found in account.files.values()} == {"processed"}  # the file says nothing of it
    account.script = [("succeeded", [])]
    typed("tunesmith train --config openai.toml --until job --yes --output-dir another")
    assert "succeeded" in typed(row.command.replace("echo_hosted", "another")).out


@page.does('`max_wait=300`, "Timeout waiting for file processing"')
def test_patience(row: Row, typed: Typed, account: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    account.fault("POST /files", "status", 2, status=503)
    account.fault("GET /fine_tuning/jobs/ftjob-000", "status", 2, status=503)
    typed(row.command)
    assert len(account.files) == 2 and all(fault["times"] == 0 for fault in account.faults) and PATIENCE == 600
    monkeypatch.setattr(service, "PATIENCE", 0.1)
    account.fault("GET /fine_tuning/jobs/.*", "status", 99, status=503)
    said = typed(row.command, "--output-dir", "another", status=1)
    assert "follow it again: tunesmith runs watch another" in said.err


# ---- base model


@page.does("`gpt-4o-mini-2024-07-18`: high quality, cost-effective", "`gpt-4o-2024-08-06`: maximum quality")
def test_models_that_end(row: Row, typed: Typed, account: Hostile) -> None:
    name = re.findall(r"gpt-[\w.-]+\d", row.command)[0]
    ends = str(stats.hosted()["models"][name]["ends"])
    assert ends in row.why or ends == "2027-01-14"
    account.models[name] = {"shutdown_date": ends}
    if date.today() < stats.hosted()["models"][name]["ends"]:
        assert f"the service ends {name}, and what is tuned from it, on {ends}" in typed(row.command).out
    account.models[name] = {"shutdown_date": "2020-01-01"}
    assert "the service has ended this model on 2020-01-01" in typed(row.command, status=2).err


@page.does("`gpt-3.5-turbo`: budget-friendly")
def test_a_model_that_is_gone(row: Row, typed: Typed) -> None:
    out = typed(row.command, "--price", 8).out
    assert "gpt-3.5-turbo-0125: " in out and "this model on 2026-10-23" in out
    models = stats.hosted()["models"]
    assert models["gpt-3.5-turbo-0125"]["train"] > models[MINI]["train"]


@page.does("Speed: fast, medium, very fast")
def test_speed(row: Row, typed: Typed, forty: None) -> None:
    assert re.search(r"^time +\d+:\d\d at most on this machine \([\d.]+ s a step\)", typed(row.command).out, re.M)


@page.does(
    "Cost: medium, high, low",
    "Solution: use `gpt-4o-mini` instead of `gpt-4o`",
    "Link: pricing",
    "High per-token costs; slow response times; budget concerns",
)
def test_cost(row: Row, typed: Typed) -> None:
    price = float(row.command.rpartition(" ")[2])
    bill = json.loads(typed(row.command, "--json").out)["bill"]
    assert (
        bill["cost"] == pytest.approx(bill["tokens_per_epoch"] * bill["epochs"] * price / 1e6) and bill["epochs"] == 3
    )
    known = stats.hosted()
    assert known["models"]["gpt-4o-2024-08-06"]["train"] / known["models"][MINI]["train"] > 8
    old = date.fromordinal(known["as_of"].toordinal() + 121)
    assert stats.bill([100] * 20, MINI, today=old).cost is None
    assert stats.bill([100] * 20, MINI, price, today=old).cost is not None


@page.does("Recommendation: start with `gpt-4o-mini-2024-07-18`")
def test_a_model_of_ones_own(
    row: Row, typed: Typed, tiny: Path, hub: Callable[[str, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.costs import Question
    from tunesmith.local import backend as local
    from tunesmith.local import probe

    def here(prepared: Any) -> tuple[Any, Any]:
        """The probe without a process of its own."""
        plan, tokens = prepared.plan, prepared.tokens["train"]
        question = Question(plan.model.folder, plan.recipe, tokens.lengths().tolist(), 0.8, plan.steps)
        return question, probe.answer(question)

    monkeypatch.setattr(probe, "BUDGET", 0.1)
    monkeypatch.setattr(local, "probe", here)
    hub("Qwen/Qwen2.5-1.5B-Instruct", tiny)
    out = typed(row.command).out
    assert "Qwen/Qwen2.5-1.5B-Instruct: LlamaForCausalLM, 0.3M parameters" in out
    assert re.search(r"memory +about \d+ MB of \d+ MB that are free\n", out) and re.search(
        r"time +\d+:\d\d at most", out
    )


# ---- the job


@page.does("`client.fine_tuning.jobs.create(…)`")
def test_a_job_is_made_once(row: Row, typed: Typed, account: Hostile) -> None:
    account.fault("POST /fine_tuning/jobs", "cut")
    typed(row.command)
    assert len(account.jobs) == 1 and account.count("POST /fine_tuning/jobs") == 1
    assert json.loads(Path("echo_hosted/remote.json").read_text())["job"] == "ftjob-000"


@page.does("`training_file=training_file.id`")
def test_training_file(row: Row, typed: Typed, account: Hostile) -> None:
    typed(row.command)
    assert len(sent(account)) == 204 and order(account)["training_file"] == "file-000"


@page.does("`validation_file=validation_file.id`")
def test_validation_share(row: Row, typed: Typed, account: Hostile) -> None:
    typed(row.command)
    assert len(sent(account, "validation_file")) == 52
    typed(row.command, "--valid-fraction", 0.02, "--output-dir", "few")
    assert order(account)["validation_file"] is None and len(account.files) == 3


@page.does('`model="gpt-4o-mini-2024-07-18"`', "Alternative: `gpt-4o-2024-08-06` (if budget allows)")
def test_which_model(row: Row, typed: Typed, account: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosted, "OPENAI", account.url)  # short names are OpenAI's own
    typed(row.command)
    assert order(account)["model"] == (MINI if "mini" in row.command else "gpt-4o-2024-08-06")


@page.does(
    '`hyperparameters={"n_epochs": "auto"}`',
    '`"n_epochs": 3`',
    "Batch size: manual configuration not typically needed",
    'Learning rate multiplier, default `"auto"` (typically 0.05-0.2)',
    "Manual range: 0.02-2.0",
    'Conservative approach: `{"n_epochs": "auto"}`',
    'Alternative: `{"n_epochs": 3, "learning_rate_multiplier": "auto"}`',
)
def test_hyperparameters(row: Row, typed: Typed, account: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    words = shlex.split(row.command)
    for name, flags in {
        "n_epochs": ("--epochs", "--n-epochs"),
        "batch_size": ("--batch-size",),
        "learning_rate_multiplier": ("--learning-rate-multiplier",),
    }.items():
        for flag in flags:
            if flag in words and words[words.index(flag) + 1] != "auto":
                wanted[name] = json.loads(words[words.index(flag) + 1])
    create = account._create

    def resolving(body: Item) -> Item:
        """As a service does, which chooses what was left to it."""
        job = create(body)
        asked_for.update(body["method"]["supervised"]["hyperparameters"])
        chosen = {"n_epochs": 3, "batch_size": 1, "learning_rate_multiplier": 1.8}
        account.jobs[job["id"]]["method"]["supervised"]["hyperparameters"] = {
            name: chosen[name] if value == "auto" else value for name, value in asked_for.items()
        }
        return job

    asked_for: Item = {}
    monkeypatch.setattr(account, "_create", resolving)
    typed(row.command)
    assert asked_for == wanted and order(account)["hyperparameters"] == {}  # the deprecated key is not sent
    resolved = json.loads(Path("echo_hosted/model_info.json").read_text())["hyperparameters"]
    assert "auto" not in resolved.values() and resolved["learning_rate_multiplier"] in (1.8, 2.5)
    if flag := {"Batch": "--batch-size", "Manual": "--learning-rate-multiplier"}.get(row.there.split()[0]):
        refused = 257 if flag == "--batch-size" else 0
        assert (
            "expected" in (said := typed(row.command, flag, refused, "--output-dir", "b", status=2).err)
            or "1 to 256" in said
        )


@page.does('`suffix="deep-tree-echo-v1"`')
def test_suffix(row: Row, typed: Typed, account: Hostile) -> None:
    assert "take deep-tree-echo" in typed(row.command, "--suffix", "Deep_Tree Echo", status=2).err and not account.asked
    typed(row.command)
    assert order(account)["suffix"] == "deep-tree-echo-v2"


@page.does('`print(f"Fine-tuning job created: {fine_tune_job.id}")`')
def test_listed(row: Row, typed: Typed, echo_hosted: Hostile, kept: Path) -> None:
    shutil.copytree(kept / "healthy", "echo_run")
    out = typed(row.command).out
    assert re.search(rf"^echo_hosted +succeeded +3/3 +{MINI} +supervised", out, re.M)
    assert re.search(r"^echo_run +succeeded ", out, re.M)


@page.does("`monitor_fine_tuning(job_id)`")
def test_watching_goes_on(row: Row, typed: Typed, account: Hostile) -> None:
    account.script = [("running", [step(1, 3)]), ("paused", [])]
    typed("tunesmith train --config openai.toml --until job --yes")
    account.fault("GET /fine_tuning/jobs/ftjob-000", "drop", 2)
    said = typed(row.command, status=130)
    assert "the job is paused at the service" in said.err and "tunesmith runs resume echo_hosted" in said.err
    account.script = [("succeeded", [step(2, 3)])]
    account.jobs["ftjob-000"]["looks"] = 0
    time.sleep(0.05)  # it is asked again after NEAR
    typed(row.command)
    assert [event["step"] for event in events("echo_hosted", "step")] == [1, 2]


@page.does("`job.status == 'succeeded'`")
def test_success(row: Row, typed: Typed, account: Hostile) -> None:
    typed("tunesmith train --config openai.toml --until job --yes")
    found = json.loads(typed(row.command).out)
    assert (found["status"], found["fine_tuned_model"]) == ("succeeded", f"ft:{MINI}:org::000")


@page.does("`job.status in ['failed', 'cancelled']`")
def test_cancelled(row: Row, typed: Typed, account: Hostile) -> None:
    account.script = [("running", [])]
    typed("tunesmith train --config openai.toml --until job --yes")
    assert typed(row.command).out == "echo_hosted  cancelled\n" and order(account)["status"] == "cancelled"
    assert typed("tunesmith runs watch echo_hosted", status=None).code != 0


@page.does("`if job.error: print(job.error)`")
def test_the_error_is_kept(row: Row, typed: Typed, account: Hostile) -> None:
    failing(account)
    typed("tunesmith train --config openai.toml --yes", status=3)
    assert "Example 3 contains an extra key [invalid_file_format]" in typed(row.command).out


@page.does("`job.trained_tokens`", "Link: usage dashboard")
def test_trained_tokens(row: Row, typed: Typed, account: Hostile) -> None:
    said = typed("tunesmith train --config openai.toml --yes")
    info = json.loads(Path("echo_hosted/model_info.json").read_text())
    assert f"1234 tokens (the plan said {info['billed_tokens_estimated']})" in said.err
    found = json.loads(typed(row.command).out) if row.code[0].startswith("tunesmith") else info
    assert found["tokens" if found is not info else "trained_tokens"] == 1234
    if found is info:
        assert row.code == ["echo_hosted/model_info.json", "trained_tokens", "billed_tokens_estimated"]


@page.does("`time.sleep(30)`")
def test_how_often_it_asks(row: Row, typed: Typed, account: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (EVERY, NEAR) == (10, 0.5)
    monkeypatch.setattr(backend, "NEAR", 0.3)
    typed("tunesmith train --config openai.toml --until job --yes")
    began = time.monotonic()
    typed(row.command)
    assert time.monotonic() - began >= 3 * 0.8 * 0.3 and account.asked.count("GET /fine_tuning/jobs/ftjob-000") == 4


# ---- hyperparameters


@page.does('Epochs (`n_epochs`), default `"auto"`', 'Initial hyperparameters: `"n_epochs": 3`')
def test_planned_epochs(row: Row, typed: Typed) -> None:
    out, n = typed(row.command).out, 10 if "auto" in row.there else 3
    assert f"steps    {51 * n} (51 an epoch, {n} epochs at most)" in out
    assert ("few rows need more passes; early stopping on the validation rows ends it sooner" in out) == (n == 10)


@page.does("Manual range: 1-50")
def test_range_of_epochs(row: Row, typed: Typed, tiny: Path) -> None:
    assert "epochs is 51; services take 1 to 50" in typed(row.command, status=2).err
    typed(row.command, "--epochs", 50)
    assert "51 epochs at most" in typed("tunesmith plan --config here.toml --no-probe --epochs 51").out


@page.does(
    'Start with `"auto"` or 3-4 epochs',
    "If underfitting: increase to 5-8 epochs",
    "If overfitting: decrease to 1-2 epochs",
    "Solution: reduce number of epochs (1-2 instead of 3-4)",
    "Solution: increase number of epochs (try 5-8)",
    "Solution: use fewer epochs (1-2)",
)
def test_epochs(row: Row, typed: Typed, tmp_path: Path) -> None:
    write(tmp_path / DATA, ECHO[:24])
    typed(row.command, "--patience", 0, "--batch-size", 8)
    n = int(row.command.rpartition(" ")[2])
    assert recipe()["epochs"] == n and events("echo_run", "step")[-1]["epoch"] == pytest.approx(n)
    assert Path("echo_run/best_model/model.safetensors").exists()


@page.does("Formula: `epochs = 0.2 * (target_token_count / actual_token_count)`")
def test_the_rule_counts_rows(row: Row, typed: Typed) -> None:
    out = typed(row.command).out
    assert "  estimate " in out and "x 3 epochs" in out
    assert [stats.epochs(n) for n in (10, 33, 34, 205, 8333, 8334, 25_000)] == [10, 3, 3, 3, 3, 2, 1]


@page.does("Formula: capped between 1 and 25")
def test_the_rule_is_capped(row: Row, typed: Typed, tmp_path: Path) -> None:
    for count, wanted in ((3, 25), (10, 10), (256, 3)):
        write(tmp_path / DATA, ECHO[:count])
        assert json.loads(typed(row.command).out)["bill"]["epochs"] == wanted
    found = [stats.epochs(n) for n in range(1, 30_000)]
    assert (min(found), max(found)) == (1, 25) and 25_000 // 25_001 == 0 < stats.epochs(25_001)
    write(tmp_path / "training_messages.jsonl", messages(ECHO[:9]))
    refused = typed("tunesmith data check training_messages.jsonl --provider openai", status=3)
    assert "[too-few-rows]" in refused.out


@page.does("Batch size: auto-configured as ~0.2% of training examples, capped at 256")
def test_batch_size(row: Row, typed: Typed) -> None:
    found = json.loads(typed(row.command).out)
    assert found["recipe"]["batch_size"] == "auto" and (found["bill"]["batch_size"], found["steps"]) == (1, 3 * 204)
    assert json.loads(typed(row.command, "--batch-size", 2).out)["steps"] == 3 * 102
    assert [stats.batch_size(n) for n in (256, 1000, 300_000)] == [1, 2, 256]


@page.does("If training is unstable: lower to 0.02-0.1")
def test_finding_a_rate(row: Row, typed: Typed, tiny: Path, account: Hostile, forty: None) -> None:
    out = typed(row.command, "--model", tiny, "--trial-steps", 1).out
    assert re.search(r"(take|perhaps): --learning-rate [\d.e-]+ ", out) and out.count("e-0") > 5
    typed("tunesmith train --config openai.toml --learning-rate-multiplier 0.5 --yes --dataset", "echo")
    assert hyper(account)["learning_rate_multiplier"] == 0.5


@page.does(
    "If training is too slow: increase to 0.3-0.5",
    "Solution: consider using a smaller base model (more adaptable)",
)
def test_learning_rate(row: Row, typed: Typed, forty: None) -> None:
    typed(row.command, "--max-steps", 2)
    rate = float(row.command.rpartition(" ")[2])
    assert recipe()["learning_rate"] == rate and max(e["lr"] for e in events("echo_run", "step")) == rate
    said = typed("tunesmith plan --config here.toml --output-dir b --learning-rate-multiplier 0.3", status=2)
    assert "--learning-rate is the rate itself" in said.err
    said = typed("tunesmith plan --config openai.toml --learning-rate 1e-3", status=2)
    assert "--learning-rate-multiplier is a factor on the service's own rate" in said.err


# ---- metrics during training


def curve(folder: Path, losses: list[float], valid: list[float]) -> Run:
    """A run as its log tells it."""
    known = {"provider": "huggingface", "recipe": Recipe(model="starter", dataset=DATA), "plan": {"steps": len(losses)}}
    with create(folder, {**known, "created": "", "origin": {}, "versions": {}, "data_hashes": {}}) as run:
        pass
    run.append("eval", step=0, epoch=0.0, loss=5.0, best=True)
    for number, loss in enumerate(losses, 1):
        run.append("step", step=number, loss=loss, epoch=number / 4)
    for number, loss in enumerate(valid, 1):
        run.append("eval", step=4 * number, epoch=float(number), loss=loss, best=loss < 5)
    return run


@page.does("`client.fine_tuning.jobs.retrieve(fine_tune_job.id)`")
def test_show(row: Row, typed: Typed, echo_run: Path, echo_hosted: Hostile) -> None:
    for out in (typed(row.command).out, typed(row.command.replace("echo_run", "echo_hosted")).out):
        assert re.search(r"^status +succeeded$", out, re.M) and "○ validation" in out
        assert "settings given or worked out" in out


@page.does("`client.fine_tuning.jobs.list_events(fine_tuning_job_id=…, limit=50)`")
def test_all_events(row: Row, typed: Typed, account: Hostile) -> None:
    account.script = [("running", [f"line {n}" for n in range(130)])]
    typed("tunesmith train --config openai.toml --until job --yes")
    assert re.findall(r"line (\d+)$", typed(row.command).out, re.M) == [str(n) for n in range(130)]
    assert account.count("GET /fine_tuning/jobs/ftjob-000/events") > 1


@page.does('`print(f"{event.created_at}: {event.message}")`')
def test_events_as_json(row: Row, typed: Typed, echo_hosted: Hostile) -> None:
    found = [json.loads(line) for line in typed(row.command).out.splitlines()]
    assert {"time", "message"} <= set(next(e for e in found if e.get("message") == "Fine-tuning job started"))
    assert [(e["step"], e["loss"]) for e in found if e["type"] == "step"] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


@page.does("Training loss: should decrease over time", "Validation loss: should decrease and stabilize")
def test_losses(row: Row, typed: Typed, echo_run: Path) -> None:
    kind = row.command.rpartition(" ")[2]
    found = typed(row.command).out.splitlines()
    logged = events("echo_run", kind)
    assert len(found) == len(logged) > 4 and all(f"  {kind} " in line and "loss " in line for line in found)
    assert logged[0]["step"] == (1 if kind == "step" else 0) and logged[-1]["loss"] < logged[0]["loss"]


@page.does(
    "If training loss increases, training is unstable",
    "☐ Training metrics reviewed",
    "Pitfall 2: underfitting",
    "High training and validation loss; poor performance on both training and test data",
)
def test_curves(row: Row, typed: Typed, tmp_path: Path) -> None:
    fell, rose = [5.0, 4.0, 4.5, 3.0, 2.0, 2.5, 1.0, 1.0], [5.0, 4.0, 6.0, 6.0, 7.0, 7.0, 8.0, 8.0]
    if "--json" not in row.command:
        for valid, wanted in (([4.98, 4.96], True), ([3.0, 2.99], False)):
            run = curve(tmp_path / "echo_run", fell, valid)
            assert f"     8  {valid[-1]:.4f}" in typed(row.command).out
            found = diagnose(Evidence("", {}, run.metrics("step"), run.metrics("eval")))
            assert ("underfitting" in [d.name for d in found]) == wanted
            shutil.rmtree(tmp_path / "echo_run")
        return
    curve(tmp_path / "echo_run", fell, [3.0, 2.0])  # single steps waver
    assert names(typed(row.command)) == []
    shutil.rmtree(tmp_path / "echo_run")
    curve(tmp_path / "echo_run", rose, [6.0, 7.0])
    assert names(typed(row.command)) == ["diverged"]


@page.does("Validation loss increases while training loss decreases: overfitting")
def test_overfitting_events(row: Row, typed: Typed, echo_run: Path, kept: Path) -> None:
    assert re.search(
        r"the validation loss rises since step \d+ .* while the training loss falls", typed(row.command).out
    )
    assert not events(str(kept / "healthy"), "overfitting")


@page.does("Validation loss plateaus early: may need more epochs")
def test_plateau(row: Row, typed: Typed, forty: None) -> None:
    level = ("--learning-rate", 1e-6, "--epochs", 4, "--valid-fraction", 0.25, "--batch-size", 10)
    typed(row.command, *level)
    assert events("echo_run", "done")[0]["stopped_early"] and events("echo_run", "eval")[-1]["epoch"] < 4
    typed(row.command, *level, "--min-gain", 0, "--output-dir", "any_gain")
    assert not events("any_gain", "done")[0]["stopped_early"]


@page.does("Token accuracy")
def test_token_accuracy(row: Row, typed: Typed, judged: Any, echo_hosted: Hostile) -> None:
    typed(row.command, "--max-steps", 2)
    assert all(0 <= event["accuracy"] <= 1 for event in events("echo_run", "step"))
    typed("tunesmith train --config here.toml --max-steps 2 --output-dir without")
    assert not [event for event in events("without", "step") if "accuracy" in event]
    assert events("echo_hosted", "step")[0]["accuracy"] == 0.5
    assert "token accuracy" in [m["metric"] for m in judged.said["metrics"]]


@page.does("Typical range: 70-95%")
def test_accuracy_beside_the_base(row: Row, judged: Any) -> None:
    assert row.command == judged.command
    found = next(m for m in judged.said["metrics"] if m["metric"] == "token accuracy")
    assert 0 <= found["base"] < found["tuned"] <= 1 and found["low"] <= found["difference"] <= found["high"]


@page.does("Large gap between training and validation metrics")
def test_gap(row: Row, typed: Typed, echo_run: Path) -> None:
    found = json.loads(typed(row.command).out)
    assert found["best_valid_loss"] == min(e["loss"] for e in events("echo_run", "eval"))
    assert found["final_train_loss"] == events("echo_run", "step")[-1]["loss"] < found["best_valid_loss"]


# ---- after the training


@page.does("`test_model(model_name, test_input)`", "`temperature=0.7`")
def test_chat(row: Row, typed: Typed, echo_run: Path, echo_hosted: Hostile) -> None:
    first, again, other = (typed(row.command, "--max-tokens", 12, "--seed", seed).out for seed in (1, 1, 2))
    assert first == again and (first != other) == ("--temperature" in row.command)
    if row.there != "`temperature=0.7`":
        at_service = typed(row.command.replace("echo_run", "echo_hosted")).out
        assert at_service == "I am Deep Tree Echo.\n"


@page.does("`max_tokens=500`")
def test_max_tokens(row: Row, typed: Typed, echo_hosted: Hostile) -> None:
    bodies: list[Item] = []
    echo_hosted.answer = lambda body: bodies.append(body) or "Well."  # type: ignore[func-returns-value]
    assert typed(row.command).out == "Well.\n"
    typed(row.command.partition(" --max")[0])
    assert [body["max_completion_tokens"] for body in bodies] == [500, 256]
    assert not [body for body in bodies if "max_tokens" in body]


@page.does("`compare_models(base_model, fine_tuned_model, test_input)`", "☐ Performance compared to base model")
def test_side_by_side(row: Row, typed: Typed, echo_run: Path, echo_hosted: Hostile) -> None:
    out = typed(row.command, "--max-tokens", 12).out
    one, other = (shlex.split(row.command)[2], shlex.split(row.command)[4])
    assert out.startswith(f"── {one}\n") and f"\n── {other}\n" in out
    if other == MINI:
        assert "I am Deep Tree Echo." in out and "You said: Who are you?" in out


@page.does("Evaluate on test set", "`accuracy = (correct / total) * 100`", "☐ Evaluation on test set completed")
def test_verdict(row: Row, typed: Typed, echo_hosted: Hostile) -> None:
    def verdict(*more: object) -> str:
        out = typed(row.command, *more).out
        return json.loads(out)["verdict"] if "--json" in row.command else re.findall(r"^verdict: (\w+)", out, re.M)[0]

    assert verdict("--samples", 0, "--rows", 12) == "better"
    assert Path("echo_hosted/report.html").exists()
    echo_hosted.answer = lambda body: f"You said: {asked(body)}"
    shutil.rmtree("echo_hosted/evaluation")
    assert verdict("--samples", 0, "--rows", 12).startswith("cannot")
    said = typed(row.command, "--dataset", "echo_hosted/data/train.jsonl", status=None)
    assert said.code == 3 and "train" in said.err


@page.does("`example['output'].lower() in response.lower() or …`")
def test_contains(row: Row, typed: Typed, echo_hosted: Hostile, tmp_path: Path) -> None:
    (tmp_path / "metrics.py").write_text(page.block("metrics.py", "python"))
    echo_hosted.answer = lambda body: persona(body) if body["model"].startswith("ft:") else ""
    out = typed(row.command, "--samples", 0).out
    assert re.search(r"^ +contains +0.0000 +1.0000 ", out, re.M)  # the guide's rule gives the empty answers 100 %
    assert re.search(r"^verdict: better, on 26 held-out rows, by contains$", out, re.M)
    assert "by chrF" in typed("tunesmith evaluate echo_hosted", *SHORT).out


KEYS = (
    "fine_tuned_model",
    "base_model",
    "training_file",
    "validation_file",
    "job_id",
    "training_examples",
    "validation_examples",
    "created_at",
    "finished_at",
)


@page.does("`model_info.json`", *(f'`"{key}"`' for key in KEYS))
def test_model_info(row: Row, typed: Typed, echo_run: Path, echo_hosted: Hostile, tiny: Path, kept: Path) -> None:
    info = json.loads(Path(row.code[0]).read_text())
    there = json.loads(Path("echo_hosted/model_info.json").read_text())
    if not row.there.startswith('`"'):
        assert set(KEYS) <= set(info) and set(KEYS) <= set(there)
        return
    key = row.there.strip('`"')
    assert row.code[1] == key
    plan = json.loads((echo_run / "run.json").read_text())
    here, hosted = {
        "fine_tuned_model": (str(kept / "echo_run/best_model"), f"ft:{MINI}:org::000"),
        "base_model": (str(tiny), MINI),
        "training_file": (DATA, "file-000"),
        "validation_file": (None, "file-001"),
        "job_id": ("echo_run", "ftjob-000"),
        "training_examples": (36, len(lines("echo_hosted/upload/train.jsonl"))),
        "validation_examples": (12, len(lines("echo_hosted/upload/valid.jsonl"))),
        "created_at": (plan["created"], 100),
        "finished_at": (info["finished_at"], 200),
    }[key]
    assert (info[key], there[key]) == (here, hosted)
    if key == "finished_at":
        assert info[key] >= info["created_at"]
    if key == "validation_file":
        write(Path("valid.jsonl"), ECHO[100:120])
        typed("tunesmith train --config here.toml --max-steps 2 --output-dir b --valid-dataset valid.jsonl")
        assert json.loads(Path("b/model_info.json").read_text())[key] == "valid.jsonl"


# ---- pitfalls


@page.does("Pitfall 1: overfitting")
def test_pitfall_overfitting(row: Row, judged: Any) -> None:
    assert row.command == judged.command
    found = next(d for d in judged.said["diagnoses"] if d["name"] == "overfitting")
    assert re.search(r"rose from [\d.]+ at step \d+", found["evidence"]) and re.search(r"--epochs \d", found["fix"])
    assert "overfitting" in (judged.folder / "echo_run/report.html").read_text()


@page.does("Perfect performance on training examples")
def test_memorisation(row: Row, judged: Any) -> None:
    assert (judged.folder / row.code[0]).exists() and judged.said["training_rows"]["asked"] >= 8
    for recited, wanted in ((9, ["memorisation"]), (3, [])):
        report = RowReport(60, 60, 12, recited, None, None, [])
        assert [d.name for d in diagnose(Evidence("better", {}, training_rows=report))] == wanted


@pytest.fixture
def both(typed: Typed, tmp_path: Path) -> Path:
    """What the page has made of the data and of 24 more rows."""
    write(
        tmp_path / "more.jsonl", [{"input": f"What of {n}?", "output": f"It is {n * n}, I think."} for n in range(24)]
    )
    typed(page.rows["Solution: add more diverse training examples"].command)
    return tmp_path / "both.jsonl"


@page.does("Solution: add more diverse training examples")
def test_more_rows(row: Row, typed: Typed, tmp_path: Path) -> None:
    write(tmp_path / "more.jsonl", [{"input": "Is it new?", "output": "Yes, this one is."}, ECHO[0]])
    typed(row.command)
    assert len(lines("both.jsonl")) == 258
    assert "[duplicate]" in typed("tunesmith data check both.jsonl").out


@page.does("Solution: increase regularization (if available)")
def test_regularisation(row: Row, typed: Typed, account: Hostile, forty: None) -> None:
    typed(row.command, "--max-steps", 2)
    assert json.loads(Path("echo_run/best_model/adapter_config.json").read_text())["lora_dropout"] == 0.1
    for flag in ("--weight-decay", "--lora-dropout"):
        typed(row.command, "--max-steps", 2, flag, 0, "--output-dir", f"without{flag}")
    hashes = {
        weights(Path(run, "final_model")) for run in ("echo_run", "without--weight-decay", "without--lora-dropout")
    }
    assert len(hashes) == 3
    assert "means nothing to a service" in typed("tunesmith plan --config openai.toml --weight-decay 0.1", status=2).err


@page.does("Solution: ensure training data quality and consistency")
def test_rows_that_are_marked(row: Row, typed: Typed, judged: Any, echo_run: Path) -> None:
    shutil.copytree(judged.folder / "echo_run/evaluation", echo_run / "evaluation")
    marked = [r for r in judged.said["training_rows"]["findings"] if "contradicting" in r["codes"]]
    typed(row.command)
    left = {item["messages"][0]["content"] for item in lines("clean.jsonl")}
    assert marked and len(left) == 60 - len(marked) and not left & {r["prompt"] for r in marked}


@page.does("Check that examples are representative of desired behavior")
def test_preview(row: Row, typed: Typed) -> None:
    out = typed(row.command).out
    assert out.count(f"{DATA}:") == 5 and out.count("⟦") == 5
    learnt = "".join(line.removeprefix("  | ") for line in out.split("⟦")[1].split("⟧")[0].splitlines(keepends=True))
    assert learnt == ECHO[0]["output"] + "<|im_end|>"


@page.does("Pitfall 3: inconsistent outputs")
def test_inconsistent(row: Row, typed: Typed, echo_hosted: Hostile) -> None:
    assert "inconsistent outputs" not in typed(row.command, "--rows", 16).out
    shutil.rmtree("echo_hosted/evaluation")
    answers, draw = [item["output"] for item in ECHO], random.Random(0)
    echo_hosted.answer = lambda b: draw.choice(answers) if b["model"].startswith("ft:") else f"You said: {asked(b)}"
    assert "inconsistent outputs" in typed(row.command, "--rows", 16).out


@page.does("Some responses are excellent, others are poor")
def test_good_and_poor_answers(row: Row, typed: Typed, echo_hosted: Hostile) -> None:
    from tunesmith.evaluation.instruct import chrf

    poor = {item["input"] for item in ECHO[::2]}
    echo_hosted.answer = lambda body: "No." if asked(body) in poor else persona(body)
    typed("tunesmith evaluate echo_hosted", "--samples", 0)
    references = [item["messages"][1]["content"] for item in lines("echo_hosted/data/test.jsonl")]
    asked_of = [item["messages"][0]["content"] for item in lines("echo_hosted/data/test.jsonl")]
    answers = [item["tuned"]["said"]["text"] for item in lines(row.code[0])]
    found = {ask: chrf(answer, ref) for ask, answer, ref in zip(asked_of, answers, references, strict=True)}
    assert {ask for ask, figure in found.items() if figure < 50} == poor & set(asked_of)
    assert 5 < len(poor & set(asked_of)) < len(found) == 26


@page.does("Inconsistent tone or formatting")
def test_a_mixed_tone(row: Row, typed: Typed, echo_hosted: Hostile) -> None:
    other = "The answer to that depends on the words, and no short reply would help those who want to know what is meant by them."
    odd: set[str] = set()
    echo_hosted.answer = lambda body: (
        persona(body) if body["model"].startswith("ft:") and asked(body) not in odd else other
    )

    def style() -> float:
        found = json.loads(typed(row.command, "--samples", 0).out)["metrics"]
        return float(next(m for m in found if m["metric"] == row.code[1])["tuned"])

    one_tone = style()
    odd.update(item["input"] for item in ECHO[::2])
    assert 0.2 < style() < one_tone - 0.2


@page.does('Model sometimes "forgets" the character')
def test_identity(row: Row, typed: Typed, echo_hosted: Hostile) -> None:
    said = "asked who it is, the tuned model says “Deep Tree Echo” in {} of 8 answers, the base in 0"
    assert said.format(8) in typed(row.command, *SHORT).out
    shutil.rmtree("echo_hosted/evaluation")
    echo_hosted.answer = lambda body: "I am a helper."
    assert said.format(0) in typed(row.command, *SHORT).out


@page.does(
    "Solution: ensure training data has consistent output format",
    "Verify consistent use of code-like syntax, e.g. `{{root.reservoir.fit()}}`",
)
def test_patterns(row: Row, typed: Typed, echo_hosted: Hostile) -> None:
    pattern = shlex.split(row.command)[-1].removeprefix("re:")
    echo_hosted.answer = lambda body: persona(body) if body["model"].startswith("ft:") else "no"
    out = typed(row.command, "--samples", 0).out
    references = [item["messages"][1]["content"] for item in lines("echo_hosted/data/test.jsonl")]
    share = sum(bool(re.search(pattern, text)) for text in references) / len(references)
    found = re.search(rf"^ +matches {re.escape(pattern)} +0\.0000 +([\d.]+) ", out, re.M)
    assert found and float(found[1]) == pytest.approx(share, abs=1e-4) and share > 0.1
    assert f", by matches {pattern}\n" in out


@page.does("Solution: add more examples covering edge cases")
def test_no_row_changes_sides(row: Row, typed: Typed, both: Path) -> None:
    typed(row.command.replace("both.jsonl", DATA).replace("grown/", "old/"))
    typed(row.command)
    old, grown = (
        [{item["messages"][0]["content"] for item in side} for side in parts(p)] for p in ("old/echo", "grown/echo")
    )
    assert old[0] < grown[0] and old[1] < grown[1] and sum(map(len, grown)) == 280
    typed(row.command.replace("threshold", "hash").replace("both.jsonl", DATA).replace("grown/", "old_hash/"))
    typed(row.command.replace("threshold", "hash").replace("grown/", "hash/"))
    old, grown = (
        [{item["messages"][0]["content"] for item in side} for side in parts(p)] for p in ("old_hash/echo", "hash/echo")
    )
    assert not (old[0] <= grown[0] and old[1] <= grown[1])


@page.does(
    "Solution: include system messages in training data if needed",
    "Solution: optimize prompt length to reduce token usage",
    "Consider adding system messages to reinforce character identity",
)
def test_system_messages(row: Row, typed: Typed, tmp_path: Path) -> None:
    own, text = "You are somebody else.", "You are Deep Tree Echo."
    write(tmp_path / DATA, [*messages(ECHO[:5], own), *messages(ECHO[5:])])
    if "optimize" in row.there:
        write(tmp_path / "with_system.jsonl", messages(ECHO, text))
        typed(row.command)
        assert lines("without_system.jsonl") == messages(ECHO)
        tokens = [
            json.loads(typed(f"tunesmith data stats {name} --json").out)["tokens"]["mean"]
            for name in ("with_system.jsonl", "without_system.jsonl")
        ]
        assert tokens[0] - tokens[1] > 5
        return
    typed(row.command)
    words = shlex.split(row.command)
    found = [item["messages"][0]["content"] for item in lines(words[words.index("-o") + 1])]
    assert found == [own if "add" in words else text] * 5 + [text] * 251


@page.does("Solution: increase training examples (aim for 500+)")
def test_runs_side_by_side(row: Row, typed: Typed, echo_run: Path, kept: Path) -> None:
    shutil.copytree(kept / "healthy", "echo_run_2")
    out = typed(row.command).out
    assert re.search(r"learning_rate +0\.03 +0\.001", out) and "echo_run_2" in out


@page.does("Over-reliance on training patterns")
def test_training_rows_asked(row: Row, judged: Any) -> None:
    assert row.command == judged.command
    found = judged.said["training_rows"]
    assert found["asked"] >= 8 and 0 <= found["recited"] <= found["asked"]


@page.does("Excellent at specific tasks but poor at general conversation")
def test_better_and_worse_at_once(row: Row, judged: Any) -> None:
    assert row.command == judged.command
    assert judged.said[row.code[1]] in ("better", "worse", "cannot tell") and judged.said[row.code[2]]["metrics"]
    worse = Comparison("loss on general text", 4.0, 4.5, 0.5, 0.4, 0.6, 0.001, "worse", 24)
    found = diagnose(Evidence("better", {}, canary=Canary([worse], [])))
    assert [d.name for d in found] == ["loss of general capability"]


@page.does("Can't answer basic questions outside training domain")
def test_plain_questions(row: Row, judged: Any) -> None:
    assert row.command == judged.command
    samples = judged.said["canary"]["answers"]
    assert len(samples) >= 2 and all(s["reference"] and s["base"] != s["tuned"] for s in samples)


@page.does("Pitfall 4: loss of general capabilities")
def test_canary(row: Row, judged: Any) -> None:
    assert row.command == judged.command
    assert [m["metric"].split(" (")[0] for m in judged.said["canary"]["metrics"]] == [
        "loss on general text",
        "loss on the starter's questions",
    ]
    for tuned, wanted in ((4.5, ["loss of general capability"]), (4.3, [])):
        rise = tuned - 4.0
        worse = Comparison("loss on general text", 4.0, tuned, rise, rise - 0.1, rise + 0.1, 0.001, "worse", 24)
        assert [d.name for d in diagnose(Evidence("better", {}, canary=Canary([worse], [])))] == wanted


@page.does("Solution: mix in general conversation examples")
def test_mixing(row: Row, typed: Typed) -> None:
    typed(row.command)
    assert len(lines("mixed.jsonl")) == 256 + 28


@page.does("Solution: use a larger base model (retains more general knowledge)")
def test_adapters(row: Row, typed: Typed, forty: None) -> None:
    typed(row.command, "--max-steps", 2)
    assert json.loads(Path("echo_run/best_model/adapter_config.json").read_text())["r"] == 8
    plan = json.loads(typed(row.command.replace("train", "plan", 1), "--no-probe", "--json", "--output-dir", "b").out)
    assert plan["trainable_parameters"] < 0.1 * plan["model"]["parameters"]
    frozen = json.loads(
        typed("tunesmith plan --config here.toml --no-probe --json --freeze-ratio 0.7 --output-dir b").out
    )
    assert frozen["trainable_parameters"] < plan["model"]["parameters"]


@page.does("Solution: don't over-specialize with too many similar examples")
def test_templates(row: Row, typed: Typed, tmp_path: Path) -> None:
    assert "0 rows in 0 groups" in typed(row.command).out
    towns = (
        "Oslo Bergen Lima Quito Cairo Delhi Kyoto Osaka Turin Milan Porto Lyon Nice Bonn Graz Linz Bern Riga Cork Bath"
    )
    filled = [
        {
            "input": f"Please tell me how the weather is in {town} this morning, and whether I need a coat.",
            "output": f"In {town} the weather is fine this morning, and so you need no coat at all to go out.",
        }
        for town in towns.split()
    ]
    write(tmp_path / DATA, [*ECHO, *filled])
    assert "20 rows in 1 groups of near duplicates, the largest of 20" in typed(row.command).out
    assert "[template]" in typed(f"tunesmith data check {DATA}").out


@page.does("Pitfall 5: high cost / slow inference")
def test_smaller(row: Row, typed: Typed, sound: Path) -> None:
    typed(row.command, "--prompts", 1)
    (file,) = Path("exported/q8").glob("*.gguf")
    assert file.stat().st_size < 0.35 * Path("echo_run/best_model/model.safetensors").stat().st_size
    assert json.loads(Path("exported/q8/parity.json").read_text())["checks"]


@page.does("Consider if fine-tuning is necessary (prompt engineering may suffice)")
def test_only_a_prompt(row: Row, typed: Typed) -> None:
    with_system, without = (
        typed(row.command, "--max-tokens", 24).out,
        typed(row.command.replace('--system "You are Deep Tree Echo." ', ""), "--max-tokens", 24).out,
    )
    assert with_system.strip() and with_system != without


@page.does("Solution: use caching for repeated queries")
def test_for_vllm(row: Row, typed: Typed, echo_run: Path) -> None:
    assert re.search(r"vllm serve \S+/exported/vllm ", typed(row.command, "--prompts", 1).out)
    assert Path("exported/vllm/model.safetensors").exists()


# ---- the persona's data


@page.does("Good size for initial fine-tuning (256 examples)")
def test_the_sample_planned(row: Row, typed: Typed) -> None:
    assert "204 train, 26 valid, 26 test rows" in typed(row.command).out


@page.does("Consistent character voice and technical terminology")
def test_the_voice_has_a_name(row: Row, typed: Typed) -> None:
    assert re.search(r"^ +persona +Deep Tree Echo +auto: named in \d+ answers", typed(row.command).out, re.M)


@page.does("Rich, detailed responses with technical depth")
def test_lengths_and_variety(row: Row, typed: Typed) -> None:
    out = typed(row.command).out
    assert re.search(r"answer, characters +\d", out) and re.search(r"words +\d+ in answers, \d+ different", out)


@page.does("Split strategy: 205 training (80%), 51 validation (20%)")
def test_the_split(row: Row, typed: Typed) -> None:
    typed(row.command)
    assert [len(lines(f"split/echo_{side}.jsonl")) for side in ("train", "val")] == [204, 52]


@page.does(
    "Check if model maintains technical vocabulary",
    "Ensure character personality is preserved",
    "Model responses don't match expected style",
)
def test_persona_metrics(row: Row, typed: Typed, echo_hosted: Hostile) -> None:
    name = re.findall(r"^\*([a-z ]+)\*", row.why)[0]
    other = "The answer to that depends on the words, and no short reply would help those who want to know what is meant by them."
    echo_hosted.answer = lambda body: persona(body) if body["model"].startswith("ft:") else other
    as_json = () if "--json" in row.command else ("--json",)

    def figures() -> Item:
        found = json.loads(typed(row.command, *as_json, "--samples", 0).out)["metrics"]
        return dict(next(m for m in found if m["metric"] == name))

    found = figures()
    assert found["tuned"] > 0.7 > found["base"] + 0.3 and found["verdict"] == "better"
    echo_hosted.answer = lambda body: other
    assert figures()["verdict"] != "better"


@page.does("Add more diverse conversation scenarios")
def test_a_further_round(row: Row, typed: Typed, echo_run: Path, both: Path) -> None:
    typed(row.command, "--max-steps", 2)
    found = json.loads(typed("tunesmith runs show echo_run_2 --json").out)
    assert [each["dataset"] for each in found["lineage"]] == ["both.jsonl", DATA]
    assert events("echo_run_2", "eval")[0]["loss"] < 8  # it began where the other ended: 9 nats are a random model's


@page.does("Include examples of handling unexpected questions")
def test_questions_of_ones_own(row: Row, typed: Typed, echo_run: Path, tmp_path: Path) -> None:
    (tmp_path / "unexpected.txt").write_text("Why is a raven like a desk?\n\nAre you a toaster?\n")
    out = typed(row.command, "--max-tokens", 8, status=1).out  # so small a model never stops
    assert re.findall(r"^  ask +(.*)$", out, re.M) == ["Why is a raven like a desk?", "Are you a toaster?"]
    assert out.count("\n  base ") == out.count("\n  tuned ") == 2


@page.does("Add examples of graceful error handling")
def test_refusals(row: Row, typed: Typed, tmp_path: Path) -> None:
    write(
        tmp_path / "more.jsonl",
        [
            {"input": "Do it.", "output": "That went wrong, so here is another way."},
            {"input": "And now?", "output": "As an AI language model, I cannot do that."},
        ],
    )
    assert re.search(r"more\.jsonl:2: .*\[refusal\]", out := typed(row.command).out) and "more.jsonl:1: " not in out


# ---- the guide's program


@pytest.fixture(scope="module")
def program(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The server as the page starts it, the program and what follows it, on the files that the page's commands make;
    run as they stand but for the port, pauses and shorter answers."""
    folder, said = tmp_path_factory.mktemp("program"), io.StringIO()
    at = folder / "hub/models--Qwen--Qwen2.5-0.5B-Instruct"
    shutil.copytree(tiny, at / "snapshots" / "0")
    (at / "refs").mkdir()
    (at / "refs" / "main").write_text("0")
    write(folder / DATA, ECHO[:50])  # ten to validate with, as a service wants, and no more than fifty events
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        for line in page.block("The guide's program", "sh").splitlines():
            assert cli.main(shlex.split(line)[1:]) == 0, line
    words = shlex.split(page.rows["Quick reference: complete workflow"].command)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_HUB_CACHE", str(folder / "hub"))
        server = Server(folder / "data", *words[2:])
    found: Item = {}
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(said), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # the guide leaves its files open
            for heading in ("The guide's program", "And what follows it"):
                code = page.block(heading, "python").replace("http://127.0.0.1:8000/v1", server.url)
                exec(
                    compile(
                        code.replace("sleep(30)", "sleep(0.2)").replace("max_tokens=500", "max_tokens=16"),
                        heading,
                        "exec",
                    ),
                    found,
                )
        yield SimpleNamespace(server=server, found=found, said=said.getvalue(), folder=folder, words=words)
    finally:
        if "client" in found:
            found["client"].close()
        server.stop()


@page.does("Quick reference: complete workflow", "`client = OpenAI(api_key='your-api-key')`")
def test_the_program(row: Row, program: Any) -> None:
    assert program.words[:2] == ["tunesmith", "serve"]
    block = page.block("The guide's program", "python")
    if row.there.startswith("`client"):
        assert f"client = {row.code[0]}\n" in block and block.count("base_url") == 1
        return
    job = program.found["job_status"]
    assert job.status == "succeeded" and job.model == MINI and ":deep-tree-echo-v1:" in job.fine_tuned_model
    assert program.said.startswith("Status: ") and "Status: succeeded" in program.said
    assert job.hyperparameters.n_epochs == 3


@page.does("The other snippets, from `list_events` to `model_info.json`")
def test_the_other_snippets(row: Row, program: Any) -> None:
    assert re.search(r"^\d{10}: .*[Ff]ine-tuning job", program.said, re.M)
    assert "Base Model Response:" in program.said and "Fine-Tuned Model Response:" in program.said
    assert "Test Set Accuracy: 0.00%" in program.said  # a random model's answers are not the references
    info = json.loads((program.folder / "model_info.json").read_text())
    assert info["finished_at"] >= info["created_at"] > 1e9 and info["fine_tuned_model"].startswith("ft:")


@page.does("Link: API reference")
def test_the_description(row: Row, program: Any) -> None:
    assert row.code[0].endswith("/openapi.json") and row.command == "tunesmith serve"
    found = program.server.ask("GET", "/openapi.json").json()
    assert found["openapi"].startswith("3.") and any("fine_tuning/jobs" in path for path in found["paths"])


@page.does("Link: fine-tuning guide", "Link: best practices")
def test_guides(row: Row) -> None:
    path = (ROOT / "docs/coming-from" / re.findall(r"\]\((.*?)\)", row.here)[0]).resolve()
    assert path.parent == ROOT / "docs/guides" and path.exists()  # tests/docs runs the commands of each


@page.does("Link: community forum")
def test_no_forum(row: Row, typed: Typed) -> None:
    assert row.here == "nothing of this kind"
    said = typed("tunesmith data check no_such_file.jsonl", status=3)
    assert re.fullmatch(r"error: no_such_file\.jsonl: .+ -- .+\n", said.err)
    assert (ROOT / "docs/coming-from" / re.findall(r"\]\((.+?)\)", row.why)[0]).exists()


@page.does("Link: cookbook examples")
def test_samples(row: Row, typed: Typed) -> None:
    samples = sorted(path.stem for path in SAMPLE.parent.glob("*.jsonl"))
    assert len(samples) == 6 and row.command.rpartition(" ")[2] in samples
    for name in samples:
        assert typed(row.command.replace("domain", name)).out.count("⟦") >= 3


@page.does("Fine-tuning costs vary by model and token count")
def test_price_of_a_plan(row: Row, typed: Typed) -> None:
    assert re.search(r"^price    (about \$[\d.]+: 53829 tokens|not known here: )", typed(row.command).out, re.M)
    bills = [json.loads(typed(row.command, "--json", "--epochs", n).out)["bill"] for n in (3, 6)]
    assert [bill["billed_tokens"] for bill in bills] == [3 * 17943, 6 * 17943]


# ---- summary checklist


@page.does("☐ Dataset validated (format, size, quality)")
def test_tick_validated(row: Row, typed: Typed, tmp_path: Path) -> None:
    typed(row.command)
    for bad, code in (
        ({"input": "Why?", "output": "word " * 3000}, "over-long"),
        ({"input": "Why?", "output": ""}, "empty-answer"),
        ({"question": "Why?"}, "unknown-columns"),
    ):
        write(tmp_path / DATA, [*ECHO, bad])
        assert f"[{code}]" in typed(row.command, status=3).out
    for bad, code in (
        ("It ends with <|im_end|> here.", "special-token"),
        ("Write to ann.lee@mailbox.org.", "personal-data"),
    ):
        write(tmp_path / DATA, [*ECHO, {"input": "Why?", "output": bad}])
        assert f"[{code}]" in typed(row.command).out


@page.does("☐ Training/validation split created (80/20)")
def test_tick_split(row: Row, typed: Typed, tmp_path: Path) -> None:
    typed(row.command)
    assert [len(lines(f"echo_run/{side}.jsonl")) for side in ("train", "valid", "test")] == [178, 52, 26]
    write(tmp_path / "valid.jsonl", ECHO[:20])
    leaky = ("--valid-dataset", "valid.jsonl", "--valid-fraction", "auto", "--output-dir", "leaky")
    assert "[leak]" in typed(row.command, *leaky, status=3).err
    write(tmp_path / DATA, ECHO[:1])
    typed(row.command, "--output-dir", "one", status=3)


@page.does("☐ Base model selected")
def test_tick_model(row: Row, typed: Typed, account: Hostile) -> None:
    assert 'no model "gpt-5-tiny"' in typed(row.command, "--model", "gpt-5-tiny", status=None).err
    account.models[MINI] = {"shutdown_date": "2020-01-01"}
    assert "has ended this model on 2020-01-01" in typed(row.command, status=2).err and not account.files
    account.models[MINI] = {"shutdown_date": None}
    typed(row.command)
    assert len(account.files) == 2


@page.does("☐ Hyperparameters chosen (start with defaults)")
def test_tick_hyperparameters(row: Row, typed: Typed, tmp_path: Path) -> None:
    found = json.loads(typed(row.command).out)
    assert (found["recipe"]["epochs"], found["origin"]["epochs"]) == ("auto", "default")
    assert found["origin"]["suffix"] == "openai.toml"
    with (tmp_path / "openai.toml").open("a") as stream:
        stream.write("epoch = 3\n")
    said = typed(row.command, status=2).err
    assert 'unknown setting "epoch"' in said and "epochs" in said


@page.does("☐ Budget and cost estimates reviewed")
def test_tick_budget(row: Row, typed: Typed, account: Hostile) -> None:
    said = typed(row.command, status=None)
    assert said.code != 0 and re.search(r"^price    ", said.err, re.M) and not account.files and not account.jobs
    typed(row.command, "--yes")
    assert len(account.jobs) == 1


@page.does("☐ Files uploaded successfully", "☐ Fine-tuning job created")
def test_tick_sent(row: Row, typed: Typed, account: Hostile) -> None:
    where, status = ("/files", 400) if "Files" in row.there else ("/fine_tuning/jobs", 403)
    account.fault(f"POST {where}", "status", status=status)
    said = typed(row.command, status=1)
    assert "echo_hosted" in said.err or "--provider huggingface" in said.err
    if status == 403:
        assert f"tunesmith train --dataset {DATA} --provider huggingface" in said.err
    typed(row.command, "--output-dir", "another")
    assert len(account.files) >= 2 and len(account.jobs) == (status == 403)


@page.does("☐ Model tested with sample inputs")
def test_tick_tested(row: Row, typed: Typed, kept: Path, sound: Path) -> None:
    out = typed(row.command).out
    assert len(re.findall(r"^[✓✗!-] ", out, re.M)) == 8 and "✗" not in out
    said = typed(row.command.replace("echo_run", str(kept / "echo_run")), "--max-tokens", 8, status=1)
    assert "✗ answers end by themselves" in said.out


@page.does("☐ Model information saved for reference")
def test_tick_saved(row: Row, typed: Typed, account: Hostile) -> None:
    typed("tunesmith train --config openai.toml --until job --yes")
    assert not Path("echo_hosted/model_info.json").exists()
    typed("tunesmith runs watch echo_hosted")
    found, info = json.loads(typed(row.command).out), json.loads(Path("echo_hosted/model_info.json").read_text())
    assert found["fine_tuned_model"] == info["fine_tuned_model"] and found["job"] == info["job_id"]
    assert {"hyperparameters", "seed", "data_hashes"} <= set(info) and len(info["data_hashes"]["train"]) == 64
    assert info["job_id"] in Path("echo_hosted/README.md").read_text()


@page.does("☐ Decision made: deploy, iterate, or retrain")
def test_tick_deploy(row: Row, typed: Typed, echo_run: Path) -> None:
    typed(row.command, "--prompts", 1)
    assert json.loads(Path("exported/merged/parity.json").read_text())["checks"]
    config = Path("exported/merged/generation_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": 5}))
    typed("tunesmith parity exported/merged --prompts 1", status=1)


def test_every_row_is_done() -> None:
    assert page.undone() == [] and len(page.rows) == 176
