"""The client against a service that misbehaves: no duplicate job, no lost run, the right message."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import rows, write
from hostile import KEY, Hostile, step, wait_until
from tunesmith import api, backends
from tunesmith.errors import DataError, Interrupted, ServiceError, TunesmithError, UsageError
from tunesmith.remote import backend, service, upload
from tunesmith.runs import Run


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hostile]:
    """The service, and a client that has little patience."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for place, name, value in (
        (service, "TIMEOUT", 0.3),
        (service, "FIRST", 0.01),
        (service, "PATIENCE", 3.0),
        (backend, "NEAR", 0.01),
        (backend, "LOOKS", (0.0, 0.05, 0.1)),
        (backend, "MARGIN", 0.3),
        (service, "WHOLE", 2.0),
    ):
        monkeypatch.setattr(place, name, value)
    made = Hostile()
    yield made
    made.close()


@pytest.fixture
def settings(hostile: Hostile, tmp_path: Path) -> dict[str, Any]:
    data = write(tmp_path / "rows.jsonl", rows(60))
    return {
        "dataset": data,
        "provider": "openai",
        "model": "base",
        "base_url": hostile.url,
        "output_dir": tmp_path / "run",
    }


def whole(run: Run, hostile: Hostile) -> None:
    """A run that came through: one job, every event once, all figures there."""
    assert run.state() == "succeeded" and len(hostile.jobs) == 1
    told = [e["event"] for e in run.events() if "event" in e]
    assert told == [e["id"] for e in hostile.events["ftjob-000"]] and len(told) == len(set(told))
    assert [(e["step"], e["loss"], e["accuracy"]) for e in run.metrics("step")] == [
        (1, 1.0, 0.5),
        (2, 0.5, 0.5),
        (3, 1 / 3, 0.5),
    ]
    assert [(e["step"], e["loss"], e["best"]) for e in run.metrics("eval")] == [(3, 0.5, True)]
    summary = run.summary()
    assert (summary["status"], summary["steps"], summary["tokens"]) == ("succeeded", 3, 1234)
    assert summary["fine_tuned_model"] == "ft:base:org::000" and summary["best_valid_loss"] == 0.5


def test_nothing_goes_wrong(hostile: Hostile, settings: dict[str, Any]) -> None:
    run = api.train(**settings, suffix="my-word", epochs=3, batch_size=2, learning_rate_multiplier=0.5, seed=7)
    whole(run, hostile)
    job = hostile.jobs["ftjob-000"]
    hyper = {"n_epochs": 3, "batch_size": 2, "learning_rate_multiplier": 0.5}
    assert job["method"] == {"type": "supervised", "supervised": {"hyperparameters": hyper}}
    assert (job["suffix"], job["seed"], job["model"]) == ("my-word", 7, "base")
    assert set(job["metadata"]) == {"tunesmith_run"}
    sent = hostile.contents[job["training_file"]].splitlines()
    assert len(sent) == len((run / "data" / "train.jsonl").read_bytes().splitlines()) > 40
    assert len(hostile.contents[job["validation_file"]].splitlines()) >= 10
    assert len(hostile.files) == 2  # the test rows stay here


