"""Conversation -> (token ids, loss mask): the one place that decides what is trained on.

Only what the assistant says, with its end-of-turn token, is learnt. The model's own chat template
renders the text; a `{% generation %}` block in it marks the assistant's part exactly; for a template
without one, the part is what the template adds after its generation prompt. A base model without
any template gets that of its task (`facts/templates`; chat: "User: …", blank line, "Assistant: …"), which is then saved with
the tuned model. Training, chat, evaluation and export all render here.
"""

from __future__ import annotations

import shutil
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, islice, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Encoding, Tokenizer
from tokenizers.processors import TemplateProcessing

from tunesmith.conversation import Conversation, Message
from tunesmith.errors import DataError, ModelError, UsageError, did_you_mean
from tunesmith.models import read_json
from tunesmith.recipe import FACTS
from tunesmith.words import Words, border

TEMPERATURE, TOP_P = 0.7, 0.95  # of answers that are drawn, unless told otherwise
TEMPLATES = {path.stem: path for path in sorted((FACTS / "templates").glob("*.jinja"))}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
_MARK = (
    f"\x00{uuid4().hex}\x00"  # stands at both ends of a generation block while rendering; random, so no text holds it
)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: the assistant's part, kept between two marks."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_wrap"), [], [], body).set_lineno(line)

    def _wrap(self, caller: Any) -> str:
        return f"{_MARK}{caller()}{_MARK}"


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that chat templates are written for: sandboxed, blocks trimmed."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
    )

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **_: Any) -> str:
        import json

        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)

    def now(form: str) -> str:
        from datetime import datetime

        return datetime.now().strftime(form)

    env.filters["tojson"] = tojson
    env.globals.update(raise_exception=refuse, strftime_now=now)
    return env


class Rendered(msgspec.Struct, frozen=True):
    """`ids[i]` is learnt where `mask[i]` is 1; `text` is what was tokenised."""

    ids: list[int]
    mask: list[int]
    text: str
    source: str = ""


