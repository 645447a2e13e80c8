"""The Python interface, what the commands do as functions: `ts.train(dataset="data.jsonl")`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from tunesmith import backends, costs, hosted, planning
from tunesmith.conversation import Conversation
from tunesmith.costs import Estimate
from tunesmith.data.check import Loaded
from tunesmith.data.check import load as load_checked
from tunesmith.data.scan import Progress
from tunesmith.errors import RunError, UsageError
from tunesmith.layout import output_path, refuse_taken
from tunesmith.models import find
from tunesmith.preflight import launched, refuse_impossible
from tunesmith.recipe import Recipe
from tunesmith.render import own_template
from tunesmith.runs import ENDED, Event, Run, listing, open_run, refuse_removed, run_of
from tunesmith.settings import changes, resolve

if TYPE_CHECKING:
    from tunesmith.evaluation.rates import Advice
    from tunesmith.evaluation.result import Evaluation
    from tunesmith.remote.rescue import Rescued


def load(dataset: str | os.PathLike[str], columns: dict[str, str] | None = None) -> list[Conversation]:
    """The conversations of a data set. Raises DataError with place and fix at the first bad row."""
    return load_checked(str(dataset), columns).require().conversations


def check(
    dataset: str | os.PathLike[str],
    columns: dict[str, str] | None = None,
    *,
    task: str | None = None,
    provider: str | None = None,
    structure_only: bool = False,
    near_duplicates: bool = True,
) -> Loaded:
    """A data set with every finding about it, as `tunesmith data check`. Raises DataError when nothing can be read at all.

    `columns`: names of the file's own columns, `{"prompt": "QUESTION", …}`. Severities are those of the `task`, and of what the
    `provider` would refuse. `structure_only`: JSON, roles and emptiness, nothing about what the texts say.
    """
    return load_checked(
        str(dataset),
        columns,
        task=task,
        provider=provider,
        structure_only=structure_only,
        near_duplicates=near_duplicates,
    )


def plan(dataset: str | os.PathLike[str] | None = None, *, config: str | None = None, **settings: Any) -> planning.Plan:
    """What training would do and need. Settings as for `train`; makes no run."""
    return prepare(dataset, config=config, **settings).plan


def estimate(prepared: planning.Prepared) -> tuple[Estimate, list[tuple[str, int]]]:
    """Memory, disk and time that a plan would take on this machine, from a probe of a few seconds; where it does not fit, the
    options that would make it fit, each with the memory it would need in MB."""
    from tunesmith.local.backend import probe

    plan = prepared.plan
    question, found = probe(prepared)
    valid = plan.tokens.get("valid", 0)
    need = costs.estimate(question, plan.model, valid, found)
    fits = need.memory_mb < need.available_mb
    return need, [] if fits else costs.ways_to_fit(question, plan.model, valid, found, possible)


def possible(recipe: Recipe) -> bool:
    """Whether this machine can do at all what a recipe says."""
    try:
        refuse_impossible(recipe)
    except UsageError:
        return False
    return True


def prepare(
    dataset: str | os.PathLike[str] | None = None,
    *,
    config: str | None = None,
    on_progress: Progress | None = None,
    until: str = "end",
    **settings: Any,
) -> planning.Prepared:
    """The plan together with the rows, split and rendered: what a backend is given.

    `on_progress(rows, share, what)` is told now and then how far it is. `until`: as for `train`; UsageError where the provider
    has no such.
    """
    if dataset is not None:
        if not isinstance(dataset, str | os.PathLike):
            raise UsageError(
                f"dataset is a {type(dataset).__name__}, not a path",
                where="dataset",
                fix="write the rows to a JSONL file",
            )
        settings["dataset"] = str(dataset)
    recipe, origin = resolve({k: str(v) if isinstance(v, os.PathLike) else v for k, v in settings.items()}, config)
    backends.get(recipe.provider)
    _refuse_until(until, recipe.provider)
    refuse_removed(recipe.model)
    if recipe.output_dir:
        refuse_taken(Path(recipe.output_dir).expanduser())  # before the work of reading
    road = hosted.prepare if recipe.provider == "openai" else planning.prepare
    return road(recipe, origin, on_progress)


def quote(prepared: planning.Prepared) -> dict[str, Any]:
    """What the service of a plan says of its model, its `shutdown_date` among it. Raises UsageError where it has no such."""
    from tunesmith.remote.backend import quote as asked

    return asked(prepared)


def train(
    dataset: str | os.PathLike[str] | None = None,
    *,
    config: str | None = None,
    on_prepared: Callable[[planning.Prepared], None] | None = None,
    on_event: Callable[[Run, Event], None] | None = None,
    on_progress: Progress | None = None,
    until: str = "end",
    **settings: Any,
) -> Run:
    """Train and wait for the end. Settings are those of the Recipe (`epochs=3, lora_rank=8, …`).

    Returns the Run; `run / "best_model"` loads in plain transformers. `on_prepared` sees the plan and the rows
    before anything is written, `on_progress` how far their preparation is (rows, share, what), `on_event` every event as it
    comes. Raises DataError, UsageError, or TunesmithError when training fails; KeyboardInterrupt makes a checkpoint and
    raises Interrupted. `until`: "files" or "job" stop where a service has them; `resume` goes on from there.
    """

    def ready() -> planning.Prepared:
        prepared = prepare(dataset, config=config, on_progress=on_progress, until=until, **settings)
        if on_prepared:
            on_prepared(prepared)
        return prepared

    if launched():
        return _together(lambda: (_laid_out(ready()), None), on_event)
    prepared = ready()
    provider = prepared.plan.recipe.provider
    backend, path = backends.get(provider), output_path(prepared.plan.recipe)
    with backends.interruptible(backend, path):
        run = backend.submit(prepared, path)
        del prepared  # the rows are on disk now
        return backends.watch(run, backend, on_event) if until == "end" else _begin(run, until, on_event)


def _refuse_until(until: str, provider: str) -> None:
    if until not in ("files", "job", "end") or until != "end" and provider != "openai":
        raise UsageError(f"until {until}: only a service has files and jobs", where="until", fix="leave it out")


def _begin(run: Run, until: str, on_event: Callable[[Run, Event], None] | None, offset: int = 0) -> Run:
    """Have a service hold the files of a run, or its job too."""
    from tunesmith.remote.backend import OpenAIBackend

    OpenAIBackend().begin(run, job=until == "job")
    for event in run.events_from(offset)[0]:
        if on_event:
            on_event(run, event)
    if run.state() == "failed":
        raise backends.failure(run)
    return run


def _laid_out(prepared: planning.Prepared) -> Run:
    from tunesmith.local.backend import lay_out

    if prepared.plan.recipe.provider != "huggingface":
        raise UsageError(
            "only training on this machine can be shared by processes", where="provider", fix="huggingface"
        )
    return lay_out(prepared, output_path(prepared.plan.recipe))


def _together(begin: Callable[[], tuple[Run, int | None]], on_event: Callable[[Run, Event], None] | None) -> Run:
    """Train as one of several processes that a launcher has started."""
    from tunesmith.local.together import together

    return together(begin, lambda run, state: backends.follow(run, lambda _: state(), lambda _: None, on_event))


def resume(
    path: str | os.PathLike[str],
    on_event: Callable[[Run, Event], None] | None = None,
    *,
    config: str | None = None,
    until: str = "end",
    **settings: Any,
) -> Run:
    """Go on with a run from its last whole checkpoint, or from the one whose folder `path` is, and wait for the end.

    A bare `checkpoint-step-N` is that of the newest run that has it. A finished run is returned as it is, but for a named
    checkpoint or changed settings. Settings may be given again; UsageError where one is another than the run's and decides
    what is learnt (`recipe.SAFE` do not).
    """
    path = _checkpoint(path, settings)
    run, step = find_run(path), None
    refuse_removed(run)
    provider = run.manifest()["provider"]
    _refuse_until(until, provider)
    changed = changes(run.recipe(), settings, config, *([hosted.same] if provider == "openai" else []))
    name = Path(path).name
    if Path(path).resolve() != run.path.resolve():
        if not re.fullmatch(r"checkpoint-step-\d+", name):
            raise RunError("no checkpoint", where=str(path), fix=f"go on with the run: --resume {run:q}")
        step = int(name.rpartition("-")[2])
    if run.state() == "succeeded" and step is None and not changed:
        return run
    if provider == "huggingface":
        refuse_impossible(msgspec.structs.replace(run.recipe(), **changed))
    if provider != "openai" and run.busy():  # a job at a service may be watched by many
        time.sleep(2)  # a worker whose parent was killed takes a moment to see it
        if run.busy():
            raise RunError("another process is training this run", where=str(run), fix="wait for it, or stop it first")

    def ready() -> tuple[Run, int | None]:
        if changed:
            run.append("changed", settings=changed)
        return run, step

    if launched():
        return _together(ready, on_event)
    backend = backends.get(provider)
    with backends.interruptible(backend, run.path):
        ready()
        offset = run.log_size()
        if until != "end":
            return _begin(run, until, on_event, offset)
        backend.resume(run, step)
        return backends.watch(run, backend, on_event, offset)


def state_of(path: str | os.PathLike[str]) -> str:
    """The state of the run at a path, "" where there is none to be found."""
    try:
        return find_run(path).state()
    except RunError:
        return ""


def _checkpoint(path: str | os.PathLike[str], settings: dict[str, Any]) -> str | os.PathLike[str]:
    """The folder of a checkpoint that is named without its run: of --output-dir, or of the newest run that has it."""
    if not str(path).startswith("checkpoint-step-") or Path(path).exists():
        return path
    folder = settings.get("output_dir")
    runs = [Run(folder)] if folder else listing(Path(settings.get("runs_dir", Recipe().runs_dir)).expanduser())
    found = next((run / "checkpoints" / path for run in runs if (run / "checkpoints" / path).is_dir()), None)
    if found is None:
        where = folder or f"the runs in {settings.get('runs_dir', Recipe().runs_dir)}"
        raise RunError(f"no {path} here", where=str(where), fix="give the checkpoint's path, or the run's")
    return found


def find_run(path: str | os.PathLike[str]) -> Run:
    """The run at a path, also from the path of one of its checkpoints or model folders. RunError where there is none."""
    here, run = Path(path), run_of(path)
    if run and not here.is_dir():
        refuse_removed(run)
        found = sorted((p.name for p in (run / "checkpoints").glob("checkpoint-step-*")), key=len)
        raise RunError("no such checkpoint", where=str(here), fix=f"there are: {', '.join(found) or 'none'}")
    return run or open_run(here)


def has_job(run: Run) -> bool:
    """Whether a service has a job of this run, and it is not known to have ended."""
    from tunesmith.remote.backend import Link

    return Link.of(run).job is not None and run.state() not in ENDED


def rescue(
    folder: str | os.PathLike[str] = "rescued",
    base_url: str | None = None,
    api_key_file: str | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Rescued:
    """Bring everything that an account holds at a service into a folder: `files/ID/`, and a run directory for each job.

    The key is that of the file, else of OPENAI_API_KEY; `base_url`: None: OPENAI_BASE_URL, or OpenAI's own. What is there
    already is not fetched again. Raises TunesmithError when the service stays out of reach; what cannot be had of one file or
    job is noted in `missing`, and the others go on. `on_progress(what)` is told each.
    """
    from tunesmith.remote.rescue import rescue as bring
    from tunesmith.remote.service import Service

    return bring(Service(hosted.effective(base_url)[0], api_key_file), Path(folder), on_progress)


def completer(model: str, beside: str | None = None) -> backends.Completer:
    """Answers of a model, or of a run: the one at a service by way of it, with a key as when it was trained.

    `beside`: a run with which the model is compared. Where that is a service's, a name that is no folder here is a model of the
    same service; a base without a chat template answers in the form in which the run was trained.
    """
    refuse_removed(model)
    folder = Path(model).is_dir() or model == "starter"
    if (Path(model) / "remote.json").exists() or model.startswith("ft:") and not folder:
        return backends.get("openai").completer(model)
    if beside and not folder and (Path(beside) / "remote.json").exists():
        from tunesmith.remote.answers import Answers
        from tunesmith.remote.backend import connect

        return Answers(connect(Run(beside)), model)
    own = own_template(find(model))  # a wrong name is said before torch is loaded
    template = find_run(beside).template() if own is None and beside and state_of(beside) else None
    return backends.get("huggingface").completer(model, template)


def lr_find(
    trial_steps: int = 15,
    on_trial: Callable[[Any], None] = lambda _: None,
    *,
    config: str | None = None,
    **settings: Any,
) -> Advice:
    """Try learning rates around the recipe's in short runs on this machine; settings as for `train`. Makes no run.

    `trial_steps`: steps of the first trials, more for those that are left. `on_trial(trial)` is told each.
    """
    from tunesmith.evaluation.rates import advise
    from tunesmith.local import loading

    with loading():
        from tunesmith.local.lr_finder import search
        from tunesmith.local.worker import failure

    prepared = prepare(config=config, **settings)
    try:
        return advise(search(prepared, trial_steps, on_trial))
    except (RuntimeError, MemoryError) as error:
        raise failure(error, "lr-find") or error from None


def evaluate(
    run: Run | str | os.PathLike[str] | None = None,
    *,
    model: str | None = None,
    against: str | None = None,
    dataset: str | None = None,
    columns: dict[str, str] | None = None,
    base_url: str | None = None,
    api_key_file: str | None = None,
    on_progress: Progress | None = None,
    **options: Any,
) -> Evaluation:
    """Compare a run's best model with its base, or `model` with `against`, on held-out rows.

    The path of one of a run's checkpoints or of its final_model has that one judged, instead of the best model. Without
    `dataset` the run's own test split is used. Rows that one of the two is known to be trained on, or that ask the same, are
    refused (DataError). What is kept: the run's own evaluation in evaluation/ and report.html, any other (another model, base
    or data set) in a folder of its own beside it.

    A model that a service keeps (of a run at a service, or named "ft:…") is judged by its answers. `base_url` and
    `api_key_file`: of the service, where the run is not one of it.
    """
    from tunesmith.evaluation.evaluate import evaluate as run_evaluation

    found = None if run is None else find_run(run)
    if run is not None and found and Path(run).resolve() != found.path.resolve():
        model = model or str(run)
    return run_evaluation(
        found,
        model=model,
        against=against,
        dataset=dataset,
        columns=columns,
        base_url=base_url,
        api_key_file=api_key_file,
        on_progress=on_progress,
        **options,
    )
