"""What an evaluation asks of one model, and what it hears: everything that costs time, done once and kept.

A model is loaded once. Rows are scored in the training engine's own batches, answers are written many at a time. What was heard
is kept in the cache by the hash of the model's files and of everything that was asked, so that a base model is judged once for
many runs.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from tunesmith import backends, layout
from tunesmith.conversation import Conversation, Message
from tunesmith.data.scan import Progress
from tunesmith.data.write import kept, tidy, write_json
from tunesmith.evaluation.metric import Heard, Said
from tunesmith.models import find
from tunesmith.preflight import GPUS

FORM = 3  # of what is kept: another number, and nothing kept before is used
HEAT = 0.8  # temperature of further answers
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "tunesmith")
VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
WORST = 1e9  # nats: of a row that a model gives no number for (JSON has no infinity)
CONTEXTS = 4  # other rows' contexts that each suspect's answer is tried with


class Ask(msgspec.Struct, frozen=True):
    """What is asked. `rows` are scored; those numbered in `answered` are answered greedily, those in `sampled` further
    `samples` times; with `shuffled` each answer is also scored after another row's context. `questions` are answered;
    `canary` is scored, `recited` are training rows whose prompts are answered as long as they are; `suspects`: rows whose
    own context is weighed against others'."""

    rows: list[Conversation]
    answered: list[int] = []
    sampled: list[int] = []
    samples: int = 0
    shuffled: bool = False
    questions: list[Conversation] = []
    canary: list[Conversation] = []
    recited: list[Conversation] = []
    suspects: list[Conversation] = []
    max_tokens: int = 256
    seed: int = 0


class Observed(msgspec.Struct, frozen=True):
    """What was heard, in the order of what was asked. `gains`: nats a token by which a suspect's answer is likelier after its
    own context than after others', None where it has none."""

    heard: list[Heard]
    questions: list[Said] = []
    canary: list[Heard] = []
    recited: list[Said] = []
    gains: list[float | None] = []


class Tally:
    """How far the work is: parts that are counted beforehand, told with a share of all."""

    def __init__(self, total: int, rows: int, doing: str, progress: Progress) -> None:
        self._total, self._rows, self._doing, self._progress, self._done = max(1, total), rows, doing, progress, 0

    def __call__(self, more: int = 1) -> None:
        self._done = min(self._total, self._done + more)
        self._progress(self._rows, self._done / self._total, self._doing)


def observe(name: str, ask: Ask, template: str | None, doing: str, progress: Progress) -> Observed:
    """Ask a model on this machine. What was heard before of the same model and the same question is read from the cache."""
    path = kept("evaluation") / f"{_key(name, ask, template)}.json"
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Observed)
        with suppress(OSError):  # its time of change is that of its last use: a cache that is only read has none
            os.utime(path)
        return found
    except (OSError, msgspec.MsgspecError):  # not asked before; or a damaged file, which is written anew
        pass
    from tunesmith.local import loading

    with loading():
        from tunesmith.local.generate import Chat
        from tunesmith.local.score import Scorer

    chat = Chat(name, template)
    scorer = Scorer(chat.renderer, chat.decoder.model)
    observed = _asked(ask, chat, scorer, doing, progress)
    with suppress(OSError):  # a cache that nobody may write, or a full disk: all is asked anew the next time
        path.parent.mkdir(parents=True, exist_ok=True)
        tidy(path.parent)
        write_json(path, observed)
    return observed


def _asked(ask: Ask, chat: backends.Completer, scorer: Callable[..., Any], doing: str, progress: Progress) -> Observed:
    own, other = _contexts(ask.rows, 1, ask.seed) if ask.shuffled else ([], [])
    mine, others = _contexts(ask.suspects, CONTEXTS, ask.seed)
    scored = [ask.rows, own, other, ask.canary, mine, others]
    writing = len(ask.answered) + len(ask.sampled) * ask.samples + len(ask.questions) + len(ask.recited)
    tally = Tally(
        sum(map(len, scored)) + 4 * writing, len(ask.rows), doing, progress
    )  # an answer takes longer than a score

    known: dict[str, Any] = {}  # scores by what was scored: a row of one turn is asked for twice, or three times

    def score(rows: list[Conversation]) -> list[Any]:
        digests = [row.digest() for row in rows]
        fresh = {digest: row for digest, row in zip(digests, rows, strict=True) if digest not in known}
        names, left = list(fresh), list(fresh.values())
        tally(len(rows) - len(left))
        for start in range(0, len(left), 64):
            known.update(zip(names[start : start + 64], scorer(left[start : start + 64]), strict=True))
            tally(len(left[start : start + 64]))
        return [known[digest] for digest in digests]

    losses = score(ask.rows)
    contexts: list[tuple[float, float, int] | None] = [None] * len(ask.rows)
    if ask.shuffled:
        places = [i for i, row in enumerate(ask.rows) if _turn(row)]
        for i, a, b in zip(places, score(own), score(other), strict=True):
            if a.tokens == b.tokens:  # else one of them was cut at the end of the context
                contexts[i] = (min(a.loss, WORST), min(b.loss, WORST), a.tokens)
    canary = [Heard(min(s.loss, WORST), s.tokens, s.right, cut=s.cut) for s in score(ask.canary)]
    gains = _gains(ask.suspects, score(mine), score(others))
    said, samples, questions, recited = _written(ask, chat, lambda n: tally(2 * n))
    heard = [
        Heard(min(s.loss, WORST), s.tokens, s.right, s.bins, contexts[i], said.get(i), samples.get(i, []), cut=s.cut)
        for i, s in enumerate(losses)
    ]
    return Observed(heard, questions, canary, recited, gains)


