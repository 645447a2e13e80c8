"""tunesmith push against a Hub on this machine: what it receives, what it never does, and how each failure is told."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from conftest import Result
from tunesmith.data.write import sha256, write_json
from tunesmith.errors import TunesmithError
from tunesmith.exporting.push import gather
from tunesmith.recipe import Recipe
from tunesmith.runs import Run

TOKEN = "hf_test0123456789abcdef"
Cli = Callable[..., Result]
MODEL = {"README.md", "model_info.json", "config.json", "model.safetensors", "tokenizer.json"}


class Hub:
    """What the client calls: a repository made and looked at, a card validated, a commit. `refuse`: (part of a path, status)."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.commits: list[dict[str, bytes | None]] = []
        self.tokens: set[str] = set()
        self.refuse: tuple[str, int] | None = None
        self.metadata_error = ""
        self.large: dict[str, bytes] = {}  # by hash: what was put where git does not hold it
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(b"")

            def do_POST(self) -> None:
                self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

            do_PUT = do_POST

            def _answer(self, body: bytes) -> None:
                if token := self.headers.get("Authorization"):  # not where the client asks for the names of agents
                    hub.tokens.add(token)
                status, said = hub.answer(self.path, body)
                data = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        if self.refuse and self.refuse[0] in path:
            return self.refuse[1], {"error": f"no, not\nwith Bearer {TOKEN}\x1b[2J"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            known = name in self.repos
            self.repos.setdefault(name, {"id": name, "private": asked["visibility"] == "private", "siblings": []})
            return 409 if known else 200, {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            errors = [{"message": self.metadata_error}] if self.metadata_error else []
            return 400 if errors else 200, {"errors": errors, "warnings": [{"message": "a wish"}]}
        if path.endswith("/info/lfs/objects/batch"):
            found = json.loads(body)["objects"]
            return 200, {
                "objects": [{**o, "actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}"}}} for o in found]
            }
        if path.startswith("/lfs/"):
            self.large[path.rpartition("/")[2]] = body
            return 200, {}
        name = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            names = [f["path"] for f in json.loads(body)["files"]]
            modes = ("regular", "lfs")  # the Hub has weights stored as large files
            files = [{"path": n, "uploadMode": modes[n.endswith(".safetensors")], "shouldIgnore": False} for n in names]
            return 200, {"files": files}
        if "/commit/" in path:
            self.commits.append(dict(self._change(**json.loads(line)) for line in body.splitlines()[1:]))
            return 200, {"commitUrl": f"{self.url}/{name}/commit/abc", "commitOid": "abc"}
        return (200, self.repos[name]) if name in self.repos else (404, {"error": "no such repository"})

    def _change(self, key: str, value: dict[str, Any]) -> tuple[str, bytes | None]:
        if key == "lfsFile":
            return value["path"], self.large[value["oid"]]
        return value["path"], base64.b64decode(value["content"]) if key == "file" else None


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    made = Hub()
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):  # the client heeds both
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # the older of the client's two roads for large files is plain HTTP
    monkeypatch.setenv("HF_ENDPOINT", made.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield made
    made.close()


def run_at(folder: Path) -> Run:
    """A run that has ended, with everything in it that must stay here."""
    for name in ("data", "best_model", "checkpoints", "logs", "evaluation"):
        (folder / name).mkdir(parents=True)
    paths = {"model": "my base", "dataset": "my rows.jsonl", "chat_template": "its.jinja"}
    recipe = Recipe(**{name: str(folder.parent / path) for name, path in paths.items()})
    plan = {"steps": 2, "rows": {"train": 2, "valid": 1, "test": 1}, "supervised_tokens": {"train": 9}}
    manifest = {"provider": "huggingface", "recipe": msgspec.to_builtins(recipe), "plan": plan, "created": "2026-01-02"}
    write_json(folder / "run.json", manifest | {"data_hashes": {"train": "ab" * 32}})
    for name in ("model.safetensors", "optimizer.pt", ".env", "notes.txt", "trainer.py"):
        (folder / "best_model" / name).write_bytes(b"SECRET" if "model" not in name else b"weights")
    for name in ("config.json", "tokenizer.json"):
        write_json(folder / "best_model" / name, {"model_type": "llama"})
    for side in ("train", "valid", "test"):
        (folder / "data" / f"{side}.jsonl").write_text(f'{{"text": "a row of {side}"}}\n')
    write_json(folder / "data" / "check.json", [])
    run = Run(folder)
    run.append("step", step=2, loss=1.5, total_tokens=9)
    run.append("state", state="succeeded")
    return run


def evaluated(run: Run) -> None:
    """The result and the page of an evaluation."""
    metric = {
        "metric": "loss",
        "base": 2.0,
        "tuned": 1.0,
        "difference": -1.0,
        "low": -1.5,
        "high": -0.5,
        "verdict": "better",
    }
    result = {"verdict": "better", "rows": 9, "dataset": f"{run}/data/test.jsonl", "metrics": [metric], "diagnoses": []}
    write_json(run / "evaluation" / "result.json", result | {"tuned": f"{run}/best_model", "unavailable": ""})
    run.append("export", path=f"{run.path.parent}/exports of it/gguf", form="gguf", quantize="f16", deployable=True)
    template = run.manifest()["recipe"]["chat_template"]
    (run / "report.html").write_text(f"<p>{run}/data/train.jsonl:1 {run.last('export')['path']} {template}</p>")


def export_at(folder: Path, run: Run, deployable: bool = True, weights: str = "model.safetensors") -> Path:
    """An export, as `tunesmith export` writes it."""
    shutil.copytree(run / "best_model", folder)
    (folder / "model.safetensors").rename(folder / weights)
    checks = [{"name": "weights", "passed": True}, {"name": "stop tokens", "passed": deployable}]
    files = {path.name: sha256(path) for path in folder.iterdir()}
    write_json(
        folder / "parity.json",
        {"deployable": deployable, "run": str(run), "model": f"{run}/best_model", "checks": checks, "files": files},
    )
    write_json(
        folder / "model_info.json", {"fine_tuned_model": f"{run}/best_model", "training_file": "/home/rows.jsonl"}
    )
    card = f'---\ntags: ["tunesmith"]\n---\n\nvllm serve {folder}\nPOST /v1/files\nModel.from_pretrained(".")\n'
    (folder / "README.md").write_text(card)
    if not deployable:
        (folder / "NOT-DEPLOYABLE.txt").write_text("stop tokens")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return run_at(tmp_path / "my run")


def told(error: pytest.ExceptionInfo[TunesmithError]) -> str:
    return str(error.value)


# ---- what would be sent


def test_a_dry_run_needs_neither_token_nor_network(
    cli: Cli, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))  # HF_HUB_OFFLINE is set, and there is no token
    done = cli("push", run, "me/echo", "--dry-run", "--json")
    assert done.code == 0, done.err
    found = done.json()
    assert {f["name"] for f in found["files"]} == MODEL and found["private"] and found["repo"] == "me/echo"
    assert next(f["bytes"] for f in found["files"] if f["name"] == "model.safetensors") == len("weights")
    assert found["left_out"] == [".env", "notes.txt", "optimizer.pt", "trainer.py"]
    assert found["metadata"]["library_name"] == "transformers"
    shown = cli("push", run, "me/echo", "--dry-run", "--public").out
    assert "me/echo, public: 5 files" in shown and "stays here: .env" in shown and "pipeline_tag" in shown
    assert run.last("push") == {}


