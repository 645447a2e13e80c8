"""The command line: a table of commands, and what is the same for all of them.

Each command is a function in a module of this folder, imported only when it is called for, so that help is fast.
Results go to stdout, progress and errors to stderr. Exit status: 0 ok, 1 failed, 2 usage, 3 data, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

COMMANDS = {  # words -> (module:function, one line of help)
    "quickstart": ("quickstart:quickstart", "train the sample persona and prove it: about two minutes"),
    "init": ("init:init", "write a commented config.toml for your data"),
    "data check": ("data:check", "find every problem in a data set, with line and fix"),
    "data stats": ("stats:stats", "lengths, turns, variety, languages; what a service would bill"),
    "data convert": ("convert:convert", "write rows in another format, chosen, changed and mixed"),
    "data split": ("convert:split", "write train, valid and test files"),
    "data preview": ("data:preview", "rows as the model sees them, with what is learnt highlighted"),
    "plan": ("train:plan", "what a training run would do and need; makes none"),
    "lr-find": ("lr_find:lr_find", "try learning rates in short runs and recommend one"),
    "train": ("train:train", "fine-tune a model"),
    "runs list": ("runs:list_runs", "runs and how they stand"),
    "runs show": ("runs:show", "one run: settings, losses, checkpoints"),
    "runs tag": ("runs:tag", "name a run, for runs list --tag"),
    "runs rm": ("runs:rm", "delete a run's weights, keep its record"),
    "runs compare": ("compare:compare", "runs against one another: settings, curves, metrics"),
    "runs watch": ("runs:watch", "follow a run that another process, or a service, trains"),
    "runs events": ("runs:events", "what a run has told"),
    "runs cancel": ("runs:cancel", "stop a run, also from another process"),
    "runs pause": ("runs:pause", "pause a job at a service"),
    "runs resume": ("runs:resume", "have a service go on with a paused job"),
    "evaluate": ("evaluate:evaluate", "base against tuned on rows neither was trained on: a verdict"),
    "export": ("export:export", "a model for llama.cpp, Ollama, vLLM or transformers, certified"),
    "parity": ("export:parity", "certify an export again"),
    "push": ("push:push", "send an export, or a run's best model, to the Hugging Face Hub"),
    "test": ("test:smoke_test", "try a model before it is deployed: answers and sanity checks"),
    "rescue": ("rescue:rescue", "bring home what an account holds at a service"),
    "serve": ("serve:serve", "offer files, jobs and models to any OpenAI client"),
    "keys add": ("serve:add", "make a key for a server"),
    "keys list": ("serve:list_keys", "a server's keys"),
    "keys rm": ("serve:rm", "take a key back"),
    "chat": ("chat:chat", "talk with a model or a run"),
    "doctor": ("doctor:doctor", "what this machine has, and what is missing"),
    "completion": ("completion:completion", "a script by which bash, zsh or fish completes what is typed"),
}
GROUPS = ("data", "runs", "keys")
LEFT = {  # what is there when a command was broken off
    "evaluate": ": no verdict is written; a model that was done is not asked again",
    "export": ": nothing is written",
    "lr-find": ": nothing is written",
    "push": ": nothing half is at the Hub",
}
HELP_WIDTH = 80  # columns of the help pages
UNIX = ("fcntl", "resource")  # modules that Python lacks on Windows: locks of files, limits of processes


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    sys.stdout, sys.stderr = (
        stream or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w") for stream in (sys.stdout, sys.stderr)
    )  # None: closed
    for stream in (sys.stdout, sys.stderr):  # a sign that the terminal's encoding lacks is no reason to fail
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    status = 1
    try:
        status = _answer(words)
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError as error:  # nobody reads our output any more, or the disk that it goes to is full
        if not status and not isinstance(error, BrokenPipeError):
            print(f"error: stdout: {error.strerror} -- check the disk", file=sys.stderr)
            status = 1
        _drop_unwritten()
    return status


def _drop_unwritten() -> None:
    """So that Python, which writes what is left when it ends, does not fail once more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _answer(words: list[str]) -> int:
    try:
        return _run(words)
    except KeyboardInterrupt:
        print(f"interrupted{LEFT.get(words[0], '')}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away: nothing to say, and nobody to say it to
        import os

        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        from tunesmith.errors import TunesmithError, UsageError

        if isinstance(error, ModuleNotFoundError) and error.name in UNIX:
            error = UsageError("this needs Linux or macOS", where="Windows", fix="run it in WSL 2, which is a Linux")
        elif isinstance(error, ModuleNotFoundError):
            error = _lacking(error, words[0])
        if isinstance(error, OSError):  # a full disk, a folder where a file should be, no permission
            error = TunesmithError(
                error.strerror or str(error), where=str(error.filename or ""), fix="check the path and the disk"
            )
        if not isinstance(error, TunesmithError):
            raise
        return _report(error, words)


def _run(words: list[str]) -> int:
    if words[0] == "help" and words[1:]:
        words = [*words[1:], "--help"]
    if words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] in ("--version", "-V"):
        from importlib.metadata import version

        print(f"tunesmith {version('tunesmith')}")
        return 0
    size = 2 if words[0] in GROUPS else 1
    name = " ".join(words[:size])
    if words[0] in GROUPS and (len(words) == 1 or words[1] in ("-h", "--help")):
        print(overview(words[0]))
        return 0
    if name not in COMMANDS:
        from tunesmith.errors import UsageError

        hint = f' (did you mean "{meant}"?)' if (meant := _meant(words)) else ""
        raise UsageError(f'no command "{name}"{hint}', fix="tunesmith --help lists them")
    if words[size:] in (["--help"], ["-h"]) and _width() >= HELP_WIDTH and os.path.exists(help_page(name)):
        with open(help_page(name), encoding="utf-8") as page:
            print(page.read(), end="")
        return 0
    from tunesmith.local import ENVIRONMENT

    os.environ.update({**ENVIRONMENT, **os.environ})
    module, _, function = COMMANDS[name][0].partition(":")
    return int(getattr(import_module(f"tunesmith.cli.{module}"), function)(words[size:]) or 0)


