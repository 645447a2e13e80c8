"""A user's own metric: a Python function by its file's path, or a regular expression that answers should match.

The file is run because the user named it, like any script; nothing else is ever loaded. `metric_from` says how a metric is named.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from tunesmith.conversation import Conversation
from tunesmith.errors import UsageError, did_you_mean
from tunesmith.evaluation.instruct import instruction
from tunesmith.evaluation.metric import Facts, Heard, Metric

SECONDS = 1.0  # that a pattern may take over one answer: one that backtracks without end would never return
LARGEST = 1e100  # of a value: sums of larger ones, and their squares, come to infinity
PARAMETERS: dict[str, Callable[[Conversation, Heard], Any]] = {  # what a function may ask for, by name
    "prompt": lambda row, heard: instruction(row),
    "answer": lambda row, heard: heard.said.text if heard.said else "",
    "reference": lambda row, heard: row.answer(),
    "messages": lambda row, heard: [msgspec.to_builtins(m) for m in row.prompt()],
    "metadata": lambda row, heard: dict(row.metadata),
    "ended": lambda row, heard: heard.said.ended if heard.said else None,
}


def metric_from(spec: str) -> Metric:
    """A metric from "path/to/file.py:function" or "re:PATTERN".

    The function has any of these parameters, by name: `prompt` (the last user message), `answer`, `reference` (texts), `messages`
    (all before the answer, as dicts), `metadata` (what else the row held) and `ended` (the answer stopped by itself; None where
    that is not known). It gives a number, or true or false, of which the mean over rows is taken; None leaves the row out.

    A pattern is searched anywhere in the answer, in the syntax of the `regex` package, which has all of Python's; the metric is
    the share of answers that match.

    Higher is better, unless the text ends with ":lower" (":higher" says so too, for a pattern that itself ends with ":lower").
    Raises UsageError where that cannot be had: with the place, and while measuring with the row's.
    """
    rest, _, last = spec.rpartition(":")
    better: Literal["lower", "higher"] = "lower" if last == "lower" else "higher"
    body = rest if last in ("lower", "higher") else spec
    return _pattern(body[3:], better) if body.startswith("re:") else _function(body, better)


def _pattern(pattern: str, better: Literal["lower", "higher"]) -> Metric:
    try:
        import regex
    except ImportError:
        raise UsageError("a metric by pattern needs regex", fix="pip install 'tunesmith[evaluate]'") from None
    try:
        compiled = regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, ValueError) as error:
        fix = r"a sign that stands for itself has a backslash before it: \("
        raise UsageError(f"no regular expression: {error}", where=f"re:{pattern}", fix=fix) from None

    def columns(row: Conversation, heard: Heard, facts: Facts) -> tuple[float, float] | None:
        if heard.said is None:
            return None
        try:
            return bool(compiled.search(heard.said.text, timeout=SECONDS)), 1
        except (TimeoutError, MemoryError):
            message = f"re:{pattern} did not come to an end over one answer ({SECONDS:g} s at most)"
            raise UsageError(message, where=row.source, fix="make it unambiguous: no (a+)+ or (a|a)*") from None

    return Metric(
        f"matches {pattern}", better, "0 to 1", "The share of answers that match the pattern.", "Yours", columns
    )


def _function(spec: str, better: Literal["lower", "higher"]) -> Metric:
    file, _, name = spec.rpartition(":")
    if not file or not name.isidentifier():
        fix = "path/to/file.py:function, or re:PATTERN"
        raise UsageError(f'no metric is named "{spec}"', where="--metric", fix=fix)
    path = Path(file).expanduser()
    function = _named(_loaded(path), name, path)
    names = _parameters(function, f"{path}:{name}")

    def columns(row: Conversation, heard: Heard, facts: Facts) -> tuple[float, float] | None:
        if heard.said is None:
            return None
        try:
            value = function(**{name: PARAMETERS[name](row, heard) for name in names})
        except (Exception, SystemExit) as error:
            raise UsageError(f"{name} raised {_said(error, path)}", where=row.source, fix=f"correct {path}") from None
        return None if value is None else (_number(value, name, row.source), 1)

    return Metric(
        name, better, "As the function has it", f"The mean of {name} in {path} over answers.", "Yours", columns
    )


def _loaded(path: Path) -> dict[str, Any]:
    """What the file defines. It has a name of its own among modules, which dataclasses and pickles look up."""
    if not path.is_file():
        raise UsageError("no such file", where=str(path), fix="path/to/file.py:function")
    name = f"tunesmith metric {path.resolve()}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError("no Python file", where=str(path), fix="its name has to end with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        fix = f"python {path} shows where"
        raise UsageError(f"cannot be loaded: {_said(error, path)}", where=str(path), fix=fix) from None
    return vars(module)


def _named(defined: dict[str, Any], name: str, path: Path) -> Callable[..., Any]:
    function = defined.get(name)
    if not callable(function):
        near = did_you_mean(name, [key for key, value in defined.items() if callable(value) and key[0] != "_"])
        raise UsageError(f'no function "{name}"{near}', where=str(path), fix=f"define it there: def {name}(answer)")
    if inspect.iscoroutinefunction(function):
        raise UsageError(f"{name} is asynchronous", where=str(path), fix="def, not async def")
    return function  # type: ignore[no-any-return]


def _parameters(function: Callable[..., Any], where: str) -> list[str]:
    """The names that it is called with. Raises UsageError for one that is not known and has no default."""
    known, names = f"known: {', '.join(PARAMETERS)}", []
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        raise UsageError("its parameters cannot be told", where=where, fix=f"write it in Python; {known}") from None
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name in PARAMETERS and parameter.kind != parameter.POSITIONAL_ONLY:
            names.append(parameter.name)
        elif parameter.default is parameter.empty:
            near = did_you_mean(parameter.name, list(PARAMETERS))
            what = "can only be given by place" if parameter.name in PARAMETERS else f"is not known{near}"
            raise UsageError(f'its parameter "{parameter.name}" {what}', where=where, fix=known)
    return names


def _number(value: Any, name: str, where: str) -> float:
    """A number from what a function gave. Raises UsageError for anything else, nan and what is over LARGEST among it."""
    try:
        number = float(value) if not isinstance(value, str | bytes) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST:
        shown = value if isinstance(value, float) else f"a value of type {type(value).__name__}"
        raise UsageError(
            f"{name} gave {shown}", where=where, fix=f"return a finite number (up to {LARGEST:g}), or True or False"
        )
    return number


def _said(error: BaseException, path: Path) -> str:
    """The error, and the line of the user's file that it came from."""
    path = path.resolve()
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).resolve() == path
    ]
    place = f" in line {lines[-1]}" if lines else ""
    return f"{type(error).__name__}{place}: {str(error)[:200]}"