FAULTS: dict[str, list[tuple[str, str, int, dict[str, Any]]]] = {
    "429 with Retry-After": [("POST /files", "status", 2, {"status": 429, "headers": {"retry-after": "0.1"}})],
    "429 without": [
        ("POST /files", "status", 2, {"status": 429}),
        ("POST /fine_tuning/jobs", "status", 2, {"status": 429}),
    ],
    "429 with a date": [
        (
            "POST /fine_tuning/jobs",
            "status",
            1,
            {"status": 429, "headers": {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}},
        )
    ],
    "500 everywhere": [(".*", "status", 2, {"status": 500})],
    "500 of create": [("POST /fine_tuning/jobs", "status", 2, {"status": 500})],
    "503 of events": [("GET /fine_tuning/jobs/.*/events", "status", 3, {"status": 503})],
    "hang of an upload": [("POST /files", "hang", 1, {})],
    "hang while watching": [("GET /fine_tuning/jobs/ftjob-000", "hang", 2, {})],
    "create cut off after it was done": [("POST /fine_tuning/jobs", "cut", 1, {})],
    "create answered by half": [("POST /fine_tuning/jobs", "half", 1, {})],
    "create answered by garbage": [("POST /fine_tuning/jobs", "garbage", 1, {})],
    "upload cut off after it was done": [("POST /files", "cut", 1, {})],
    "upload lost before": [("POST /files", "drop", 1, {})],
    "bodies cut": [("GET /.*", "half", 3, {})],
    "garbage while watching": [("GET /fine_tuning/jobs/ftjob-000", "garbage", 2, {})],
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_passes_leaves_no_trace(hostile: Hostile, settings: dict[str, Any], name: str) -> None:
    for what, action, times, how in FAULTS[name]:
        hostile.fault(what, action, times, **how)
    whole(api.train(**settings), hostile)
    assert all(fault["times"] == 0 for fault in hostile.faults)  # it did happen
    assert len(hostile.files) == 2


def test_connections_go_with_the_service_that_made_them(hostile: Hostile) -> None:
    made = service.Service(hostile.url)
    assert list(made.files()) == []
    client = made._client
    made.say = made.hidden  # type: ignore[assignment]  # it holds itself, as the frames of an exception may hold it
    del made
    gc.collect()
    assert client.is_closed()


def test_retry_after_is_waited_for(hostile: Hostile, settings: dict[str, Any]) -> None:
    hostile.fault("POST /fine_tuning/jobs", "status", 1, status=429, headers={"retry-after": "1"})
    began = time.monotonic()
    whole(api.train(**settings), hostile)
    assert time.monotonic() - began > 1.0 and hostile.count("POST /fine_tuning/jobs") == 2


def test_a_wait_too_long_is_said(hostile: Hostile, settings: dict[str, Any]) -> None:
    hostile.fault("POST /fine_tuning/jobs", "status", 9, status=429, headers={"retry-after": "3600"})
    with pytest.raises(TunesmithError, match="HTTP 429") as caught:
        api.train(**settings)
    assert "busy" in caught.value.fix and hostile.count("POST /fine_tuning/jobs") == 1
    hostile.faults.clear()
    whole(api.resume(settings["output_dir"]), hostile)  # and nothing is lost: the files are there already
    assert len(hostile.files) == 2


@pytest.mark.parametrize("action", ["drop", "hang"])
def test_a_create_that_nobody_answers_is_not_made_again_blindly(
    hostile: Hostile, settings: dict[str, Any], action: str
) -> None:
    hostile.fault("POST /fine_tuning/jobs", action, 1)
    with pytest.raises(TunesmithError, match="no job with this run's mark") as caught:
        api.train(**settings)
    assert hostile.count("POST /fine_tuning/jobs") == 1 and not hostile.jobs
    assert "train --resume" in caught.value.fix
    assert any("metadata%5Btunesmith_run%5D=ts-" in asked for asked in hostile.asked)
    late = hostile._create(
        {"model": "base", "training_file": "file-000", "metadata": None}
    )  # the service was only slow
    run = api.resume(settings["output_dir"])
    assert len(hostile.jobs) == 1 and hostile.count("POST /fine_tuning/jobs") == 1
    assert f"the job was made, though its answer was lost: {late['id']}" in (run / "events.jsonl").read_text()


def test_duplicates_and_a_list_without_end(hostile: Hostile, settings: dict[str, Any]) -> None:
    twice = {**step(1, 3), "id": "ftevent-dup"}
    filler = [f"line {n}" for n in range(150)]  # two pages, of which the service always gives the first
    hostile.script[2] = ("running", ["Fine-tuning job started", *filler, twice, twice, step(2, 3)])
    hostile.wrong_after = True
    run = api.train(**settings)
    assert any("after=" in asked for asked in hostile.asked)
    assert [e["step"] for e in run.metrics("step")] == [1, 2, 3]
    assert [e.get("event") for e in run.events()].count("ftevent-dup") == 1


def test_many_events_come_in_pages_and_in_order(hostile: Hostile, settings: dict[str, Any]) -> None:
    hostile.script = [("running", [step(n, 450) for n in range(1, 451)]), ("succeeded", [])]
    run = api.train(**settings)
    assert [e["step"] for e in run.events() if e["type"] == "step"] == list(range(1, 451))
    assert hostile.count("GET /fine_tuning/jobs/ftjob-000/events") >= 5


def test_a_job_that_fails_validation(hostile: Hostile, settings: dict[str, Any]) -> None:
    hostile.script = [("validating_files", []), ("failed", ["The job failed"])]
    message = f"Invalid file format. Example 3 contains an extra key {KEY}"
    hostile.error = {"code": "invalid_file_format", "message": message, "param": "training_file"}
    with pytest.raises(TunesmithError, match="Example 3 contains an extra key") as caught:
        api.train(**settings)
    assert caught.value.where == "training_file" and "data check" in caught.value.fix and caught.value.exit_status == 3
    assert KEY not in str(caught.value)
    assert api.state_of(settings["output_dir"]) == "failed"


def test_a_refusal_to_create_names_the_way_out(hostile: Hostile, settings: dict[str, Any]) -> None:
    refusal = {"message": f"Your organization may not create jobs (key {KEY})", "code": None}
    hostile.fault("POST /fine_tuning/jobs", "status", 9, status=403, error=refusal)
    with pytest.raises(TunesmithError, match="makes no jobs for this account") as caught:
        api.train(**settings)
    assert f"tunesmith train --dataset {settings['dataset']} --provider huggingface" in caught.value.fix
    assert hostile.count("POST /fine_tuning/jobs") == 1
    leaked = [p for p in Path(settings["output_dir"]).rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]
    assert not leaked and KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "error", "words", "fix"),
    [
        (401, {"message": f"Incorrect API key provided: {KEY}"}, "Incorrect API key provided: [key]", "OPENAI_API_KEY"),
        (429, {"message": "You exceeded your quota", "code": "insufficient_quota"}, "exceeded your quota", "billing"),
        (400, {"message": "suffix is odd"}, "suffix is odd", "service says"),
    ],
)
def test_what_the_service_refuses_is_told_at_once(
    hostile: Hostile, settings: dict[str, Any], status: int, error: dict[str, Any], words: str, fix: str
) -> None:
    hostile.fault("POST /fine_tuning/jobs", "status", 9, status=status, error=error)
    with pytest.raises(TunesmithError) as caught:
        api.train(**settings)
    assert words in caught.value.message and fix in caught.value.fix
    assert hostile.count("POST /fine_tuning/jobs") == 1


