"""The certificate of an export: is it still the model that was trained, in the program that will run it?

Checks, each with a name, a figure and a limit (facts/parity.toml): what the files say (template, stop tokens, settings, every
weight), and what the runtime does (token ids, log-probabilities, greedy answers) beside the run's own model.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from statistics import fmean
from typing import Any

import msgspec

from tunesmith.conversation import Message
from tunesmith.errors import DataError
from tunesmith.exporting.runtime import Answer, Runtime
from tunesmith.recipe import FACTS
from tunesmith.render import Renderer

ANSWER = 64  # tokens of a greedy answer
PLACES = 8  # at which a prompt's answer is looked into
ADDED = 64  # tokens of a model's own that are tried within a text
LESS = 0.5  # nats by which another token may be likelier where an answer ended


class Check(msgspec.Struct, frozen=True):
    """One check of a certificate."""

    name: str  # what was compared
    passed: bool  # found within the limit
    found: str  # what was measured, in words
    limit: str = ""  # what was allowed, in words
    cause: str = ""  # of a failure, by name
    value: float | None = None  # the measured figure, where there is one


class Own(msgspec.Struct, frozen=True):
    """What the run's own model does: its greedy answers to the prompts, `texts` of both with the `stop` that ended them, and the
    likeliest tokens at each place of each answer."""

    prompts: list[list[int]]
    answers: list[Answer]
    stop: int
    texts: list[list[int]]
    likeliest: list[list[dict[int, float]]]

    def places(self, row: int) -> list[int]:
        """Some places in a text, from the first of its answer to the last: after so many tokens comes one that is compared."""
        first, last = len(self.prompts[row]), len(self.texts[row]) - 1
        return sorted({first + round(i * (last - first) / (PLACES - 1)) for i in range(PLACES)})


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """parity.json: whether an export is still the model that was trained."""

    deployable: bool  # every check has passed
    model: str  # the folder that it was made from
    run: str | None  # the run it was made from, None: from a model
    form: str  # merged, adapter, gguf, ollama or vllm
    quantize: str  # the type of its numbers
    runtime: str  # the program that was asked, with its version
    created: str  # when, with the offset from UTC
    checks: list[Check]  # each with what was found
    prompts: int  # that both models answered
    probes: int  # texts whose token ids were compared
    tunesmith: str  # version
    files: dict[str, str] = {}  # SHA-256 of each file that was checked

    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]


@cache
def facts() -> dict[str, Any]:
    """facts/parity.toml."""
    with (FACTS / "parity.toml").open("rb") as stream:
        return tomllib.load(stream)


@cache
def probes() -> tuple[list[str], list[str]]:
    """(texts whose tokens are compared, prompts for models without held-out rows)."""
    with (FACTS / "parity_probes.toml").open("rb") as stream:
        known = tomllib.load(stream)
    return known["texts"], known["prompts"]


def limits(quantize: str) -> dict[str, float]:
    """What is allowed of a way to store weights."""
    known: dict[str, dict[str, float]] = facts()["limits"]
    return known.get(quantize, known["k_quant"])


def observe(model: Any, prompts: list[list[int]], stop: int, told: Callable[[int], object]) -> Own:
    """Ask the run's own model: greedy answers of up to ANSWER tokens, and the likeliest tokens along them."""
    answers = model.answers(prompts, ANSWER)
    told(1)
    texts = [p + a.ids + [stop] * a.ended for p, a in zip(prompts, answers, strict=True)]
    likeliest = []
    for prompt, text in zip(prompts, texts, strict=True):
        likeliest.append(model.next_tokens(text, range(len(prompt), len(text))))
        told(1)
    return Own(prompts, answers, stop, texts, likeliest)


# ---- what the runtime does


def behaviour(
    runtime: Runtime,
    renderer: Renderer,
    own: Own,
    rows: Sequence[tuple[Message, ...]],
    quantize: str,
    told: Callable[[int], object],
) -> Iterator[Check]:
    """All that the runtime is asked, beside what the run's own model did."""
    yield tokens(runtime, renderer, rows)
    answers = runtime.answers(own.prompts, ANSWER)
    told(1)
    found = []
    for row, text in enumerate(own.texts):
        found.append(runtime.next_tokens(text, own.places(row)))
        told(1)
    yield stopping(runtime, own, found, limits(quantize))
    yield from probabilities(own, found, limits(quantize))
    if limits(quantize)["answers"]:  # of 5 and 4 bits few stay the same, which says nothing
        yield greedy(own, answers, limits(quantize))


