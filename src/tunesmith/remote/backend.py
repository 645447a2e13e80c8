"""The backend of a service: a state machine on disk, which any process can take one step further.

`remote.json` in the run says what the service holds of it (files, job), and is written before the next step is begun; what the
job tells becomes the run's own events. So a run is followed by reading it and asking, from wherever it was left.
"""

from __future__ import annotations

import random
import time
import uuid
from pathlib import Path
from typing import Any

import msgspec

from tunesmith.backends import Completer, create_run
from tunesmith.data.write import write_json
from tunesmith.errors import Interrupted, RunError, TunesmithError, UsageError
from tunesmith.hosted import address, effective, local_address
from tunesmith.planning import Prepared
from tunesmith.remote import upload
from tunesmith.remote.answers import Answers
from tunesmith.remote.results import fetch
from tunesmith.remote.service import Job, Service, Unsure
from tunesmith.remote.told import Told
from tunesmith.runs import Run

ENDED = ("succeeded", "failed", "cancelled")
WORDS = {"validating_files": "queued", "queued": "queued", "running": "running", "paused": "paused"}
EVERY, NEAR = 10.0, 0.5  # seconds between two questions: of a service far away, of one on this machine
STILL = 86_400.0  # seconds without any news after which we stop waiting
LOOKS = (0.0, 5.0, 15.0)  # seconds before each look for a job that an unanswered request may have made
TRIES = 3  # times that a job is asked for where the service answers with an error of its own


class Link(msgspec.Struct, kw_only=True):
    """remote.json: where the run is, and what the service holds of it. `mark` stands in the job's metadata."""

    base_url: str
    mark: str
    files: dict[str, str] = {}  # side: id
    asked: bool = False  # a job was asked for: before asking again, look whether it was made
    job: str | None = None

    @classmethod
    def of(cls, run: Run) -> Link:
        """What stands in a run. Raises RunError where it is no run of a service."""
        try:
            return msgspec.json.decode((run / "remote.json").read_bytes(), type=cls)
        except FileNotFoundError:
            raise RunError("not a run at a service", where=str(run), fix="its Ctrl-C and --resume are here") from None
        except msgspec.DecodeError as error:
            raise RunError(f"remote.json is damaged: {error}", where=str(run), fix="restore it, or rescue") from None

    def save(self, run: Run) -> None:
        write_json(run / "remote.json", self)


_following: dict[str, Following] = {}  # of this process, by run directory


class OpenAIBackend:
    """Has a service train. The job goes on when this process ends."""

    def submit(self, prepared: Prepared, path: Path) -> Run:
        """Ask the service about the model, then lay out the run; files and job follow when it is polled."""
        recipe = prepared.plan.recipe
        quote(prepared)
        mark = f"ts-{uuid.uuid4().hex[:16]}"

        def fill(run: Run) -> None:
            upload.write(prepared.splits, run)
            Link(base_url=str(recipe.base_url), mark=mark).save(run)

        return create_run(prepared, path, fill)

    def resume(self, run: Run, step: int | None = None) -> None:
        """Go on with what was begun: sending files, asking for the job, or only watching it."""
        if step is not None:
            raise UsageError("a job of a service begins at no checkpoint", where=str(run), fix="resume the run itself")
        link = Link.of(run)
        _following.pop(str(run.path.resolve()), None)
        if link.job is None:
            run.append("state", state="queued")

    def poll(self, run: Run) -> str:
        return _of(run).look()

    def interrupt(self, run: Run) -> None:
        """Ctrl-C leaves the job alone."""
        link = Link.of(run)
        if link.job:
            how = f"follow it: tunesmith runs watch {run}; stop it: tunesmith runs cancel {run}"
            raise Interrupted(f"the job {link.job} goes on at the service", where=str(run), fix=how)
        fix = f"go on with: tunesmith train --resume {run}"
        raise Interrupted("stopped before the service had a job", where=str(run), fix=fix)

    def cancel(self, run: Run) -> None:
        self.act(run, "cancel")

    def act(self, run: Run, what: str) -> str:
        """cancel, pause or resume the job; the state it has then. A run without a job is cancelled here alone."""
        link = Link.of(run)
        if link.job is None and what == "cancel":
            run.append("state", state="cancelled")
            return "cancelled"
        if link.job is None:
            raise UsageError("the service has no job of this run yet", where=str(run), fix="tunesmith runs watch does")
        service = connect(run)
        if what != "cancel" or run.state() not in ENDED:
            service.act(link.job, what)
        return _of(run).look(now=True)

    def completer(self, model: str, template: str | None = None) -> Completer:
        """Answers of a run's tuned model, or of a model of the service that OPENAI_BASE_URL names; templates are its own."""
        if not (Path(model) / "remote.json").exists():
            return Answers(Service(effective(None)[0]), model)
        run = Run(model)
        name = run.last("done").get("model")
        if not name:
            raise UsageError("this run has no model yet", where=model, fix=f"tunesmith runs watch {model}")
        return Answers(connect(run), name)


