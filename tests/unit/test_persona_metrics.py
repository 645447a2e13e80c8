"""Metrics of a persona: the classifier and the vocabulary against hand-computed values and planted styles."""

from __future__ import annotations

import json
import math
import random
import time
from collections import Counter

import numpy as np
import pytest

from tunesmith.conversation import Conversation, Message
from tunesmith.evaluation import persona
from tunesmith.evaluation.metric import Facts, Heard, Said, measure

METRICS = {metric.name: metric for metric in persona.METRICS}
NOUNS = ["lamp", "river", "garden", "letter", "window", "bread", "horse", "winter", "song", "paper", "stone", "bridge"]
SAYINGS = [
    "The {} is by the {}.",
    "I think that the {} was there before the {}.",
    "You can see it, but not from the {}.",
    "We have a {} and a {}, which is enough.",
    "It is hard to say.",
    "After the {}, take what is left of the {} and put it back.",
    "There are two: the {} and the {}.",
    "If you want, I can show you the {}.",
]


def row(reference: str) -> Conversation:
    return Conversation((Message("user", "u"), Message("assistant", reference)))


def said(text: str) -> Heard:
    return Heard(said=Said(text))


def plain(count: int, seed: int) -> list[str]:
    """Answers of two to five sentences about this and that, in one style."""
    rng = random.Random(seed)
    return [
        " ".join(rng.choice(SAYINGS).format(*rng.sample(NOUNS, 2)) for _ in range(rng.randint(2, 5)))
        for _ in range(count)
    ]


def pirate(text: str) -> str:
    return "Arr! " + text.replace(".", "!").replace(" is ", " be ")


def test_features_by_hand() -> None:
    """ "No, NO! I go" and a line break: 4 words and 3 marks (, ! and the break): rates of 1/7. Capitals N N O I of 7 letters."""
    found = persona.features("No, NO! I go\n")
    assert (
        found["no"] == 2 / 7 and found["no no"] == found["no i"] == found["i go"] == found["!"] == found["\n"] == 1 / 7
    )
    assert found["(capitals)"] == 4 / 7 and found["(emoji)"] == 0
    assert found["(word length)"] == pytest.approx(7 / 4 / 10)
    assert found["(sentence length)"] == pytest.approx(math.log(1 + 4 / 2))  # "No, NO" and "I go"
    assert persona.features("hi 🎉")["(emoji)"] == 1 / 2


def test_logistic_regression_by_hand() -> None:
    """Two points, x = 1 of label 1 and x = -1 of label 0. By symmetry the bias is 0, and the slope w satisfies
    2 (sigma(w) - 1) + ridge w = 0: with w = ln 3, sigma = 3/4, so that ridge = 0.5 / ln 3."""
    x, y = np.array([[1.0], [-1.0]]), np.array([1.0, 0.0])
    slope, bias = persona.ridge_logistic(x, y, np.ones(2), 0.5 / math.log(3))
    assert slope == pytest.approx(math.log(3), abs=1e-6) and bias == pytest.approx(0, abs=1e-6)
    # a weight is worth as many points: without slope the bias is the log odds of 3 to 1
    _, bias = persona.ridge_logistic(np.zeros((2, 1)), y, np.array([3.0, 1.0]), 1.0)
    assert bias == pytest.approx(math.log(3), abs=1e-4)


def test_the_score_is_the_logistic_of_weighted_features() -> None:
    """ "yes !": rates 1/2 each: 2 * 1/2 - 4 * 1/2 + ln 3 + 1 = ln 3, which is 3/4."""
    weights = {"yes": 2.0, "!": -4.0, "never there": 9.0, persona.BIAS: math.log(3) + 1}
    assert persona.style_score("yes !", weights) == pytest.approx(3 / 4)
    assert persona.style_score(" \n", weights) == 0
    assert persona.style_score("x", {persona.BIAS: 1e9}) == 1 and persona.style_score("x", {persona.BIAS: -1e9}) == 0


def test_a_style_is_learnt_and_found_in_answers_about_other_things() -> None:
    base = plain(60, seed=1)
    weights, accuracy = persona.learn_style([pirate(text) for text in base], base, seed=0)
    assert accuracy >= 0.95
    assert json.loads(json.dumps(weights)) == weights
    assert weights == persona.learn_style([pirate(text) for text in base], base, seed=0)[0]
    assert not {name for name in weights if name.split()[0] in NOUNS and abs(weights[name]) > max(weights.values())}
    other = "We sold coffee all day. She is proud of that, and it is a fine shop."
    assert persona.style_score(pirate(other), weights) > 0.8 and persona.style_score(other, weights) < 0.2
    found = measure(
        METRICS["style"], [row("r")] * 9, [said(other)] * 9, [said(pirate(other))] * 9, Facts(style=weights)
    )
    assert found and found.tuned - found.base > 0.6 and found.verdict == "better"


