"""How many rows with another row's answer the row report finds: the bundled persona sample and 256 questions of GSM8K.

    python benchmarks/rows.py [--sets echo,gsm8k] [--seeds 12] [--model starter]

Of 256 rows 20 get another row's answer: with odd seeds a rotation among them in random order, with even ones swaps of pairs; with
seed 0 none. Told is how many of the 20 are within the first 40, by the texts alone and with the model's gains (as the report has
it); and the shares that are marked contradicting, of sound and of wrong rows. The report asks the base, so nothing is trained.
Its losses are kept from seed to seed, as only 20 rows change; a row has the same other contexts for all of them.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from statistics import fmean

from tunesmith import api
from tunesmith.conversation import Conversation, Message
from tunesmith.evaluation.observe import CONTEXTS
from tunesmith.evaluation.rowreport import FIRST, SUSPICIOUS
from tunesmith.evaluation.suspicion import suspicion
from tunesmith.local.generate import Chat
from tunesmith.local.score import Scorer

SHARED = Path(__file__).parent.parent.parent / "shared" / "data" / "gsm8k_test.jsonl"
ROWS, WRONG = 256, 20
Pair = tuple[int, int]  # numbers of the rows that a prompt and an answer are from


def planted(rows: int, seed: int) -> list[int]:
    """The number of the row that each row has its answer from."""
    chance = random.Random(1000 + seed)
    wrong = chance.sample(range(rows), WRONG) if seed else []
    source = list(range(rows))
    for ring in [wrong] if seed % 2 else [wrong[i : i + 2] for i in range(0, len(wrong), 2)]:
        for here, other in zip(ring, [*ring[1:], *ring[:1]], strict=True):
            source[here] = other
    return source


class Losses:
    """Nats a token of an answer after a prompt, each asked once."""

    def __init__(self, rows: list[Conversation], model: str) -> None:
        chat = Chat(model)
        self._rows, self._scorer = rows, Scorer(chat.renderer, chat.decoder.model)
        self._known: dict[Pair, float] = {}

    def __call__(self, pairs: list[Pair]) -> list[float]:
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._known]
        for start in range(0, len(new), 64):
            part = new[start : start + 64]
            asked = [
                Conversation((*self._rows[p].prompt(), Message("assistant", self._rows[a].answer()))) for p, a in part
            ]
            self._known.update(
                (pair, score.loss / max(1, score.tokens)) for pair, score in zip(part, self._scorer(asked), strict=True)
            )
        return [self._known[pair] for pair in pairs]


def gains(losses: Losses, source: list[int]) -> list[float]:
    own = losses(list(enumerate(source)))
    others = [_others(row, answer, len(source)) for row, answer in enumerate(source)]
    return [fmean(losses(each)) - loss for each, loss in zip(others, own, strict=True)]


def _others(row: int, answer: int, rows: int) -> list[Pair]:
    """As the report draws them: any prompt but the row's."""
    drawn = [place for place in random.Random(answer).sample(range(rows), CONTEXTS + 1) if place != row]
    return [(place, answer) for place in drawn[:CONTEXTS]]


def told(name: str, rows: list[Conversation], losses: Losses, seeds: int) -> None:
    """A line for each planting, and the means."""
    prompts, answers = [row.prompt()[-1].content for row in rows], [row.answer() for row in rows]
    hits: list[Pair] = []
    for seed in range(seeds + 1):
        began = time.perf_counter()
        source = planted(len(rows), seed)
        wrong = {i for i, j in enumerate(source) if i != j}
        said = [answers[i] for i in source]
        texts, scores = (suspicion(prompts, said, each) for each in (None, gains(losses, source)))
        first, marked = _found(texts, scores, wrong)
        shares = [sum(scores[i] >= SUSPICIOUS for i in part) for part in (set(range(len(rows))) - wrong, wrong)]
        hits += [(first, marked)] if seed else []
        print(
            f"{name} {seed}: {first} by texts, {marked} with gains; contradicting: {shares[0]} of {len(rows) - len(wrong)} "
            f"sound, {shares[1]} of {len(wrong)} wrong ({time.perf_counter() - began:.1f} s)",
            flush=True,
        )
    for kind, found in zip(("texts", "with gains"), zip(*hits, strict=True), strict=True):
        print(f"{name}, {kind}: {fmean(found):.1f} ({min(found)} to {max(found)})", flush=True)


def _found(texts: list[float], scores: list[float], wrong: set[int]) -> Pair:
    first, second = (
        len(set(sorted(range(len(each)), key=lambda i: -each[i])[:FIRST]) & wrong) for each in (texts, scores)
    )
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default="echo,gsm8k")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--model", default="starter")
    how = parser.parse_args()
    for name in how.sets.split(","):
        rows = api.load(SHARED if name == "gsm8k" else name)[:ROWS]
        told(name, rows, Losses(rows, how.model), how.seeds)


if __name__ == "__main__":
    main()