def test_a_model_that_is_not_there_or_ends(hostile: Hostile, settings: dict[str, Any]) -> None:
    with pytest.raises(ServiceError, match='no model "other"'):
        api.train(**{**settings, "model": "other"})
    hostile.models["base"] = {"shutdown_date": "2020-01-01"}
    with pytest.raises(UsageError, match="ended this model on 2020-01-01"):
        api.train(**settings)
    assert not hostile.files and not Path(settings["output_dir"]).exists()


def test_nobody_is_there(hostile: Hostile, settings: dict[str, Any]) -> None:
    hostile.close()
    with pytest.raises(TunesmithError, match="not reached"):
        api.train(**settings)


def test_pause_resume_cancel_from_disk(hostile: Hostile, settings: dict[str, Any]) -> None:
    hostile.script = [("queued", []), ("running", ["Fine-tuning job started", step(1, 3)])]
    run = backends.get("openai").submit(api.prepare(**settings), Path(settings["output_dir"]))
    work = backends.get("openai")
    wait_until(lambda: work.poll(run) == "running")
    assert work.act(run, "pause") == "paused" == run.state()
    with pytest.raises(Interrupted, match="paused at the service") as caught:
        backends.watch(run, work)
    assert f"runs resume {run}" in caught.value.fix
    hostile.script = [("running", [])]
    assert work.act(run, "resume") == "running"
    backend._following.clear()  # as another process
    assert work.act(run, "cancel") == "cancelled" == run.state()
    assert backends.get("openai").act(run, "cancel") == "cancelled"  # again: nothing happens
    assert hostile.count("POST /fine_tuning/jobs/ftjob-000/cancel") == 1


