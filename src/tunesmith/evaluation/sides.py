"""Who is compared with whom, on which rows: and that neither was trained on them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tunesmith import backends
from tunesmith.conversation import Conversation
from tunesmith.data.check import load
from tunesmith.data.scan import Progress, conversations
from tunesmith.data.split import prompt_key
from tunesmith.errors import DataError, UsageError
from tunesmith.evaluation.observe import Ask, Observed, heard_at_service, observe
from tunesmith.hosted import effective
from tunesmith.models import find
from tunesmith.render import own_template
from tunesmith.runs import Run, refuse_removed, run_of


class Sides(msgspec.Struct, frozen=True):
    """Two models by name or folder, the held-out rows, and what these are called."""

    tuned: str
    base: str
    rows: list[Conversation]
    dataset: str


def sides(
    run: Run | None, model: str | None, against: str | None, dataset: str | None, columns: dict[str, str] | None
) -> Sides:
    """What is compared. Raises UsageError where something is missing, DataError where a row was trained on."""
    if run is None:
        if not (model and against and dataset):
            raise UsageError(
                "needs a run, or two models and a data set",
                fix="tunesmith evaluate RUN, or --model A --against B --dataset D",
            )
        refuse_removed(model, against)
        rows = _once(load(dataset, columns).require().conversations)
        for name in (model, against):
            refuse_seen(rows, name)
        return Sides(model, against, rows, dataset)
    manifest = run.manifest()
    refuse_removed(run, *(name for name in (model, against or manifest["recipe"]["model"]) if name))
    hosted = manifest["provider"] == "openai"
    there = run.last("done").get("model") if hosted else str(run / "best_model")
    if not there or not hosted and not Path(there).is_dir():
        why = run.last("error").get("message")
        raise UsageError(
            f"this run has no model yet (it is {run.state()}{f': {why}' if why else ''})",
            where=str(run),
            fix=f"see: tunesmith runs show {run:q}; go on with: tunesmith train --resume {run:q}",
        )
    tuned, base = model or there, against or manifest["recipe"]["model"]
    own = run / "data" / "test.jsonl"
    if dataset is None and not own.exists():
        raise UsageError(
            "this run kept no test rows", where=str(run), fix="give rows it was not trained on: --dataset FILE"
        )
    rows = _once(load(dataset or str(own), columns).require().conversations)
    for name in (tuned, base, str(run)):
        refuse_seen(rows, name)
    return Sides(tuned, base, rows, dataset or str(own))


def _once(rows: list[Conversation]) -> list[Conversation]:
    """Each row once: one that stands there several times is no further evidence, but would pass for it."""
    return list({row.digest(): row for row in rows}.values())


def refuse_seen(rows: list[Conversation], model: str) -> None:
    """DataError where rows ask what the run that made `model`, or one that this began from, was trained or chosen on (its
    train and valid rows)."""
    made = run_of(model)
    for run in [*reversed(made.forebears()), made] if made else []:
        asked = asked_in(run.path, ("train", "valid"), set(map(prompt_key, rows)))
        seen = [row for row in rows if prompt_key(row) in asked]
        if seen:
            raise DataError(
                f"{len(seen)} of {len(rows)} rows ask what {run} was trained on",
                where=seen[0].source,
                fix="evaluate on rows that it has not seen, such as its own data/test.jsonl",
            )


def asked_in(run: Path, parts: tuple[str, ...], keys: set[str]) -> set[str]:
    """Those of some prompts' keys that rows of a run ask. The rows are gone through: there may be more than memory holds."""
    files = [run / "data" / f"{part}.jsonl" for part in parts]
    read = (prompt_key(row) for file in files if file.exists() for row in conversations(str(file)))
    return {key for key in read if key in keys}


class Models:
    """Where the models of an evaluation are to be asked: here, or at a service."""

    def __init__(self, run: Run | None, base_url: str | None, api_key_file: str | None) -> None:
        self._run, self._base_url, self._key_file = run, base_url, api_key_file
        self._remote = run is not None and run.manifest()["provider"] == "openai"

    def hosted(self, name: str) -> bool:
        """Whether a service has the model: what is no folder here, for a run at a service; for others "ft:…"."""
        return not Path(name).is_dir() and (self._remote or name.startswith("ft:"))

    def observe(self, name: str, ask: Ask, progress: Progress) -> Observed:
        """Ask a model, wherever it is."""
        if self.hosted(name):
            return heard_at_service(self._service(name), ask, f"asking {name}", progress)
        return observe(name, ask, self._template(name), f"judging {_called(name)}", progress)

    def _template(self, name: str) -> str | None:
        """The run's chat template for a model that has none: a base is judged on the form in which it was tuned."""
        run = None if self._remote else self._run
        return run.template() if run and own_template(find(name)) is None else None

    def _service(self, name: str) -> backends.Completer:
        from tunesmith.remote.answers import Answers
        from tunesmith.remote.backend import connect
        from tunesmith.remote.service import Service

        if self._remote and self._run and not self._base_url:
            return Answers(connect(self._run, self._key_file), name)
        return Answers(Service(effective(self._base_url)[0], self._key_file), name)


def _called(name: str) -> str:
    """A model for a progress line: the end of its path."""
    path = Path(name)
    return f"{path.parent.name}/{path.name}" if path.is_dir() and path.parent.name else name
