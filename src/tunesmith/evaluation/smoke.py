"""A model is tried before it is deployed: what it and its base answer to a few prompts, and checks that fail by name.

The checks look at what a runtime will read (chat template, tokens, stop tokens) and at the answers. How good these are is no
question here: that is what evaluation answers.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import msgspec

from tunesmith.backends import Completer
from tunesmith.conversation import Conversation, Message
from tunesmith.data.check import load
from tunesmith.data.read import SUFFIXES, container
from tunesmith.data.scan import conversations
from tunesmith.data.text import SPECIAL
from tunesmith.errors import DataError
from tunesmith.evaluation.metric import Said
from tunesmith.evaluation.observe import prompt_of
from tunesmith.evaluation.result import Severity
from tunesmith.models import find, read_json
from tunesmith.recipe import FACTS
from tunesmith.render import Renderer
from tunesmith.runs import Run

FIRST = 6  # prompts of a run's test rows that are asked
ENDS = 0.5  # share of the answers that have to end within the limit
BEGUN = 4  # characters of a template's piece at an answer's end that are no chance
HOLE = "\ue000"  # a private character, where a template puts what is said


class Answer(msgspec.Struct, frozen=True):
    """What both models say to a prompt; `base` None where there is none."""

    prompt: str
    base: str | None
    tuned: str


class Check(msgspec.Struct, frozen=True):
    """`passed` None: it could not be told, for the reason that `evidence` names."""

    name: str
    severity: Severity
    passed: bool | None
    evidence: str
    fix: str


class Trial(msgspec.Struct, frozen=True):
    """The answers, and all checks. `passed`: none of severity error has failed."""

    passed: bool
    answers: list[Answer]
    checks: list[Check]


class Tried(msgspec.Struct, frozen=True):
    """All that the checks look at. `renderer` None: a service's model; `refused`: why the template took some prompts not."""

    renderer: Renderer | None
    prompts: Sequence[Conversation]
    refused: Sequence[str]
    tuned: Sequence[Said]
    base: Sequence[Said] | None
    max_tokens: int


Found = tuple[bool | None, str]  # passed, evidence
UNSEEN: Found = (None, "a service keeps its template and tokens")
UNHEARD: Found = (None, "nothing was answered")


def prompts(run: Run | None, file: str | None) -> list[Conversation]:
    """Those of a file, all; else the first of the run's test rows; else what is asked of any model."""
    if file:
        return _in_file(Path(file))
    rows = run / "data" / "test.jsonl" if run else None
    if rows and rows.exists():
        asked = (prompt_of(row) for row in conversations(str(rows)) if row.prompt())
        if found := list(islice(asked, FIRST)):
            return found
    return [_question(text) for text in _facts()["prompts"]]


def _in_file(path: Path) -> list[Conversation]:
    """The prompts of a data file's rows; of any other file, each line that is not blank."""
    if container(path) in SUFFIXES:
        rows = load(str(path), structure_only=True).require().conversations
        found = [prompt_of(row) for row in rows if row.prompt()]
    else:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            raise DataError("no such file", where=str(path), fix="check the path") from None
        except UnicodeDecodeError:
            raise DataError("not UTF-8", where=str(path), fix="save it as UTF-8") from None
        found = [_question(line.strip()) for line in lines if line.strip()]
    if not found:
        raise DataError("no prompts in it", where=str(path), fix="one a line; or rows in a .jsonl file")
    return found


def _question(text: str) -> Conversation:
    return Conversation((Message("user", text),))


def _facts() -> dict[str, list[str]]:
    with (FACTS / "smoke.toml").open("rb") as stream:
        return tomllib.load(stream)


def attempt(
    asked: Sequence[Conversation],
    tuned: Completer,
    base: Completer | None,
    max_tokens: int,
    told: Callable[[int], object] = lambda _: None,
) -> Trial:
    """Ask both models, greedily, and check. `told` hears of each answer."""
    renderer: Renderer | None = getattr(tuned, "renderer", None)  # which a service's model has not
    able, refused = [], []
    for prompt in asked:
        try:
            _ids(renderer, prompt) if renderer else None
            able.append(prompt)
        except DataError as error:
            refused.append(error.message)

    def said(model: Completer) -> list[Said]:
        return [Said(*s) for s in model.said(able, max_tokens, told=told)] if able else []

    tried = Tried(renderer, able, refused, said(tuned), said(base) if base else None, max_tokens)
    checks = [Check(name, severity, *look(tried), fix) for name, severity, look, fix in CHECKS]
    before = [s.text for s in tried.base] if tried.base is not None else [None] * len(able)
    answers = [
        Answer(prompt.messages[-1].content, b, t.text) for prompt, b, t in zip(able, before, tried.tuned, strict=True)
    ]
    return Trial(not any(c.severity == "error" and c.passed is False for c in checks), answers, checks)


def _ids(renderer: Renderer, prompt: Conversation) -> list[int]:
    return renderer.prompt_ids(prompt.messages, prompt.tools)


# ---- what a runtime will read


def renders(t: Tried) -> Found:
    if t.renderer is None:
        return UNSEEN
    first = f": {t.refused[0]}" if t.refused else ""
    return not t.refused, f"{len(t.prompts)} of {len(t.prompts) + len(t.refused)} prompts{first}"


