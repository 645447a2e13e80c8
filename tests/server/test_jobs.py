"""Jobs: their states, events, checkpoints and results, and what is wrong with files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serving import Server, chats, worker
from tunesmith.runs import Run
from tunesmith.server.results import translate


def start(server: Server, file: str | None = None, **order: Any) -> dict[str, Any]:
    file = file or server.upload(chats(24)).json()["id"]
    made = server.ask("POST", "/fine_tuning/jobs", {"model": "tiny", "training_file": file, **order})
    assert made.status == 200, made.body
    return dict(made.json())


def long(server: Server, **order: Any) -> dict[str, Any]:
    """A job that is running and will be for a while."""
    job = start(
        server, server.upload(chats(200)).json()["id"], hyperparameters={"n_epochs": 50, "batch_size": 1}, **order
    )
    found = server.job(job["id"], "running", "failed")
    assert found["status"] == "running"
    server.wait_until(lambda: any(e["type"] == "metrics" for e in server.events(job["id"])))
    return found


def test_a_job_from_end_to_end(server: Server, tuned: dict[str, Any]) -> None:
    assert tuned["fine_tuned_model"].startswith("ft:tiny:local:my-suffix:") and tuned["seed"] == 5
    resolved = {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 1.0}
    assert tuned["hyperparameters"] == resolved == tuned["method"]["supervised"]["hyperparameters"]
    assert (
        tuned["created_at"] <= tuned["finished_at"] and tuned["error"] is None and tuned["metadata"] == {"run": "a b"}
    )
    told = server.events(tuned["id"])
    metrics = [e["data"] for e in told if e["type"] == "metrics"]
    assert [m["step"] for m in metrics] == list(range(1, 19)) and all(m["total_steps"] == 18 for m in metrics)
    assert [m["step"] for m in metrics if "full_valid_loss" in m] == [6, 12, 18]
    assert all({"train_loss", "train_mean_token_accuracy"} <= set(m) for m in metrics)
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"]
    places = server.ask("GET", f"/fine_tuning/jobs/{tuned['id']}/checkpoints").json()["data"]
    assert [c["step_number"] for c in places] == [18, 12, 6]
    assert places[0]["fine_tuned_model_checkpoint"] == tuned["fine_tuned_model"]
    assert places[1]["fine_tuned_model_checkpoint"] == f"{tuned['fine_tuned_model']}:ckpt-step-12"
    assert places[0]["metrics"]["full_valid_loss"] == metrics[-1]["full_valid_loss"]
    answers = set()
    for place in places:  # each can be asked at once
        order = {
            "model": place["fine_tuned_model_checkpoint"],
            "prompt": "What is",
            "max_tokens": 4,
            "logprobs": 1,
            "temperature": 0,
        }
        found = server.ask("POST", "/completions", order)
        assert found.status == 200
        answers.add(found.json()["choices"][0]["logprobs"]["token_logprobs"][0])
    assert len(answers) == 3
    table = server.ask("GET", f"/files/{tuned['result_files'][0]}/content").body.decode().splitlines()
    assert table[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy" and len(table) == 19
    assert table[1].endswith(",,") and float(table[6].split(",")[3]) == pytest.approx(
        metrics[5]["full_valid_loss"], abs=1e-5
    )
    assert server.ask("GET", f"/files/{tuned['result_files'][0]}").json()["purpose"] == "fine-tune-results"


def test_events_and_jobs_come_in_pages(server: Server, tuned: dict[str, Any]) -> None:
    path = f"/fine_tuning/jobs/{tuned['id']}/events"
    first = server.ask("GET", f"{path}?limit=3").json()
    second = server.ask("GET", f"{path}?limit=1000&after={first['data'][-1]['id']}").json()
    assert first["has_more"] and not second["has_more"] and "first_id" not in first
    assert [e["id"] for e in [*first["data"], *second["data"]]] == [
        e["id"] for e in reversed(server.events(tuned["id"]))
    ]
    assert server.ask("GET", f"{path}?after=ftevent-x").status == 400
    jobs = server.ask("GET", "/fine_tuning/jobs?limit=100").json()
    assert tuned["id"] in [j["id"] for j in jobs["data"]]
    assert [j["id"] for j in server.ask("GET", "/fine_tuning/jobs?metadata%5Brun%5D=a%20b").json()["data"]] == [
        tuned["id"]
    ]
    assert not server.ask("GET", "/fine_tuning/jobs?metadata%5Brun%5D=other").json()["data"]
    assert tuned["id"] not in [
        j["id"] for j in server.ask("GET", "/fine_tuning/jobs?metadata=null&limit=100").json()["data"]
    ]


BAD_FILES = [
    (chats(7), "invalid_n_examples", "Training file has 7 example(s), but must have at least 10 examples"),
    (chats(12) + b"{broken\n", "invalid_file_format", "Example 13"),
    (chats(12) + b'{"messages": [{"content": "x"}]}\n', "invalid_file_format", "Example 13"),
    (chats(12) + b'{"messages": []}\n', "invalid_file_format", "Example 13"),
    (chats(12).replace(b"{", b'{"weight": 1, ', 1), "invalid_file_format", 'Example 1 contains an extra "weight".'),
    (b"\0" * 5000, "invalid_file_format", ""),
    (b"", "invalid_n_examples", "has 0 example(s)"),
]


@pytest.mark.parametrize(("data", "code", "words"), BAD_FILES)
def test_a_bad_file_fails_the_job_and_says_where(server: Server, data: bytes, code: str, words: str) -> None:
    job = start(server, server.upload(data).json()["id"])
    assert job["status"] == "validating_files" and job["error"] is None
    found = server.job(job["id"])
    assert found["status"] == "failed" and found["error"]["code"] == code and found["error"]["param"] == "training_file"
    assert words in found["error"]["message"] and str(server.folder) not in found["error"]["message"], found["error"]
    assert found["fine_tuned_model"] is None and found["finished_at"] is not None
    assert server.events(job["id"])[-1] | {"id": "", "created_at": 0} == {
        "id": "", "object": "fine_tuning.job.event", "created_at": 0, "level": "error", "type": "message",
        "message": found["error"]["message"], "data": {},
    }  # fmt: skip


def test_a_bad_validation_file_is_named(server: Server) -> None:
    job = start(server, validation_file=server.upload(b'{"messages": 5}\n' * 12).json()["id"])
    found = server.job(job["id"])
    assert found["status"] == "failed" and found["error"]["param"] == "validation_file"


def test_files_of_another_purpose_are_refused(server: Server) -> None:
    other = server.upload(chats(12), purpose="batch").json()["id"]
    found = server.ask("POST", "/fine_tuning/jobs", {"model": "tiny", "training_file": other})
    assert found.status == 400 and found.error()["param"] == "training_file"


def test_a_file_that_is_deleted_meanwhile_is_named(server: Server) -> None:
    file = server.upload(chats(12)).json()["id"]
    (server.folder / "files" / file).unlink()
    job = start(server, file)
    assert server.job(job["id"])["error"] == {
        "code": "invalid_training_file", "message": "The file has been deleted", "param": "training_file"
    }  # fmt: skip


def test_a_job_whose_model_is_deleted_fails_alone(server: Server, tuned: dict[str, Any]) -> None:
    file = server.upload(chats(24, 700)).json()["id"]
    base = start(server, file, hyperparameters={"n_epochs": 1})["id"]
    model = server.job(base)["fine_tuned_model"]
    job = start(server, file, model=model)["id"]
    server.ask("POST", f"/fine_tuning/jobs/{job}/pause")
    assert server.ask("DELETE", f"/models/{model}").status == 200
    again = server.ask("POST", f"/fine_tuning/jobs/{job}/resume").json()
    other = start(server, seed=3)["id"]
    if again["status"] != "queued":  # else it was faster than we
        found = server.job(job)
        assert found["status"] == "failed" and found["error"]["code"] == "model_not_found"
    assert server.job(other, "queued", "running", "succeeded")["seed"] == 3  # the others go on
    server.ask("POST", f"/fine_tuning/jobs/{other}/cancel")


def test_pause_resume_and_cancel(server: Server) -> None:
    job = long(server)["id"]
    running = server.ask("GET", f"/fine_tuning/jobs/{job}").json()
    assert running["estimated_finish"] >= running["created_at"]
    assert server.ask("POST", f"/fine_tuning/jobs/{job}/resume").status == 400
    paused = server.ask("POST", f"/fine_tuning/jobs/{job}/pause", b"").json()
    assert paused["status"] == "paused" and paused["finished_at"] is None
    server.wait_until(lambda: worker(job) is None)
    steps = sum(e["type"] == "metrics" for e in server.events(job))
    assert server.ask("POST", f"/fine_tuning/jobs/{job}/pause").status == 400
    assert server.ask("POST", f"/fine_tuning/jobs/{job}/resume").json()["status"] == "queued"
    server.job(job, "running")
    server.wait_until(lambda: sum(e["type"] == "metrics" for e in server.events(job)) > steps)
    cancelled = server.ask("POST", f"/fine_tuning/jobs/{job}/cancel").json()
    assert cancelled["status"] == "cancelled" and cancelled["finished_at"] and cancelled["fine_tuned_model"] is None
    assert cancelled["estimated_finish"] is None
    server.wait_until(lambda: worker(job) is None)
    found = server.ask("POST", f"/fine_tuning/jobs/{job}/cancel")
    assert found.status == 400 and "is cancelled and cannot be cancelled" in found.error()["message"]
    told = [e["message"] for e in server.events(job)]
    numbers = [e["data"]["step"] for e in server.events(job) if e["type"] == "metrics"]
    assert numbers == list(range(1, len(numbers) + 1))  # none lost, none twice, over the pause
    assert (
        told[-1] == "The job has been cancelled"
        and "The job has been paused" in told
        and "The job has been resumed" in told
    )


def test_a_request_that_is_sent_again_makes_no_second_job(server: Server) -> None:
    file = server.upload(chats(12)).json()["id"]
    order = {"model": "tiny", "training_file": file, "hyperparameters": {"n_epochs": 1}}
    first = server.ask("POST", "/fine_tuning/jobs", order).json()["id"]
    again = server.ask("POST", "/fine_tuning/jobs", order, {"x-stainless-retry-count": "1"}).json()["id"]
    other = server.ask("POST", "/fine_tuning/jobs", {**order, "seed": 1}, {"x-stainless-retry-count": "1"}).json()["id"]
    meant = server.ask("POST", "/fine_tuning/jobs", order).json()["id"]
    assert again == first and len({first, other, meant}) == 3
    for id in (first, other, meant):
        server.ask("POST", f"/fine_tuning/jobs/{id}/cancel")


def test_training_goes_on_from_a_tuned_model_and_older_ways_work(server: Server, tuned: dict[str, Any]) -> None:
    file = server.upload(chats(24, 300)).json()["id"]
    job = start(server, file, model=tuned["fine_tuned_model"], hyperparameters={"n_epochs": 1}, suffix="again")
    found = server.job(job["id"])
    assert found["status"] == "succeeded" and found["fine_tuned_model"].startswith("ft:tiny:local:again:")
    assert found["hyperparameters"]["n_epochs"] == 1
    run = Run(server.folder / "jobs" / job["id"] / "run")
    assert str(run.recipe().model).endswith(f"{tuned['id']}/run/final_model")
    gone = server.ask("DELETE", f"/models/{found['fine_tuned_model']}").json()
    assert gone == {"id": found["fine_tuned_model"], "object": "model", "deleted": True}
    assert server.ask("POST", "/completions", {"model": found["fine_tuned_model"], "prompt": "x"}).status == 404


def test_the_multiplier_scales_the_rate_and_auto_stops_early(server: Server) -> None:
    file, valid = server.upload(chats(24)).json()["id"], server.upload(chats(10, 50)).json()["id"]
    jobs = [
        start(server, file, hyperparameters={"n_epochs": 1, "learning_rate_multiplier": m}) for m in ("auto", 0.5)
    ] + [start(server, file, validation_file=valid)]
    recipes = []
    for job in jobs:
        server.job(job["id"], "queued", "running", "succeeded")  # what it will do is decided
        recipes.append(Run(server.folder / "jobs" / job["id"] / "run").recipe())
        server.ask("POST", f"/fine_tuning/jobs/{job['id']}/cancel")
    assert float(recipes[1].learning_rate) == pytest.approx(0.5 * float(recipes[0].learning_rate))
    assert [r.patience for r in recipes] == [0, 0, 3] and recipes[2].epochs == 10


def test_a_step_waits_for_what_belongs_to_it(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"provider": "x", "recipe": {}, "plan": {"steps": 2}, "created": ""}))
    run, job = Run(tmp_path), {"model": "ft:m"}
    step = {"loss": 1.0, "accuracy": 0.5}
    run.append("state", state="running")
    told, at = translate(run, job, 0)
    assert [t.message for t in told] == ["Fine-tuning job started"] and at == run.log_size()
    run.append("step", step=1, **step)
    assert translate(run, job, at) == ([], at)  # a validation may follow
    run.append("eval", step=1, loss=2.0, best=True)
    run.append("checkpoint", step=1, path="x", regular=True)
    assert translate(run, job, at) == ([], at)
    before = run.log_size()
    run.append("step", step=2, **step)
    told, at = translate(run, job, at)
    assert [t.name for t in told] == ["step-1", "checkpoint-1"] and at == before
    assert told[0].message == "Step 1/2: training loss=1.00, full validation loss=2.00"
    assert told[1].checkpoint and told[1].checkpoint[1]["full_valid_loss"] == 2.0
    run.append("checkpoint", step=2, path="y", regular=False)  # made because a minute had passed: nobody's model
    run.append("done", step=2)
    told, at = translate(run, job, at)
    assert [t.name for t in told] == ["step-2"] and at == run.log_size()
    run.append("step", step=3, **step)  # killed before its validation was written: done again from step 2
    assert translate(run, job, at) == ([], at)
    run.append("resumed", step=2)
    run.append("state", state="running")
    run.append("step", step=3, **step)
    run.append("eval", step=3, loss=1.5, best=True)
    run.append("done", step=3)
    told, at = translate(run, job, at)
    assert [t.name for t in told] == ["started", "step-3"] and told[1].data["full_valid_loss"] == 1.5
    run.append("step", step=4, **step)
    assert [t.name for t in translate(run, job, at, over=True)[0]] == ["step-4"]  # it failed after it: nothing comes
    with (tmp_path / "events.jsonl").open("ab") as log:
        log.write(b'{"type": "st')  # a line that is still being written
    assert translate(run, job, at) == ([], at)