class Renderer:
    """A model's tokenizer and chat template, read from its folder without torch.

    `template`: the text of another one than the model's own. `is_own`: whether the model's is used.
    """

    def __init__(self, folder: Path, template: str | None = None) -> None:
        if not (folder / "tokenizer.json").exists():
            raise ModelError(
                "no tokenizer.json", where=str(folder), fix="save the model's fast tokenizer into this folder"
            )
        self.folder = folder
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        config = {**read_json(folder / "special_tokens_map.json"), **read_json(folder / "tokenizer_config.json")}
        self.special = {k: _token_text(config.get(k)) for k in ("bos_token", "eos_token", "pad_token", "unk_token")}
        own = own_template(folder) if template is None else None
        self.is_own = own is not None
        self.template: str = next(t for t in (own, template, TEMPLATES["chat"].read_text("utf-8")) if t is not None)
        self._compiled = _environment().from_string(self.template)
        prefix = self.tokenizer.encode("").ids  # what the tokenizer itself puts before a text (a Llama's BOS)
        self.adds_bos = bool(prefix)
        # Templates write the special tokens; a post-processor would only trim spaces off the offsets (GPT-2's does)
        self.tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
        if not self.is_own or not self.special["bos_token"]:
            self.special["bos_token"] = self.tokenizer.decode(prefix, skip_special_tokens=False) if prefix else ""
        self.stop_ids = self._stops(read_json(folder / "generation_config.json"))
        self.pad_id = self._id(self.special["pad_token"]) if self.special["pad_token"] else self.stop_ids[0]
        at = border(self.tokenizer)
        self._words = Words(self.tokenizer, at) if at else None
        self._at_border = lru_cache(1 << 16)(self._border)

    def _id(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise ModelError(
                f"the special token {token!r} is not in the vocabulary",
                where=str(self.folder),
                fix="correct tokenizer_config.json",
            )
        return int(found)

    def _stops(self, generation: dict[str, Any]) -> list[int]:
        """Ids that end an answer: the tokenizer's EOS, then the generation configuration's."""
        eos = [self._id(self.special["eos_token"])] if self.special["eos_token"] else []
        more = generation.get("eos_token_id") or []
        stops = list(dict.fromkeys(eos + ([more] if isinstance(more, int) else list(more))))
        if not stops:
            raise ModelError(
                "no end-of-sequence token", where=str(self.folder), fix="set eos_token in tokenizer_config.json"
            )
        return stops

    # ---- text

    def _render(self, messages: Iterable[Message], tools: Any, prompt: bool) -> str:
        """The template's text, the assistant's parts between marks where it has `{% generation %}`."""
        plain = [{k: v for k, v in msgspec.to_builtins(m).items() if k != "weight"} for m in messages]
        try:
            return self._compiled.render(messages=plain, tools=tools, add_generation_prompt=prompt, **self.special)
        except (TemplateError, TypeError, KeyError) as error:
            raise DataError(
                f"the model's chat template refuses this conversation: {error}",
                fix="change the roles' order, or the model",
            ) from None

    def text(self, messages: Iterable[Message], prompt: bool, tools: Any = None) -> str:
        """What the template writes; with `prompt` up to where the model speaks. Raises DataError where it refuses."""
        return self._render(messages, tools, prompt).replace(_MARK, "")

    def text_and_spans(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation and the character spans in it that are learnt."""
        messages = conversation.messages
        if messages[0].role == "text":
            bos, eos = self.special["bos_token"], self.special["eos_token"]
            return f"{bos}{messages[0].content}{eos}", [(len(bos), len(bos) + len(messages[0].content) + len(eos))]
        marked = self._render(messages, conversation.tools, prompt=False)
        turns = [m for m in messages if m.role == "assistant"]
        if _MARK in marked:
            text, spans = _unmark(marked)
        else:
            text, spans = marked, self._spans_by_prefix(conversation, marked)
        if len(spans) != len(turns):
            raise DataError(
                f"the chat template marks {len(spans)} answers, the row has {len(turns)}",
                where=conversation.source,
                fix="use another chat template",
            )
        return text, [self._to_turn_end(text, span) for span, m in zip(spans, turns, strict=True) if m.weight != 0]

    def _spans_by_prefix(self, conversation: Conversation, text: str) -> list[tuple[int, int]]:
        """What the template adds to `text` after its generation prompt, for each answer."""
        spans = []
        for i, message in enumerate(conversation.messages):
            if message.role == "assistant":
                before = self.text(conversation.messages[:i], True, conversation.tools)
                after = self.text(conversation.messages[: i + 1], False, conversation.tools)
                if not (after.startswith(before) and text.startswith(after)):
                    raise DataError(
                        "the chat template renders an answer differently from its own generation prompt",
                        where=conversation.source,
                        fix="mark the answer with {% generation %} in the template",
                    )
                spans.append((len(before), len(after)))
        return spans

    def _to_turn_end(self, text: str, span: tuple[int, int]) -> tuple[int, int]:
        """Without the line break that many templates put after the end-of-turn token: no model ever has to write it."""
        end = span[0] + len(text[slice(*span)].rstrip())
        ends = [self.tokenizer.id_to_token(i) for i in self.stop_ids]
        return (span[0], end) if any(e and text[span[0] : end].endswith(e) for e in ends) else span

    # ---- ids

    def render(self, conversation: Conversation) -> Rendered:
        """One conversation as ids and mask; both have one entry per token."""
        return next(self.render_all([conversation]))

    def render_all(self, conversations: Iterable[Conversation], chunk: int = 1024) -> Iterator[Rendered]:
        """Many conversations, in order. A tokenizer that has to see them whole is given chunks, for every core."""
        rest = iter(conversations)
        while rows := list(islice(rest, chunk if self._words is None else 1)):
            texts = []
            for row in rows:
                try:
                    texts.append(self.text_and_spans(row))
                except DataError as error:
                    error.where = error.where or row.source
                    raise
            if self._words is not None:
                for row, (text, spans) in zip(rows, texts, strict=True):
                    yield Rendered(*self._by_words(self._words, text, spans), text, row.source)
                continue
            encodings = self.tokenizer.encode_batch([t for t, _ in texts], add_special_tokens=False)
            for row, (text, spans), encoding in zip(rows, texts, encodings, strict=True):
                ids, offsets = self._unstraddled(text, spans, encoding)
                yield Rendered(ids, _mask(offsets, spans), text, row.source)

    def _by_words(self, words: Words, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """(ids, mask) as of `_unstraddled` and `_mask`; only where an answer begins or ends within a word is it looked into."""
        cut = words.split(text)
        places = [place for span in spans for place in span]
        ends = list(accumulate(map(len, cut)))
        for here in sorted({bisect_right(ends, place) for place in places if place < len(text)}, reverse=True):
            cut[here : here + 1] = words.around_added(cut[here])
        ends = list(accumulate(map(len, cut)))
        ids: list[int] = []
        mask: list[int] = []
        at = 0  # words that are done
        for number, place in enumerate(places):
            here = bisect_right(ends, place)
            if here < at:  # in the word that was just done
                continue
            ids += words.ids(cut[at:here])
            mask += [number % 2] * (len(ids) - len(mask))  # learnt between a span's first place and its last
            at = here
            if here < len(cut) and (start := ends[here] - len(cut[here])) < place:
                inside = tuple((max(a - start, 0), b - start) for a, b in spans if b > start and a < ends[here])
                found, learnt = self._at_border(cut[here], inside)
                ids += found
                mask += learnt
                at += 1
        ids += words.ids(cut[at:])
        return ids, mask + [0] * (len(ids) - len(mask))

    def _border(self, text: str, spans: tuple[tuple[int, int], ...]) -> tuple[list[int], list[int]]:
        """(ids, mask) of a word in which a span begins or ends."""
        ids, offsets = self._unstraddled(text, spans, self.tokenizer.encode(text, add_special_tokens=False))
        return ids, _mask(offsets, spans)

    def _unstraddled(
        self, text: str, spans: Sequence[tuple[int, int]], encoding: Encoding
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, character offsets) such that no token lies across the start of an answer.

        An answer that begins with a line break would melt into one token with the template's own; when the
        model speaks, the prompt's tokens are fixed already. Such rows (rare) are encoded piece by piece.
        """
        ids, offsets = encoding.ids, encoding.offsets
        starts = {start for start, _ in spans}
        inside = (offsets[bisect_right(offsets, start, key=itemgetter(0)) - 1] for start in starts if offsets)
        if not any(a < start < b for start, (a, b) in zip(starts, inside, strict=False)):
            return ids, offsets
        cuts = [0, *sorted(starts - {0}), len(text)]
        ids, offsets = [], []
        for a, b in pairwise(cuts):
            piece = self.tokenizer.encode(text[a:b], add_special_tokens=False)
            ids += piece.ids
            offsets += [(a + x, a + y) for x, y in piece.offsets]
        return ids, offsets

    def prompt_ids(self, messages: Iterable[Message], tools: Any = None) -> list[int]:
        """Ids after which the model speaks as the assistant."""
        text, spans = _unmark(self._render(messages, tools, prompt=True))
        if self._words is not None:
            return self._by_words(self._words, text, spans)[0]
        return self._unstraddled(text, spans, self.tokenizer.encode(text, add_special_tokens=False))[0]

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=not special))

    def save(self, folder: Path) -> None:
        """Tokenizer and template as they were, byte for byte; one that is not the model's own is written out."""
        for name in TOKENIZER_FILES:
            if (self.folder / name).exists():
                shutil.copyfile(self.folder / name, folder / name)
        if not self.is_own:
            (folder / "chat_template.jinja").write_text(self.template, encoding="utf-8")


