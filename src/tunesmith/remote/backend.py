"""The backend of a service: a state machine on disk, which any process can take one step further.

`remote.json` in the run says what the service holds of it (files, job), and is written before the next step is begun; what the
job tells becomes the run's own events. So a run is followed by reading it and asking, from wherever it was left.
"""

from __future__ import annotations

import math
import random
import shlex
import time
import uuid
from pathlib import Path
from typing import Any

import msgspec

from tunesmith.backends import Completer
from tunesmith.data.write import write_json
from tunesmith.errors import Interrupted, RunError, ServiceError, TunesmithError, UsageError
from tunesmith.hosted import address, effective, instead, local_address
from tunesmith.layout import create_run
from tunesmith.planning import Prepared
from tunesmith.remote import upload
from tunesmith.remote.answers import Answers
from tunesmith.remote.objects import Job, as_job
from tunesmith.remote.results import fetch
from tunesmith.remote.service import Service, Unsure, is_named, named
from tunesmith.remote.told import Told
from tunesmith.runs import ENDED, Run

WORDS = {"validating_files": "queued", "queued": "queued", "running": "running", "paused": "paused"}
HYPERPARAMETERS = {  # the service's names: ours
    "n_epochs": "epochs",
    "batch_size": "batch_size",
    "learning_rate_multiplier": "learning_rate_multiplier",
}
EVERY, NEAR = 10.0, 0.5  # seconds between two questions: of a service far away, of one on this machine
STILL = 86_400.0  # seconds without any news after which we stop waiting
LOOKS = (0.0, 5.0, 15.0)  # seconds before each look for a job that an unanswered request may have made
MARGIN = 180.0  # seconds in which a request that was cut off may still become a job
TRIES = 3  # times that a job is asked for where the service answers with an error of its own


class Link(msgspec.Struct, kw_only=True):
    """remote.json: where the run is, and what the service holds of it.

    `mark` stands in the job's metadata. `asked`: when a job was last asked for, in seconds since 1970; before it is asked for
    again, the one that may have been made is looked for.
    """

    base_url: str
    mark: str
    files: dict[str, str] = {}  # side: id
    asked: float | None = None
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

        run = create_run(prepared, path, fill)
        _following[_key(run)] = Following(run, may_begin=True)
        return run

    def resume(self, run: Run, step: int | None = None) -> None:
        """Go on with what was begun: sending files, asking for the job, or only watching it."""
        if step is not None:
            raise UsageError("a job of a service begins at no checkpoint", where=str(run), fix="resume the run itself")
        if Link.of(run).job is None:
            run.append("state", state="queued")
        _following[_key(run)] = Following(run, may_begin=True)

    def begin(self, run: Run, job: bool) -> None:
        """Send the files, and with `job` ask for the job, without watching it. Where it is refused the run has failed."""
        with run.lock():
            link = Link.of(run)
            if link.job is None:
                Following(run).begin(connect(run), link, job)

    def poll(self, run: Run) -> str:
        """Take a step, unless that was done a moment ago. Only where this process has submitted or resumed the run are files
        sent and a job asked for: who merely watches starts nothing."""
        return _of(run).look()

    def interrupt(self, run: Run, at_once: bool = False) -> None:
        """Ctrl-C leaves the job alone."""
        link = Link.of(run)
        how = f"follow it: tunesmith runs watch {run:q}; stop it: tunesmith runs cancel {run:q}"
        if link.job:
            raise Interrupted(f"the job {link.job} goes on at the service", where=str(run), fix=how)
        fix = f"go on with: tunesmith train --resume {run:q}"
        if link.asked:
            message = "stopped while the service was asked for the job, which it may have made"
            raise Interrupted(message, where=str(run), fix=f"{fix} (it looks for it first)")
        raise Interrupted("stopped before the service was asked for a job", where=str(run), fix=fix)

    def cancel(self, run: Run, at_once: bool = False) -> None:
        self.act(run, "cancel")

    def act(self, run: Run, what: str) -> str:
        """cancel, pause or resume the job; the state it has then. A run that has asked for no job is cancelled here alone."""
        if what == "cancel" and run.state() in ENDED:
            return run.state()
        with run.lock(wait=60.0):
            link = Link.of(run)
            if link.job is None and link.asked is None and what == "cancel":
                run.append("state", state="cancelled")
                return "cancelled"
            service = connect(run)
            if link.job is None and link.asked and (found := find(service, link)):
                link.job = found.id
                link.save(run)
            if link.job is None:
                fix = f"go on with: tunesmith train --resume {run:q}"
                raise UsageError("the service has no job of this run", where=str(run), fix=fix)
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