def take_in(run: Run, service: Service) -> str:
    """Take in what a run's job has told since; its state. As a step of following it, with a service that is at hand."""
    with run.lock():
        return Following(run).step(service)


def connect(run: Run) -> Service:
    """The service of a run, with the key of now."""
    recipe = run.manifest()["recipe"]
    return Service(address(Link.of(run).base_url, str(run / "remote.json")), recipe.get("api_key_file"))


def quote(prepared: Prepared) -> dict[str, Any]:
    """The model as the service describes it. Raises UsageError where it has none of that name, or no longer."""
    recipe = prepared.plan.recipe
    found = Service(str(recipe.base_url), recipe.api_key_file).model(recipe.model)
    ends = found.get("shutdown_date")
    if isinstance(ends, str) and ends <= time.strftime("%Y-%m-%d"):
        raise UsageError(
            f"the service has ended this model on {ends}", where=recipe.model, fix=_instead(recipe.dataset)
        )
    return found


def _instead(dataset: str | None) -> str:
    return f"train on this machine: tunesmith train --dataset {dataset} --provider huggingface"


def _of(run: Run) -> Following:
    key = str(run.path.resolve())
    if key not in _following:
        _following[key] = Following(run)
    return _following[key]


class Following:
    """One run, followed from this process."""

    def __init__(self, run: Run) -> None:
        self._run, self._told = run, Told(run)
        self._due, self._news = 0.0, time.monotonic()
        self._word = "queued"

    def look(self, now: bool = False) -> str:
        """The state, asked of the service unless that was done a moment ago."""
        if time.monotonic() < self._due and not now:
            return self._word
        try:
            lock = self._run.lock(wait=60.0 if now else 0.0)
        except RunError:  # another process follows it: its events are ours
            return self._run.state()
        with lock:
            self._word = self.step()
        link = Link.of(self._run)
        pause = NEAR if local_address(link.base_url) else EVERY
        self._due = time.monotonic() + pause * random.uniform(0.8, 1.2)
        return self._word

    def step(self, service: Service | None = None) -> str:
        """Do what is next, and take in what is new; the state then. The run's lock is held."""
        run, link = self._run, Link.of(self._run)
        word = run.state()
        if word in ENDED:
            return word
        service = service or connect(run)
        if link.job is None:
            self._begin(service, link)
            if link.job is None:
                return run.state()
        return self._watch(service, link)

    def _begin(self, service: Service, link: Link) -> None:
        """Send what is missing, then ask for the job; a refusal is the run's last word."""
        run = self._run
        run.append("state", state="preparing")
        try:
            for side in ("train", "valid"):
                if (run / "upload" / f"{side}.jsonl").exists() and side not in link.files:
                    run.append("message", message=f"sending {side}.jsonl ({size(run / 'upload' / f'{side}.jsonl')})")
                    link.files[side] = upload.send(
                        service, run / "upload" / f"{side}.jsonl", f"{link.mark}-{side}.jsonl"
                    )
                    link.save(run)
            link.job = self._create(service, link)
            link.save(run)
        except TunesmithError as error:
            how = dict(message=error.message, where=error.where, fix=error.fix, exit_status=error.exit_status)
            run.append("error", **how)
            run.append("state", state="failed")

    def _create(self, service: Service, link: Link) -> str:
        """The id of this run's job, which is made at most once."""
        tries = 0
        while True:
            if link.asked and (found := find(service, link)):
                self._run.append("message", message=f"the job was made, though its answer was lost: {found.id}")
                return found.id
            link.asked, tries = True, tries + 1
            link.save(self._run)
            try:
                return service.make(lambda c: create(c, self._run, link), "making the job").id
            except Unsure as lost:
                if lost.answered and tries < TRIES:
                    continue
                if found := find(service, link):
                    continue
                again = f"go on with: tunesmith train --resume {self._run} (it looks again before it asks again)"
                why = f"{lost.why.message}; no job with this run's mark is at the service"
                raise TunesmithError(why, where=service.base_url, fix=again) from None
            except TunesmithError as error:
                raise refused(error, self._run) from None

    def _watch(self, service: Service, link: Link) -> str:
        """Take in what is new of the job."""
        run, before = self._run, self._run.last("state")
        job = service.job(str(link.job))
        new = self._told.take(service, job)
        word = WORDS.get(job.status, job.status if job.status in ENDED else "running")
        if word == "succeeded":
            fetch(run, service, job, link.files)
        elif word == "failed":
            self._told.failed(job, service)
        if changed := (word, job.status) != (before.get("state"), before.get("said")):
            run.append("state", state=word, at="service", said=job.status)
        if changed or new:
            self._news = time.monotonic()
        if word not in ENDED and time.monotonic() - self._news > STILL:
            message = f"nothing new of the job {job.id} for {STILL / 3600:.0f} hours (it says: {job.status})"
            raise TunesmithError(message, where=str(run), fix=f"look again: tunesmith runs watch {run}")
        return word


