"""Metrics of a persona: whether answers are in the style of the training answers, and keep their words.

Both are learnt from training answers against the base model's answers, ideally to the same prompts: what differs between them
is then style, not topic. Neither looks at an evaluated row, so that the score cannot favour the model that is scored.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tunesmith.conversation import Conversation
from tunesmith.data.convert import emoji_in
from tunesmith.data.language import words
from tunesmith.evaluation.metric import Facts, Heard, Metric

TELLS_APART = 0.7  # held-out accuracy under which the classifier knows no style to speak of: no score then
FEWEST = 20  # answers of each side: with ten of each held out, chance reaches TELLS_APART in 6 % of cases
LOOK = 400  # characters of an answer that its style is told from, which 100 tokens of English fill
FREQUENT = 300  # words, pairs and marks that the classifier looks at
IN_ANSWERS = 3  # answers that a word must be in: what one or two answers have is their topic
RIDGE = 10.0  # strength of the L2 penalty on standardised features
PRIOR = 500.0  # words that each side is taken to have said alike, before what it said is counted
SURE = 2.0  # z-score of a word of the vocabulary
BIAS = "(bias)"
_MARK = re.compile(r"[^\w\s]|\n")
_SENTENCE = re.compile(r"[.!?…]\s|[。！？\n]")

Array = NDArray[np.float64]


def learn_style(training_answers: list[str], base_answers: list[str], seed: int) -> tuple[dict[str, float], float]:
    """Weights of a classifier between two styles, for `Facts.style`, and its accuracy on answers it has not seen.

    Item i of both lists should answer the same prompt, and the base model have had 100 tokens for it. Half of the prompts are
    learnt from, with both their answers; the accuracy (0 to 1, the mean of both sides', 0.5: chance) is that on the other
    half. No weights ({}) where it is under TELLS_APART; nor, with accuracy 0.5, where a side has fewer than FEWEST answers
    that are not blank.

    Logistic regression with an L2 penalty on `features`, both sides weighing the same.
    """
    sides = [
        {i: features(text) for i, text in enumerate(side) if text.strip()} for side in (base_answers, training_answers)
    ]
    if min(map(len, sides)) < FEWEST:
        return {}, 0.5
    order = np.random.default_rng(seed).permutation(max(len(base_answers), len(training_answers)))
    learnt = set(order[: len(order) // 2].tolist())
    base, training = ([found for i, found in side.items() if i in learnt] for side in sides)
    if not base or not training:
        return {}, 0.5
    names = _frequent(base, training)
    x = np.array([[found.get(name, 0.0) for name in names] for found in base + training])
    y = np.repeat([0.0, 1.0], [len(base), len(training)])
    weights = _fit(names, x, y)
    right = [
        [(_probability(found, weights) > 0.5) == bool(label) for i, found in side.items() if i not in learnt]
        for label, side in enumerate(sides)
    ]
    accuracy = sum(sum(side) / len(side) if side else 0.5 for side in right) / 2
    return (weights if accuracy >= TELLS_APART else {}), accuracy


def style_score(text: str, weights: dict[str, float]) -> float:
    """Probability, 0 to 1, that an answer is in the training style, by weights of `learn_style`; 0 for a blank answer."""
    return _probability(features(text), weights) if text.strip() else 0.0


def features(text: str) -> dict[str, float]:
    """What the classifier sees: words, pairs of neighbours and marks, each as its share of all words and marks; likewise
    "(emoji)"; "(capitals)" of all letters; mean "(word length)" in tens of letters, "(sentence length)" as ln words.

    All are rates, and only the first LOOK characters count: answers are cut at a token limit and training answers are not, and
    whole is told from cut by how answers go on (of 400 questions, one half cut in the middle, 90 % were).
    """
    text = text[:LOOK]
    said, marks = words(text), _MARK.findall(text)
    size = max(1, len(said) + len(marks))
    found = {name: n / size for name, n in Counter([*said, *map(" ".join, pairwise(said)), *marks]).items()}
    sentences = sum(not part.isspace() for part in _SENTENCE.split(text) if part)
    letters = sum(map(str.isalpha, text))
    found["(emoji)"] = min(1.0, emoji_in(text) / size)
    found["(capitals)"] = sum(map(str.isupper, text)) / max(1, letters)
    found["(word length)"] = sum(map(len, said)) / max(1, len(said)) / 10
    found["(sentence length)"] = math.log(1 + len(said) / max(1, sentences))
    return found


def _frequent(base: list[dict[str, float]], training: list[dict[str, float]]) -> list[str]:
    """Features by the share of answers that they are in, the mean of both sides; IN_ANSWERS answers at least."""
    inside = [Counter(name for found in side for name in found) for side in (base, training)]
    share = {name: inside[0][name] / len(base) + inside[1][name] / len(training) for name in inside[0] | inside[1]}
    often = (name for name in share if inside[0][name] + inside[1][name] >= IN_ANSWERS)
    return sorted(sorted(often, key=lambda name: (-share[name], name))[:FREQUENT])


def _fit(names: list[str], x: Array, y: Array) -> dict[str, float]:
    """Weights of the features, not standardised, and the bias, rounded: machines agree. x [answers, features], y 0 or 1."""
    mean, deviation = x.mean(0), x.std(0)
    kept = np.flatnonzero(deviation > 1e-9)
    weight = np.where(y > 0, 0.5 / y.mean(), 0.5 / (1 - y.mean()))
    found = ridge_logistic((x[:, kept] - mean[kept]) / deviation[kept], y, weight, RIDGE)
    slopes = found[:-1] / deviation[kept]
    weights = {names[i]: round(float(slope), 6) for i, slope in zip(kept, slopes, strict=True)}
    return {**weights, BIAS: round(float(found[-1] - slopes @ mean[kept]), 6)}


def ridge_logistic(x: Array, y: Array, weight: Array, ridge: float) -> Array:
    """Weights [features + 1], the bias last, that minimise the weighted log loss + ridge / 2 * their squares (not the bias's).

    By the bound X'X / 4 on the curvature (Böhning and Lindsay 1988): every step goes down, without a search for its length.
    """
    x = np.hstack([x, np.ones((len(x), 1))])
    penalty = np.r_[np.full(x.shape[1] - 1, ridge), 1e-6]  # of the bias: only so that the matrix has an inverse
    inverse = np.linalg.inv((x.T * weight) @ x / 4 + np.diag(penalty))
    found = np.zeros(x.shape[1])
    for _ in range(1000):
        slope = x.T @ (weight * (0.5 * (1 + np.tanh(x @ found / 2)) - y)) + penalty * found
        step = inverse @ slope
        found -= step
        if np.abs(step).max() < 1e-8:
            break
    return found


def _probability(found: dict[str, float], weights: dict[str, float]) -> float:
    logit = weights.get(BIAS, 0.0) + math.fsum(
        weights[name] * value for name, value in found.items() if name in weights
    )
    return 0.5 * (1 + math.tanh(logit / 2))


def mine_vocabulary(training_answers: list[str], base_answers: list[str], most: int = 50) -> list[str]:
    """Words that the training answers use far more often than the base model's, the surest first: for `Facts.vocabulary`.

    By the log odds of a word with an informative Dirichlet prior (Monroe et al. 2008), with a z-score of SURE at least and in
    IN_ANSWERS training answers at least. An answer counts a word once: with every use counted, the few answers that speak of
    pizza make a word of style of it (of two random halves of 800 answers 53 words of 526 so, 5 with answers counted).
    """
    training, base = (
        Counter(word for text in side for word in set(words(text))) for side in (training_answers, base_answers)
    )
    often = [word for word, n in training.items() if n >= IN_ANSWERS]
    if not base or len(training | base) < 2:
        return []
    scores = dict(zip(often, log_odds(often, training, base), strict=True))
    return sorted((word for word in often if scores[word] >= SURE), key=lambda word: (-scores[word], word))[:most]


def log_odds(chosen: list[str], training: Counter[str], base: Counter[str]) -> list[float]:
    """z-scores of the difference of words' log odds, training less base, both with PRIOR words more, spread as in both together.

    Both sides have a word, and together two at least: a word that is all there is has no odds.
    """
    n, m = training.total(), base.total()
    found = []
    for word in chosen:
        prior = PRIOR * (training[word] + base[word]) / (n + m)
        ours, theirs = training[word] + prior, base[word] + prior
        difference = math.log(ours / (n + PRIOR - ours)) - math.log(theirs / (m + PRIOR - theirs))
        found.append(difference / math.sqrt(1 / ours + 1 / theirs))
    return found


def style(_: Conversation, heard: Heard, facts: Facts) -> tuple[float, ...] | None:
    if heard.said is None or not facts.style:
        return None
    return style_score(heard.said.text, facts.style), 1


def vocabulary_kept(row: Conversation, heard: Heard, facts: Facts) -> tuple[float, ...] | None:
    """(words of the vocabulary that the reference and the answer have, those that the reference has)."""
    possible = set(facts.vocabulary) & set(words(row.answer()))
    if heard.said is None or not possible:
        return None
    return len(possible & set(words(heard.said.text))), len(possible)


METRICS = (
    Metric(
        "style",
        "higher",
        "0 to 1",
        "The probability that an answer is in the style of the training answers and not of the base model's, the mean over "
        "answers. By logistic regression on the rates of frequent words, pairs of words and marks, of emoji and capitals, and on "
        "the length of words and sentences, all in the first 400 characters; learnt from answers to prompts that are not "
        "evaluated. "
        "Not reported where that classifier tells fewer than 70 % of answers apart that it has not seen. A blank answer has 0.",
        "Defined here; style by frequent words: Mosteller and Wallace 1964, Burrows 2002",
        style,
    ),
    Metric(
        "vocabulary kept",
        "higher",
        "0 to 1",
        "The share of the persona's words in the references that is also in the answers, over all rows. The persona's words are "
        "50 at most, those that more training answers than answers of the base model have, with a z-score of 2 at least.",
        "Defined here; words by log odds with an informative Dirichlet prior: Monroe et al. 2008 (Political Analysis 16:372)",
        vocabulary_kept,
    ),
)
