"""An Ollama Modelfile: the template, stop strings, system prompt and sampling of training.

Ollama renders prompts by a Go template, not by the model's Jinja. Ours is made from what the Jinja template writes around each
role's text, and is checked against it on whole conversations; a template that does more than that has no Go counterpart.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import zip_longest

import msgspec

from tunesmith.conversation import Conversation, Message
from tunesmith.errors import DataError, ModelError
from tunesmith.exporting.parity import Check, probes
from tunesmith.models import read_json
from tunesmith.render import TEMPERATURE, TOP_P, Renderer

ROLES = ("system", "user", "assistant")
TEXTS = ("\u2460", "\u2461", "\u2462")  # stand for what is said, one for each role: no template has them
# Ollama's name = transformers' name, and what our own chat does; Ollama's own defaults would punish repetition
SAMPLING = {
    "temperature": ("temperature", TEMPERATURE),
    "top_p": ("top_p", TOP_P),
    "top_k": ("top_k", 0),
    "repeat_penalty": ("repetition_penalty", 1.0),
}
MANY = 0.9  # share of the rows with one system prompt from which it is the model's own


class Parts(msgspec.Struct, frozen=True):
    """What a template writes: `before` and `after` the text of each role, `start` at the beginning, `unsaid` instead of a system
    prompt where there is none, `opening` before an answer."""

    start: str
    unsaid: str
    before: dict[str, str]
    after: dict[str, str]
    opening: str

    def render(self, messages: Sequence[Message]) -> str:
        """What the Go template below renders."""
        said = "".join(self.before[m.role] + m.content + self.after[m.role] for m in messages)
        return self.start + ("" if messages[0].role == "system" else self.unsaid) + said + self.opening


def parts(renderer: Renderer) -> Parts:
    """Take a chat template apart. ModelError where it does more than writing something around each text."""
    refused = ModelError(
        "the chat template cannot be written as one of Ollama's: it does more than put words around each role's text",
        where=str(renderer.folder),
        fix="export --format gguf, and serve it with llama.cpp",
    )
    system, user, answer = (Message(role, text) for role, text in zip(ROLES, TEXTS, strict=True))  # type: ignore[arg-type]

    def text(*messages: Message, prompt: bool = False) -> str:
        return renderer.text(messages, prompt)

    try:
        one, two = text(user, answer), text(user, answer, user, answer)
        asked, opened = text(user), text(user, prompt=True)
    except DataError:
        raise refused from None
    try:
        instructed = text(system, user)
    except DataError:  # Gemma's: no system prompt, neither here nor there
        instructed = ""
    between = two.removeprefix(one)
    if not (two.startswith(one) and opened.startswith(asked) and TEXTS[1] in between and TEXTS[2] in between):
        raise refused
    before_user, rest = between.split(TEXTS[1], 1)
    opening = opened.removeprefix(asked)
    middle, _, after_answer = rest.partition(TEXTS[2])
    if not middle.endswith(opening):
        raise refused
    start = one.split(TEXTS[1], 1)[0].removesuffix(before_user)
    head, _, tail = instructed.partition(TEXTS[0])
    bos = renderer.special["bos_token"] if start.startswith(renderer.special["bos_token"]) else ""
    found = Parts(
        bos,
        start.removeprefix(bos),
        {"user": before_user, "assistant": opening},
        {"user": middle.removesuffix(opening), "assistant": after_answer},
        opening,
    )
    if instructed:
        found.before["system"] = head.removeprefix(bos)
        found.after["system"] = tail.partition(TEXTS[1])[0].removesuffix(before_user)
    if any(found.render(c) != renderer.text(c, True) for c in _tries(bool(instructed))):
        raise refused
    return found


def _tries(instructed: bool) -> list[tuple[Message, ...]]:
    """Conversations on which both templates must agree: of one turn and of several, and `instructed` by a system prompt."""
    texts = [text.strip() for text in probes()[0]]  # many templates strip what is said
    found = []
    for i in range(0, len(texts) - 4, 4):
        turns = [Message(role, text) for role, text in zip(("user", "assistant", "user"), texts[i:], strict=False)]  # type: ignore[arg-type]
        found += [tuple(turns[:1]), tuple(turns)]
        found += [(Message("system", texts[i + 3]), *turns)] if instructed else []
    return found


def go_template(known: Parts, adds_bos: str) -> str:
    """The parts in Go's template language. `adds_bos`: what the runtime itself puts at the start, which is left out."""
    start = known.start.removeprefix(adds_bos)
    said = {role: f"{_go(known.before[role])}{{{{ .Content }}}}{_go(known.after[role])}" for role in known.before}
    roles = "{{ else ".join(f'if eq .Role "{role}" }}}}{text}' for role, text in said.items())
    other = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{_go(known.unsaid)}{{{{ end }}}}'
    unsaid = other if known.unsaid else ""
    return f"{_go(start)}{unsaid}{{{{ range .Messages }}}}{{{{ {roles}{{{{ end }}}}{{{{ end }}}}{_go(known.opening)}"


def _go(text: str) -> str:
    """A text as it stands in a Go template: one that has an action, or makes one with its neighbours, is written as a string."""
    plain = "{{" not in text and "}}" not in text and not text.startswith("}") and not text.endswith("{")
    return text if plain else "{{ " + json.dumps(text, ensure_ascii=False) + " }}"


def modelfile(file: str, renderer: Renderer, system: str | None, context: int) -> str:
    """The Modelfile for a GGUF file that lies beside it."""
    known = parts(renderer)
    bos = renderer.special["bos_token"] if renderer.adds_bos else ""
    generation = read_json(renderer.folder / "generation_config.json")
    lines = [f"FROM ./{file}", f"TEMPLATE {_quoted(go_template(known, bos))}"]
    lines += [
        f"PARAMETER stop {json.dumps(renderer.tokenizer.id_to_token(i), ensure_ascii=False)}" for i in renderer.stop_ids
    ]
    for name, (key, usual) in SAMPLING.items():
        given = generation.get(key)
        lines.append(f"PARAMETER {name} {usual if given is None else given}")
    lines += [f"PARAMETER num_ctx {context}"]
    lines += [f"SYSTEM {_quoted(system)}"] if system else []
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    if '"""' in text:
        fix = "take them out of the template or the system prompt"
        raise ModelError("three quotation marks in a row end a text in a Modelfile", fix=fix)
    return f'"""{text}"""'


def own_system(rows: Sequence[Conversation]) -> str | None:
    """The system prompt that nearly all training rows share: the model expects it."""
    said = [row.messages[0].content if row.messages[0].role == "system" else "" for row in rows]
    most = max(set(said), key=said.count, default="")
    return most if most and said.count(most) >= MANY * len(said) else None


def modelfile_check(text: str, renderer: Renderer, system: str | None, file: str, context: int) -> Check:
    """Whether a Modelfile is the one of the run."""
    wanted = modelfile(file, renderer, system, context)
    lines = zip_longest(wanted.splitlines(), text.splitlines(), fillvalue="(nothing)")
    first = next((there or "an empty line" for line, there in lines if there != line), "a line break")
    found = f"{len(wanted.splitlines())} lines: template, stops, sampling, system prompt"
    cause = "" if text == wanted else f"the Modelfile is not the one of training, first: {first}"
    return Check("Modelfile", not cause, cause or found, "as in training", cause)
