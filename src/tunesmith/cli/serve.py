"""tunesmith serve; tunesmith keys add | list | rm."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from tunesmith.cli.options import Parser, natural, port, positive, show_json
from tunesmith.errors import UsageError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(argv: list[str]) -> int:
    parser = Parser("serve", "Serve the OpenAI fine-tuning protocol: files, jobs, models, completions.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on [127.0.0.1]")
    parser.add_argument("--port", type=port, default=8000, help="port to listen on; 0: any that is free [8000]")
    parser.add_argument(
        "--data-dir", default="tunesmith_data", type=Path, help="where everything is kept [tunesmith_data]"
    )
    parser.add_argument("--max-jobs", type=positive, default=1, help="jobs that train at once [1]")
    parser.add_argument(
        "--allow-model",
        action="append",
        default=[],
        metavar="[ALIAS=]MODEL",
        help="a folder or Hub name that may be used and tuned, besides the starter; again for more",
    )
    parser.add_argument(
        "--config", metavar="FILE|PRESET", help="settings of jobs that clients cannot give: method, lora_rank …"
    )
    parser.add_argument("--max-file-bytes", type=positive, default=512 << 20, help="largest file in one piece [512 MB]")
    parser.add_argument("--max-rows", type=natural, default=1_000_000, help="rows of a training file; 0: any [1000000]")
    parser.add_argument("--rate", type=natural, default=0, help="requests a minute of one key; 0: any [0]")
    parser.add_argument(
        "--max-queued", type=natural, default=100, help="jobs of one key that wait or run; 0: any [100]"
    )
    parser.add_argument("--max-models", type=positive, default=4, help="base models in memory at once [4]")
    parser.add_argument("--keep-free", type=natural, default=1024, help="MB of disk that stay free [1024]")
    options = parser.parse_args(argv)
    _need()
    from tunesmith.server.entry import allowed, alone
    from tunesmith.settings import resolve

    if options.config:
        resolve({}, options.config)  # a mistake in it is said now
    bases, folder = allowed(options.allow_model), options.data_dir.resolve()
    with alone(folder):
        return _serve(options, folder, bases)


def _serve(options: argparse.Namespace, folder: Path, bases: dict[str, Path]) -> int:
    keyed = refuse_open(options, folder)  # before what takes seconds to load
    from tunesmith.backends import get
    from tunesmith.local import loading

    with loading():
        from tunesmith.server.run import run
        from tunesmith.server.service import Limits, Service

    limits = Limits(
        file_bytes=options.max_file_bytes,
        rows=options.max_rows,
        rate=options.rate,
        jobs=options.max_queued,
        models=options.max_models,
        free_bytes=options.keep_free << 20,
    )
    service = Service(folder, get("huggingface"), bases, options.max_jobs, options.config, limits)
    service.keyed = keyed
    return run(service, options.host, options.port)


def refuse_open(options: argparse.Namespace, folder: Path) -> bool:
    """Whether keys are asked for. UsageError where everybody could reach a server without any."""
    from tunesmith.server.entry import has_keys, opened

    keyed = has_keys(opened(folder))
    if not keyed and options.host not in LOOPBACK:
        raise UsageError(
            "everybody who reaches this address could use it: there are no keys",
            where=f"--host {options.host}",
            fix=f"tunesmith keys add NAME --data-dir {options.data_dir}",
        )
    return keyed


def add(argv: list[str]) -> int:
    parser = Parser("keys add", "Make a key for a server; it is shown once.").with_json()
    parser.add_argument("name", help="whose it is")
    parser.add_argument("--admin", action="store_true", help="sees what belongs to others, and the figures")
    parser.add_argument("--data-dir", default="tunesmith_data", type=Path, help="the server's [tunesmith_data]")
    options = parser.parse_args(argv)
    _need()
    from tunesmith.server.entry import add_key

    key = add_key(_store(options.data_dir, True), options.name, options.admin)
    if options.json:
        show_json({"name": options.name, "key": key, "admin": options.admin})
    else:
        print(key)
        print("it is not shown again: the server keeps only its hash", file=sys.stderr)
    return 0


def list_keys(argv: list[str]) -> int:
    parser = Parser("keys list", "The keys of a server, by name.").with_json()
    parser.add_argument("--data-dir", default="tunesmith_data", type=Path, help="the server's [tunesmith_data]")
    options = parser.parse_args(argv)
    _need()
    from tunesmith.server import store as db

    rows, _ = _store(options.data_dir).page(db.keys, [], None, 100_000, False)
    known = [{"name": r["name"], "id": r["id"], "admin": bool(r["admin"]), "created": r["created_at"]} for r in rows]
    if options.json:
        show_json(known)
    else:
        print(
            "\n".join(f"{k['name']}{'  (admin)' if k['admin'] else ''}" for k in known)
            or "no keys: everybody is let in"
        )
    return 0


def rm(argv: list[str]) -> int:
    parser = Parser("keys rm", "Take a key back. What belongs to it stays, for administrators to see.")
    parser.add_argument("name", help="whose it was")
    parser.add_argument("--data-dir", default="tunesmith_data", type=Path, help="the server's [tunesmith_data]")
    options = parser.parse_args(argv)
    _need()
    from tunesmith.server import store as db

    with _store(options.data_dir).begin() as connection:
        done = connection.execute(db.keys.delete().where(db.keys.c.name == options.name))
    if not done.rowcount:
        raise UsageError(f'no key "{options.name}"', where="NAME", fix="tunesmith keys list")
    return 0


def _need() -> None:
    missing = [
        m
        for m in ("starlette", "uvicorn", "sqlalchemy", "alembic", "multipart", "prometheus_client")
        if not find_spec(m)
    ]
    if missing:
        raise UsageError(f"serving needs {missing[0]}", fix="pip install 'tunesmith[local,serve]'")


def _store(folder: Path, make: bool = False):  # type: ignore[no-untyped-def]
    from tunesmith.server.entry import opened

    if make:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    elif not (folder / "tunesmith.db").exists():
        raise UsageError("no server has run here", where=str(folder), fix="--data-dir is that of tunesmith serve")
    return opened(folder.resolve())