def test_an_evaluation_is_data(run: Run) -> None:
    with pytest.raises(TunesmithError) as error:
        gather(run.path, "me/echo", with_evaluation=True)
    assert "shows rows of the data" in told(error) and "--with-data" in told(error)
    with pytest.raises(TunesmithError) as error:
        gather(run.path, "me/echo", with_evaluation=True, with_data=True)
    assert "tunesmith evaluate" in told(error)
    evaluated(run)
    names = {file.name for file in gather(run.path, "me/echo", with_evaluation=True, with_data=True).files}
    assert names == MODEL | {
        "data/train.jsonl",
        "data/valid.jsonl",
        "data/test.jsonl",
        "evaluation/result.json",
        "report.html",
    }


def test_the_card_s_metadata_is_read_by_the_hub_s_client(run: Run, tmp_path: Path) -> None:
    evaluated(run)
    metadata = gather(run.path, "me/echo").metadata
    assert metadata["model-index"][0]["results"][0]["metrics"][0] == {"type": "loss", "value": 1.0}
    folder = export_at(tmp_path / "exported", run)
    for text in ("---\na: [\n---\n", "---\n- a\n---\n"):
        (folder / "README.md").write_text(text)
        with pytest.raises(TunesmithError) as error:
            gather(folder, "me/echo")
        assert "README.md: no metadata of a model card" in told(error) and "mend" in told(error)


