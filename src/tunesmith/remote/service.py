"""A service that speaks the OpenAI protocol, spoken to with patience: deadlines, back-off, and words a user can act on.

Reading may be tried again as often as one likes, and is. What makes something (a file, a job) is tried again only where it is
known that nothing was made: see `Unsure`.
"""

from __future__ import annotations

import contextlib
import email.utils
import os
import queue
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import openai

from tunesmith.data.write import write_parts
from tunesmith.errors import ServiceError, UsageError
from tunesmith.hosted import OPENAI, local_address
from tunesmith.hosted import key_file as file_of_key
from tunesmith.remote.objects import Job, as_job, hidden, page, plain

T = TypeVar("T")
TIMEOUT = 60.0  # seconds without a byte
WHOLE = 180.0  # seconds for a whole answer, besides those for its bytes
SLOWEST = 20_000  # bytes a second of a file, under which we give up
PATIENCE = 600.0  # seconds that a service may be out of reach before we stop waiting for it
HELLO = 10.0  # seconds for the first connection: who is not there at first has a wrong address
FIRST, LONGEST = 0.5, 30.0  # seconds between two tries: doubled from one to the next
SOONEST = 5.0  # a pause never grows over this where the service says how long to wait
PAGES = 10_000  # of a list: a service may invent items for ever
GARBLED = 5  # tries where something else than the protocol's objects comes: cut off, or not this protocol at all
ODD = (ValueError, AttributeError, TypeError)  # what the SDK, and we, raise then


class Unsure(Exception):
    """No answer to a request that makes something: it may have been done, or not. `answered`: with an error of the service."""

    def __init__(self, why: ServiceError, answered: bool) -> None:
        super().__init__(str(why))
        self.why, self.answered = why, answered


class Cut(Exception):
    """A file came, and not whole."""


class Late(Exception):
    """A request had no whole answer in its time."""


