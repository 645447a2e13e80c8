"""tunesmith chat."""

from __future__ import annotations

import sys
from typing import Any

from tunesmith.cli.options import Parser, natural, positive, show_json


def chat(argv: list[str]) -> int:
    parser = Parser(
        "chat",
        "Talk with a model or a run's best model. An empty line or Ctrl-D ends; /reset forgets what was said. "
        "With --json each answer is an object, one a line where questions come from a pipe.",
    ).with_json()
    parser.add_argument("model", nargs="?", default="starter", help="a run, a model folder, a Hub name, or starter")
    parser.add_argument("--prompt", help="answer this once and end")
    parser.add_argument("--system", help="a system message")
    parser.add_argument("--max-tokens", type=positive, default=256, metavar="N", help="longest answer [256]")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.7,
        metavar="T",
        help="0: always the likeliest word [0.7; 0 with --prompt]",
    )
    parser.add_argument("--seed", type=natural, default=0)
    options = parser.parse_args(argv)
    if options.prompt is not None and not any(a.startswith("--temperature") for a in argv):
        options.temperature = 0.0
    import msgspec

    from tunesmith import api
    from tunesmith.conversation import Message

    model: Any = api.completer(options.model)
    history = (Message("system", options.system),) if options.system else ()

    def answer(messages: tuple[Message, ...], seed: int) -> str:
        text = ""
        for piece in model.stream(messages, options.max_tokens, options.temperature, seed):
            text += piece
            if not options.json:
                print(piece, end="", flush=True)
        if not options.json:
            print()
        return text.strip()

    if options.prompt is not None:
        text = answer((*history, Message("user", whole(options.prompt))), options.seed)
        if options.json:
            show_json({"model": options.model, "prompt": options.prompt, "answer": text})
        return 0
    start, turn = history, 0
    print(f"chatting with {options.model}; an empty line ends", file=sys.stderr)
    while True:
        try:
            said = whole(input("> " if sys.stdin.isatty() else "")).strip()
        except EOFError:
            return 0
        if not said:
            return 0
        if said == "/reset":
            history = start
            continue
        history = (*history, Message("user", said))
        while len(history) > len(start) + 1 and model.room(history) < min(options.max_tokens, model.context // 4):
            history = (*start, *history[len(start) + 2 :])  # a question and its answer
            print("(the oldest turn no longer fits and is forgotten)", file=sys.stderr)
        text = answer(history, options.seed + turn)
        if options.json:
            print(msgspec.json.encode({"prompt": said, "answer": text}).decode(), flush=True)
        history = (*history, Message("assistant", text or " "))
        turn += 1


def whole(text: str) -> str:
    """Text from outside, bytes that are not UTF-8 replaced."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