def _meant(words: list[str]) -> str | None:
    """The command whose name is likest: first its group, then within it, lest a slip asks for what deletes."""
    from tunesmith.errors import nearest

    single = [name for name in COMMANDS if " " not in name]
    first = "--version" if words[0] == "-v" else nearest(words[0], [*GROUPS, *single, "--help", "--version"])
    if first not in GROUPS or len(words) == 1:
        return first
    second = nearest(words[1], [name.split()[1] for name in COMMANDS if name.startswith(f"{first} ")])
    return f"{first} {second}" if second else first if words[0] != first else None


def help_page(name: str) -> Path:
    """The file with the command's help, made by tools/pages.py; a narrower terminal has it made anew."""
    from pathlib import Path

    return Path(__file__).parent.parent / "assets" / "help" / f"{name.replace(' ', '-')}.txt"


def _width() -> int:
    try:
        return int(os.environ.get("COLUMNS") or os.get_terminal_size(1).columns)
    except (OSError, ValueError):
        return HELP_WIDTH


def _lacking(error: ModuleNotFoundError, command: str) -> Exception:
    """What to install, where one of the packages that our extras bring is not there; any other missing module is a defect."""
    import re
    from importlib.metadata import requires

    from tunesmith.errors import UsageError

    name = (error.name or "").partition(".")[0]
    wanted = re.compile(rf'{name.replace("_", "[-_]")}(?![\w\[-]).*extra == "(\w+)"')
    extras = (wanted.match(line) for line in requires("tunesmith") or ())
    extra = next(filter(None, extras), None)
    message = f"this needs {name}, which is not installed"
    return UsageError(message, where=command, fix=f"pip install 'tunesmith[{extra[1]}]'") if extra else error


def as_typed(place: str, words: list[str]) -> str:
    """A setting's name as the option that was typed ("track": --report-to); any other place as it is."""
    from tunesmith.recipe import canonical, fields

    options = (word.partition("=")[0] for word in words if word.startswith("--"))
    typed = (option for option in options if canonical(option.replace("--no-", "--")) == place)
    return next(typed, place) if place in (*fields(), "until") else place


def _report(error: Exception, words: list[str]) -> int:
    from tunesmith.errors import TunesmithError

    assert isinstance(error, TunesmithError)
    error.where = as_typed(error.where, words)
    word = "interrupted" if error.exit_status == 130 else "error"
    print(f"{word}: {error}", file=sys.stderr)
    if "--json" in words:
        import json

        print(
            json.dumps(
                {
                    "error": {
                        "message": error.message,
                        "where": error.where,
                        "fix": error.fix,
                        "exit_status": error.exit_status,
                    }
                }
            )
        )
    return error.exit_status


def overview(group: str = "") -> str:
    """The list of commands; of one group where named."""
    shown = {name: line for name, (_, line) in COMMANDS.items() if name.startswith(group)}
    lines = [
        "tunesmith: from a JSONL file to a fine-tuned model that you can prove is better.",
        "",
        f"usage: tunesmith {group + ' ' if group else ''}COMMAND [options]",
        "",
    ]
    lines += [f"  {name:13} {line}" for name, line in shown.items()]
    lines += ["", "tunesmith COMMAND --help explains each one. First steps: tunesmith quickstart"]
    if (width := _width()) < HELP_WIDTH:
        from textwrap import wrap

        indent = min(16, width // 3)
        lines = [part for line in lines for part in wrap(line, max(20, width), subsequent_indent=" " * indent) or [""]]
    return "\n".join(lines)