class Service:
    """One service and one key. Every method raises ServiceError with place and fix, and never tells the key."""

    def __init__(self, base_url: str, key_file: str | None = None) -> None:
        self.base_url, self._key = base_url, key(base_url, key_file)
        self.key_file = file_of_key(key_file) if key_file else None
        self._reached = False  # by any request so far
        self.say: Callable[[str], None] = lambda text: None  # told of long waits
        self._client = openai.OpenAI(
            api_key=self._key, base_url=base_url, max_retries=0, timeout=openai.Timeout(TIMEOUT, connect=10.0)
        )
        # Its connections go with us. Left to the collector of cycles, a socket may be found before what would have closed it.
        weakref.finalize(self, self._client.close).atexit = False

    # ---- patience

    def read(self, ask: Callable[[openai.OpenAI], T], what: str, missing: str = "", size: int = 0) -> T:
        """The answer to a question that may be asked again: until PATIENCE is over. `missing`: what a 404 means."""
        return self._patiently(ask, what, missing, lambda error: not final(error), size)

    def make(self, ask: Callable[[openai.OpenAI], T], what: str, size: int = 0) -> T:
        """The answer to a request that makes something. Asked again only where it is sure that nothing was made: the service
        said so itself (429), or was never reached. Raises Unsure where it may have been made. `size`: bytes sent with it.
        """

        def again(error: Exception) -> bool:
            status = getattr(error, "status_code", None)
            if never_sent(error) or status == 429:
                return not final(error)
            if not final(error):
                answered = status in (500, 503)  # others may be a gateway's word
                raise Unsure(self.explained(error, what), answered) from None
            return False

        return self._patiently(ask, what, "", again, size)

    def _patiently(
        self, ask: Callable[[openai.OpenAI], T], what: str, missing: str, again: Callable[[Exception], bool], size: int
    ) -> T:
        began, pause, garbled, told = time.monotonic(), FIRST, 0, False
        while True:
            try:
                found = within(WHOLE + size / SLOWEST, lambda: ask(self._client))
                self._reached = True
                return found
            except (openai.OpenAIError, Late, Cut, *ODD) as error:
                garbled += isinstance(error, (Cut, *ODD))
                self._reached = self._reached or not never_sent(error)
                if not again(error) or garbled == GARBLED:
                    raise self.explained(error, what, missing) from None
                if never_sent(error) and not self._reached and time.monotonic() - began > HELLO:
                    raise self.explained(error, what, missing) from None
                if not told and time.monotonic() - began > HELLO:
                    told = True
                    self.say(f"{self.explained(error, what).message}: asking again for {PATIENCE / 60:.0f} minutes")
                said = wait_said(error)
                pause_now = min(LONGEST, pause) * random.uniform(0.75, 1.0)
                if said is not None:
                    pause_now = max(said, min(pause_now, SOONEST))
                if time.monotonic() - began + pause_now > PATIENCE:
                    raise self.explained(error, what, missing) from None
                time.sleep(pause_now)
                pause *= 2

    # ---- words

    def hidden(self, said: Any) -> str:
        """A text from outside, without our key in it and without what steers a terminal."""
        return hidden(str(said), self._key)

    def clean(self, value: Any) -> Any:
        """A value that came from outside, its texts as `hidden` has them."""
        if isinstance(value, dict):
            return {self.hidden(name): self.clean(inside) for name, inside in value.items()}
        if isinstance(value, list):
            return [self.clean(inside) for inside in value]
        return self.hidden(value) if isinstance(value, str) else value

    def explained(self, error: Exception, what: str, missing: str = "") -> ServiceError:
        """What went wrong, for a user."""
        status, code, body = (getattr(error, name, None) for name in ("status_code", "code", "body"))
        inside = body.get("message") if isinstance(body, dict) else None
        said = self.hidden(inside or getattr(error, "message", "") or error)
        cause = self.hidden(error.__cause__ or error)
        words, fix, exit_status = f"{what}: {said} (HTTP {status})", "see what the service says", 1
        if isinstance(error, openai.APITimeoutError | Late):
            seconds = WHOLE if isinstance(error, Late) else TIMEOUT
            words, fix = f"{what}: no answer within {seconds:g} s", "try later"
        elif isinstance(error, openai.APIConnectionError):
            words, fix = f"{what}: not reached ({cause})", "is the address right, and the service up?"
        elif isinstance(error, Cut):
            words, fix = f"{what}: cut off", "go on later"
        elif status is None or status == 404 and not isinstance(body, dict):
            words, fix = f"{what}: the answer is not one of this protocol", "is the address right? It ends in /v1"
        elif status == 401:
            fix, exit_status = "export OPENAI_API_KEY=…, or --api-key-file FILE", 2
        elif status == 404 and missing:
            words, fix, exit_status = f"{missing} ({said})", "check the name", 2
        elif code == "insufficient_quota":
            fix = "the account has no credit: see its billing page"
        elif status == 429:
            fix = "the service is busy: go on later"
        found = ServiceError(words, where=self.base_url, fix=fix)
        found.status, found.exit_status = status or 0, exit_status
        return found

    # ---- what is asked

    def model(self, name: str) -> dict[str, Any]:
        """A model as the service describes it. ServiceError where it has none of that name."""
        missing = f'the service has no model "{name}"'
        return self.read(lambda c: plain(c.models.retrieve(name)), "asking about the model", missing)

    def job(self, id: str) -> Job:
        return self.read(lambda c: as_job(c.fine_tuning.jobs.retrieve(id)), "asking about the job", f"no job {id}")

    def act(self, id: str, what: str) -> Job:
        """cancel, pause or resume a job. Where an answer was lost and the service then says that it cannot, the job's state
        tells whether it had."""
        try:
            return self.read(lambda c: as_job(getattr(c.fine_tuning.jobs, what)(id)), f"asking to {what} the job")
        except ServiceError as error:
            job = self.job(id) if error.status in (400, 409) else None
            if job is None or job.status not in DONE[what]:
                raise
            return job

    def jobs(self, **query: Any) -> Iterator[Job]:
        """All jobs, newest first."""
        return (as_job(job) for job in self.pages(lambda c, **q: c.fine_tuning.jobs.list(**q, **query), "jobs"))

    def events(self, id: str) -> Iterator[dict[str, Any]]:
        """A job's events, newest first, page by page as they are asked for."""
        return self.pages(lambda c, **q: c.fine_tuning.jobs.list_events(id, **q), "events")

    def checkpoints(self, id: str) -> list[dict[str, Any]]:
        return list(self.pages(lambda c, **q: c.fine_tuning.jobs.checkpoints.list(id, **q), "checkpoints"))

    def files(self) -> Iterator[dict[str, Any]]:
        """All files, newest first."""
        return self.pages(lambda c, **q: c.files.list(**q), "files")

    def pages(self, ask: Callable[..., Any], what: str, size: int = 100) -> Iterator[dict[str, Any]]:
        """Objects of a list, page by page. A service that ignores `after` is not asked for ever."""
        after: dict[str, str] = {}
        seen: set[str] = set()
        for _ in range(PAGES):
            items, more = self.read(lambda c: page(ask(c, limit=size, **after)), f"listing {what}")  # noqa: B023
            new = [item for item in items if item["id"] not in seen]
            yield from new
            seen.update(item["id"] for item in new)
            if not new or not more:
                return
            after = {"after": items[-1]["id"]}

    def content(self, file: str, path: Path, size: int | None = None) -> None:
        """Write a file's bytes to a path, whole or not at all. `size`: how many they are, where it is known."""

        def fetch(client: openai.OpenAI) -> None:
            try:
                with client.files.with_streaming_response.content(file) as found:
                    write_parts(path, found.iter_bytes(1 << 20), size)
            except Exception as error:
                if cut_off(error) or isinstance(error, ValueError):
                    raise Cut from error
                raise

        self.read(fetch, f"fetching {file}", f"no file {file}", size or 1 << 30)


