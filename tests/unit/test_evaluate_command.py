"""`tunesmith evaluate` from the outside: what it prints, every option, odd rows and models, what an interruption leaves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from conftest import Result, rows, write
from hostile import KEY, Hostile
from training import fit
from tunesmith import api
from tunesmith.cli import main
from tunesmith.cli.evaluate import _short, figure, settled
from tunesmith.errors import DataError
from tunesmith.evaluation import observe as observing
from tunesmith.evaluation.result import Evaluation
from tunesmith.evaluation.stats import MOST, Comparison
from tunesmith.runs import Run

QUICK = ("--rows", "4", "--samples", "0", "--max-tokens", "8")


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("command")
    return fit(folder / "run", write(folder / "d.jsonl", rows(80)), tiny, epochs=4, learning_rate=1e-2, persona="word1")


@pytest.fixture
def asked(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `tunesmith evaluate ARGS` here; what it wrote on stdout. It must succeed."""

    def run(*words: object) -> str:
        capsys.readouterr()
        code = main(["evaluate", *map(str, words)])
        told = capsys.readouterr()
        assert code == 0, told.err
        return told.out

    return run


def changed(tiny: Path, folder: Path, **config: Any) -> Path:
    """The tiny model with other settings."""
    shutil.copytree(tiny, folder)
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, **config}))
    return folder


def nothing_but_nan(folder: Path) -> Path:
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()  # it may be linked from elsewhere
    nan = {name: torch.full_like(weight, float("nan")) for name, weight in weights.items()}
    save_file(nan, folder / "model.safetensors", {"format": "pt"})
    return folder


# ---- what it says


def test_json_is_the_whole_result(run: Run, cli: Callable[..., Result]) -> None:
    done = cli("evaluate", run, *QUICK, "--json")
    assert done.code == 0 and set(done.json()) == set(Evaluation.__struct_fields__)
    told = msgspec.json.decode(done.out, type=Evaluation)
    assert told == msgspec.json.decode((run / "evaluation" / "result.json").read_bytes(), type=Evaluation)
    assert (told.rows, told.answered, told.task) == (8, 4, "chat") and told.training_rows is not None
    assert told.options["rows"] == 4


def test_text_ends_with_the_verdict_and_where_the_report_is(run: Run, asked: Callable[..., str]) -> None:
    out = asked(run, *QUICK)
    lines = out.splitlines()
    assert lines[-2].startswith("verdict: better, on 8 held-out rows, by loss (nats per token)")
    assert lines[-1] == f"report:  {run}/report.html" and (run / "report.html").exists()
    assert out.count("  ask    ") == 3 and "says “word1” in" in out and "rows worth a look (80 of 80 weighed)" in out
    result = api.evaluate(run, rows=4, samples=0, max_tokens=8)
    for metric in (*result.metrics, *result.canary.metrics):
        assert any(line.strip().startswith(metric.metric) and figure(metric.tuned) in line for line in lines)
    for d in result.diagnoses:
        assert f"{d.severity}: {d.name}: {d.evidence}" in out and f"next: {d.fix}" in out


def test_figures_of_any_size() -> None:
    sizes = (0.12345, 999.5, 1234.5, 96618357.0, 2.7e43)
    assert [figure(x, "+") for x in sizes] == ["+0.1235", "+999.5000", "+1234", "+9.66e+07", "+2.7e+43"]


