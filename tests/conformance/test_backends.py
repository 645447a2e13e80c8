"""One suite over every backend that runs here: what the rest of the program may count on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hostile import Hostile
from tunesmith import api, backends
from tunesmith.backends import BACKENDS, Backend
from tunesmith.conversation import Conversation, Message
from tunesmith.errors import Interrupted
from tunesmith.planning import Prepared


def test_every_backend_is_in_this_suite() -> None:
    assert sorted(BACKENDS) == ["fake", "huggingface", "openai"]


@pytest.fixture(params=["fake", "huggingface", "openai"])
def provider(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def backend(provider: str) -> Backend:
    return backends.get(provider)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hostile]:
    """A well-behaved service, whose jobs have three steps."""
    made = Hostile()
    monkeypatch.setenv("OPENAI_BASE_URL", made.url)
    yield made
    made.close()


@pytest.fixture
def model(provider: str, tiny: Path) -> str:
    return "base" if provider == "openai" else str(tiny)


@pytest.fixture
def prepared(provider: str, model: str, data: Path, service: Hostile) -> Prepared:
    here = {} if provider == "openai" else {"max_steps": 3}
    return api.prepare(data, provider=provider, model=model, **here)


def test_a_run_from_submit_to_its_end(backend: Backend, prepared: Prepared, tmp_path: Path) -> None:
    seen: list[str] = []
    run = backend.submit(prepared, tmp_path / "run")
    assert (run / "run.json").exists() and (run / "data" / "train.jsonl").exists()
    backends.watch(run, backend, lambda _, event: seen.append(event["type"]))
    assert backend.poll(run) == run.state() == "succeeded"
    assert seen.count("step") == 3 and seen.index("step") < seen.index("done")
    summary = run.summary()
    assert (summary["status"], summary["steps"], summary["planned_steps"]) == ("succeeded", 3, 3)
    backend.cancel(run)  # of a finished run: nothing happens
    assert run.state() == "succeeded"


@pytest.mark.parametrize("provider", ["huggingface", "openai"])  # a dry run has ended when it has begun
def test_what_is_cancelled_ends_and_says_so(
    provider: str, backend: Backend, model: str, data: Path, tmp_path: Path, service: Hostile
) -> None:
    service.script = [("running", [])]
    prepared = api.prepare(data, provider=provider, model=model, epochs=50)
    run = backend.submit(prepared, tmp_path / "run")
    with pytest.raises(Interrupted):
        backends.watch(
            run, backend, lambda run, event: backend.cancel(run) if event.get("state") == "running" else None
        )
    assert backend.poll(run) == run.state() == {"huggingface": "paused", "openai": "cancelled"}[provider]


def test_each_answers_every_prompt(backend: Backend, model: str, service: Hostile) -> None:
    complete = backend.completer(model)
    prompts = [Conversation((Message("user", text),)) for text in ("one", "a longer question, two", "three")]
    answers = complete(prompts, max_tokens=4)
    assert len(answers) == 3 and all(isinstance(a, str) for a in answers)
    assert complete(prompts, max_tokens=4) == answers  # temperature 0: the same again