DONE = {  # what was asked: states that a job has then
    "cancel": ("cancelled",),
    "pause": ("paused",),
    "resume": ("validating_files", "queued", "running"),
}


def within(seconds: float, ask: Callable[[], T]) -> T:
    """The answer, in a time that ends: the HTTP library's limits are between two bytes, and a drop a second meets them. Raises
    Late. The thread is left behind then, and Ctrl-C is heard meanwhile."""
    answer: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answer.put((True, ask()))
        except BaseException as error:
            answer.put((False, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        fine, found = answer.get(timeout=seconds)
    except queue.Empty:
        raise Late from None
    if not fine:
        raise found
    return found  # type: ignore[no-any-return]


def key(base_url: str, key_file: str | None) -> str:
    """The service's key, from a file or the environment. Raises UsageError where there is none and one is needed."""
    if key_file:
        path = Path(file_of_key(key_file))
        try:
            found = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            if os.environ.get("OPENAI_API_KEY"):
                return key(base_url, None)
            why = getattr(error, "strerror", None) or "not text"
            raise UsageError(f"no key: {why}", where=key_file, fix="name a file that holds the key alone") from None
        where, fix = key_file, "write the key, and nothing else, into it"
    else:
        found = os.environ.get("OPENAI_API_KEY", "").strip()
        if not found and local_address(base_url):
            return "none"  # a server on this machine may want none, but the SDK does
        where, fix = base_url, "export OPENAI_API_KEY=…, or --api-key-file FILE"
    if not found or len(found.split()) != 1 or not found.isascii() or not found.isprintable():
        raise UsageError("no key for the service" if not found else "no key: not one ASCII word", where=where, fix=fix)
    return found


def cut_off(error: Exception) -> bool:
    """Whether the line broke while an answer came in: the HTTP library's own error, which has another name in each of its
    versions."""
    return type(error).__module__.partition(".")[0].startswith(("httpx", "httpcore"))


def named(url: str) -> None:
    """Keep that this user has named a service: by a flag, a variable, or as the default."""
    with contextlib.suppress(OSError):
        if not is_named(url):
            _services().parent.mkdir(parents=True, exist_ok=True)
            with _services().open("a", encoding="utf-8") as stream:
                stream.write(url + "\n")


def is_named(url: str) -> bool:
    """Whether a key may go there: a run directory of somebody else could name any address."""
    lines = _services().read_text(encoding="utf-8").splitlines() if _services().exists() else []
    return local_address(url) or url in (OPENAI, os.environ.get("OPENAI_BASE_URL", "").rstrip("/"), *lines)


def _services() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "tunesmith" / "services"


def never_sent(error: Exception) -> bool:
    """Whether no connection came about, so that nothing can have been done."""
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ in (
            "ConnectError",
            "ConnectTimeout",
            "PoolTimeout",
            "gaierror",
            "ConnectionRefusedError",
        ):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def final(error: Exception) -> bool:
    """Whether asking again would bring the same refusal."""
    status, code = getattr(error, "status_code", None), getattr(error, "code", None)
    if status is None:
        return False
    return code == "insufficient_quota" or status < 500 and status not in (408, 429)


def wait_said(error: Exception) -> float | None:
    """Seconds that the service asks us to wait (Retry-After: seconds or a date), None where it does not say."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        said = str(headers.get(name, ""))
        try:
            return max(0.0, float(said) / unit)
        except ValueError:
            pass
        try:
            return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
        except (ValueError, TypeError, OverflowError):
            pass
    return None
