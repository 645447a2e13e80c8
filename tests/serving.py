"""A server in a process of its own, for tests: start, ask, kill, start again."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openai

ENDED = ("succeeded", "failed", "cancelled")


class Answer:
    """Status, headers and body of a response, whatever the status."""

    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    def json(self) -> Any:
        return json.loads(self.body)

    def error(self) -> dict[str, Any]:
        """The envelope's inside; fails where it is not exactly that."""
        found = self.json()
        assert list(found) == ["error"] and set(found["error"]) == {"message", "type", "param", "code"}, found
        assert self.headers["x-request-id"].startswith("req_")
        return dict(found["error"])


class Server:
    """`tunesmith serve` on a free port."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.folder, self.arguments = folder, [*map(str, arguments)]
        self.log = folder.with_name(folder.name + ".log")
        self.clients: list[openai.OpenAI] = []  # closed by us: one holds itself, and is found late
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "tunesmith", "serve", "--port", "0", "--data-dir", str(self.folder)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--keep-free", "0", *self.arguments], stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout
        said, _, _ = select.select([self.process.stdout], [], [], 120)
        line = self.process.stdout.readline().strip() if said else "nothing"
        if not line.startswith("http://127.0.0.1:"):
            self.process.kill()
            raise AssertionError(f"the server said {line!r}; the log: {self.log.read_text()[-2000:]}")
        self.url = line
        self.wait_until(lambda: self.ask("GET", "/health").status == 200, 30)

    def stop(self, how: int = signal.SIGTERM) -> int:
        while self.clients:
            self.clients.pop().close()
        self.process.send_signal(how)
        code = self.process.wait(60)
        if self.process.stdout:
            self.process.stdout.close()
        return code

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        made = openai.OpenAI(base_url=self.url, api_key=key, **{"max_retries": 0, **options})
        self.clients.append(made)
        return made

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """A bare request. `body`: an object (sent as JSON) or bytes."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {"content-type": "application/json", **(headers or {})}
        request = urllib.request.Request(self.url + path, data, given, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as found:
                return Answer(found.status, found.headers, found.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.headers, error.read())

    def upload(self, data: bytes, name: str = "train.jsonl", purpose: str = "fine-tune", **headers: str) -> Answer:
        """A file, as a multipart form."""
        parts = [("purpose", None, purpose.encode()), ("file", name, data)]
        return self.form("/files", parts, **headers)

    def form(self, path: str, parts: list[tuple[str, str | None, bytes]], **headers: str) -> Answer:
        body = b""
        for field, name, data in parts:
            where = f'form-data; name="{field}"' + ("" if name is None else f'; filename="{name}"')
            body += f"--xyz\r\nContent-Disposition: {where}\r\n\r\n".encode() + data + b"\r\n"
        known = {"content-type": "multipart/form-data; boundary=xyz", **headers}
        return self.ask("POST", path, body + b"--xyz--\r\n", known)

    def wait_until(self, done: Any, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                if done():
                    return
            except (urllib.error.URLError, ConnectionError):
                pass
            assert time.monotonic() < deadline, f"did not come about; the log: {self.log.read_text()[-3000:]}"
            time.sleep(0.1)

    def job(self, id: str, *states: str, seconds: float = 120) -> dict[str, Any]:
        """A job, once it has one of some states (else: has ended)."""
        found: dict[str, Any] = {}

        def there() -> bool:
            found.update(self.ask("GET", f"/fine_tuning/jobs/{id}").json())
            return found["status"] in (states or ENDED)

        self.wait_until(there, seconds)
        return found

    def events(self, id: str) -> list[dict[str, Any]]:
        """All events of a job, oldest first."""
        return list(reversed(self.ask("GET", f"/fine_tuning/jobs/{id}/events?limit=1000").json()["data"]))


def worker(job: str) -> int | None:
    """Process that trains a job."""
    for folder in Path("/proc").iterdir() if Path("/proc").exists() else ():
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"tunesmith.local.worker" in words and any(job.encode() in word for word in words):
            return int(folder.name)
    return None


def kill(pid: int | None) -> None:
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def chats(count: int, first: int = 0) -> bytes:
    """A training file of distinct rows."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i}?"},
                {"role": "assistant", "content": f"It is number {i}."},
            ]
        }
        for i in range(first, first + count)
    ]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)