def test_no_path_of_this_machine_is_in_what_is_sent(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated(run)
    folder = export_at(tmp_path / "my export", run)
    moved = folder.rename(tmp_path / "moved")
    for source in (run.path, moved):
        parcel = gather(source, "me/echo", with_data=True, with_evaluation=True)
        texts = {f.name: f.content.decode() for f in parcel.files if isinstance(f.content, bytes)}
        assert len(texts) == 4 + (source == moved)
        assert not [name for name, text in texts.items() if "/home/" in text or f"{tmp_path.parent}" in text]
        assert 'from_pretrained("me/echo")' in texts["README.md"]
        assert texts["report.html"] == "<p>data/train.jsonl:1 gguf its.jinja</p>"
    assert (
        "POST /v1/files" in texts["README.md"] and json.loads(texts["model_info.json"])["training_file"] == "rows.jsonl"
    )
    monkeypatch.setenv("HOME", "/somewhere/me")
    write_json(moved / "config.json", {"_name_or_path": "/somewhere/me/base"})
    said = json.loads((moved / "parity.json").read_text())
    said["files"]["config.json"] = sha256(moved / "config.json")
    write_json(moved / "parity.json", said)
    with pytest.raises(TunesmithError) as error:
        gather(moved, "me/echo")
    assert "moved/config.json: it names your home folder -- take the path out of it" in told(error)


def test_an_adapter_on_a_folder_of_this_machine_is_refused(run: Run) -> None:
    path = run / "best_model" / "adapter_config.json"
    write_json(path, {"base_model_name_or_path": "/models/base"})
    with pytest.raises(TunesmithError) as error:
        gather(run.path, "me/echo")
    assert "/models/base: the adapter's base" in told(error) and "--format merged" in told(error)
    write_json(path, {"base_model_name_or_path": "meta/base"})
    assert "adapter_config.json" in {file.name for file in gather(run.path, "me/echo").files}


def test_a_failed_certificate_is_refused_but_for_force(run: Run, tmp_path: Path) -> None:
    folder = export_at(tmp_path / "exported", run, deployable=False)
    with pytest.raises(TunesmithError) as error:
        gather(folder, "me/echo")
    assert "its certificate failed: stop tokens" in told(error) and "--force" in told(error)
    names = {file.name for file in gather(folder, "me/echo", force=True).files}
    assert names == MODEL | {"parity.json", "NOT-DEPLOYABLE.txt"}


@pytest.mark.parametrize("name", ["a b/c", "a/b/c", "", "a--b", "-a"])
def test_a_wrong_name_is_said_before_anything_is_read(name: str) -> None:
    with pytest.raises(TunesmithError) as error:
        gather("nowhere", name)
    assert "no name of a repository" in told(error) and told(error).endswith("-- user/name")


def test_what_cannot_be_pushed(run: Run, tmp_path: Path) -> None:
    with pytest.raises(TunesmithError, match="neither an export nor a run -- tunesmith export"):
        gather(tmp_path, "me/echo")
    with run.lock(), pytest.raises(TunesmithError, match="a process is training this run"):
        gather(run.path, "me/echo")
    folder = export_at(tmp_path / "exported", run)
    for name in ("data", "best_model"):
        shutil.rmtree(run / name)
    with pytest.raises(TunesmithError, match="no best_model to send -- finish it: tunesmith train --resume"):
        gather(run.path, "me/echo")
    with pytest.raises(TunesmithError, match="no data to send -- push without --with-data"):
        gather(folder, "me/echo", with_data=True)
    for name, words in (("config.json", "has changed since"), ("more.gguf", "was not there when it was certified")):
        changed = export_at(tmp_path / name, run_at(tmp_path / f"of {name}"))
        (changed / name).write_text("{}")
        with pytest.raises(TunesmithError, match=f"{name} {words}"):
            gather(changed, "me/echo")
    shutil.rmtree(run.path)
    with pytest.raises(TunesmithError, match="the run that made it is not here"):
        gather(folder, "me/echo", with_data=True)
    assert len(gather(folder, "me/echo").files) == 6


# ---- what the Hub receives


def test_the_model_goes_in_one_commit_to_a_private_repository(cli: Cli, hub: Hub, run: Run, tmp_path: Path) -> None:
    done = cli("push", run, "me/echo", "--yes", "--json")
    assert done.code == 0, done.err
    (commit,) = hub.commits
    assert set(commit) == MODEL == set(done.json()["files"]) and hub.repos["me/echo"]["private"]
    assert commit["model.safetensors"] == b"weights" and b'from_pretrained("me/echo")' in (commit["README.md"] or b"")
    everything = b"".join(content or b"" for content in commit.values())
    assert b"a row of" not in everything and b"SECRET" not in everything and str(tmp_path).encode() not in everything
    assert done.json()["url"] == f"{hub.url}/me/echo" and done.err == ""
    assert {k: run.last("push")[k] for k in ("repo", "commit", "private")} == {
        "repo": "me/echo",
        "commit": "abc",
        "private": True,
    }
    assert hub.tokens == {f"Bearer {TOKEN}"} and TOKEN not in done.out + done.err
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]


