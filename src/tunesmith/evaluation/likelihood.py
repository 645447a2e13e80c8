"""Metrics of every task: how likely the reference answers are to a model, and whether it is as sure as it is right."""

from __future__ import annotations

import numpy as np

from tunesmith.conversation import Conversation
from tunesmith.evaluation.metric import Facts, Heard, Metric
from tunesmith.evaluation.stats import Array, ratio

BINS = 10  # tenths of sureness, as of local.score


def _per_token(row: Conversation, heard: Heard, facts: Facts) -> tuple[float, ...] | None:
    return None if heard.loss is None or not heard.tokens else (heard.loss, heard.tokens)


def _per_byte(row: Conversation, heard: Heard, facts: Facts) -> tuple[float, ...] | None:
    """Over the UTF-8 bytes of all that a model is scored on in this row."""
    size = sum(len(m.content.encode()) for m in row.messages if m.role in ("assistant", "text") and m.weight != 0)
    return None if heard.loss is None or not size else (heard.loss, size)


def _right(row: Conversation, heard: Heard, facts: Facts) -> tuple[float, ...] | None:
    return None if heard.loss is None or not heard.tokens else (heard.right, heard.tokens)


def _bins(row: Conversation, heard: Heard, facts: Facts) -> tuple[float, ...] | None:
    return tuple(number for each in heard.bins for number in each) if heard.bins else None


def calibration_error(sums: Array) -> Array:
    """From sums [3 x BINS, …] of (tokens, probability, right) for each bin: the mean over tokens of |sureness - accuracy|."""
    tokens, sure, right = sums[0::3], sums[1::3], sums[2::3]
    with np.errstate(invalid="ignore"):
        return np.asarray(np.abs(sure - right).sum(0) / tokens.sum(0), np.float64)


def _exp(sums: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(ratio(sums)), np.float64)


LOSS = Metric(
    "loss (nats per token)",
    "lower",
    "0 and up, nats",
    "The mean of -ln p over the tokens of the reference answers, each given all that stands before it.",
    "cross-entropy (Shannon 1948)",
    _per_token,
)
PER_BYTE = Metric(
    "loss (nats per byte)",
    "lower",
    "0 and up, nats",
    "As the loss, over the bytes of the answers: for two models that do not count tokens alike.",
    "bits per byte (Gao et al. 2020, The Pile), in nats",
    _per_byte,
)
METRICS = (
    LOSS,
    Metric(
        "perplexity",
        "lower",
        "1 and up",
        "e to the loss: among so many equally likely tokens the model hesitates. On rows of one domain this is the domain "
        "perplexity.",
        "Jelinek et al. 1977",
        _per_token,
        _exp,
    ),
    Metric(
        "token accuracy",
        "higher",
        "0 to 1",
        "The share of the references' tokens that were the likeliest to the model.",
        "teacher-forced top-1 accuracy",
        _right,
    ),
    Metric(
        "calibration error",
        "lower",
        "0 to 1",
        "The mean over tokens of |how sure the model was of its likeliest token - how often those were right|, in ten bins of "
        "sureness.",
        "expected calibration error (Guo et al. 2017)",
        _bins,
        calibration_error,
    ),
)