def tokens(runtime: Runtime, renderer: Renderer, rows: Sequence[tuple[Message, ...]] = ()) -> Check:
    """Whether prompts become the same tokens as in training: every probe, each token of the model's own within a text, several
    turns with and without a system prompt, and the `rows` themselves."""
    wrong, count = [], 0
    for messages in [*_conversations(renderer), *rows]:
        try:
            want = renderer.prompt_ids(messages)
        except DataError:  # a template that refuses system prompts
            continue
        count += 1
        if runtime.prompt(messages) != want:
            wrong.append(messages[-1].content)
    found = f"{count - len(wrong)} of {count} prompts give the same token ids"
    cause = f"the runtime renders or cuts text otherwise than in training, first {wrong[0][:80]!r}" if wrong else ""
    return Check("token ids", not wrong, found, f"{count} of {count}", cause, 1 - len(wrong) / count)


def _conversations(renderer: Renderer) -> list[tuple[Message, ...]]:
    texts = probes()[0]
    added = [t.content for t in renderer.tokenizer.get_added_tokens_decoder().values()][:ADDED]
    one = [(Message("user", text),) for text in (*texts, *(f"call {token} now" for token in added))]
    several = [
        (Message("user", a), Message("assistant", b), Message("user", c))
        for a, b, c in zip(texts[::5], texts[1::5], texts[2::5], strict=False)
    ]
    system = Message("system", "Answer briefly.")
    return [*one, *several, *((system, *turns) for turns in (one[0], *several))]


def stopping(runtime: Runtime, own: Own, found: Sequence[Sequence[dict[int, float]]], limit: dict[str, float]) -> Check:
    """Whether the runtime ends an answer at the end-of-turn token, and finds that token likely where the run's own model does."""
    ends = [theirs[-1] for theirs, answer in zip(found, own.answers, strict=True) if answer.ended]
    missed = sum(there.get(own.stop, float("-inf")) < max(there.values()) - LESS for there in ends)
    works = runtime.ends(own.prompts[0], own.stop)
    said = f"{len(ends) - missed} of {len(ends)} answers would end where they did in training"
    if not works:
        cause = "the runtime goes on after the end-of-turn token: it is no stop token there"
    else:
        cause = "it no longer ends its answers" if missed > round((1 - limit["same"]) * len(ends)) else ""
    return Check("stopping", not cause, said, f"{limit['same']:.0%}, and the token ends an answer", cause)


def probabilities(own: Own, found: Sequence[Sequence[dict[int, float]]], limit: dict[str, float]) -> Iterator[Check]:
    """How far the log-probabilities are apart, and how often another token is the likeliest."""
    drifts, same = [], []
    for row, theirs in enumerate(found):
        for place, there in zip(own.places(row), theirs, strict=True):
            here = own.likeliest[row][place - len(own.prompts[row])]
            best = max(here, key=here.__getitem__)
            drifts.append(abs(here[best] - there.get(best, min(there.values()))))
            same.append(_tied(here, max(there, key=there.__getitem__)))
    drift, share = fmean(drifts), fmean(same)
    yield Check(
        "log-probabilities",
        drift <= limit["drift"],
        f"{drift:.4f} nats apart on average, {max(drifts):.4f} at most, at {len(drifts)} places",
        f"{limit['drift']} nats on average",
        "" if drift <= limit["drift"] else "the runtime computes another model: see the other checks for what differs",
        drift,
    )
    yield Check(
        "likeliest token",
        share >= limit["same"],
        f"the same at {share:.1%} of {len(same)} places",
        f"{limit['same']:.0%}",
        "" if share >= limit["same"] else "too much was lost: choose a finer --quantize, or see the other checks",
        share,
    )


def greedy(own: Own, answers: Sequence[Answer], limit: dict[str, float]) -> Check:
    """How many greedy answers are the same to their end; how many part only where two tokens are about equally likely."""
    exact = [a == b for a, b in zip(own.answers, answers, strict=True)]
    near = [e or _parts_at_tie(own, row, answers[row]) for row, e in enumerate(exact)]
    share = fmean(near)
    return Check(
        "greedy answers",
        share >= limit["answers"],
        f"{sum(exact)} of {len(exact)} the same for up to {ANSWER} tokens, {sum(near) - sum(exact)} more part at a tie",
        f"{limit['answers']:.0%}",
        "" if share >= limit["answers"] else "answers part from those of the run's own model: see the other checks",
        fmean(exact),
    )


def _parts_at_tie(own: Own, row: int, answer: Answer) -> bool:
    """Whether another answer first differs where the run's own model finds its token about as likely."""
    mine, theirs = (a.ids + [own.stop] * a.ended for a in (own.answers[row], answer))
    at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
    return at is not None and _tied(own.likeliest[row][at], theirs[at])


def _tied(here: dict[int, float], token: int) -> bool:
    """Whether a token is the likeliest, or as likely within `tie`."""
    return bool(here.get(token, float("-inf")) >= max(here.values()) - facts()["tie"])
