"""tunesmith chat: with one model, or with two that answer side by side."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from tunesmith.cli.options import Parser, natural, positive, share, show_json, temperature
from tunesmith.conversation import Message
from tunesmith.errors import DataError


def chat(argv: list[str]) -> int:
    parser = Parser(
        "chat",
        "Talk with a model or a run's best model. An empty line or Ctrl-D ends; /reset forgets what was said. "
        "With --json each answer is an object, one a line where questions come from a pipe.",
    ).with_json()
    parser.add_argument("model", nargs="?", default="starter", help="a run, a model folder, a Hub name, or starter")
    parser.add_argument(
        "--against", metavar="MODEL", help="ask this one too: side by side in a terminal of 80 columns, else in turn"
    )
    parser.add_argument("--prompt", help="answer this once and end")
    parser.add_argument("--system", help="a system message")
    parser.add_argument("--max-tokens", type=positive, default=256, metavar="N", help="longest answer [256]")
    parser.add_argument(
        "--temperature",
        type=temperature,
        default=0.7,
        metavar="T",
        help="0: always the likeliest word [0.7; 0 with --prompt]",
    )
    parser.add_argument(
        "--top-p", type=share, metavar="P", help="draw among the likeliest words that make up P together [0.95]"
    )
    parser.add_argument("--seed", type=natural, default=0)
    options = parser.parse_args(argv)
    if options.prompt is not None and not any(a.startswith("--temperature") for a in argv):
        options.temperature = 0.0
    import msgspec

    from tunesmith import api

    sides = [Side(options.model, api.completer(options.model), options.system)]
    if options.against is not None:
        sides.append(Side(options.against, api.completer(options.against, options.model), options.system))
    names = ("answer", "against")[: len(sides)]
    drawn = {} if options.top_p is None else {"top_p": options.top_p}

    def answers(seed: int) -> dict[str, str]:
        streams = [side.stream(options.max_tokens, options.temperature, seed, **drawn) for side in sides]
        texts = ["".join(stream).strip() for stream in streams] if options.json else shown(sides, streams)
        return dict(zip(names, texts, strict=True))

    if options.prompt is not None:
        for side in sides:
            side.ask(whole(options.prompt))
        found = answers(options.seed)
        if options.json:
            show_json({"model": options.model, "prompt": options.prompt, **found})
        return 0
    turn = 0
    print(f"chatting with {' and '.join(s.name for s in sides)}; an empty line ends", file=sys.stderr)
    while True:
        try:
            said = whole(input("> " if sys.stdin.isatty() else "")).strip()
        except EOFError:
            return 0
        if not said:
            return 0
        if said == "/reset":
            for side in sides:
                side.reset()
            continue
        for side in sides:
            side.ask(said)
            if side.forget(options.max_tokens):
                who = f"{side.name}: " if len(sides) > 1 else ""
                print(f"({who}the oldest turn no longer fits and is forgotten)", file=sys.stderr)
        found = answers(options.seed + turn)
        if options.json:
            print(msgspec.json.encode({"prompt": said, **found}).decode(), flush=True)
        for side, text in zip(sides, found.values(), strict=True):
            side.hear(text)
        turn += 1


class Side:
    """A model, and what was said with it alone."""

    def __init__(self, name: str, model: Any, system: str | None) -> None:
        self.name, self._model = name, model
        self._start: tuple[Message, ...] = (Message("system", whole(system)),) if system else ()
        self._said: tuple[Message, ...] = self._start

    def reset(self) -> None:
        self._said = self._start

    def ask(self, text: str) -> None:
        self._said = (*self._said, Message("user", text))

    def hear(self, text: str) -> None:
        self._said = (*self._said, Message("assistant", text or " "))

    def forget(self, max_tokens: int) -> int:
        """Forget the oldest questions, each with its answer, until there is room for an answer; how many."""
        first, count = len(self._start), 0
        while len(self._said) > first + 1 and self._model.room(self._said) < min(max_tokens, self._model.context // 4):
            self._said, count = (*self._start, *self._said[first + 2 :]), count + 1
        return count

    def stream(self, max_tokens: int, temperature: float, seed: int, **drawn: float) -> Iterator[str]:
        """The answer to what was said, piece by piece. Raises DataError where the model has no room for one."""
        try:
            yield from self._model.stream(self._said, max_tokens, temperature, seed, **drawn)
        except DataError as error:
            error.where = error.where or self.name
            raise


def shown(sides: Sequence[Side], streams: Sequence[Iterator[str]]) -> list[str]:
    """The answers, written to stdout as they come: two in columns where the terminal has room for them, else in turn."""
    from tunesmith.cli.columns import LEAST, Columns, drawable

    texts = [""] * len(sides)
    size = shutil.get_terminal_size()
    if len(sides) > 1 and sys.stdout.isatty() and size.columns >= LEAST and os.environ.get("TERM") != "dumb":
        screen = Columns([side.name for side in sides], size.columns, size.lines, _write)
        try:
            for at, piece in in_turn(streams):
                if piece is None:
                    screen.end(at)
                else:
                    texts[at] += piece
                    screen.add(at, piece)
        finally:
            screen.close()
        return [text.strip() for text in texts]
    for at, stream in enumerate(streams):
        if len(sides) > 1:
            _write(f"── {sides[at].name}\n")
        for piece in stream:
            texts[at] += piece
            _write(drawable(piece) if sys.stdout.isatty() else piece)
        _write("\n")
    return [text.strip() for text in texts]


def in_turn(streams: Sequence[Iterator[str]]) -> Iterator[tuple[int, str | None]]:
    """(which, piece) of several answers, one piece of each at a time; None where one has ended."""
    left = dict(enumerate(streams))
    while left:
        for at, stream in list(left.items()):
            piece = next(stream, None)
            if piece is None:
                del left[at]
            yield at, piece


def _write(text: str) -> None:
    print(text, end="", flush=True)


def whole(text: str) -> str:
    """Text from outside, bytes that are not UTF-8 replaced."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
