"""The road of the OpenAI guide through the unmodified SDK, with only address and key changed: three major versions of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from serving import Server, chats

MAJORS = {"3": None, "2": ROOT / ".venv" / "openai2", "1": ROOT / ".venv" / "openai1"}  # laid there by `make install`

GUIDE = """
import json, sys, time
import openai
from openai import OpenAI

client = OpenAI(base_url=sys.argv[1], api_key="none", _strict_response_validation=True)
with open(sys.argv[2], "rb") as f:
    training = client.files.create(file=f, purpose="fine-tune")
with open(sys.argv[3], "rb") as f:
    validation = client.files.create(file=f, purpose="fine-tune")
assert client.files.wait_for_processing(training.id, poll_interval=0.1).status == "processed"
assert training.id in [f.id for f in client.files.list(purpose="fine-tune")]
assert client.files.retrieve(training.id).bytes == training.bytes
assert client.files.content(training.id).read() == open(sys.argv[2], "rb").read()
job = client.fine_tuning.jobs.create(
    training_file=training.id, validation_file=validation.id, model="tiny", suffix="emoji-bot",
    hyperparameters={"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": "auto"},
)
deadline = time.time() + 120
while True:
    job = client.fine_tuning.jobs.retrieve(job.id)
    if job.status in ("succeeded", "failed", "cancelled"):
        break
    assert time.time() < deadline
    time.sleep(0.3)
assert job.status == "succeeded", job
assert job.id in [j.id for j in client.fine_tuning.jobs.list(limit=1)]
events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))  # several pages
checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
table = client.files.content(job.result_files[0]).text
asked = dict(model=job.fine_tuned_model, messages=[{"role": "user", "content": "What is 3?"}], max_tokens=8)
answer = client.chat.completions.create(**asked, temperature=0)
pieces = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**asked, temperature=0, stream=True)]
assert "".join(pieces) == answer.choices[0].message.content
assert job.fine_tuned_model in [m.id for m in client.models.list()]
assert client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model
print(json.dumps({"version": openai.__version__, "events": [e.message for e in reversed(events)], "table": table,
                  "steps": [c.step_number for c in checkpoints], "model": job.fine_tuned_model,
                  "hyperparameters": job.hyperparameters.model_dump(), "tokens": job.trained_tokens}))
assert client.models.delete(job.fine_tuned_model).deleted and client.files.delete(training.id).deleted
"""


@pytest.mark.parametrize("major", MAJORS)
def test_the_guide_end_to_end(server: Server, tmp_path: Path, major: str) -> None:
    folder = MAJORS[major]
    assert folder is None or folder.is_dir(), f"{folder} is missing: make install"
    (tmp_path / "train.jsonl").write_bytes(chats(24))
    (tmp_path / "valid.jsonl").write_bytes(chats(10, 200))
    environment = {**os.environ, **({"PYTHONPATH": str(folder)} if folder else {})}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", GUIDE, server.url, tmp_path / "train.jsonl", tmp_path / "valid.jsonl"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["version"].startswith(f"{major}.")
    assert told["model"].startswith("ft:tiny:local:emoji-bot:") and len(told["model"].rpartition(":")[2]) == 8
    assert told["hyperparameters"] == {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.0}
    assert told["steps"] == [12, 6] and told["tokens"] > 0
    lines = told["table"].splitlines()
    assert lines[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy" and len(lines) == 13
    words = told["events"]
    assert words[0].startswith("Created fine-tuning job: ftjob-") and words[-1] == "The job has successfully completed"
    order = [
        "Created fine",
        "Validating training file",
        "Files validated",
        "Fine-tuning job started",
        "Step 1/12",
        "Step 12/12",
    ]
    order += ["New fine-tuned model created"]
    places = [next(i for i, w in enumerate(words) if w.startswith(begin)) for begin in order]
    assert places == sorted(places) and len(set(words)) == len(words)
