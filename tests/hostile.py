"""A service that speaks the protocol and misbehaves on request: for tests of the client."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

KEY = "sk-test-abcdefghijklmnop"
Fault = dict[str, Any]


class Hostile:
    """Files, jobs and events in memory. `fault` has the next requests of a kind go wrong; `asked` keeps what was asked.

    A job's `script` is what it says at each look: (status, messages); the last one stays.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Any]] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.events: dict[str, list[dict[str, Any]]] = {}
        self.contents: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.faults: list[Fault] = []
        self.script: list[tuple[str, list[Any]]] = [
            ("validating_files", ["Created fine-tuning job"]),
            ("queued", ["Files validated, moving job to queued state"]),
            ("running", ["Fine-tuning job started", step(1, 3), step(2, 3)]),
            ("succeeded", [step(3, 3, 0.5), "New fine-tuned model created", "The job has successfully completed"]),
        ]
        self.models: dict[str, dict[str, Any]] = {"base": {"shutdown_date": None}}
        self.answer: Callable[[dict[str, Any]], str] = lambda body: "An answer."
        self.error: dict[str, Any] | None = None
        self.parts: list[bytes] = []
        self.wrong_after = False  # lists do not heed `after`
        self.release = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()

    def fault(self, what: str, action: str, times: int = 1, **how: Any) -> None:
        """`what`: "POST /files". `action`: "status" (status, headers, error), "hang", "cut" (done, but no answer), "drop" (not
        done, no answer), "half" (done, the answer cut in the middle), "garbage" (done, no JSON), "drip" (a byte at a time),
        "slow" (done, after a second)."""
        self.faults.append({"what": what, "action": action, "times": times, **how})

    def count(self, what: str) -> int:
        return sum(asked.startswith(what) for asked in self.asked)

    # ---- what is asked

    def answer_to(self, method: str, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, Any]:
        parts = path.removeprefix("/v1/").split("/")
        if path == "/v1/files" and method == "POST":
            return 200, self._upload(body)
        if path == "/v1/uploads":
            self.parts = [json.loads(body)["filename"].encode()]
            return 200, {"id": "upload_1", "object": "upload", "status": "pending"}
        if path == "/v1/uploads/upload_1/parts":
            self.parts.append(body.split(b"\r\n\r\n", 1)[1].rsplit(b"\r\n--", 1)[0])
            return 200, {"id": f"part_{len(self.parts)}", "object": "upload.part"}
        if path == "/v1/uploads/upload_1/complete":
            head = b'filename="' + self.parts[0] + b'"\r\n\r\n'
            return 200, {
                "id": "upload_1",
                "object": "upload",
                "file": self._upload(head + b"".join(self.parts[1:]) + b"\r\n--"),
            }
        if path == "/v1/files":
            return 200, self._listed(list(self.files.values()), query)
        if parts[0] == "files" and parts[-1] == "content":
            found = self.contents.get(parts[1])
            return (200, found) if found is not None else (404, "No such File object")
        if parts[0] == "models" and len(parts) == 2:
            found = self.models.get(parts[1])
            return (
                (200, {"id": parts[1], "object": "model", "created": 1, "owned_by": "x", **found})
                if found
                else (404, "no model")
            )
        if path == "/v1/fine_tuning/jobs" and method == "POST":
            return 200, self._create(json.loads(body))
        if path == "/v1/fine_tuning/jobs":
            jobs = list(self.jobs.values())
            for name, value in query.items():
                if name.startswith("metadata["):
                    jobs = [j for j in jobs if (j["metadata"] or {}).get(name[9:-1]) == value[0]]
            return 200, self._listed(jobs, query)
        if parts[:2] == ["fine_tuning", "jobs"] and parts[2] in self.jobs:
            job = self.jobs[parts[2]]
            if len(parts) == 3:
                self._on(job)
                return 200, {k: v for k, v in job.items() if k != "looks"}
            if parts[3] == "events":
                return 200, self._listed(self.events[job["id"]], query)
            if parts[3] == "checkpoints":
                return 200, {"object": "list", "data": [], "has_more": False}
            job["status"] = {"cancel": "cancelled", "pause": "paused", "resume": "queued"}[parts[3]]
            self.script = [(job["status"], [])] if parts[3] != "resume" else self.script
            return 200, {k: v for k, v in job.items() if k != "looks"}
        if path == "/v1/chat/completions":
            asked = json.loads(body)
            if asked["model"] not in self.models:
                return 404, "no model"
            if asked.get("stream"):
                delta = {"index": 0, "delta": {"content": self.answer(asked)}, "finish_reason": None}
                chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [delta]}
                return 200, b"data: " + json.dumps(chunk).encode() + b"\n\ndata: [DONE]\n\n"
            message = {"role": "assistant", "content": self.answer(asked), "refusal": None}
            choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
            return 200, {
                "id": "c",
                "object": "chat.completion",
                "created": 1,
                "model": asked["model"],
                "choices": [choice],
            }
        return 404, "no such route"

    def _upload(self, body: bytes) -> dict[str, Any]:
        name = re.search(rb'filename="([^"]*)"', body)
        content = body.split(b'filename="')[1].split(b"\r\n\r\n", 1)[1].rsplit(b"\r\n--", 1)[0]
        id = f"file-{len(self.files):03}"
        about = {"id": id, "object": "file", "bytes": len(content), "created_at": 1, "purpose": "fine-tune"}
        self.files[id] = {**about, "filename": name[1].decode() if name else "?", "status": "processed"}
        self.contents[id] = content
        return self.files[id]

    def _create(self, body: dict[str, Any]) -> dict[str, Any]:
        id = f"ftjob-{len(self.jobs):03}"
        job = {"id": id, "object": "fine_tuning.job", "created_at": 100, "finished_at": None, "fine_tuned_model": None}
        job |= {"status": "validating_files", "result_files": [], "trained_tokens": None, "organization_id": "o"}
        job |= {"error": None, "validation_file": None, "metadata": None, "hyperparameters": {}, **body, "looks": 0}
        self.jobs[id], self.events[id] = job, []
        return {k: v for k, v in job.items() if k != "looks"}

    def _on(self, job: dict[str, Any]) -> None:
        """The next line of the script."""
        status, said = self.script[min(job["looks"], len(self.script) - 1)]
        if job["looks"] < len(self.script):
            for message in said:
                event = message if isinstance(message, dict) else {"message": message}
                known = self.events[job["id"]]
                base = {
                    "object": "fine_tuning.job.event",
                    "id": f"ftevent-{len(known):03}",
                    "created_at": 100 + len(known),
                }
                known.append({**base, "level": "info", "type": "message", "data": None, **event})
        job["looks"] += 1
        job["status"] = status
        if status == "succeeded":
            model = f"ft:{job['model']}:org::{job['id'][-3:]}"
            self.models.setdefault(model, {})
            job |= {"fine_tuned_model": model, "finished_at": 200, "trained_tokens": 1234}
        if status == "failed":
            job["error"] = self.error

    def _listed(self, items: list[dict[str, Any]], query: dict[str, list[str]]) -> dict[str, Any]:
        items = [{k: v for k, v in i.items() if k != "looks"} for i in reversed(items)]
        limit = int(query.get("limit", ["20"])[0])
        after = query.get("after", [""])[0]
        if after and not self.wrong_after:
            items = items[[i["id"] for i in items].index(after) + 1 :]
        page = items[:limit]
        return {"object": "list", "data": page, "has_more": len(items) > limit}

    # ---- the line

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.handle_one()

            def do_POST(self) -> None:
                self.handle_one()

            def handle_one(self) -> None:
                parts = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                what = f"{self.command} {parts.path.removeprefix('/v1')}"
                service.asked.append(what + (f"?{parts.query}" if parts.query else ""))
                fault = next((f for f in service.faults if re.fullmatch(f["what"], what) and f["times"]), None)
                action = fault["action"] if fault else ""
                if fault:
                    fault["times"] -= 1
                if action == "status":
                    assert fault
                    error = {"message": "no", "type": "e", "param": None, "code": None, **fault.get("error", {})}
                    self.give(fault["status"], {"error": error}, fault.get("headers", {}))
                    return
                if action == "slow":
                    service.release.wait(1)
                if action in ("hang", "drop"):
                    if action == "hang":
                        service.release.wait(5)
                    self.close_connection = True
                    return
                status, found = service.answer_to(self.command, parts.path, parse_qs(parts.query), body)
                if status != 200:
                    found = {"error": {"message": found, "type": "invalid_request_error", "param": None, "code": None}}
                if action == "cut":
                    self.close_connection = True
                    return
                if action == "garbage":
                    self.give(200, b"<html>hello</html>", {"content-type": "text/html"})
                    return
                self.give(status, found, {}, half=action == "half", drip=action == "drip")

            def give(
                self, status: int, found: Any, headers: dict[str, str], half: bool = False, drip: bool = False
            ) -> None:
                data = found if isinstance(found, bytes) else json.dumps(found).encode()
                self.send_response(status)
                kind = "text/event-stream" if data.startswith(b"data:") else "application/json"
                for name, value in {"content-type": kind, **headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    for byte in data if drip else b"":
                        self.wfile.write(bytes([byte]))
                        service.release.wait(0.1)
                    self.wfile.write(b"" if drip else data[: len(data) // 2] if half else data)
                if half:
                    self.close_connection = True

        return Handler


def step(number: int, total: int, valid: float | None = None) -> dict[str, Any]:
    """A metrics event."""
    data = {"step": number, "total_steps": total, "train_loss": 1.0 / number, "train_mean_token_accuracy": 0.5}
    data |= {} if valid is None else {"full_valid_loss": valid, "full_valid_mean_token_accuracy": 0.75}
    return {"type": "metrics", "message": f"Step {number}/{total}: training loss={1 / number:.2f}", "data": data}


def wait_until(done: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)
