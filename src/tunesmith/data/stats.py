"""What a data set looks like: counts, lengths, turns, variety, emoji, languages, near duplicates; what a service would bill."""

from __future__ import annotations

import re
import tomllib
from array import array
from collections import Counter
from datetime import date
from functools import cache
from typing import Any

import msgspec

from tunesmith.conversation import Conversation
from tunesmith.data.convert import emoji_in
from tunesmith.data.dedup import body, pairs, root, sketches
from tunesmith.data.language import SAMPLE, languages, words
from tunesmith.data.scan import Progress
from tunesmith.errors import DataError, UsageError, did_you_mean
from tunesmith.recipe import FACTS

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
BINS = 12


class Spread(msgspec.Struct, frozen=True):
    """Of some numbers: how many, mean, quantiles (as in QUANTILES), and a histogram of BINS equal steps up to the greatest."""

    count: int
    mean: float
    quantiles: list[float]
    edges: list[float]
    bars: list[int]


class Bill(msgspec.Struct, frozen=True):
    """What training at a service would be billed as."""

    model: str  # dated name
    epochs: int  # guessed by the rule of OpenAI's cookbook, or as set
    batch_size: int  # rows
    steps: int  # in all
    tokens_per_epoch: int  # none over the context
    billed_tokens: int  # tokens of an epoch times epochs
    over_long: int  # rows longer than the context: cut
    price: float | None  # dollars for a million tokens, None: not known
    cost: float | None  # dollars, None: not known
    note: str  # of the price's date, and the model's end


class Stats(msgspec.Struct, frozen=True):
    """The figures. Lengths in characters (prompt: all before the last answer) and, of whole rows, in tokens of `model`."""

    dataset: str
    rows: int
    model: str
    roles: dict[str, int]
    turns: Spread
    prompt_characters: Spread
    answer_characters: Spread
    tokens: Spread
    vocabulary: dict[str, float]
    emoji: dict[str, float]
    languages: dict[str, int]
    near_duplicates: dict[str, int]
    bill: Bill | None = None