def survives(t: Tried) -> Found:
    """A runtime that is given the text makes the same tokens of it."""
    if t.renderer is None:
        return UNSEEN
    if not t.prompts:
        return UNHEARD
    tokenizer = t.renderer.tokenizer
    ids = [_ids(t.renderer, prompt) for prompt in t.prompts]
    again = [tokenizer.encode(t.renderer.decode(i, special=True), add_special_tokens=False).ids for i in ids]
    same = sum(a == b for a, b in zip(ids, again, strict=True))
    return same == len(ids), f"{same} of {len(ids)} prompts"


def stops(t: Tried) -> Found:
    """The last token that is learnt of a turn is one at which plain transformers stops."""
    if t.renderer is None:
        return UNSEEN
    try:
        row = t.renderer.render(Conversation((Message("user", "Hi"), Message("assistant", "Hi"))))
    except DataError as error:
        return False, error.message
    end = [token for token, learnt in zip(row.ids, row.mask, strict=True) if learnt][-1]
    saved = _saved_stops(t.renderer.folder)
    return end in saved, f"a turn ends with {t.renderer.tokenizer.id_to_token(end)!r} ({end}); stop ids: {saved}"


def _saved_stops(folder: Path) -> list[int]:
    """At which ids `generate` stops: those of generation_config.json; without one, config.json's; of an adapter, its base's."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            ids = read_json(folder / name).get("eos_token_id")
            return [ids] if isinstance(ids, int) else list(ids or [])
    return _saved_stops(find(str(read_json(folder / "adapter_config.json")["base_model_name_or_path"])))


# ---- what the answers show


def ends(t: Tried) -> Found:
    known = [said.ended for said in t.tuned if said.ended is not None]
    if not known:
        return (None, "the service does not say") if t.tuned else UNHEARD
    return sum(known) >= ENDS * len(known), f"{sum(known)} of {len(known)} answers, within {t.max_tokens} tokens"


def speaks(t: Tried) -> Found:
    empty = sum(not said.text.strip() for said in t.tuned)
    return (not empty, f"{empty} of {len(t.tuned)} answers are empty") if t.tuned else UNHEARD


def keeps_to_text(t: Tried) -> Found:
    pieces = [*_facts()["headings"], *(_pieces(t.renderer) if t.renderer else [])]
    found = [leak for said in t.tuned if (leak := _leak(said.text, pieces))]
    first = f", such as {found[0]!r}" if found else ""
    return (not found, f"{len(found)} of {len(t.tuned)} answers have some{first}") if t.tuned else UNHEARD


def _pieces(renderer: Renderer) -> list[str]:
    """What the template writes around answers, line by line ("Assistant:", "### Response:"), and the special tokens."""
    try:
        text, spans = renderer.text_and_spans(Conversation((Message("user", HOLE), Message("assistant", HOLE))))
    except DataError:
        text, spans = "", []
    for a, b in reversed(spans):
        text = text[:a] + HOLE + text[b:]
    lines = [line.strip() for part in text.split(HOLE) for line in part.splitlines()]
    special = [token.content for token in renderer.tokenizer.get_added_tokens_decoder().values() if token.special]
    return [p for p in dict.fromkeys([*lines, *special]) if len(p) > 2 and (not p[0].isalnum() or p.endswith(":"))]


def _leak(text: str, pieces: Sequence[str]) -> str | None:
    """A control token or a template's piece in an answer, or one begun at its end; a word with a colon where a line begins."""
    if control := SPECIAL.search(text):
        return control[0]
    for piece in pieces:
        if piece[0].isalnum():
            if re.search(rf"^\s*{re.escape(piece)}", text, re.M):
                return piece
        elif piece in text:
            return piece
        elif begun := next((piece[:n] for n in range(len(piece) - 1, BEGUN - 1, -1) if text.endswith(piece[:n])), None):
            return begun
    return None


def varies(t: Tried) -> Found:
    if len({prompt.messages for prompt in t.prompts}) < 2:
        return None, "fewer than two different prompts"
    different = len({said.text for said in t.tuned})
    return different > 1, f"{different} different answers to {len(t.tuned)} prompts"


def differs(t: Tried) -> Found:
    if t.base is None:
        return None, "no base to compare with: --against MODEL"
    changed = sum(a.text != b.text for a, b in zip(t.base, t.tuned, strict=True))
    return (changed > 0, f"{changed} of {len(t.tuned)} answers are not the base's") if t.tuned else UNHEARD


CHECKS: tuple[tuple[str, Severity, Callable[[Tried], Found], str], ...] = (
    ("the template renders every prompt", "error", renders, "another --chat-template in training; or other roles"),
    (
        "tokens survive decoding",
        "warning",
        survives,
        "give the runtime token ids, or look at the tokenizer's normalizer",
    ),
    ("the end of a turn is a stop token", "error", stops, "add its id to eos_token_id in generation_config.json"),
    (
        "answers end by themselves",
        "error",
        ends,
        "more --max-tokens if long ones are meant; else tunesmith data preview",
    ),
    ("no answer is empty", "error", speaks, "look for rows with next to no answer: tunesmith data check DATASET"),
    ("no template pieces in answers", "error", keeps_to_text, "tunesmith data check DATASET finds them in rows"),
    ("answers differ by prompt", "error", varies, "fewer --epochs, a lower --learning-rate, more different rows"),
    (
        "training has changed answers",
        "warning",
        differs,
        "more --epochs, or a higher --learning-rate: tunesmith lr-find",
    ),
)