def test_data_goes_only_where_asked_for(cli: Cli, hub: Hub, run: Run) -> None:
    evaluated(run)
    assert cli("push", run, "me/echo", "--yes").code == 0
    assert cli("push", run, "me/echo", "--yes", "--with-data").code == 0
    assert cli("push", run, "me/echo", "--yes", "--with-data", "--with-evaluation").code == 0
    splits = {f"data/{side}.jsonl" for side in ("train", "valid", "test")}
    assert [set(c) - MODEL for c in hub.commits] == [set(), splits, splits | {"evaluation/result.json", "report.html"}]
    assert hub.commits[1]["data/test.jsonl"] == b'{"text": "a row of test"}\n'


def test_who_may_see_it_is_as_asked_or_nothing_is_sent(cli: Cli, hub: Hub, run: Run) -> None:
    assert cli("push", run, "me/open", "--yes", "--public").code == 0
    assert not hub.repos["me/open"]["private"]
    again = cli("push", run, "me/open", "--yes")
    assert again.code == 2 and "the repository is there, and public -- --public, or change it at the Hub" in again.err
    cli("push", run, "me/closed", "--yes")
    closed = cli("push", run, "me/closed", "--yes", "--public")
    assert closed.code == 2 and "and private -- leave out --public" in closed.err
    assert len(hub.commits) == 2


