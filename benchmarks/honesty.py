"""How often a verdict is wrong, and how often a planted difference is found, on a real model's own figures.

    python benchmarks/honesty.py [--rows 400] [--size 50] [--sets 200]

*Null*: the starter against itself. Both sides answer the same held-out questions with sampling (temperature 0.8, other seeds),
and a coin says for each row of each test set which answer is whose, so that no difference is real. From `--rows` of them,
`--sets` test sets of `--size` rows are drawn; every metric of chat and of instructions is compared on each. *Power*: its
losses on these rows against the same with noise (0.3 nats a token) and a shift: the one that `detectable` names.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np

from tunesmith.conversation import Conversation, Message
from tunesmith.evaluation import chat, instruct
from tunesmith.evaluation.metric import Facts, Heard, Said, measure
from tunesmith.evaluation.stats import compare
from tunesmith.local.generate import Chat
from tunesmith.local.score import Scorer

ASSETS = Path(__file__).parent.parent / "src/tunesmith/assets"


def questions(count: int) -> list[Conversation]:
    """The starter's held-out questions, then its chat samples."""
    found = []
    for path in (ASSETS / "starter/heldout.jsonl", ASSETS / "data/chat.jsonl", ASSETS / "data/emoji.jsonl"):
        for line in path.read_text().splitlines():
            found.append(Conversation(tuple(Message(m["role"], m["content"]) for m in json.loads(line)["messages"])))
    return found[:count]


def null(rows: list[Conversation], model: Chat, sets: int, size: int) -> dict[str, float]:
    """The share of test sets on which a metric tells the model from itself."""
    prompts = [Conversation(row.prompt()) for row in rows]
    sides = [[Heard(said=Said(*s)) for s in model.said(prompts, 64, 0.8, seed)] for seed in (1_000, 2_000_000)]
    wrong: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for number in range(sets):
        drawn = np.random.default_rng(number).choice(len(rows), size, replace=False)
        coins = np.random.default_rng([number, 1]).integers(0, 2, size)  # which of the two answers is called the base's
        part = [[sides[k ^ c][i] for i, c in zip(drawn, coins, strict=True)] for k in (0, 1)]
        for metric in (*chat.METRICS, *instruct.METRICS):
            found = measure(metric, [rows[i] for i in drawn], *part, Facts(), number % 4)
            if found and found.verdict:
                asked[metric.name] += 1
                wrong[metric.name] += found.verdict != "cannot tell"
    return {name: wrong[name] / asked[name] for name in asked}


def power(rows: list[Conversation], model: Chat, sets: int, size: int) -> tuple[float, float]:
    """(the planted difference in nats a token, the share of test sets on which it is found)."""
    scored = Scorer(model.renderer, model.decoder.model)(rows)
    tokens = np.array([s.tokens for s in scored], np.float64)
    base = np.array([s.loss for s in scored])
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.3, len(rows)) * tokens  # of a row's loss under another model, nats a token
    noise -= tokens * noise.sum() / tokens.sum()

    def table(losses: np.ndarray, places: np.ndarray) -> np.ndarray:
        return np.stack([losses[places], tokens[places]], 1)

    planted, found = 0.0, 0
    for number in range(sets):
        drawn = np.random.default_rng(number).choice(len(rows), size, replace=True)
        if not planted:
            wide = [
                compare("loss", table(base, d), table(base + noise, d), True).detectable or 0.0
                for d in _draws(len(rows), size)
            ]
            planted = float(np.mean(wide))
        tuned = base + noise - planted * tokens
        found += compare("loss", table(base, drawn), table(tuned, drawn), True, seed=number % 4).verdict == "better"
    return planted, found / sets


def _draws(rows: int, size: int) -> list[np.ndarray]:
    return [np.random.default_rng(10_000 + k).choice(rows, size, replace=True) for k in range(20)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--size", type=int, default=50)
    parser.add_argument("--sets", type=int, default=200)
    options = parser.parse_args()
    rows, model = questions(options.rows), Chat("starter")
    print(
        f"the starter against itself, {options.sets} test sets of {options.size} rows: told apart (at most 5 % are meant to be)"
    )
    for name, share in null(rows, model, options.sets, options.size).items():
        print(f"  {name:28} {share:6.1%}")
    planted, found = power(rows, model, options.sets, options.size)
    print(f"a planted difference of {planted:.3f} nats a token (named as found in 80 % of cases): found in {found:.1%}")


if __name__ == "__main__":
    main()