def test_every_option_does_what_it_says(run: Run, tmp_path: Path, asked: Callable[..., str]) -> None:
    def told(*words: object) -> Any:
        return json.loads(asked(run, *words, "--json"))

    usual = told(*QUICK)
    names = {m["metric"] for m in usual["metrics"]}
    assert "ROUGE-L" in {m["metric"] for m in told(*QUICK, "--task", "instruct")["metrics"]} - names
    assert told("--rows", 2, *QUICK[2:])["answered"] == 2 and told("--rows", 0, "--samples", 0)["samples"] == []
    told("--rows", 3, "--samples", 2, "--max-tokens", 4)
    heard = [json.loads(x)["tuned"] for x in (run / "evaluation" / "rows.jsonl").read_text().splitlines()]
    assert sorted(len(h.get("samples", [])) for h in heard) == [0] * 5 + [2] * 3
    assert max(s["tokens"] for h in heard for s in h.get("samples", [])) <= 4
    assert {s["prompt"] for s in told(*QUICK, "--seed", 5)["samples"]} != {s["prompt"] for s in usual["samples"]}
    own = tmp_path / "own.py"
    own.write_text("def short(prompt, answer, reference):\n    return len(answer)\n")
    by_own = told(*QUICK, "--metric", f"{own}:short:lower")
    assert "short" in by_own["metrics"][0]["metric"] and by_own["better"][by_own["metrics"][0]["metric"]] == "lower"
    assert usual["persona"]["name"] == "word1" and told(*QUICK, "--persona", "Nemo")["persona"]["name"] == "Nemo"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", "chatt"], 'did you mean "chat"'),
        (["--judge", "http://127.0.0.1:1/v1"], "--judge-model NAME"),
        (["--rows", "0", "--judge", "http://127.0.0.1:1/v1", "--judge-model", "m"], "a judge needs answers"),
        (["--rows", "-1"], "whole number"),
        (["--max-tokens", "0"], "whole number"),
        (["--metric", "re:("], "re:"),
        (["--sample", "3"], "unknown option --sample"),
        (["--judge-key-file", "key"], "--judge-key-file: a judge's key, and no judge"),
        (["--base-url", "http://127.0.0.1:1/v1"], "--base-url: neither model is a service's"),
        (["--api-key-file", "key"], "--api-key-file: neither model is a service's"),
        (["--judge", "nowhere", "--judge-model", "m"], "--judge: no address of a service"),
    ],
)
def test_what_cannot_be_asked(run: Run, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), *words]) == 2
    assert said in capsys.readouterr().err


# ---- services


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hostile]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    made = Hostile()
    yield made
    made.close()


def test_a_judge(run: Run, service: Hostile, asked: Callable[..., str]) -> None:
    service.answer = lambda body: "TIE"
    words = [run, *QUICK, "--judge", service.url, "--judge-model", "base"]
    assert "the judge base: 0 won, 4 tied, 0 lost of 4 rows: cannot tell" in asked(*words)
    told = json.loads(asked(*words, "--json"))["judge"]
    assert (told["rows"], told["ties"], told["model"]) == (4, 4, "base")
    assert len((run / "evaluation" / "judge.jsonl").read_text().splitlines()) == 8 - 2 * told["equal"]