def _token_text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else token or ""


def own_template(folder: Path) -> str | None:
    """The chat template that a model brings."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    given = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(given, list):  # several named ones
        given = next((t["template"] for t in given if t.get("name") == "default"), None)
    return str(given) if given else None


def chosen_template(name: str, folder: Path) -> str | None:
    """The text of a recipe's `chat_template`, which is not "auto": None for the model's own. Raises UsageError."""
    if name == "model":
        if own_template(folder) is None:
            raise UsageError("the model has no chat template", where=str(folder), fix=f"choose {', '.join(TEMPLATES)}")
        return None
    path = TEMPLATES.get(name, Path(name).expanduser())
    try:
        text = path.read_text(encoding="utf-8")
        _environment().from_string(text)
    except (OSError, UnicodeDecodeError):
        known = ["auto", "model", *TEMPLATES]
        raise UsageError(
            f'no chat template "{name}"{did_you_mean(name, known)}',
            where="chat_template",
            fix=f"one of {', '.join(known)}, or a file",
        ) from None
    except TemplateError as error:
        raise UsageError(f"no Jinja template: {error}", where=name, fix="correct the file") from None
    return text


def _unmark(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and the spans that stood between two of them."""
    spans, length, parts = [], 0, marked.split(_MARK)
    for i, part in enumerate(parts):
        if i % 2:
            spans.append((length, length + len(part)))
        length += len(part)
    return "".join(parts), spans


def _mask(offsets: list[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """1 for the tokens that lie inside a span. Tokens are in text order."""
    mask = [0] * len(offsets)
    for first, last in spans:
        low, high = (bisect_left(offsets, at, key=itemgetter(0)) for at in (first, last))
        mask[low:high] = [int(a < b <= last) for a, b in offsets[low:high]]
    return mask