def create(client: Any, run: Run, link: Link) -> Job:
    """Ask for the job of a run."""
    from tunesmith.remote.service import as_job

    recipe = run.manifest()["recipe"]
    names = {"n_epochs": "epochs", "batch_size": "batch_size", "learning_rate_multiplier": "learning_rate_multiplier"}
    hyperparameters = {theirs: recipe[ours] for theirs, ours in names.items()}
    order = {
        "model": recipe["model"],
        "training_file": link.files["train"],
        "seed": recipe["seed"],
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "metadata": {"tunesmith_run": link.mark},
    }
    order |= {"validation_file": link.files["valid"]} if "valid" in link.files else {}
    order |= {"suffix": recipe["suffix"]} if recipe["suffix"] else {}
    return as_job(client.fine_tuning.jobs.create(**order))


def find(service: Service, link: Link) -> Job | None:
    """The job of a run, by its mark, or by its training file, which no other run has sent."""
    for wait in LOOKS:
        time.sleep(wait)
        for query in ({"metadata": {"tunesmith_run": link.mark}}, {}):
            for number, job in enumerate(service.jobs(**query)):
                marked = (job.metadata or {}).get("tunesmith_run") == link.mark
                if marked or job.training_file == link.files["train"]:
                    return job
                if number == 200:  # newest first: it would be among these
                    break
    return None


def refused(error: TunesmithError, run: Run) -> TunesmithError:
    """The same error; where the service lets this account make no jobs at all, with what can be done instead."""
    if "HTTP 403" in error.message or "not available for fine-tuning" in error.message:
        dataset = run.manifest()["recipe"]["dataset"]
        words = f"{error.message}: the service makes no jobs for this account"
        return TunesmithError(words, where=error.where, fix=_instead(dataset))
    return error


def size(path: Path) -> str:
    bytes = path.stat().st_size
    return f"{bytes / 1e6:.1f} MB" if bytes >= 100_000 else f"{bytes:,} bytes"
