"""Argument parsing: flags made from the Recipe, errors as one line, results as text or JSON."""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import Any, NoReturn

from tunesmith.errors import UsageError, did_you_mean

REQUIRED = "the following arguments are required: "


class _Formatter(argparse.HelpFormatter):
    """The value once, behind all names of an option, as Python 3.13 prints it; and of the ways to say no the first."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if not name.startswith("--no-")]
        if len(names) < len(action.option_strings):
            names.append(next(name for name in action.option_strings if name.startswith("--no-")))
        value = (
            "" if action.nargs == 0 else " " + self._format_args(action, self._get_default_metavar_for_optional(action))
        )
        return ", ".join(names) + value


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are UsageErrors with a suggestion."""

    def __init__(self, name: str, description: str, **kwargs: Any) -> None:
        kwargs = {"formatter_class": _Formatter, **kwargs}
        super().__init__(prog=f"tunesmith {name}", description=description, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        known = list(self._option_string_actions)
        if found := re.match(r"argument (\S+): (.*)", message, re.DOTALL):
            raise self._refused(*found.groups())
        if message.startswith(REQUIRED):
            place = self.prog.removeprefix("tunesmith ")
            raise UsageError(f"needs {message.removeprefix(REQUIRED)}", where=place, fix=f"{self.prog} --help")
        if message.startswith("unrecognized arguments:"):
            word = message.split(": ", 1)[1].split()[0].split("=")[0]
            if word == "--api-key":
                fix = "export OPENAI_API_KEY=…, or --api-key-file FILE; and change the key if this one is real"
                raise UsageError("a key on the command line is seen by all users of this machine", where=word, fix=fix)
            if word == "help":
                raise UsageError("unexpected argument help", fix=f"{self.prog} --help")
            if {"--model", "--lora-rank"} <= set(known) and not word.startswith("-"):
                raise UsageError(f"unexpected argument {word}", fix=f"data is named by an option: --dataset {word}")
            if {"--model", "--lora-rank"} <= set(known):  # a command with the settings of training
                from tunesmith.settings import elsewhere, unknown

                if word.startswith("--") and word[2:].replace("-", "_") in elsewhere():
                    raise unknown(word, self.prog)
            message = (
                f"unknown option {word}{did_you_mean(word, known)}"
                if word.startswith("-")
                else f"unexpected argument {word}"
            )
        raise UsageError(message, fix=f"{self.prog} --help lists the options")

    def _refused(self, name: str, said: str) -> UsageError:
        """What argparse says of an option's value, in our form."""
        option = next((word for word in name.split("/") if word.startswith("--")), name)
        if wrong := re.match(r"invalid choice: '(.*)' \(choose from", said, re.DOTALL):
            action = next(a for a in self._actions if name in ("/".join(a.option_strings), a.metavar, a.dest))
            known = [str(choice) for choice in action.choices or ()]
            near = did_you_mean(wrong[1], known)
            return UsageError(f'no "{wrong[1]}"{near}', where=option, fix=f"known: {', '.join(known)}")
        if wrong := re.match(r"invalid (?:int|float) value: (.*)", said, re.DOTALL):
            said = f"expected a number, not {wrong[1]}"
        elif said.startswith("ignored explicit argument"):
            said = "takes no value"
        elif said.startswith("expected ") and said.endswith("argument"):
            said = "needs a value"
        return UsageError(said, where=option, fix=f"{self.prog} --help")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # help that could not be written is told of as any output
        super().exit(status, message)

    def with_json(self) -> Parser:
        self.add_argument("--json", action="store_true", help="the result as JSON on stdout")
        return self


def positive(text: str) -> int:
    """An option's value that is a whole number over 0."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """An option's value that is a whole number, 0 or more."""
    return _whole(text, 0)


def port(text: str) -> int:
    """An option's value that is a port: 16 bits."""
    return _whole(text, 0, 65535)


def share(text: str) -> float:
    """An option's value that is a number over 0, 1 at most."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number over 0, 1 at most, not {text!r}")
    return value


def temperature(text: str) -> float:
    """An option's value that is a temperature: 0 to 2, as services have it. NaN is in no range."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 2, not {text!r}")
    return value


def _whole(text: str, least: int, most: int | None = None) -> int:
    if not text.isdecimal() or not least <= int(text) <= (most or 2**63 - 1):
        raise argparse.ArgumentTypeError(
            f"expected a whole number from {least} {f'to {most}' if most else 'up'}, not {text!r}"
        )
    return int(text)


def add_settings(parser: Parser) -> None:
    """A flag for each setting of the Recipe, grouped; only flags that are given end up in the namespace."""
    from tunesmith.recipe import fields

    parser.usage = "%(prog)s [options]"  # all of them at once are forty lines, and say nothing
    groups: dict[str, Any] = {}
    for field in fields().values():
        group = groups.setdefault(field.group, None) or parser.add_argument_group(field.group)
        groups[field.group] = group
        names = [f"--{n.replace('_', '-')}" for n in (field.name, *field.aliases)]
        default = "" if field.default is False or field.default in (None, {}) else f" [{field.default}]"
        text = (field.help + default).replace("%", "%%")
        if field.type is bool:
            group.add_argument(
                *names, action=argparse.BooleanOptionalAction, dest=field.name, default=argparse.SUPPRESS, help=text
            )
        else:
            metavar = (
                "{" + ",".join(field.choices()) + "}" if field.choices() else field.name.rpartition("_")[2].upper()
            )
            group.add_argument(*names, dest=field.name, default=argparse.SUPPRESS, metavar=metavar, help=text)
        if field.name == "method":
            group.add_argument(
                "--lora", action="store_true", default=argparse.SUPPRESS, help="the same as --method lora"
            )
    parser.add_argument(
        "--config", metavar="FILE|PRESET", help="settings from a .toml or .json file, or a preset's name"
    )


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings given as flags."""
    from tunesmith.recipe import SWITCHES, fields

    known = {*fields(), *SWITCHES}
    return {k: v for k, v in vars(options).items() if k in known}


def confirm(question: str, reason: str, where: str) -> bool:
    """Whether the user says yes. Raises UsageError with the reason for asking where nobody can be asked."""
    if not sys.stdin.isatty():
        raise UsageError(f"{reason}, and nobody can be asked here", where=where, fix="add --yes")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def coloured(stream: Any) -> bool:
    """Whether to write colours: on a terminal that has them, unless NO_COLOR is set (no-color.org)."""
    return bool(stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb")


def columns(text: str | None) -> dict[str, str]:
    """--columns as a mapping of our field names to the file's."""
    from tunesmith.settings import resolve

    return resolve({"columns": text})[0].columns if text else {}


def show_json(value: Any) -> None:
    """A value (structs too) as indented JSON on stdout."""
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