def test_a_judge_that_is_not_there_is_told_at_once(
    run: Run, service: Hostile, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a model is asked anything."""
    monkeypatch.setattr("tunesmith.remote.service.HELLO", 0.1)
    monkeypatch.setattr(observing, "_asked", lambda *_: pytest.fail("a model was asked"))
    words = ["evaluate", str(run), "--rows", "5", "--samples", "0", "--max-tokens", "9", "--seed", "77", "--judge"]
    assert main([*words, "http://127.0.0.1:9/v1", "--judge-model", "base"]) == 1
    assert "not reached" in capsys.readouterr().err
    assert main([*words, service.url, "--judge-model", "nobody"]) == 2
    assert 'the service has no model "nobody"' in capsys.readouterr().err
    service.fault("POST /chat/completions", "status", 1, status=401)
    assert main([*words, service.url, "--judge-model", "base"]) == 2
    assert service.count("POST /chat/completions") == 2


def test_a_judge_that_fails_costs_its_own_figures_alone(
    run: Run, service: Hostile, asked: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.remote.service.PATIENCE", 0.1)

    def gone(body: dict[str, Any]) -> str:
        service.fault("POST /chat/completions", "status", 10_000, status=503)
        return "A"

    service.answer = gone
    out = asked(run, "--rows", 5, "--samples", 0, "--max-tokens", 9, "--judge", service.url, "--judge-model", "base")
    assert "HTTP 503" in out and "\nverdict: better" in out
    told = msgspec.json.decode((run / "evaluation" / "result.json").read_bytes(), type=Evaluation).judge
    assert told and told.comparison is None and told.missing == 5 and "HTTP 503" in told.failure
    assert "HTTP 503" in (run / "report.html").read_text()


def test_the_rows_that_were_measured_are_counted(run: Run, asked: Callable[..., str]) -> None:
    assert "on 4 held-out rows, by matches word" in asked(run, *QUICK, "--metric", "re:word")


def test_rows_that_are_needed_in_words() -> None:
    m = Comparison("x", 1.0, 1.1, 0.1, rows_needed=123)
    assert settled(m) == " (about 123 rows like these would settle it)"
    assert settled(msgspec.structs.replace(m, rows_needed=MOST)).startswith(" (more than a million rows")
    assert settled(msgspec.structs.replace(m, rows_needed=None)) == ""


def test_marks_of_another_data_set_are_said_to_be_none(
    run: Run, tmp_path: Path, cli: Callable[..., Result], asked: Callable[..., str]
) -> None:
    asked(run, *QUICK)
    result = msgspec.json.decode((run / "evaluation" / "result.json").read_bytes(), type=Evaluation)
    assert result.training_rows
    codes = ",".join(sorted({code for row in result.training_rows.findings for code in row.codes}))
    other = write(tmp_path / "other.jsonl", [{"prompt": f"Else {i}?", "completion": f"No {i}."} for i in range(9)])
    for dataset, warned in ((other, True), (run.recipe().dataset, False)):
        done = cli("data", "convert", dataset, "-o", tmp_path / f"{warned}.jsonl", "--drop-codes", codes, "--run", run)
        assert done.code == 0 and (f"rows that {run} marks is here" in done.err) is warned


def test_a_hosted_model_is_judged_by_its_answers(
    service: Hostile, tiny: Path, tmp_path: Path, asked: Callable[..., str]
) -> None:
    service.models["ft:base:org::x"] = {}
    service.answer = lambda body: body["messages"][-1]["content"].replace("Question number ", "word").replace("?", ".")
    data = write(
        tmp_path / "d.jsonl", [{"prompt": f"Question number {i}?", "completion": f"word{i}."} for i in range(12)]
    )
    words = [
        "--model",
        "ft:base:org::x",
        "--against",
        tiny,
        "--dataset",
        data,
        "--base-url",
        service.url,
        "--samples",
        1,
    ]
    told = json.loads(asked(*words, "--json"))
    assert (
        told["metrics"][0]["metric"] == "chrF" and told["metrics"][0]["tuned"] == 100.0 and told["verdict"] == "better"
    )
    assert "a service does not say" in told["unavailable"] and told["canary"] is None
    assert not [m for m in told["metrics"] if "loss" in m["metric"]]
    assert "not to be had: loss, perplexity" in asked(*words)


# ---- rows of all kinds

CALL = [{"id": "c", "type": "function", "function": {"name": "w", "arguments": '{"x": 1}'}}]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "w", "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
]


def said(*turns: tuple[str, str], **last: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for role, text in turns[:-1]] + [
        {"role": turns[-1][0], "content": turns[-1][1], **last}
    ]


KINDS: dict[str, tuple[Callable[[int], dict[str, Any]], int]] = {  # a row of each kind; how many of 12 are answered
    "text": (lambda i: {"text": f"Plain words, number {i}, and some more."}, 0),
    "several turns": (
        lambda i: {"messages": said(("user", f"Hi {i}"), ("assistant", "Ho"), ("user", "And?"), ("assistant", f"Well, {i}."))},
        12,
    ),
    "no weight": (
        lambda i: {"messages": said(("user", f"Hi {i}"), ("assistant", "Ho"), ("user", "?"), ("assistant", "No."), weight=0)},
        12,
    ),
    "tools": (
        lambda i: {
            "messages": [
                *said(("user", f"Weather in {i}?"), ("assistant", ""), tool_calls=CALL),
                {"role": "tool", "content": "sunny", "tool_call_id": "c"},
                {"role": "assistant", "content": f"It is sunny in {i}."},
            ],
            "tools": TOOLS,
        },
        12,
    ),
    "a call": (
        lambda i: {"messages": said(("user", f"Weather {i}?"), ("assistant", ""), tool_calls=CALL), "tools": TOOLS},
        0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_all_kinds(kind: str, run: Run, tiny: Path, tmp_path: Path) -> None:
    """A model against itself, on each: it cannot be told, and what is scored is what a plain rendering learns."""
    from tunesmith.render import Renderer

    row, answered = KINDS[kind]
    data = write(tmp_path / "d.jsonl", [row(i) for i in range(12)])
    found = api.evaluate(model=str(tiny), against=str(tiny), dataset=str(data), samples=2, max_tokens=6)
    assert (found.verdict, found.rows, found.answered) == ("cannot tell", 12, answered)
    assert all(m.difference == 0 for m in found.metrics)
    rendered = Renderer(tiny).render_all(api.load(data))
    assert found.tokens == sum(sum(r.mask[1:]) for r in rendered) > 0  # nothing stands before the first token
    json.dumps(msgspec.to_builtins(found), allow_nan=False)
    if answered:
        assert [s.prompt for s in found.samples] == [row.prompt()[-1].content for row in api.load(data)][
            : len(found.samples)
        ]


# ---- models of all kinds


def test_a_model_with_too_little_room_is_not_favoured(tiny: Path, tmp_path: Path) -> None:
    """Its twin with a context of 32 tokens reads short rows alike and nothing of the long ones' answers, which do not count."""
    short = changed(tiny, tmp_path / "short", max_position_embeddings=32)
    long = [{"prompt": "word " * 60 + str(i), "completion": f"other {i}"} for i in range(9)]
    data = write(tmp_path / "d.jsonl", [*rows(12, words=2), *long])
    found = api.evaluate(model=str(short), against=str(tiny), dataset=str(data), rows=0)
    assert found.verdict == "cannot tell" and found.metrics[0].difference == 0 and found.metrics[0].rows == 12
    assert "the loss on 9 rows: they are longer than the context" in found.unavailable
    assert all(m.difference == 0 for m in found.canary.metrics)
    with pytest.raises(DataError, match="longer than the context of one of the models"):
        api.evaluate(model=str(short), against=str(tiny), dataset=str(write(tmp_path / "long.jsonl", long)), rows=0)
    both = api.evaluate(model=str(short), against=str(short), dataset=str(data), rows=4, samples=0)
    assert both.verdict == "cannot tell" and "the loss on" not in both.unavailable


def test_a_model_of_nothing_but_nan(run: Run, tiny: Path, tmp_path: Path, asked: Callable[..., str]) -> None:
    """It is worse, by numbers that JSON can hold, in the report too; and against itself it cannot be told."""
    copy = Run(tmp_path / "run")
    shutil.copytree(run.path, copy.path)
    nothing_but_nan(copy / "best_model")
    told = json.loads(asked(copy, *QUICK, "--json"), parse_constant=pytest.fail)
    assert told["verdict"] == "worse" and told["diagnoses"][0]["name"] == "worse than the base"
    assert all(None not in (m["base"], m["tuned"], m["difference"]) for m in told["metrics"])
    assert (copy / "report.html").exists() and api.evaluate(copy, rows=4, samples=0, max_tokens=8).verdict == "worse"
    nan = nothing_but_nan(changed(tiny, tmp_path / "nan"))
    data = write(tmp_path / "d.jsonl", rows(12))
    itself = json.loads(asked("--model", nan, "--against", nan, "--dataset", data, *QUICK, "--json"))
    assert itself["verdict"] == "cannot tell"
    back = json.loads(asked("--model", tiny, "--against", nan, "--dataset", data, *QUICK, "--json"))
    assert back["verdict"] == "better"


def test_two_models_that_answer(run: Run, tiny: Path, asked: Callable[..., str]) -> None:
    words = ["--model", run / "best_model", "--against", tiny, "--dataset", run / "data" / "test.jsonl", "--samples", 2]
    out = asked(*words, "--rows", 5)
    assert "verdict: better" in out.splitlines()[-1] and "\nreport:" not in out and out.count("\n  tuned  ") == 3
    told = json.loads(asked(*words, "--rows", 5, "--json"))
    assert told["report"] is None and told["answered"] == 5 and len(told["samples"]) == 5
    assert {"chrF", "end-of-turn rate", "self-repetition"} <= {m["metric"] for m in told["metrics"]}


# ---- what is kept


def kept(cache: Path) -> list[Path]:
    return sorted((cache / "evaluation").iterdir()) if (cache / "evaluation").exists() else []


def test_interrupted_in_the_middle(
    run: Run, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C while the second model is asked: nothing is half written, the first is not asked again."""
    from tunesmith.local import model as models

    copy = Run(tmp_path / "run")
    shutil.copytree(run.path, copy.path, ignore=lambda *_: {"evaluation", "report.html"})
    loaded: list[str] = []
    load = models.to_judge
    monkeypatch.setattr(models, "to_judge", lambda name: loaded.append(str(name)) or load(name))
    told: list[str] = []

    def stop(rows: int, share: float, doing: str) -> None:
        told.append(doing)
        if share > 0.5 and "best_model" in doing:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.evaluate(copy, rows=4, samples=0, on_progress=stop)
    assert len(loaded) == 2 and not (copy / "evaluation").exists() and not (copy / "report.html").exists()
    assert [p.suffix for p in kept(cache)] == [".json"] and len(set(told)) == 2
    assert main(["evaluate", str(copy), "--rows", "4", "--samples", "0"]) == 0
    assert len(loaded) == 3 and len(kept(cache)) == 2 and "verdict" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [b"", b"{half", b"\xff\xfe", b'{"heard": 3}', b"[]"])
def test_a_damaged_cache_is_asked_anew(damage: bytes, tiny: Path, data: Path, cache: Path) -> None:
    def again() -> Evaluation:
        return api.evaluate(model=str(tiny), against=str(tiny), dataset=str(data), rows=0)

    first = again()
    (path,) = kept(cache)
    whole = path.read_bytes()
    os.utime(path, (1e9, 1e9))
    assert again() == first and path.stat().st_mtime > 1.5e9  # used now: it is not tidied away
    path.write_bytes(damage)
    assert again() == first and path.read_bytes() == whole


@pytest.mark.parametrize("way", ["a file in its place", "nobody may write"])
def test_without_a_cache_all_is_asked_each_time(
    way: str, tiny: Path, data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(30, "Read-only file system")

    if way == "nobody may write":
        monkeypatch.setattr(observing, "write_json", refused)
    else:
        cache.parent.mkdir(parents=True)
        cache.write_text("")
    found = api.evaluate(model=str(tiny), against=str(tiny), dataset=str(data), rows=2, samples=0, max_tokens=4)
    assert found.verdict == "cannot tell" and found.answered == 2


def test_what_was_heard_on_another_device_is_not_compared(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU computes in 16 bits: base and tuned are heard on one machine, with the same devices in sight."""
    keys = [observing._key(str(tiny), observing.Ask([]), None)]
    assert keys == [observing._key(str(tiny), observing.Ask([]), None)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    keys.append(observing._key(str(tiny), observing.Ask([]), None))
    monkeypatch.setattr(observing, "GPUS", ("/dev/null",))
    keys.append(observing._key(str(tiny), observing.Ask([]), None))
    monkeypatch.setattr(observing, "processor", lambda: "another")
    keys.append(observing._key(str(tiny), observing.Ask([]), None))
    assert len(set(keys)) == 4


def test_an_answer_steers_no_terminal() -> None:
    assert _short("a\x1b]0;owned\x07 \u202eb \x9b31m") == "a␛]0;owned␇ \ufffdb \ufffd31m"