def test_weights_of_an_earlier_push_do_not_stay_beside_these(cli: Cli, hub: Hub, run: Run, tmp_path: Path) -> None:
    there = ["adapter_config.json", "model-00001-of-00002.safetensors", "old-q8_0.gguf", "LICENSE", "config.json"]
    hub.repos["me/echo"] = {"id": "me/echo", "private": True, "siblings": [{"rfilename": name} for name in there]}
    done = cli("push", run, "me/echo", "--yes")
    assert {name for name, content in hub.commits[0].items() if content is None} == set(there[:2])
    assert "deleted there: adapter_config.json" in done.out
    folder = export_at(tmp_path / "exported", run, weights="echo-q4_0.gguf")
    assert cli("push", folder, "me/echo", "--yes").code == 0
    assert None not in hub.commits[1].values() and "echo-q4_0.gguf" in hub.commits[1]


def test_the_token_of_a_file(cli: Cli, hub: Hub, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("hf_other\n")
    assert cli("push", run, "me/echo", "--yes", "--token-file", "token").code == 0
    assert hub.tokens == {"Bearer hf_other"}
    (tmp_path / "token").write_text("hf_other hf_more")
    for given, said in (
        (TOKEN, "a file's name is wanted"),
        ("token", "no token: it has spaces"),
        ("none", "No such file"),
    ):
        done = cli("push", run, "me/echo", "--yes", "--token-file", given)
        assert done.code and said in done.err and "hf_" not in done.err and len(done.err.splitlines()) == 1
    monkeypatch.delenv("HF_TOKEN")
    done = cli("push", run, "me/echo", "--yes")
    assert done.code == 2 and "no token -- hf auth login, or HF_TOKEN=…, or --token-file" in done.err
    assert len(hub.commits) == 1


def test_from_python(hub: Hub, run: Run) -> None:
    code = f"import tunesmith as ts; done = ts.push({str(run)!r}, 'me/echo', public=True); print(done.commit, done.private)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "abc False\n" and set(hub.commits[0]) == MODEL


def test_it_asks_first(cli: Cli, hub: Hub, run: Run) -> None:
    done = cli("push", run, "me/echo")
    assert done.code == 2 and "me/echo: what is sent is out of your hands" in done.err and "add --yes" in done.err
    assert "model.safetensors" in done.err and not hub.repos


# ---- what fails


@pytest.mark.parametrize(
    ("part", "status", "said"),
    [
        ("create", 401, "the Hub says 401"),
        ("create", 403, "the Hub says 403: no, not with Bearer [key]␛[2J -- a token that may write to me/echo"),
        ("create", 500, "the Hub says 500: no, not with Bearer [key]␛[2J -- push again later"),
        ("commit", 503, "the Hub says 503: no, not with Bearer [key]␛[2J -- push again later"),
    ],
)
def test_a_refusal_is_one_line_without_the_token(
    cli: Cli, hub: Hub, run: Run, part: str, status: int, said: str
) -> None:
    hub.refuse = (part, status)
    done = cli("push", run, "me/echo", "--yes")
    assert done.code == 1 and f"me/echo: {said}" in done.err
    assert len(done.err.splitlines()) == 1 and TOKEN not in done.err and "\x1b" not in done.err
    assert not hub.commits and run.last("push") == {}


def test_metadata_that_the_hub_refuses(cli: Cli, hub: Hub, run: Run) -> None:
    hub.metadata_error = '"license" must be one of these'
    done = cli("push", run, "me/echo", "--yes")
    assert done.code == 1 and '"license" must be one of these' in done.err and len(done.err.splitlines()) == 1


def test_no_network(cli: Cli, hub: Hub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        done = cli("push", run, "me/echo", "--yes", "--json")
    assert done.code == 1 and "me/echo: not sent: " in done.err and "look at network and disk" in done.err
    assert done.json()["error"]["exit_status"] == 1 and len(done.err.splitlines()) == 1
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert (
        "me/echo: the client is told to stay offline -- unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"
        in cli("push", run, "me/echo", "--yes").err
    )
    assert os.environ["HF_TOKEN"] == TOKEN
