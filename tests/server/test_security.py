"""Keys and what belongs to them; limits; nothing of a refused request stays; no secret in a log."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest

from conftest import Result
from serving import Server, chats

LIMIT = 4 << 20  # bytes of a file


def key(folder: Path, name: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "tunesmith", "keys", "add", name, "--data-dir", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Keyed:
    """A server with keys of two users and of an administrator."""

    def __init__(self, folder: Path, tiny: Path) -> None:
        self.keys = {name: key(folder, name) for name in ("ann", "bob")}
        self.keys["admin"] = key(folder, "admin", "--admin")
        self.server = Server(
            folder, "--allow-model", f"tiny={tiny}", "--max-file-bytes", LIMIT, "--max-rows", 50, "--max-queued", 2
        )

    def ask(self, who: str, method: str, path: str, body: Any = None) -> Any:
        return self.server.ask(method, path, body, self.of(who))

    def of(self, who: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys.get(who, who)}"}


@pytest.fixture(scope="module")
def keyed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    made = Keyed(tmp_path_factory.mktemp("keyed") / "data", tiny)
    yield made
    log = made.server.log.read_text()
    assert not [name for name, k in made.keys.items() if k in log or k[3:] in log]
    made.server.stop()


@pytest.mark.parametrize(
    ("who", "words"), [("sk-wrong", "Incorrect API key provided"), ("", "You didn't provide an API key")]
)
def test_without_a_key_nothing_is_said(keyed: Keyed, who: str, words: str) -> None:
    for method, path in (("GET", "/files"), ("GET", "/models"), ("POST", "/chat/completions"), ("GET", "/metrics")):
        found = keyed.ask(who, method, path)
        assert found.status == 401 and found.error()["code"] == "invalid_api_key" and found.error()["message"] == words
    assert keyed.server.ask("GET", "/health").status == 200  # for those who only look whether it lives


def test_what_belongs_to_one_key_is_not_there_for_another(keyed: Keyed) -> None:
    file = keyed.server.upload(chats(12), **keyed.of("ann")).json()["id"]
    job = keyed.ask(
        "ann", "POST", "/fine_tuning/jobs", {"model": "tiny", "training_file": file, "hyperparameters": {"n_epochs": 1}}
    )
    job = job.json()["id"]
    keyed.server.wait_until(lambda: keyed.ask("ann", "GET", f"/fine_tuning/jobs/{job}").json()["status"] == "succeeded")
    done = keyed.ask("ann", "GET", f"/fine_tuning/jobs/{job}").json()
    model, result = done["fine_tuned_model"], done["result_files"][0]
    upload = keyed.ask(
        "ann", "POST", "/uploads", {"filename": "f", "purpose": "batch", "bytes": 3, "mime_type": "x"}
    ).json()["id"]
    theirs = [
        ("GET", f"/files/{file}", None), ("GET", f"/files/{file}/content", None), ("DELETE", f"/files/{file}", None),
        ("GET", f"/files/{result}/content", None), ("GET", f"/fine_tuning/jobs/{job}", None),
        ("POST", f"/fine_tuning/jobs/{job}/cancel", None), ("GET", f"/fine_tuning/jobs/{job}/events", None),
        ("GET", f"/fine_tuning/jobs/{job}/checkpoints", None), ("GET", f"/models/{model}", None),
        ("DELETE", f"/models/{model}", None),
        ("POST", "/completions", {"model": model, "prompt": "x"}), ("POST", f"/uploads/{upload}/cancel", None),
        ("POST", f"/uploads/{upload}/complete", {"part_ids": ["part_x"]}),
        ("POST", "/fine_tuning/jobs", {"model": model, "training_file": file}),
    ]  # fmt: skip
    names = {file: "file-x", result: "file-x", job: "ftjob-x", model: "ft:x", upload: "upload_x"}

    def unknown(text: str) -> str:
        for name, none in names.items():
            text = text.replace(name, none)
        return text

    for method, path, body in theirs:
        found = keyed.ask("bob", method, path, body)
        absent = keyed.ask("bob", method, unknown(path), body and json.loads(unknown(json.dumps(body))))
        assert found.status == absent.status == 404, (method, path, found.body)
        assert found.error()["code"] == absent.error()["code"]  # as if it were not there at all
    stolen = keyed.ask("bob", "POST", "/fine_tuning/jobs", {"model": "tiny", "training_file": file})
    assert stolen.status == 400 and stolen.error()["code"] == "invalid_file_id"
    for path in ("/files", "/fine_tuning/jobs"):
        assert not keyed.ask("bob", "GET", path).json()["data"]
        assert keyed.ask("admin", "GET", path).json()["data"]
    assert model not in str(keyed.ask("bob", "GET", "/models").json()) and model in str(
        keyed.ask("admin", "GET", "/models").json()
    )
    assert keyed.ask("ann", "GET", "/metrics").status == 403 and keyed.ask("admin", "GET", "/metrics").status == 200
    assert keyed.ask("ann", "POST", "/completions", {"model": model, "prompt": "x", "max_tokens": 1}).status == 200


def test_jobs_of_one_key_are_bounded(keyed: Keyed) -> None:
    file = keyed.server.upload(chats(40), **keyed.of("bob")).json()["id"]
    order = {"model": "tiny", "training_file": file, "hyperparameters": {"n_epochs": 50, "batch_size": 1}}
    made = [keyed.ask("bob", "POST", "/fine_tuning/jobs", order) for _ in range(3)]
    assert [m.status for m in made] == [200, 200, 429] and made[2].error()["code"] == "rate_limit_exceeded"
    for m in made[:2]:
        assert keyed.ask("bob", "POST", f"/fine_tuning/jobs/{m.json()['id']}/cancel").status == 200
    many = keyed.server.upload(chats(51), **keyed.of("bob")).json()["id"]
    job = keyed.ask("bob", "POST", "/fine_tuning/jobs", {**order, "training_file": many}).json()["id"]
    keyed.server.wait_until(lambda: keyed.ask("bob", "GET", f"/fine_tuning/jobs/{job}").json()["status"] == "failed")
    assert "51 examples, over 50" in keyed.ask("bob", "GET", f"/fine_tuning/jobs/{job}").json()["error"]["message"]


def stored(server: Server) -> set[str]:
    return {
        str(p.relative_to(server.folder)) for p in server.folder.rglob("*") if not p.name.startswith("tunesmith.db")
    }


def test_a_byte_too_many_leaves_nothing(keyed: Keyed) -> None:
    assert keyed.server.upload(b"x" * LIMIT, **keyed.of("ann")).status == 200
    before = stored(keyed.server)
    over = keyed.server.upload(b"x" * (LIMIT + 1), **keyed.of("ann"))
    assert over.status == 413 and str(LIMIT) in over.error()["message"]
    where, sent = urlparse(keyed.server.url), 0
    with socket.create_connection((where.hostname, where.port)) as line:  # and without saying how much comes
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: {keyed.of('ann')['Authorization']}\r\n"
        line.sendall(
            head.encode() + b"Content-Type: multipart/form-data; boundary=b\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        line.sendall(b"%x\r\n%s\r\n" % (len(part), part))
        with contextlib.suppress(OSError):
            while sent <= 3 * LIMIT:
                line.sendall(b"10000\r\n" + b"y" * 65536 + b"\r\n")
                sent += 65536
        line.settimeout(10)
        answer = b""
        with contextlib.suppress(OSError):  # the refusal may be lost with the connection
            answer = line.recv(4096)
    assert not answer or b" 413 " in answer
    keyed.server.wait_until(lambda: stored(keyed.server) == before, 10)
    huge = keyed.ask("ann", "POST", "/chat/completions", b'{"model": "' + b"x" * (17 << 20) + b'"}')
    assert huge.status == 413
    many = keyed.ask(
        "ann", "POST", "/uploads", {"filename": "f", "purpose": "batch", "bytes": 1 << 40, "mime_type": "x"}
    )
    assert many.status == 413


@pytest.mark.parametrize(
    "path",
    [
        "/files/..%2F..%2Fetc%2Fpasswd",
        "/files/%2e%2e",
        "/files/file-x%00",
        "/models/..%2F..%2F..%2Fetc",
        "/fine_tuning/jobs/..%2F..%2Fkeys",
        "/models/%2Fetc%2Fpasswd",
    ],
)
def test_path_tricks_find_nothing(keyed: Keyed, path: str) -> None:
    for suffix in ("", "/content") if path.startswith("/files") else ("",):
        found = keyed.ask("ann", "GET", path + suffix)
        assert (
            found.status == 404
            and "root:" not in found.body.decode()
            and str(keyed.server.folder) not in found.body.decode()
        )


def test_a_packed_file_is_never_unpacked(keyed: Keyed) -> None:
    import gzip

    bomb = gzip.compress(b"\0" * (100 << 20))
    assert len(bomb) < LIMIT
    for name in ("train.jsonl.gz", "train.jsonl"):
        file = keyed.server.upload(bomb, name, **keyed.of("ann")).json()["id"]
        job = keyed.ask("ann", "POST", "/fine_tuning/jobs", {"model": "tiny", "training_file": file}).json()["id"]
        keyed.server.wait_until(
            lambda j=job: keyed.ask("ann", "GET", f"/fine_tuning/jobs/{j}").json()["status"] == "failed"
        )
        assert keyed.ask("ann", "GET", f"/fine_tuning/jobs/{job}").json()["error"]["code"] == "invalid_file_format"


def test_a_key_that_is_taken_back_is_refused(keyed: Keyed) -> None:
    keyed.keys["carl"] = key(keyed.server.folder, "carl")
    keyed.server.wait_until(lambda: keyed.ask("carl", "GET", "/files").status == 200, 10)  # without starting anew
    subprocess.run(
        [sys.executable, "-m", "tunesmith", "keys", "rm", "carl", "--data-dir", keyed.server.folder], check=True
    )
    keyed.server.wait_until(lambda: keyed.ask("carl", "GET", "/files").status == 401, 10)


def test_keys_are_kept_as_hashes_only(keyed: Keyed) -> None:
    data = b"".join(p.read_bytes() for p in keyed.server.folder.glob("tunesmith.db*"))
    assert b"ann" in data and not [k for k in keyed.keys.values() if k.encode() in data]
    assert keyed.server.folder.stat().st_mode & 0o077 == 0


FOREIGN = [
    ({"Host": "evil.example"}, False), ({"Host": "evil.example:8000"}, False), ({"Host": "10.0.0.5"}, False),
    ({"Host": "127.0.0.1.evil.example"}, False), ({"Origin": "https://evil.example"}, False), ({"Origin": "null"}, False),
    ({"Origin": "http://[::1"}, False),
    ({"Host": "localhost:8000"}, True), ({"Host": "[::1]:8000"}, True), ({"Host": "127.0.0.2"}, True),
    ({"Origin": "http://localhost:3000"}, True),
]  # fmt: skip


@pytest.mark.parametrize(("headers", "taken"), FOREIGN)
def test_without_keys_other_sites_cannot_ask_through_a_browser(
    server: Server, headers: dict[str, str], taken: bool
) -> None:
    for method, path, body in (("GET", "/files", None), ("POST", "/fine_tuning/jobs", {}), ("GET", "/health", None)):
        found = server.ask(method, path, body, headers)
        assert (found.status != 403) is taken, found.body
        if not taken:
            error = found.error()
            assert error["code"] == "foreign_request" and next(iter(headers)) in error["message"]


def test_with_keys_the_key_decides(keyed: Keyed) -> None:
    headers = {"Host": "tunes.example", "Origin": "https://tunes.example", **keyed.of("ann")}
    assert keyed.server.ask("GET", "/files", headers=headers).status == 200


def test_a_rate_is_kept_to_and_taking_back_the_last_key_opens_nothing(tmp_path: Path) -> None:
    headers = {"Authorization": f"Bearer {key(tmp_path / 'data', 'only')}"}
    server = Server(tmp_path / "data", "--rate", 30)
    try:
        began = time.monotonic()
        found = [server.ask("GET", "/files", headers=headers) for _ in range(60)]
        more = (time.monotonic() - began) * 30 / 60  # that the bucket has filled meanwhile
        assert 30 <= [f.status for f in found].count(200) <= 31 + more and 429 in [f.status for f in found]
        found = [f for f in found if f.status == 429]
        assert int(found[-1].headers["retry-after"]) >= 1 and found[-1].error()["code"] == "rate_limit_exceeded"
        assert server.ask("GET", "/health").status == 200
        subprocess.run(
            [sys.executable, "-m", "tunesmith", "keys", "rm", "only", "--data-dir", tmp_path / "data"], check=True
        )
        server.wait_until(lambda: server.ask("GET", "/files", headers=headers).status == 401, 10)
        assert server.ask("GET", "/files").status == 401
    finally:
        assert server.stop(signal.SIGINT) == 0


def test_the_command_says_what_is_wrong(server: Server, cli: Callable[..., Result]) -> None:
    open_to_all = cli("serve", "--host", "0.0.0.0", "--data-dir", "d")
    assert open_to_all.code == 2 and "there are no keys" in open_to_all.err and "tunesmith keys add" in open_to_all.err
    assert cli("serve", "--allow-model", "./none", "--data-dir", "d").code == 2
    assert "no such file or preset" in cli("serve", "--config", "quick", "--data-dir", "d").err
    again = cli("serve", "--data-dir", server.folder, "--port", "0")
    assert again.code == 2 and "another server has it" in again.err
    busy = cli("serve", "--data-dir", "d", "--port", urlparse(server.url).port)
    assert busy.code == 2 and "--port" in busy.err
    assert cli("keys", "list", "--data-dir", "d").out == "no keys: everybody is let in\n"
    made = cli("keys", "add", "ann", "--data-dir", "d", "--json").json()
    assert made["key"].startswith("sk-") and len(made["key"]) > 40
    assert "there is a key" in cli("keys", "add", "ann", "--data-dir", "d").err
    assert [k["name"] for k in cli("keys", "list", "--data-dir", "d", "--json").json()] == ["ann"]
    assert (
        cli("keys", "rm", "bob", "--data-dir", "d").code == 2 and cli("keys", "rm", "ann", "--data-dir", "d").code == 0
    )
    assert cli("keys", "list", "--data-dir", "nowhere").code == 2