def heard_at_service(completer: backends.Completer, ask: Ask, doing: str, progress: Progress) -> Observed:
    """Ask a model that a service keeps: only its answers can be had. Nothing is kept: it may change behind its name."""
    writing = len(ask.answered) + len(ask.sampled) * ask.samples + len(ask.questions) + len(ask.recited)
    tally = Tally(writing, len(ask.rows), doing, progress)
    said, samples, questions, recited = _written(ask, completer, tally)
    heard = [Heard(said=said.get(i), samples=samples.get(i, [])) for i in range(len(ask.rows))]
    return Observed(heard, questions, recited=recited, gains=[None] * len(ask.suspects))


def _written(
    ask: Ask, chat: backends.Completer, told: Callable[[int], object]
) -> tuple[dict[int, Said], dict[int, list[Said]], list[Said], list[Said]]:
    """(greedy answers by row, further ones by row, to the questions, to the recited rows)."""

    def write(prompts: list[Conversation], most: int, heat: float = 0.0, seed: int = 0) -> list[Said]:
        return [Said(*s) for s in chat.said(prompts, most, heat, seed, told)] if prompts else []

    prompts = {i: prompt_of(ask.rows[i]) for i in {*ask.answered, *ask.sampled}}
    greedy = dict(
        zip(ask.answered, write([prompts[i] for i in ask.answered], ask.max_tokens, seed=ask.seed), strict=True)
    )
    many = write([prompts[i] for i in ask.sampled for _ in range(ask.samples)], ask.max_tokens, HEAT, ask.seed)
    samples = {i: many[k * ask.samples : (k + 1) * ask.samples] for k, i in enumerate(ask.sampled)}
    recited = write([prompt_of(row) for row in ask.recited], ask.max_tokens, seed=ask.seed)
    return greedy, samples, write(ask.questions, ask.max_tokens, seed=ask.seed), recited


def prompt_of(row: Conversation) -> Conversation:
    """What a model is asked of a row."""
    return Conversation(row.prompt(), tools=row.tools)


# ---- contexts


def _turn(row: Conversation) -> bool:
    """Whether a row's last answer has a context: something was said before it."""
    return bool(row.prompt()) and bool(row.answer())


def _last(context: tuple[Message, ...], row: Conversation) -> Conversation:
    """A context with a row's last answer after it, which alone is scored."""
    shown = tuple(msgspec.structs.replace(m, weight=0) if m.role == "assistant" else m for m in context)
    return Conversation((*shown, Message("assistant", row.answer())), tools=row.tools, source=row.source)


def _contexts(rows: Sequence[Conversation], count: int, seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """(the rows that have a context, each with its last answer alone; the same after `count` other rows' contexts each)."""
    turns = [row for row in rows if _turn(row)]
    if len(turns) < 2:
        return [_last(row.prompt(), row) for row in turns], [
            _last(row.prompt(), row) for row in turns for _ in range(count)
        ]
    chance, n = random.Random(seed), len(turns)
    others = [
        _last(turns[(i + 1 + chance.randrange(n - 1)) % n].prompt(), row)
        for i, row in enumerate(turns)
        for _ in range(count)
    ]
    return [_last(row.prompt(), row) for row in turns], others


def _gains(rows: Sequence[Conversation], own: Sequence[Any], others: Sequence[Any]) -> list[float | None]:
    found: list[float | None] = []
    place = 0
    for row in rows:
        if not _turn(row):
            found.append(None)
            continue
        mine, count = own[place], CONTEXTS
        theirs = [min(s.loss, WORST) for s in others[place * count : (place + 1) * count] if s.tokens == mine.tokens]
        place += 1
        found.append((fmean(theirs) - min(mine.loss, WORST)) / max(1, mine.tokens) if theirs else None)
    return found


# ---- what is kept


def _key(name: str, ask: Ask, template: str | None) -> str:
    """Hash of all that decides what is heard: the model's files, what is asked, the template, the libraries, and the machine,
    whose device decides the precision. Two models are compared as heard on one."""
    digest = hashlib.sha256(msgspec.json.encode(ask))
    libraries = [layout.version_of(name) for name in LIBRARIES]
    machine = processor(), [device for device in GPUS if os.path.exists(device)]  # torch takes seconds to be asked
    variables = [os.environ.get(name) for name in VARIABLES]  # an empty one hides all GPUs
    digest.update(repr((FORM, template, libraries, machine, variables)).encode())
    digest.update(_model_hash(find(name)).encode())
    return digest.hexdigest()[:32]


@functools.cache
def processor() -> str:
    """The model of this machine's processor, by which sums come out."""
    with suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as stream:
        return next(line for line in stream if line.startswith("model name")).strip()
    return platform.machine() + platform.processor()


def _model_hash(folder: Path) -> str:
    """Of the files that make a model what it is; an adapter's base among them."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt"):
            if path.name in MADE_BY_RUNS:
                continue
            digest.update(f"{path.name}\0".encode())
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        base = msgspec.json.decode(adapter.read_bytes())["base_model_name_or_path"]
        digest.update(_model_hash(find(str(base))).encode())
    return digest.hexdigest()


MADE_BY_RUNS = ("run.json", "trainer.json", "MANIFEST.json", "model_info.json", "remote.json")