def describe(
    rows: list[Conversation],
    dataset: str,
    model: str,
    lengths: list[int],
    bill: Bill | None = None,
    progress: Progress | None = None,
) -> Stats:
    """Figures of conversations whose whole rows are so many tokens long. Raises DataError where there are none."""
    if not rows:
        raise DataError("no usable row", where=dataset, fix="see: tunesmith data check")
    step = max(1, len(rows) // SAMPLE)
    return Stats(
        dataset,
        len(rows),
        model,
        roles=dict(Counter(m.role for row in rows for m in row.messages)),
        turns=spread([sum(m.role in ("assistant", "text") for m in row.messages) for row in rows]),
        prompt_characters=spread([sum(len(m.content) for m in row.prompt()) for row in rows]),
        answer_characters=spread(
            [len(m.content) for row in rows for m in row.messages if m.role in ("assistant", "text")]
        ),
        tokens=spread(lengths),
        vocabulary=variety(rows),
        emoji=emoji(rows),
        languages=dict(languages([body(row) for row in rows[::step]]).most_common()),
        near_duplicates=clusters(rows, progress),
        bill=bill,
    )


def spread(numbers: list[int]) -> Spread:
    import numpy as np

    values = np.array(numbers, np.float64)
    top = max(1.0, float(values.max()))
    bars, edges = np.histogram(values, bins=BINS, range=(0.0, top))
    quantiles = [float(q) for q in np.quantile(values, QUANTILES)]
    return Spread(len(numbers), float(values.mean()), quantiles, edges.tolist(), bars.tolist())


def variety(rows: list[Conversation]) -> dict[str, float]:
    """Words and how varied they are; how varied the prompts are.

    distinct_1 and distinct_2: different words, and pairs of words, of all in the answers (Li et al. 2016, "distinct-n").
    distinct_prompts and distinct_openings: different prompts, and first three words of prompts, of all.
    """
    import numpy as np

    number: dict[str, int] = {}  # of each different word
    said, count_twos = array("i"), 0  # the words of all answers, -1 after each
    for row in rows:
        for m in row.messages:
            if m.role in ("assistant", "text"):
                found = [number.setdefault(word, len(number)) for word in words(m.content)]
                said.extend(found)
                said.append(-1)
                count_twos += max(0, len(found) - 1)
    flat = np.frombuffer(said, np.int32).astype(np.int64)
    count, whole = int((flat >= 0).sum()), (flat[:-1] >= 0) & (flat[1:] >= 0)
    twos = len(np.unique(flat[:-1][whole] * len(number) + flat[1:][whole]))  # a pair as one number
    asked = [" ".join(words(" ".join(m.content for m in r.prompt() if m.role == "user"))) for r in rows]
    openings = {" ".join(text.split(maxsplit=3)[:3]) for text in asked}
    return {
        "words": count,
        "different_words": len(number),
        "distinct_1": len(number) / max(1, count),
        "distinct_2": twos / max(1, count_twos),
        "distinct_prompts": len(set(asked)) / len(asked),
        "distinct_openings": len(openings) / len(asked),
    }


def emoji(rows: list[Conversation]) -> dict[str, float]:
    """Emoji in answers: all, a mean for each answer, the shares of answers with one at least and with more than five."""
    counts = [emoji_in(m.content) for row in rows for m in row.messages if m.role == "assistant"]
    n = max(1, len(counts))
    return {
        "emoji": sum(counts),
        "per_answer": sum(counts) / n,
        "answers_with": sum(c > 0 for c in counts) / n,
        "answers_with_over_5": sum(c > 5 for c in counts) / n,
    }


def clusters(rows: list[Conversation], progress: Progress | None = None) -> dict[str, int]:
    """Groups of rows that are nearly the same: how many, how many rows they hold, and the size of the largest."""
    parent = list(range(len(rows)))
    for a, b, _ in pairs(sketches(map(body, rows)), progress=progress):
        parent[root(parent, b)] = root(parent, a)
    sizes = [size for size in Counter(root(parent, i) for i in range(len(rows))).values() if size > 1]
    return {"clusters": len(sizes), "rows": sum(sizes), "largest": max(sizes, default=1)}


# ---- the hosted service


@cache
def hosted() -> dict[str, Any]:
    """Models, prices and their date: facts/openai.toml."""
    with (FACTS / "openai.toml").open("rb") as stream:
        return tomllib.load(stream)


def hosted_model(name: str) -> tuple[str, dict[str, Any]] | None:
    """(full name, facts) of a hosted model, also from a shorter name ("gpt-4o-mini"); None for no such.

    Raises UsageError for a name that only a hosted model can have, and that cannot be trained.
    """
    models = hosted()["models"]
    short = (m for m, about in models.items() if name in (m.rpartition("-20")[0], about.get("also")))
    found = name if name in models else max(short, default=None)
    if not found and _HOSTED.match(name):
        message = f"{name} is not among the hosted models that can be trained{_nearest(name)}"
        raise UsageError(message, where="--model", fix=f"the service trains {still_trained()}")
    return (found, models[found]) if found else None


def _nearest(name: str) -> str:
    """The name meant, also without its date."""
    models = hosted()["models"]
    return did_you_mean(name, [*models, *(m.rpartition("-20")[0] for m in models)])


def still_trained() -> str:
    """Names of the hosted models that have not ended yet, for a message."""
    return ", ".join(m for m, about in hosted()["models"].items() if about["ends"] >= date.today()) or "none any more"


_HOSTED = re.compile(r"(?:gpt-[345]|o\d|babbage-|davinci-)[\w.-]*$")


def openai_lengths(rows: list[Conversation], model: str, progress: Progress | None = None) -> list[int]:
    """Tokens of each row by the cookbook's rule: 3 a message, its texts (role included), 1 more a name, 3 a row.

    Tools and tool calls, which that rule leaves out, are counted as their JSON.
    """
    known = hosted_model(model)
    if not known:
        raise UsageError(
            f'no hosted model "{model}"{_nearest(model)}', where="--model", fix=f"known: {still_trained()}"
        )
    from rs_bpe.bpe import openai

    tokens = getattr(openai, known[1]["encoding"])().count

    def length(row: Conversation) -> int:
        total = 3 + (tokens(msgspec.json.encode(row.tools).decode()) if row.tools else 0)
        for m in row.messages:
            total += 3 + tokens(m.role) + tokens(m.content)
            total += 1 + tokens(m.name) if m.name else 0
            total += tokens(msgspec.json.encode(m.tool_calls).decode()) if m.tool_calls else 0
        return total

    lengths = []
    for row in rows:
        lengths.append(length(row))
        if progress and len(lengths) % 1024 == 0:
            progress(len(rows), len(lengths) / len(rows), "counting tokens")
    return lengths


def epochs(rows: int) -> int:
    """The cookbook's estimate: 3, more where 3 passes are under 100 rows, fewer where they are over 25,000."""
    if 3 * rows < 100:
        return min(25, max(1, 100 // max(1, rows)))
    if 3 * rows > 25_000:
        return max(1, 25_000 // rows)
    return 3


def batch_size(rows: int) -> int:
    """The cookbook's estimate: a 500th of the rows, 256 at most."""
    return min(256, max(1, round(0.002 * rows)))


def bill(
    lengths: list[int],
    model: str,
    price: float | None = None,
    today: date | None = None,
    n: int | None = None,
    batch: int | None = None,
) -> Bill:
    """What training on rows of so many tokens would be billed as; a price that is too old is not quoted.

    `n` epochs with `batch` rows a step; None: as the cookbook estimates what the service would take.
    """
    known = hosted_model(model)
    assert known
    name, facts = known
    limit, n, batch = facts["training_context"], n or epochs(len(lengths)), batch or batch_size(len(lengths))
    once = sum(min(length, limit) for length in lengths)
    age = ((today or date.today()) - hosted()["as_of"]).days
    over = (today or date.today()) > facts["ends"]
    note = f"prices of {hosted()['as_of']}; the service {'ended' if over else 'ends'} this model on {facts['ends']}"
    if price is None and age > hosted()["stale_after_days"]:
        note = f"the prices known are of {hosted()['as_of']}, {age} days old: give today's with --price"
    elif price is None:
        price = facts["train"]
    return Bill(
        name,
        n,
        batch,
        n * -(-len(lengths) // batch),
        once,
        once * n,
        sum(length > limit for length in lengths),
        price,
        None if price is None else once * n / 1e6 * price,
        note,
    )
