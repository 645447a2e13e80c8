"""A service that speaks the OpenAI protocol, spoken to with patience: deadlines, back-off, and words a user can act on.

Reading may be tried again as often as one likes, and is. What makes something (a file, a job) is tried again only where it is
known that nothing was made: see `Unsure`.
"""

from __future__ import annotations

import email.utils
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import openai

from tunesmith.data.write import write_parts
from tunesmith.errors import TunesmithError, UsageError
from tunesmith.hosted import local_address

T = TypeVar("T")
TIMEOUT = 60.0  # seconds without a byte
PATIENCE = 600.0  # seconds that a service may be out of reach before we stop waiting for it
FIRST, LONGEST = 0.5, 30.0  # seconds between two tries: doubled from one to the next
GARBLED = 5  # tries where something else than the protocol's objects comes: cut off, or not this protocol at all
ODD = (ValueError, AttributeError, TypeError)  # what the SDK, and we, raise then


class Unsure(Exception):
    """No answer to a request that makes something: it may have been done, or not. `answered`: with an error of the service."""

    def __init__(self, why: TunesmithError, answered: bool) -> None:
        super().__init__(str(why))
        self.why, self.answered = why, answered


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What we need of a fine-tuning job; everything else is kept as it came, in `as_sent`."""

    id: str
    status: str
    model: str = ""
    training_file: str = ""
    validation_file: str | None = None
    fine_tuned_model: str | None = None
    created_at: float = 0
    finished_at: float | None = None
    trained_tokens: int | None = None
    result_files: list[str] = []
    error: dict[str, Any] | None = None
    hyperparameters: dict[str, Any] | None = None
    method: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    seed: int | None = None
    as_sent: dict[str, Any] = {}

    def resolved(self) -> dict[str, Any]:
        """The hyperparameters as far as they are known: `method` says them first, the older field stands in."""
        method = self.method or {}
        inside = (method.get(str(method.get("type"))) or {}).get("hyperparameters")
        return dict(inside or self.hyperparameters or {})

    def failure(self) -> dict[str, Any]:
        """code, message, param; {} for a healthy job, whose `error` may be an object of nulls."""
        return self.error if self.error and (self.error.get("code") or self.error.get("message")) else {}


class Service:
    """One service and one key. Every method raises TunesmithError with place and fix, and never tells the key."""

    def __init__(self, base_url: str, key_file: str | None = None) -> None:
        self.base_url, self._key = base_url, key(base_url, key_file)
        self._client = openai.OpenAI(
            api_key=self._key, base_url=base_url, max_retries=0, timeout=openai.Timeout(TIMEOUT, connect=10.0)
        )

    # ---- patience

    def read(self, ask: Callable[[openai.OpenAI], T], what: str, missing: str = "") -> T:
        """The answer to a question that may be asked again: until PATIENCE is over. `missing`: what a 404 means."""
        return self._patiently(ask, what, missing, lambda error: not final(error))

    def make(self, ask: Callable[[openai.OpenAI], T], what: str) -> T:
        """The answer to a request that makes something. Asked again only where it is sure that nothing was made: the service
        said so itself (429), or was never reached. Raises Unsure where it may have been made.
        """

        def again(error: Exception) -> bool:
            status = getattr(error, "status_code", None)
            if never_sent(error) or status == 429:
                return not final(error)
            if not final(error):
                raise Unsure(self.explained(error, what), status is not None) from None
            return False

        return self._patiently(ask, what, "", again)

    def _patiently(
        self, ask: Callable[[openai.OpenAI], T], what: str, missing: str, again: Callable[[Exception], bool]
    ) -> T:
        began, pause, garbled = time.monotonic(), FIRST, 0
        while True:
            try:
                return ask(self._client)
            except (openai.OpenAIError, *ODD) as error:
                garbled += isinstance(error, ODD)
                if not again(error) or garbled == GARBLED:
                    raise self.explained(error, what, missing) from None
                said = wait_said(error)
                pause_now = min(LONGEST, pause) * random.uniform(0.75, 1.0) if said is None else said
                if time.monotonic() - began + pause_now > PATIENCE:
                    raise self.explained(error, what, missing) from None
                time.sleep(pause_now)
                pause *= 2

    # ---- words

    def hidden(self, text: str) -> str:
        """A text from outside without our key in it; services repeat a wrong one, or parts of it."""
        text = text.replace(self._key, "[key]") if len(self._key) > 7 else text
        return re.sub(r"\b(sk|tsk)-[\w*-]{6,}", "[key]", text)

    def explained(self, error: Exception, what: str, missing: str = "") -> TunesmithError:
        """What went wrong, for a user."""
        where, status = self.base_url, getattr(error, "status_code", None)
        body = getattr(error, "body", None)
        inside = body.get("message") if isinstance(body, dict) else None
        said = self.hidden(str(inside or getattr(error, "message", "") or error))
        code = getattr(error, "code", None)
        if isinstance(error, openai.APITimeoutError):
            return TunesmithError(f"{what}: no answer within {TIMEOUT:.0f} s", where=where, fix="try again later")
        if isinstance(error, openai.APIConnectionError):
            cause = self.hidden(str(error.__cause__ or error))
            return TunesmithError(f"{what}: not reached ({cause})", where=where, fix="is the address right, and up?")
        if status is None:
            return TunesmithError(
                f"{what}: the answer is not one of this protocol", where=where, fix="check --base-url"
            )
        words = f"{what}: {said} (HTTP {status})"
        if status == 401:
            return UsageError(words, where=where, fix="export OPENAI_API_KEY=…, or --api-key-file FILE")
        if status == 404 and missing:
            return UsageError(f"{missing} ({said})", where=where, fix="check the name; tunesmith doctor")
        if status == 429 and code == "insufficient_quota":
            return TunesmithError(words, where=where, fix="the account has no credit: see its billing page")
        if status == 429:
            return TunesmithError(words, where=where, fix="the service is busy: go on later")
        return TunesmithError(words, where=where, fix="see what the service says")

    # ---- what is asked

    def model(self, name: str) -> dict[str, Any]:
        """A model as the service describes it. Raises UsageError where it has none of that name."""
        missing = f'the service has no model "{name}"'
        return self.read(lambda c: _plain(c.models.retrieve(name)), "asking about the model", missing)

    def job(self, id: str) -> Job:
        return self.read(lambda c: as_job(c.fine_tuning.jobs.retrieve(id)), "asking about the job", f"no job {id}")

    def act(self, id: str, what: str) -> Job:
        """cancel, pause or resume a job: to be asked twice does no harm."""
        return self.read(lambda c: as_job(getattr(c.fine_tuning.jobs, what)(id)), f"asking to {what} the job")

    def jobs(self, **query: Any) -> Iterator[Job]:
        """All jobs, newest first."""
        return (_checked(job) for job in self.pages(lambda c, **q: c.fine_tuning.jobs.list(**q, **query), "jobs"))

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
        while True:
            page = self.read(lambda c: _page(ask(c, limit=size, **after)), f"listing {what}")  # noqa: B023
            new = [item for item in page[0] if item["id"] not in seen]
            yield from new
            seen.update(item["id"] for item in new)
            if not new or not page[1]:
                return
            after = {"after": page[0][-1]["id"]}

    def content(self, file: str, path: Path) -> int:
        """Write a file's bytes to a path, whole or not at all; how many."""

        def fetch(client: openai.OpenAI) -> int:
            try:
                with client.files.with_streaming_response.content(file) as found:
                    return write_parts(path, found.iter_bytes(1 << 20))
            except Exception as error:
                if cut_off(error):
                    raise ValueError("cut off") from error
                raise

        return self.read(fetch, f"fetching {file}", f"no file {file}")


