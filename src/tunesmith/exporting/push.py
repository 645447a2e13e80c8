"""tunesmith push: an export, or a run's best model, to the Hugging Face Hub, in one commit: nothing half is ever visible there.

What may go is a list of names (`MODEL`): no optimizer, checkpoint or log is on it. Rows are data, and an evaluation shows rows:
both go only where asked for. In what Tunesmith itself has written, a folder of this machine becomes its name.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec

from tunesmith import card
from tunesmith.data.write import sha256
from tunesmith.errors import RunError, ServiceError, TunesmithError, UsageError
from tunesmith.exporting.forms import PARITY, SAID
from tunesmith.models import read_json
from tunesmith.remote.objects import hidden
from tunesmith.removal import MODEL_FILES
from tunesmith.runs import Run, open_run, refuse_removed, run_of

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
MODEL = (*WEIGHTS, "*.gguf", *MODEL_FILES, "Modelfile", *SAID)
LOADED = (
    *WEIGHTS,
    "config.json",
    "adapter_config.json",
)  # of an earlier push: would be loaded beside, or instead of, ours
EVALUATION = ("evaluation/result.json", "report.html")
TOLD = 300  # characters of what the Hub says that an error repeats
_PATH = re.compile(
    r"(?<![\w.:/<~-])(/[\w.@+-]+)(?:/[\w.@+-]+)+/?"
)  # two names at least: "/v1" is an address, "/ " is a slash


class File(msgspec.Struct, frozen=True):
    """What is sent: a file here, or the bytes of one that is made for the Hub."""

    name: str
    content: Path | bytes
    size: int


class Parcel(msgspec.Struct, frozen=True, kw_only=True):
    """All that a push would send. `left_out`: names in the folder that are not on the list."""

    repo: str
    private: bool
    files: list[File]
    left_out: list[str]
    metadata: dict[str, Any]
    run: Run | None

    def size(self) -> int:
        return sum(file.size for file in self.files)


class Pushed(msgspec.Struct, frozen=True):
    """A push that is done."""

    url: str  # of the repository
    commit: str  # its hash
    private: bool  # who may see it: you and those you name
    files: list[str]  # names of what was sent
    bytes: int  # of them
    deleted: list[str]  # weights of an earlier push that are not this model's


def push(
    source: str | os.PathLike[str],
    repo: str,
    *,
    public: bool = False,
    with_data: bool = False,
    with_evaluation: bool = False,
    force: bool = False,
    token_file: str | None = None,
) -> Pushed:
    """Send an export, or a run's best model, to the Hub, in one commit; the repository is made where it is not there yet.

    `public`: for everybody to see. `with_data`: the run's splits too, under data/; `with_evaluation`: its result and report,
    which show rows and so need `with_data`. `force`: also an export whose certificate has failed. The token is that of the
    file, else of HF_TOKEN or of the client's login. Raises UsageError without one, or where the repository is there and
    another may see it than was asked for; ServiceError where the Hub refuses, or is not reached.
    """
    parcel = gather(source, repo, public=public, with_data=with_data, with_evaluation=with_evaluation, force=force)
    return send(parcel, token_file)


def gather(
    source: str | os.PathLike[str],
    repo: str,
    *,
    public: bool = False,
    with_data: bool = False,
    with_evaluation: bool = False,
    force: bool = False,
) -> Parcel:
    """What pushing an export or a run to `repo` would send, with the options of `push`; asks nobody."""
    _refuse_name(repo)
    path = Path(source).expanduser()
    folder, run = _opened(path, force)
    _refuse_local_base(folder, run)
    if with_evaluation and not with_data:
        fix = "add --with-data, or leave it out"
        raise UsageError("the evaluation shows rows of the data", where="--with-evaluation", fix=fix)
    names = sorted(entry.name for entry in folder.iterdir())
    contents: dict[str, Path | bytes] = {n: folder / n for n in names if _matches(n, MODEL) and (folder / n).is_file()}
    left_out = [name for name in names if name not in contents]
    stand_ins = _stand_ins(folder, run, repo)
    contents |= _said(folder, run, repo, stand_ins)
    if with_data:
        contents |= _data(_known(run, path))
    if with_evaluation:
        contents |= _evaluation(_known(run, path), stand_ins)
    return Parcel(
        repo=repo,
        private=not public,
        files=[File(n, c, len(c) if isinstance(c, bytes) else c.stat().st_size) for n, c in sorted(contents.items())],
        left_out=left_out,
        metadata=_metadata(contents, folder),
        run=run,
    )


def _opened(path: Path, force: bool) -> tuple[Path, Run | None]:
    """The folder whose model is sent, and the run that made it."""
    if certificate := read_json(path / PARITY):
        for name, digest in (certificate.get("files") or {}).items():
            if not (path / name).is_file() or sha256(path / name) != digest:
                fix = f"tunesmith parity {shlex.quote(str(path))}"
                raise UsageError(f"{name} has changed since it was certified", where=str(path), fix=fix)
        certified = {*(certificate.get("files") or {}), *SAID}
        if more := sorted(p.name for p in path.iterdir() if _matches(p.name, MODEL) and p.name not in certified):
            fix = f"take it out, or tunesmith parity {shlex.quote(str(path))}"
            raise UsageError(f"{more[0]} was not there when it was certified", where=str(path), fix=fix)
        if certificate.get("deployable") is not True and not force:
            failed = ", ".join(c["name"] for c in certificate.get("checks", []) if not c["passed"])
            fix = "export it again, or --force"
            raise UsageError(f"its certificate failed: {failed}", where=str(path), fix=fix)
        return path, run_of(certificate["run"]) if certificate.get("run") else None
    if not (path / "run.json").exists():
        raise UsageError(
            "neither an export nor a run", where=str(path), fix="tunesmith export RUN -o exported makes an export"
        )
    run = open_run(path)
    refuse_removed(run)
    if run.busy():
        raise RunError("a process is training this run", where=str(run), fix="wait for it, or stop it first")
    if not (run / "best_model").is_dir():
        raise RunError(
            "it has no best_model to send",
            where=str(run),
            fix="finish it: tunesmith train --resume " + format(run, "q"),
        )
    return run / "best_model", run


def _known(run: Run | None, path: Path) -> Run:
    if run is None:
        raise UsageError(
            "the run that made it is not here: there is no data to send", where=str(path), fix="push without it"
        )
    return run


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return not name.startswith(".") and any(fnmatchcase(name, pattern) for pattern in patterns)


# ---- what may not leave


def _refuse_name(repo: str) -> None:
    try:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id
    except ImportError:
        raise UsageError("the Hub needs huggingface_hub", where=repo, fix="pip install 'tunesmith[local]'") from None
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        said = " ".join(str(error).split()).removesuffix(f" '{repo}'.").removesuffix(f": '{repo}'.")
        raise UsageError(f"no name of a repository: {said}", where=repo, fix="user/name") from None


def _refuse_local_base(folder: Path, run: Run | None) -> None:
    """UsageError for an adapter that nobody else can load."""
    base = str(read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "")
    if os.path.isabs(base):
        made_of = format(run, "q") if run else "RUN"
        fix = f"send the whole model: tunesmith export {made_of} --format merged -o merged && tunesmith push merged …"
        raise UsageError(
            "the adapter's base is a folder of this machine, which others do not have", where=base, fix=fix
        )


def _stand_ins(folder: Path, run: Run | None, repo: str) -> dict[str, str]:
    """The paths of this machine that the files may name, and what stands for each on the Hub: its name, or the repository."""
    known = [*read_json(folder / "model_info.json").values(), *read_json(folder / PARITY).values()]
    if run:
        known += [str(run.path.absolute()), *read_json(run / "evaluation" / "result.json").values()]
        known += [*run.manifest()["recipe"].values(), *(e["path"] for e in run.events("export"))]
        known += [each[key] for each in run.lineage() for key in ("run", "model", "dataset")]
    found = {
        path: Path(path).name for path in known if isinstance(path, str) and path.count("/") > 1 and os.path.isabs(path)
    }
    return found | {str(folder.absolute()): repo, str(folder.resolve()): repo}


def _without(text: str, stand_ins: dict[str, str]) -> str:
    for path in sorted(stand_ins, key=len, reverse=True):
        text = text.replace(f"{path}/", "").replace(path, stand_ins[path])
    return text


def _said(folder: Path, run: Run | None, repo: str, stand_ins: dict[str, str]) -> dict[str, bytes]:
    """Card, facts and certificate as they go to the Hub: those of an export, or made of a run. UsageError where a file names the
    user's home after all."""
    if run and not (folder / PARITY).exists():
        texts = {"README.md": card.card(run, repo=repo), "model_info.json": _json(card.model_info(run))}
    else:
        texts = {name: (folder / name).read_text("utf-8", "replace") for name in SAID if (folder / name).exists()}
    found = {}
    for name, text in texts.items():
        text = text.replace('from_pretrained(".")', f'from_pretrained("{repo}")')
        text = text.replace("vllm serve . ", f"vllm serve {repo} ")
        found[name] = _PATH.sub(_name, _without(text, stand_ins))
    home = os.path.expanduser("~") + "/"
    for name, text in (found | {p.name: p.read_text("utf-8", "replace") for p in folder.glob("*config.json")}).items():
        if home != "//" and home in text:
            raise UsageError("it names your home folder", where=str(folder / name), fix="take the path out of it")
    return {name: text.encode() for name, text in found.items()}