def connect(run: Run, key_file: str | None = None) -> Service:
    """The service of a run, with the key of now."""
    url = address(Link.of(run).base_url, str(run / "remote.json"))
    if not is_named(url):
        message = f"the run says that its service is {url}, to which you have never sent a key from here"
        raise UsageError(message, where=str(run), fix=f"if you know it: export OPENAI_BASE_URL={shlex.quote(url)}")
    return Service(url, key_file or run.recipe().api_key_file)


def quote(prepared: Prepared) -> dict[str, Any]:
    """The model as the service describes it. ServiceError where it has none of that name, UsageError where no longer."""
    recipe = prepared.plan.recipe
    service = Service(str(recipe.base_url), recipe.api_key_file)
    named(service.base_url)
    found = service.model(recipe.model)
    ends = service.hidden(found.get("shutdown_date") or "")
    if ends and ends <= time.strftime("%Y-%m-%d"):
        raise UsageError(f"the service has ended this model on {ends}", where=recipe.model, fix=instead(recipe.dataset))
    return {**found, "shutdown_date": ends or None}


def _key(run: Run) -> str:
    return str(run.path.resolve())


def _of(run: Run) -> Following:
    return _following.setdefault(_key(run), Following(run))


class Following:
    """One run, followed from this process."""

    def __init__(self, run: Run, may_begin: bool = False) -> None:
        self._run, self._told, self._may_begin = run, Told(run), may_begin
        self._due, self._news = 0.0, time.monotonic()
        self._word = "queued"

    def look(self, now: bool = False) -> str:
        """The state, asked of the service unless that was done a moment ago."""
        if time.monotonic() < self._due and not now:
            return self._word
        pause = NEAR if local_address(Link.of(self._run).base_url) else EVERY
        try:
            lock = self._run.lock(wait=60.0 if now else 0.0)
        except RunError:  # another process follows it: its events are ours
            self._word = self._run.state()
        else:
            with lock:
                self._word = self.step()
        self._due = time.monotonic() + pause * random.uniform(0.8, 1.2)
        return self._word

    def step(self, service: Service | None = None) -> str:
        """Do what is next, and take in what is new; the state then. The run's lock is held."""
        run, link = self._run, Link.of(self._run)
        word = run.state()
        if word in ENDED:
            return word
        service = service or connect(run)
        service.say = lambda text: run.append("warning", message=text)
        if link.job is None:
            if not self._may_begin:
                fix = f"send it: tunesmith train --resume {run:q}"
                raise UsageError("the service has no job of this run yet", where=str(run), fix=fix)
            self.begin(service, link)
        return self._watch(service, link) if link.job else run.state()

    def begin(self, service: Service, link: Link, job: bool = True) -> None:
        """Send what is missing, then ask for the job. A refusal is the run's last word; anything else is raised, and the run
        can be gone on with."""
        run = self._run
        run.append("state", state="preparing")
        try:
            for side in ("train", "valid"):
                path = run / "upload" / f"{side}.jsonl"
                if path.exists() and side not in link.files:
                    run.append("message", message=f"sending {side}.jsonl ({size(path)})")
                    link.files[side] = upload.send(service, path, f"{link.mark}-{side}.jsonl")
                    link.save(run)
            if not job:
                run.append("state", state="paused")
                return
            link.job = self._create(service, link)
            link.save(run)
            run.append("state", state="queued", at="service")
        except ServiceError as error:
            if not error.refusal():
                fix = f"{error.fix}; go on with: tunesmith train --resume {run:q}"
                raise TunesmithError(error.message, where=error.where, fix=fix) from None
            error = refused(error, run)
            how = dict(message=error.message, where=error.where, fix=error.fix, exit_status=error.exit_status)
            run.append("error", **how)
            run.append("state", state="failed")

    def _create(self, service: Service, link: Link) -> str:
        """The id of this run's job, which is made at most once."""
        for number in range(1, TRIES + 1):
            if link.asked and (found := self._look(service, link, patiently=True)):
                return found.id
            link.asked = time.time()
            link.save(self._run)
            try:
                return service.make(lambda c: create(c, self._run, link), "making the job").id
            except Unsure as lost:
                if lost.answered and number < TRIES:
                    continue
                if found := self._look(service, link):
                    return found.id
                message = f"{lost.why.message}; no job with this run's mark is at the service"
                again = f"go on with: tunesmith train --resume {self._run:q} (it looks again before it asks again)"
                raise TunesmithError(message, where=service.base_url, fix=again) from None
        raise AssertionError

    def _look(self, service: Service, link: Link, patiently: bool = False) -> Job | None:
        """The job that an unanswered request has made, if it has. `patiently`: as long as it still may."""
        until = float(link.asked or 0) + MARGIN
        try:
            found = find(service, link)
            while not found and patiently and time.time() < until:
                left = math.ceil(until - time.time())
                self._run.append("message", message=f"looking for the job that may have been made, {left} s more")
                time.sleep(min(LOOKS[-1], max(0.01, until - time.time())))
                found = find(service, link)
        except ServiceError as error:
            message = f"{error.message}; whether the job was made is not known"
            fix = f"{error.fix}; go on with: tunesmith train --resume {self._run:q} (it looks for it first)"
            raise TunesmithError(message, where=error.where, fix=fix) from None
        if found:
            self._run.append("message", message=f"the job was made, though its answer was lost: {found.id}")
        return found

    def _watch(self, service: Service, link: Link) -> str:
        """Take in what is new of the job."""
        run, before = self._run, self._run.last("state")
        try:
            job = service.job(str(link.job))
            new = self._told.take(service, job)
            word = WORDS.get(job.status, job.status if job.status in ENDED else "running")
            if word == "succeeded":
                fetch(run, service, job, link.files)
        except ServiceError as error:
            message = f"{error.message}; the job {link.job} goes on without us"
            fix = f"{error.fix}; follow it again: tunesmith runs watch {run:q}"
            raise TunesmithError(message, where=error.where, fix=fix) from None
        if word == "failed":
            self._told.failed(job, service)
        said = service.hidden(job.status)
        if changed := (word, said) != (before.get("state"), before.get("said")):
            run.append("state", state=word, at="service", said=said)
        if changed or new:
            self._news = time.monotonic()
        if word not in ENDED and time.monotonic() - self._news > STILL:
            message = f"nothing new of the job {job.id} for {STILL / 3600:.0f} hours (it says: {said})"
            raise TunesmithError(message, where=str(run), fix=f"look again: tunesmith runs watch {run:q}")
        return word


def create(client: Any, run: Run, link: Link) -> Job:
    """Ask for the job of a run."""
    recipe = run.manifest()["recipe"]
    hyperparameters = {theirs: recipe[ours] for theirs, ours in HYPERPARAMETERS.items()}
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


def refused(error: ServiceError, run: Run) -> ServiceError:
    """The same error, with what can be done instead where the service makes no jobs for this account, or of this model."""
    if error.status == 403:
        error.message += ": the service makes no jobs for this account"
    if error.status == 403 or "not available for fine-tuning" in error.message:
        error.fix = instead(run.manifest()["recipe"]["dataset"])
    return error


def size(path: Path) -> str:
    count = path.stat().st_size
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count:,} bytes"