def key(base_url: str, key_file: str | None) -> str:
    """The service's key, from a file or the environment. Raises UsageError where there is none and one is needed."""
    if key_file:
        path = Path(key_file).expanduser()
        try:
            found = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"no key: {type(error).__name__}", where=key_file, fix="a file with the key alone"
            ) from None
        if not found or len(found.split()) != 1 or not found.isascii():
            raise UsageError("holds no key", where=key_file, fix="write the key, and nothing else, into it")
        return found
    found = os.environ.get("OPENAI_API_KEY", "").strip()
    if not found and not local_address(base_url):
        fix = "export OPENAI_API_KEY=…, or --api-key-file FILE"
        raise UsageError("no key for the service", where=base_url, fix=fix)
    return found or "none"  # a server on this machine may want none, but the SDK does


def cut_off(error: Exception) -> bool:
    """Whether the line broke while an answer came in: the HTTP library's own error, which has another name in each of its
    versions."""
    return type(error).__module__.partition(".")[0].startswith(("httpx", "httpcore"))


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
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        said = headers.get("retry-after")
        return None if said is None else max(0.0, float(said))
    except ValueError:
        when = email.utils.parsedate_to_datetime(said) if said and "," in said else None
        return None if when is None else max(0.0, when.timestamp() - time.time())


def as_job(job: Any) -> Job:
    """An SDK object as ours. Raises ValueError where it is none."""
    return _checked(_plain(job))


def _checked(sent: dict[str, Any]) -> Job:
    known = {name: sent[name] for name in Job.__struct_fields__ if sent.get(name) is not None and name != "as_sent"}
    return msgspec.convert({**known, "as_sent": sent}, Job)  # msgspec.ValidationError is a ValueError


def _page(page: Any) -> tuple[list[dict[str, Any]], bool]:
    """(objects, whether there may be more) of a list. Raises ValueError where it is none."""
    sent = _plain(page)
    items = sent.get("data")
    if not isinstance(items, list) or not all(isinstance(i, dict) and isinstance(i.get("id"), str) for i in items):
        raise ValueError("no list")
    return items, sent.get("has_more") is not False


def _plain(sent: Any) -> dict[str, Any]:
    """What came, as JSON objects. Raises ValueError for anything else than an object."""
    found = sent.to_dict(mode="json") if hasattr(sent, "to_dict") else sent
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found