def test_no_score_where_there_is_no_style_to_learn() -> None:
    """The same style on both sides: of ten pairs of sets none is told apart, and without weights there is no score."""
    for seed in range(10):
        weights, accuracy = persona.learn_style(plain(60, 2 * seed), plain(60, 2 * seed + 1), seed)
        assert weights == {} and 0.2 < accuracy < persona.TELLS_APART
    base = plain(60, 1)
    enough = [pirate(text) for text in base[: persona.FEWEST]]
    assert persona.learn_style(enough, base, 0)[0]
    assert persona.learn_style(enough[1:] + [" "] * 30, base, 0) == ({}, 0.5)  # blank answers do not count
    assert persona.learn_style([], [], 0) == ({}, 0.5)
    assert measure(METRICS["style"], [row("r")], [said("a")], [said("a")], Facts()) is None
    assert METRICS["style"].columns and METRICS["style"].columns(row("r"), Heard(), Facts(style={"a": 1.0})) is None


def test_the_score_knows_no_length() -> None:
    """Answers cut at some 100 tokens against whole ones that end in a way of their own: not told apart."""
    texts = [" ".join(plain(6, seed)) + " Was that all you wanted to know?" for seed in range(120)]
    assert min(map(len, texts)) > 500
    assert persona.learn_style(texts[60:], [text[:420] for text in texts[:60]], 0)[0] == {}


def test_sides_of_different_sizes_weigh_the_same() -> None:
    """30 answers of a faint style among 400: told apart in four of four draws, where unweighted sides fail in the first.

    And without a style, always saying the larger side is right in half of the cases, not in 91 %.
    """
    for seed in range(4):
        rng = random.Random(seed)
        texts = [(text, text.replace(" is ", " be ").replace("There", "Thar")) for text in plain(30, 1)]
        faint = [other if rng.random() < 0.8 else text for text, other in texts]
        assert persona.learn_style(faint, plain(400, 2), seed)[0]
    assert persona.learn_style(plain(20, 1), plain(200, 2), 0)[1] < persona.TELLS_APART


def test_log_odds_by_hand() -> None:
    """Training 9 a, 1 b; base 1 a, 9 b: shares 1/2, so that the prior of each is 250, and z of a is
    [ln(259 / 251) - ln(251 / 259)] / sqrt(1/259 + 1/251)."""
    found = persona.log_odds(["a", "b"], Counter(a=9, b=1), Counter(a=1, b=9))
    want = 2 * math.log(259 / 251) / math.sqrt(1 / 259 + 1 / 251)
    assert found == [pytest.approx(want), pytest.approx(-want)]


def test_the_vocabulary_is_the_personas() -> None:
    base = plain(40, 1)
    training = [f"Ahoy, matey: {text}" if i % 2 else text for i, text in enumerate(base)]
    assert persona.mine_vocabulary(training, base) == ["ahoy", "matey"]
    assert persona.mine_vocabulary(training, base, most=1) == ["ahoy"]
    rare = ["Zounds! " * 50 + text if i < 2 else text for i, text in enumerate(base)]
    assert persona.mine_vocabulary(rare, base) == []  # two answers are no habit, however often they say it
    assert persona.mine_vocabulary(base, base) == []
    assert persona.mine_vocabulary(["a"] * 5, ["a"] * 5) == []
    assert (
        persona.mine_vocabulary([], base)
        == persona.mine_vocabulary(base, [])
        == persona.mine_vocabulary([""], [""])
        == []
    )


def test_vocabulary_kept_by_hand() -> None:
    """Of ahoy, matey, arr the first reference has two, the second one, the third none: base 1 of 3, tuned 2 of 3."""
    facts = Facts(vocabulary=["ahoy", "matey", "arr"])
    rows = [row("Ahoy, matey!"), row("ARR."), row("Hello.")]
    base, tuned = [said("ahoy ahoy"), said("no"), said("arr")], [said("hello"), said("arr"), said("arr")]
    tuned[0] = said("matey, arr")  # arr is not in this reference
    found = measure(METRICS["vocabulary kept"], rows, base, tuned, facts)
    assert found and (found.base, found.tuned, found.rows) == (pytest.approx(1 / 3), pytest.approx(2 / 3), 2)
    assert METRICS["vocabulary kept"].columns and METRICS["vocabulary kept"].columns(rows[0], Heard(), facts) is None


@pytest.mark.parametrize(
    "text", ["\x00" * 100_000, "." * 100_000, "a. " * 33_000, "漢" * 50_000, "\ud800", "🙂" * 9000, "A" * 99_999]
)
def test_any_text_has_its_score_in_no_time(text: str) -> None:
    start = time.perf_counter()
    assert 0 <= persona.style_score(text, {"a": 1.0, persona.BIAS: 0.1}) <= 1
    assert persona.learn_style([text] * 3, [text], 0) == ({}, 0.5)
    assert isinstance(persona.mine_vocabulary([text] * 3, ["a", text]), list)
    assert time.perf_counter() - start < 10
