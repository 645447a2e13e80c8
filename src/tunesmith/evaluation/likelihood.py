"""Metrics of every task: how likely the reference answers are to a model, and whether it is as sure as it is right."""

from __future__ import annotations

import msgspec
import numpy as np

from tunesmith.conversation import Conversation, Message
from tunesmith.evaluation.metric import Facts, Heard, Metric
from tunesmith.evaluation.stats import Array, ratio

MOST = 100.0  # nats, of a perplexity: of a model that gives no numbers it would be infinite, which JSON cannot say


def _per_token(row: Conversation, heard: Heard, facts: Facts) -> tuple[float, ...] | None:
    return None if heard.loss is None or not heard.tokens else (heard.loss, heard.tokens)


def _per_byte(row: Conversation, heard: Heard, facts: Facts) -> tuple[float, ...] | None:
    size = learnt_bytes(row)
    return None if heard.loss is None or not size else (heard.loss, size)


def learnt_bytes(row: Conversation) -> int:
    """UTF-8 bytes of all that a model is scored on in a row."""
    scored = [m for m in row.messages if m.role in ("assistant", "text") and m.weight != 0]
    return sum(len(m.content.encode(errors="replace")) + len(_calls(m)) for m in scored)


def _calls(message: Message) -> bytes:
    return msgspec.json.encode(message.tool_calls) if message.tool_calls else b""


def _right(row: Conversation, heard: Heard, facts: Facts) -> tuple[float, ...] | None:
    return None if heard.loss is None or not heard.tokens else (heard.right, heard.tokens)


def _bins(row: Conversation, heard: Heard, facts: Facts) -> tuple[float, ...] | None:
    return tuple(number for each in heard.bins for number in each) if heard.bins else None


def calibration_error(sums: Array) -> Array:
    """From sums [3 x bins, …] of (tokens, probability, right) for each bin: the mean over tokens of |sureness - accuracy|."""
    tokens, sure, right = sums[0::3], sums[1::3], sums[2::3]
    with np.errstate(invalid="ignore"):
        return np.asarray(np.abs(sure - right).sum(0) / tokens.sum(0), np.float64)


def _exp(sums: Array) -> Array:
    return np.asarray(np.exp(np.minimum(ratio(sums), MOST)), np.float64)


LOSS = Metric(
    "loss (nats per token)",
    "lower",
    "0 and up, in nats per token",
    "The mean of -ln p over the tokens of the reference answers, each given all that stands before it.",
    "Cross-entropy, Shannon 1948",
    _per_token,
)
PER_BYTE = Metric(
    "loss (nats per byte)",
    "lower",
    "0 and up, in nats per byte",
    "The sum of -ln p over the tokens of the reference answers, divided by their UTF-8 bytes: for two models that do not count "
    "tokens alike.",
    "Bits per byte of Gao et al. 2020, The Pile (arXiv:2101.00027), in nats",
    _per_byte,
)
METRICS = (
    LOSS,
    Metric(
        "perplexity",
        "lower",
        "1 and up",
        "The exponential of the loss: among so many equally likely tokens the model hesitates. On the held-out rows of a domain "
        "this is the domain perplexity.",
        "Jelinek, Mercer, Bahl and Baker 1977",
        _per_token,
        _exp,
    ),
    Metric(
        "token accuracy",
        "higher",
        "0 to 1",
        "The share of the tokens of the reference answers that were the likeliest to the model, each given all that stands "
        "before it.",
        "Top-1 accuracy under teacher forcing, as usual",
        _right,
    ),
    Metric(
        "calibration error",
        "lower",
        "0 to 1",
        "How far the probability of the likeliest token is from how often it is right: the absolute difference in each of ten "
        "bins of equal width, the mean over tokens.",
        "Expected calibration error of Naeini et al. 2015, as Guo et al. 2017 (arXiv:1706.04599) measure it",
        _bins,
        calibration_error,
    ),
)