def _name(path: re.Match[str]) -> str:
    """The last name of a path, where it is one of this machine (/v1/files is an address)."""
    return Path(path[0]).name if Path(path[1]).is_dir() else path[0]


def _json(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n"


def _data(run: Run) -> dict[str, Path | bytes]:
    found: dict[str, Path | bytes] = {f"data/{path.name}": path for path in (run / "data").glob("*.jsonl")}
    if not found:
        raise RunError("it has no data to send", where=str(run / "data"), fix="push without --with-data")
    return found


def _evaluation(run: Run, stand_ins: dict[str, str]) -> dict[str, Path | bytes]:
    if missing := [name for name in EVALUATION if not (run / name).exists()]:
        raise RunError(f"it has no {missing[0]}", where=str(run), fix=f"tunesmith evaluate {run:q}")
    return {name: _without((run / name).read_text("utf-8", "replace"), stand_ins).encode() for name in EVALUATION}


def _metadata(contents: dict[str, Path | bytes], folder: Path) -> dict[str, Any]:
    """What the Hub will read at the top of the card, by the Hub's own client. UsageError where that refuses it."""
    from huggingface_hub import ModelCard

    text = contents.get("README.md", b"")
    assert isinstance(text, bytes)
    try:
        found: dict[str, Any] = ModelCard(text.decode()).data.to_dict()
    except Exception as error:  # of the YAML parser, or of the client's own checks
        fix = "mend the lines between --- and --- at its top"
        raise UsageError(f"no metadata of a model card: {error}", where=str(folder / "README.md"), fix=fix) from None
    return found


# ---- the Hub


def send(parcel: Parcel, token_file: str | os.PathLike[str] | None = None) -> Pushed:
    """Make the repository where it is not there yet, and publish the files in one commit: see `push`."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    token = _token(token_file)
    api = HfApi(token=token, library_name="tunesmith")
    with _in_words(parcel.repo, token):
        made = api.create_repo(parcel.repo, private=parcel.private, exist_ok=True)
        there = api.repo_info(made.repo_id)
        if there.private != parcel.private:
            is_now, fix = ("private", "leave out --public") if there.private else ("public", "--public")
            raise UsageError(
                f"the repository is there, and {is_now}", where=made.repo_id, fix=f"{fix}, or change it at the Hub"
            )
        deleted = _superseded([each.rfilename for each in there.siblings or []], parcel)
        changes = [CommitOperationAdd(file.name, file.content) for file in parcel.files]
        done = api.create_commit(
            made.repo_id, [*changes, *map(CommitOperationDelete, deleted)], commit_message="Model pushed by Tunesmith"
        )
    if parcel.run:
        parcel.run.append("push", repo=made.repo_id, commit=done.oid, private=parcel.private)
    names = [file.name for file in parcel.files]
    return Pushed(str(made), done.oid, parcel.private, names, parcel.size(), deleted)


def _superseded(there: list[str], parcel: Parcel) -> list[str]:
    """Files of an earlier push that would be loaded with this one's: of two sets of shards, or adapter and whole model."""
    sent = {file.name for file in parcel.files}
    folder = any(_matches(name, WEIGHTS) for name in sent)
    return [name for name in there if folder and name not in sent and _matches(name, LOADED)]


def _token(file: str | os.PathLike[str] | None) -> str:
    """The token; no error repeats it."""
    from huggingface_hub import get_token

    if file and str(file).startswith("hf_"):
        fix = "write it into a file; and take it back: the command line is seen by all users of this machine"
        raise UsageError("a token was given, and a file's name is wanted", where="--token-file", fix=fix)
    token = Path(file).expanduser().read_text(encoding="utf-8", errors="replace").strip() if file else get_token()
    if not token:
        fix = "hf auth login, or HF_TOKEN=…, or --token-file FILE: one that may write"
        raise UsageError("no token", where=str(file or "Hugging Face Hub"), fix=fix)
    if not re.fullmatch(r"[!-~]+", token):
        raise UsageError(
            "no token: it has spaces or signs that none has", where=str(file or "HF_TOKEN"), fix="copy it again"
        )
    return token


@contextmanager
def _in_words(repo: str, token: str) -> Iterator[None]:
    """What the client raises, as our errors."""
    from huggingface_hub import errors

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # each retry would be a line of its own
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the Hub's wishes about a card, in several lines
            yield
    except TunesmithError:
        raise
    except errors.OfflineModeIsEnabled:
        fix = "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"
        raise UsageError("the client is told to stay offline", where=repo, fix=fix) from None
    except errors.HfHubHTTPError as error:
        raise _refused(error, repo, token) from None
    except Exception as error:  # of three libraries below the client, when the network or a file is gone
        said = hidden(str(error), token)[:TOLD] or type(error).__name__
        fix = "look at network and disk, then push again: the repository is as it was"
        raise ServiceError(f"not sent: {said}", where=repo, fix=fix) from None


def _refused(error: Any, repo: str, token: str) -> ServiceError:
    status, said = error.response.status_code, hidden(error.server_message or "", token)[:TOLD]
    fixes = {
        401: "hf auth login, or another token in HF_TOKEN or --token-file",
        403: f"a token that may write to {repo}",
        404: "look at the name: user/name",
    }
    fix = fixes.get(status, "push again later: the repository is as it was")
    found = ServiceError(f"the Hub says {status}{': ' if said else ''}{said}", where=repo, fix=fix)
    found.status = status
    return found
