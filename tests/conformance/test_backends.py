"""One suite over every backend that runs here: what the rest of the program may count on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith import api, backends
from tunesmith.backends import BACKENDS, Backend
from tunesmith.conversation import Conversation, Message
from tunesmith.planning import Prepared


def test_every_backend_is_in_this_suite() -> None:
    assert sorted(BACKENDS) == ["fake", "huggingface"]


@pytest.fixture(params=["fake", "huggingface"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return backends.get(request.param)


@pytest.fixture
def prepared(tiny: Path, data: Path) -> Prepared:
    return api.prepare(data, model=str(tiny), max_steps=3)


def test_a_run_from_submit_to_its_end(backend: Backend, prepared: Prepared, tmp_path: Path) -> None:
    seen: list[str] = []
    run = backend.submit(prepared, tmp_path / "run")
    assert (run / "run.json").exists() and (run / "data" / "train.jsonl").exists()
    api.watch(run, backend, lambda _, event: seen.append(event["type"]))
    assert backend.poll(run) == run.state() == "succeeded"
    assert seen.count("step") == 3 and seen.index("step") < seen.index("done")
    summary = run.summary()
    assert (summary["status"], summary["steps"], summary["planned_steps"]) == ("succeeded", 3, 3)
    backend.cancel(run)  # of a finished run: nothing happens
    assert run.state() == "succeeded"


def test_each_answers_every_prompt(backend: Backend, tiny: Path) -> None:
    complete = backend.completer(str(tiny))
    prompts = [Conversation((Message("user", text),)) for text in ("one", "a longer question, two", "three")]
    answers = complete(prompts, max_tokens=4)
    assert len(answers) == 3 and all(isinstance(a, str) for a in answers)
    assert complete(prompts, max_tokens=4) == answers  # temperature 0: the same again