def test_a_status_nobody_knows_goes_on_for_a_time(
    hostile: Hostile, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile.script.insert(2, ("polishing", []))
    whole(api.train(**settings), hostile)
    hostile.script = [("polishing", [])]
    monkeypatch.setattr(backend, "STILL", 0.3)
    with pytest.raises(TunesmithError, match="nothing new of the job ftjob-001"):
        api.train(**{**settings, "output_dir": str(settings["output_dir"]) + "2"})


def command(settings: dict[str, Any], *more: str) -> subprocess.Popen[str]:
    options = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return subprocess.Popen(
        [sys.executable, "-m", "tunesmith", "train", *options, *more],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # who runs us may have it ignored
    )


def test_interrupted_it_goes_on_and_another_process_takes_over(hostile: Hostile, settings: dict[str, Any]) -> None:
    script, hostile.script = hostile.script, hostile.script[:3]
    process = command(settings, "--yes")
    run = Run(settings["output_dir"])
    wait_until(lambda: bool(run.metrics("step")), 60)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and "goes on at the service" in said and f"runs watch {run}" in said
    assert run.state() == "running" and "cancel" not in " ".join(hostile.asked)
    hostile.script = script
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", "runs", "watch", str(run)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    whole(run, hostile)


def test_killed_at_any_moment_there_is_one_job(hostile: Hostile, settings: dict[str, Any]) -> None:
    hostile.fault("POST /files", "status", 3, status=429, headers={"retry-after": "0.5"})
    hostile.fault("POST /fine_tuning/jobs", "cut", 1)
    hostile.fault("GET /fine_tuning/jobs", "hang", 1)  # it is looked for, and not found before the kill
    process = command(settings, "--yes")
    run = Run(settings["output_dir"])
    wait_until(lambda: (run / "remote.json").exists() and len(hostile.jobs) == 1, 60)
    os.kill(process.pid, signal.SIGKILL)  # the job is made, and nobody here knows
    process.communicate()
    assert '"job": null' in (run / "remote.json").read_text() and run.state() == "interrupted"
    whole(api.resume(run), hostile)


def test_it_asks_before_it_sends(hostile: Hostile, settings: dict[str, Any]) -> None:
    process = command(settings)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and "add --yes" in said and hostile.url in said
    assert not hostile.files and not Path(settings["output_dir"]).exists()


def test_a_result_file_in_base64_and_steps_that_the_events_lack(hostile: Hostile, settings: dict[str, Any]) -> None:
    import base64

    table = (
        b"step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n1,1.0,0.5,,\n2,0.5,0.5,,\n3,0.25,,,\n"
    )
    hostile.contents["file-result"] = base64.b64encode(table)
    hostile.script = [("running", [step(1, 3)]), ("succeeded", [])]
    create = hostile._create

    def with_results(body: dict[str, Any]) -> dict[str, Any]:
        made = create(body)
        hostile.jobs[made["id"]]["result_files"] = ["file-result", "file-gone"]
        return made

    hostile._create = with_results  # type: ignore[method-assign]
    run = api.train(**settings)
    assert (run / "results" / "file-result.csv").read_bytes() == table
    assert [(e["step"], e["loss"], e.get("accuracy")) for e in run.metrics("step")] == [
        (1, 1.0, 0.5),
        (2, 0.5, 0.5),
        (3, 0.25, None),
    ]
    assert any(e["type"] == "warning" and "file-gone" in e["message"] for e in run.events())


def test_settings_that_mean_nothing_to_a_service(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="learning_rate means nothing") as caught:
        api.plan(**settings, learning_rate=1e-4)
    assert "multiplier" in caught.value.fix
    with pytest.raises(UsageError, match="lora_rank means nothing"):
        api.plan(**settings, lora_rank=8)
    with pytest.raises(UsageError, match="epochs is 51"):
        api.plan(**settings, epochs=51)
    with pytest.raises(UsageError, match="take my-bot"):
        api.plan(**settings, suffix="My_Bot")
    with pytest.raises(UsageError, match="may hold no key"):
        api.plan(**{**settings, "base_url": "https://me:secret@host/v1"})
    assert [i.code for i in api.plan(**settings, config="quick_test").issues].count("idle-setting") > 0
    with pytest.raises(DataError, match="of at least 10"):
        api.plan(**{**settings, "dataset": write(Path(settings["dataset"]).with_name("few.jsonl"), rows(11))})


def test_a_gateways_word_is_no_answer(hostile: Hostile, settings: dict[str, Any]) -> None:
    """502 and 504 come from between: the job may be on its way, and is not asked for again."""
    for status in (502, 504):
        hostile.faults.clear()
        hostile.fault("POST /fine_tuning/jobs", "status", 9, status=status)
        folder = f"{settings['output_dir']}{status}"
        with pytest.raises(TunesmithError, match="no job with this run's mark"):
            api.train(**{**settings, "output_dir": folder})
        assert Run(folder).state() == "interrupted"
    assert hostile.count("POST /fine_tuning/jobs") == 2


def test_an_answer_that_drips_is_given_up(
    hostile: Hostile, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "WHOLE", 0.5)
    hostile.fault("GET /models/base", "drip", 1)
    began = time.monotonic()
    whole(api.train(**settings), hostile)
    assert time.monotonic() - began < 6 and hostile.count("GET /models/base") == 2


ODD_EVENTS: list[dict[str, Any]] = [
    {"data": ["x"], "type": "metrics"},
    {"message": "\ud800 half a character"},
    {"message": None, "created_at": "noon"},
    {"message": "\x1b]0;title\x07\x1b[2J cleared", "level": "warn"},
    {"message": f"the key {KEY}", "created_at": 1e300},
    {"type": "metrics", "data": {"step": "3", "train_loss": 1.0}},
    {"type": "metrics", "data": {"step": 4, "train_loss": None, "total_steps": "many"}},
    {"type": "metrics", "data": {"step": 2, "train_loss": 0.5, "total_steps": "9", "full_valid_loss": "low"}},
]


def test_what_is_not_as_it_should_be_is_made_safe(hostile: Hostile, settings: dict[str, Any], cli: Any) -> None:
    hostile.script = [("running", ODD_EVENTS), ("succeeded", [])]
    create = hostile._create

    def odd(body: dict[str, Any]) -> dict[str, Any]:
        made = create(body)
        more = {
            "result_files": None,
            "created_at": "x",
            "seed": "y",
            "hyperparameters": [],
            "method": 3,
            "metadata": {"n": 1},
        }
        hostile.jobs[made["id"]] |= more
        return made

    hostile._create = odd  # type: ignore[method-assign]
    run = api.train(**settings)
    assert run.state() == "succeeded" and len([e for e in run.events() if "event" in e]) == len(ODD_EVENTS)
    assert [(e["step"], e["loss"]) for e in run.metrics("step")] == [(2, 0.5)]
    log = (run / "events.jsonl").read_text()
    assert KEY not in log and "\\u001b" not in log and "cleared" in log
    for words in (("runs", "events", run), ("runs", "show", run), ("runs", "watch", run)):
        assert cli(*words).code == 0


@pytest.mark.parametrize("said", ["abc", "soon, please", "", "-5", "nan", "1e400"])
def test_a_wait_that_cannot_be_read_is_none(hostile: Hostile, settings: dict[str, Any], said: str) -> None:
    headers = {"retry-after": said, "retry-after-ms": said} if said != "1e400" else {"retry-after-ms": "x"}
    hostile.fault("POST /files", "status", 1, status=429, headers=headers)
    whole(api.train(**settings), hostile)


def test_a_wait_of_nothing_is_not_a_storm(
    hostile: Hostile, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "FIRST", 0.1)
    hostile.fault("GET /models/base", "status", 99, status=429, headers={"retry-after": "0"})
    with pytest.raises(ServiceError, match="429"):
        api.train(**settings)
    assert hostile.count("GET /models/base") < 10


def test_who_only_looks_starts_nothing(hostile: Hostile, settings: dict[str, Any], cli: Any) -> None:
    run = backends.get("openai").submit(api.prepare(**settings), Path(settings["output_dir"]))
    backend._following.clear()  # as another process
    assert cli("runs", "events", run).code == 0
    watched = cli("runs", "watch", run)
    assert watched.code == 2 and f"train --resume {run}" in watched.err
    assert not hostile.files and not hostile.jobs


def test_step_by_step(hostile: Hostile, settings: dict[str, Any], cli: Any) -> None:
    """Files, job and watching as commands of their own; the rows as they would be sent, without any service."""
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    done = cli("train", *flags[:-1], f"{settings['output_dir']}-rows", "--prepare-only")
    assert done.code == 0 and not hostile.asked and "train.jsonl" in done.out, done.err
    run = Run(settings["output_dir"])
    done = cli("train", *flags, "--yes", "--until", "files")
    assert done.code == 0 and len(hostile.files) == 2 and not hostile.jobs, done.err
    assert f"train --resume {run}" in done.err and run.state() == "paused"
    done = cli("train", "--resume", run, "--until", "job", "--json")
    assert done.code == 0 and len(hostile.jobs) == 1 and done.json()["status"] == "queued", done.err
    assert hostile.count("GET /fine_tuning/jobs/ftjob-000") == 0
    assert cli("runs", "watch", run, "--json").json()["status"] == "succeeded"
    whole(run, hostile)
    assert cli("train", "--dataset", settings["dataset"], "--until", "job").code == 2


@pytest.mark.parametrize("moment", ["create", "create that is lost"])
def test_interrupted_while_the_job_is_made(
    hostile: Hostile, settings: dict[str, Any], moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "MARGIN", 4.0)
    hostile.fault("POST /fine_tuning/jobs", "slow" if moment == "create" else "hang", 1)
    process = command(settings, "--yes")
    wait_until(lambda: hostile.count("POST /fine_tuning/jobs") == 1, 60)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and "may have made" in said and "train --resume" in said
    whole(api.resume(settings["output_dir"]), hostile)
    assert hostile.count("POST /fine_tuning/jobs") == (1 if moment == "create" else 2)


def test_cancelled_while_it_is_not_known_whether_there_is_a_job(hostile: Hostile, settings: dict[str, Any]) -> None:
    hostile.fault("POST /fine_tuning/jobs", "cut", 1)
    hostile.fault("GET /fine_tuning/jobs", "status", 99, status=500)
    with pytest.raises(TunesmithError):
        api.train(**settings)
    run, work = Run(settings["output_dir"]), backends.get("openai")
    with pytest.raises(TunesmithError):
        work.act(run, "cancel")
    assert run.state() == "interrupted"  # it is not known, so it is not said to have ended
    hostile.faults.clear()
    assert work.act(run, "cancel") == "cancelled" and hostile.jobs["ftjob-000"]["status"] == "cancelled"


def test_an_answer_to_pause_that_was_lost(hostile: Hostile, settings: dict[str, Any]) -> None:
    hostile.script = [("running", [])]
    work = backends.get("openai")
    run = work.submit(api.prepare(**settings), Path(settings["output_dir"]))
    wait_until(lambda: work.poll(run) == "running")
    hostile.fault("POST /fine_tuning/jobs/ftjob-000/pause", "cut", 1)
    hostile.fault(
        "POST /fine_tuning/jobs/ftjob-000/pause", "status", 1, status=400, error={"message": "already paused"}
    )
    assert work.act(run, "pause") == "paused"
    hostile.fault("POST /fine_tuning/jobs/ftjob-000/cancel", "status", 1, status=400, error={"message": "no"})
    with pytest.raises(ServiceError, match="no"):
        work.act(run, "cancel")


def test_two_that_watch_are_one(hostile: Hostile, settings: dict[str, Any]) -> None:
    script, hostile.script = hostile.script, hostile.script[:2]
    run = backends.get("openai").submit(api.prepare(**settings), Path(settings["output_dir"]))
    processes = [command({}, "--resume", str(run)) for _ in range(3)]
    wait_until(lambda: bool(hostile.jobs), 60)
    hostile.script = script
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    whole(run, hostile)
    assert len(hostile.files) == 2


def test_the_same_path_again_is_another_run(hostile: Hostile, settings: dict[str, Any]) -> None:
    api.train(**settings)
    shutil.rmtree(settings["output_dir"])
    again = api.train(**settings)
    assert again.state() == "succeeded" and len(hostile.jobs) == 2
    assert [e["step"] for e in again.metrics("step")] == [1, 2, 3]


def test_a_file_too_large_for_one_goes_in_parts(
    hostile: Hostile, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "IN_PARTS", 100)
    run = api.train(**settings)
    assert run.state() == "succeeded" and hostile.count("POST /files") == 0
    sent = hostile.contents[hostile.jobs["ftjob-000"]["training_file"]]
    assert sent == (run / "upload" / "train.jsonl").read_bytes()


def test_keys_are_not_where_they_should_not_be(
    settings: dict[str, Any], cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    for more in (["--api-key-file", KEY], ["--api-key", KEY]):
        done = cli("plan", *flags, "--no-probe", *more)
        assert done.code == 2 and KEY not in done.out + done.err and "command line" in done.err
    with pytest.raises(UsageError, match="may hold no key"):
        api.plan(**{**settings, "base_url": "https://host/v1?key=secret"})
    monkeypatch.setenv("OPENAI_API_KEY", "clé")
    with pytest.raises(UsageError, match="not one ASCII word"):
        api.train(**settings)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UsageError, match="no key for the service"):
        api.train(**{**settings, "base_url": "https://host.invalid/v1"})


def test_a_run_of_somebody_else_gets_no_key(
    hostile: Hostile, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """remote.json names an address: it is asked only where this user has named it before."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(settings["output_dir"]) + "-config")
    run = backends.get("openai").submit(api.prepare(**settings), Path(settings["output_dir"]))
    link = backend.Link.of(run)
    link.base_url = "https://elsewhere.invalid/v1"
    link.save(run)
    with pytest.raises(UsageError, match="never sent a key") as caught:
        backend.connect(run)
    assert "OPENAI_BASE_URL=https://elsewhere.invalid/v1" in caught.value.fix
    service.named("https://elsewhere.invalid/v1")
    assert backend.connect(run).base_url == "https://elsewhere.invalid/v1"
    service.named("https://elsewhere.invalid/v1")
    kept = Path(str(settings["output_dir"]) + "-config") / "tunesmith" / "services"
    assert kept.read_text() == "https://elsewhere.invalid/v1\n"
