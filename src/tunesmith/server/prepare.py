"""The process that checks a job's files and lays out its run: `python -m tunesmith.server.prepare FOLDER`, the order on stdin.

It leaves FOLDER/run and FOLDER/prepared.json: what became of "auto", or which file is wrong and why. It ends with the server
(its standard input closes), and works on the folder alone.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from tunesmith import api
from tunesmith.conversation import Issue
from tunesmith.data.check import examine
from tunesmith.data.write import write_json
from tunesmith.errors import DataError, ModelError, TunesmithError
from tunesmith.local.backend import lay_out

LEAST_ROWS = 10  # as OpenAI asks
KEYS = ("messages", "tools", "parallel_tool_calls", "functions")  # of a row of conversation


class Order(msgspec.Struct):
    """What to prepare: files, the base's folder, settings of the Recipe; `multiplier` is of the rate that "auto" gives."""

    training_file: str
    validation_file: str | None
    config: str | None
    settings: dict[str, Any]
    multiplier: float
    most_rows: int


class Prepared(msgspec.Struct):
    """What came of it. `error`: code, message and param as the protocol's job has them."""

    n_epochs: int = 0
    batch_size: int = 0
    error: dict[str, str | None] | None = None


class Wrong(Exception):
    """A file that cannot be trained on."""

    def __init__(self, code: str, message: str, param: str) -> None:
        super().__init__(message)
        self.found: dict[str, str | None] = {"code": code, "message": message, "param": param}


def prepare(order: Order, folder: Path) -> Prepared:
    """Check the files and lay out the run. What is wrong with them is part of the answer."""
    try:
        _check(order.training_file, "training_file", order.most_rows)
        if order.validation_file:
            _check(order.validation_file, "validation_file", order.most_rows)
        settings = {**order.settings, "dataset": order.training_file, "valid_dataset": order.validation_file}
        prepared = api.prepare(config=order.config, **settings)
    except Wrong as wrong:
        return Prepared(error=wrong.found)
    except FileNotFoundError as error:
        if (param := Path(str(error.filename)).stem) not in ("training_file", "validation_file"):
            raise
        return Prepared(error={"code": f"invalid_{param}", "message": "The file has been deleted", "param": param})
    except (DataError, ModelError) as error:
        words = _public(error.message, order, folder)
        return Prepared(error={"code": "invalid_training_file", "message": words, "param": "training_file"})
    except TunesmithError as error:  # the operator's settings, or this machine
        return Prepared(error={"code": "server_error", "message": _public(error.message, order, folder), "param": None})
    shutil.rmtree(folder / "run", ignore_errors=True)  # of a process that was killed
    recipe = prepared.plan.recipe
    recipe = replace(recipe, learning_rate=float(recipe.learning_rate) * order.multiplier)
    lay_out(replace(prepared, plan=replace(prepared.plan, recipe=recipe)), folder / "run")
    return Prepared(int(recipe.epochs), int(recipe.batch_size))


def _public(message: str, order: Order, folder: Path) -> str:
    """A message without the places of this server's files."""
    places = {order.training_file: "training file", order.validation_file or "": "validation file"}
    places |= {str(Path(path).resolve()): name for path, name in places.items() if path}
    places |= {str(order.settings["model"]): "model", str(folder): "job", str(folder.parent.parent): "server"}
    for place in sorted(filter(None, places), key=len, reverse=True):
        message = message.replace(place, f"<{places[place]}>")
    return message


def _check(path: str, param: str, most_rows: int) -> None:
    """The rules of the protocol, which are stricter than ours. Raises Wrong with the first line that breaks one."""
    word, rows = param.removesuffix("_file"), 0
    if Path(path).stat().st_size:
        try:
            found = examine([path], provider="openai", structure_only=True)
        except TunesmithError as error:
            raise _format(word, error.message, param) from None
        # other keys are a warning to who trains at a service, since `train` converts them; an upload is taken as it is
        wrong = [issue for issue in found.issues if issue.severity == "error" or issue.code == "extra-field"]
        if first := next((issue for issue in wrong if issue.code != "too-few-rows"), None):
            raise _format(word, _said(first), param)
        if extra := _extra_key(path):
            raise _format(word, extra, param)
        rows = found.rows_in
    if rows < LEAST_ROWS:
        few = f"{word.capitalize()} file has {rows} example(s), but must have at least {LEAST_ROWS} examples"
        raise Wrong("invalid_n_examples", few, param)
    if most_rows and rows > most_rows:
        raise Wrong("invalid_n_examples", f"{word.capitalize()} file has {rows} examples, over {most_rows}", param)


def _extra_key(path: str) -> str:
    """The first key beside the messages that the protocol does not know, in its words; "" where there is none."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = msgspec.json.decode(line)
            except (msgspec.DecodeError, RecursionError):  # a blank line, or one that has been reported
                continue
            if isinstance(row, dict) and "messages" in row and (extra := next((k for k in row if k not in KEYS), None)):
                return f'Example {number} contains an extra "{extra}".'
    return ""


def _format(word: str, detail: str, param: str) -> Wrong:
    message = f"The job failed due to a file format error in the {word} file. Invalid file format. {detail}"
    return Wrong("invalid_file_format", message, param)


def _said(issue: Issue) -> str:
    line = issue.where.rpartition(":")[2]
    return f"Example {line}: {issue.message}" if line.isdigit() else issue.message


def main(folder: Path) -> None:
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    threading.Thread(target=_end_with_server, daemon=True).start()
    with (folder / ".prepare.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of a server that was killed may still be ending
        write_json(folder / "prepared.json", prepare(order, folder))


def _end_with_server() -> None:
    os.read(sys.stdin.fileno(), 1)  # nothing more is written to it: this returns when the server's end closes
    os.killpg(0, signal.SIGKILL)  # with the processes that read for this one


if __name__ == "__main__":
    main(Path(sys.argv[1]))
