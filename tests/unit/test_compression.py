"""Metrics of compression against hand-computed values."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from tunesmith.conversation import Conversation, Message
from tunesmith.evaluation import compression
from tunesmith.evaluation.metric import Facts, Heard, Said, measure

METRICS = {metric.name: metric for metric in compression.METRICS}


def row(reference: str, *before: Message, **metadata: Any) -> Conversation:
    return Conversation((*before, Message("user", "u"), Message("assistant", reference)), metadata)


def said(text: str) -> Heard:
    return Heard(said=Said(text))


def columns(name: str, heard: Heard, row: Conversation) -> tuple[float, ...] | None:
    found = METRICS[name].columns
    assert found
    return found(row, heard, Facts())


def test_tokens_of_cl100k() -> None:
    """As tiktoken's documentation gives them: "hello world" is 15339, 1917; "tiktoken is great!" six tokens."""
    assert [compression.tokens(t) for t in ("", "hello world", "tiktoken is great!")] == [0, 2, 6]
    assert compression.tokens("\ud800") == compression.tokens("?") == 1


def test_token_reduction_is_of_the_sums() -> None:
    """References 2 + 6 tokens. Base 6 + 6: 100 * (8 - 12) / 8 = -50. Tuned 0 + 2: 75, where the mean of rows is 83.3."""
    rows = [row("hello world"), row("tiktoken is great!"), row("")]
    base = [said("tiktoken is great!"), said("tiktoken is great!"), said("x")]
    tuned = [said(""), said("hello world"), said("x")]
    found = measure(METRICS["token reduction"], rows, base, tuned, Facts())
    assert found and (found.base, found.tuned, found.rows) == (pytest.approx(-50), pytest.approx(75), 2)
    assert found.low is not None and found.high is not None


def test_token_reduction_from_the_length_before_compression() -> None:
    """Originals 10 and 30, answers 2 and 6: 100 * (40 - 8) / 40 = 80."""
    rows = [row("r", original_tokens=10), row("r", original_tokens=30.0)]
    answers = [said("hello world"), said("tiktoken is great!")]
    found = measure(METRICS["token reduction from originals"], rows, answers, answers, Facts())
    assert found and found.base == pytest.approx(80) and found.rows == 2
    for odd in (True, "30", None, 0, -1, math.nan, math.inf):
        assert columns("token reduction from originals", said("a"), row("r", original_tokens=odd)) is None
    turns = row("r", Message("user", "u"), Message("assistant", "earlier"), original_tokens=30)
    assert columns("token reduction from originals", said("a"), turns) is None  # the number is of both answers


def test_emoji() -> None:
    """Reference 2 emoji. Answers with 5 and with 0 are 3 and 2 away; a family is one emoji; only 6 are more than 5."""
    reference = row("Hi 🎉👩‍💻")
    assert columns("emoji distance", said("🎉" * 5), reference) == (3, 1)
    assert columns("emoji distance", said("Hi"), reference) == (2, 1)
    assert columns("emoji distance", said("Hi 👩‍💻🎉"), reference) == (0, 1)
    assert columns("over 5 emoji", said("🎉" * 5), reference) == (0, 1)
    assert columns("over 5 emoji", said("🎉" * 6), reference) == (1, 1)
    found = measure(
        METRICS["emoji per answer"], [reference] * 2, [said("a"), said("🎉")], [said("🎉🎉"), said("🎉")], Facts()
    )
    assert found and (found.base, found.tuned, found.low, found.verdict) == (0.5, 1.5, None, "")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (
            "Download from python.org 💻, then run `pip  install torch` and set CUDA_VISIBLE_DEVICES=0.",
            ["pip install torch", "python.org", "cuda_visible_devices"],
        ),
        ("Two GPUs, e.g. an H100 with 80GB; AI-powered, TCP/IP.", ["gpu", "h100", "80gb", "ai", "tcp", "ip"]),
        ("On the 3rd at 10am, a 3-day trial of 1.5 or 24/7, OK? DO NOT wait.", []),
        (
            "See https://www.kaggle.com/docs?x=my_x (src/train.py, ~/.bashrc).",
            ["kaggle.com", "src/train.py", "~/.bashrc"],
        ),
        ("Use git, C++ or PyTorch with --max-tokens 5.", ["git", "c++", "pytorch", "--max-tokens"]),
        ("```python\nmy_df = np.array([1])\n```\nThen `sort()` it.", ["sort", "my_df", "np.array"]),
        ("THIS IS LOUD, SAYS NASA", []),
        ("使用GPU训练 résumé Résumé ÉTÉ", ["gpu"]),
        ("and so on...done.Then `` ` ` `?`", []),
        ("", []),
    ],
)
def test_technical_terms(text: str, want: list[str]) -> None:
    assert compression.terms(text) == want


def test_technical_terms_kept() -> None:
    """Four terms: pip install torch (also without backticks), python.org, gpu (a plural does), utf-8 (not part of utf-8x)."""
    reference = row("Get `pip install torch` from python.org for a GPU with utf-8.")
    kept = said("🐍 Python.org: run\npip install torch on GPUs, utf-8x 🎉")
    assert columns("technical terms kept", kept, reference) == (3, 4)
    assert columns("technical terms kept", said("用GPU训练"), reference) == (1, 4)
    assert columns("technical terms kept", said(""), reference) == (0, 4)
    assert columns("technical terms kept", said("GPU"), row("No terms here.")) is None
    assert columns("technical terms kept", Heard(), reference) is None


def test_a_reference_gives_no_more_terms_than_can_be_looked_for() -> None:
    assert len(compression.terms(" ".join(f"x{i}y" for i in range(5000)))) == compression.MOST


@pytest.mark.parametrize(
    "text",
    [
        "\x00" * 100_000,
        "a." * 50_000,
        "`a" * 50_000,
        "1" * 100_000,
        "://" * 33_000,
        "A" * 100_000,
        "a_" * 50_000,
        "🙂" * 9000,
        "Aa " * 33_000,
        "\ud800",
        "-" * 100_000,
    ],
)
def test_any_text_has_its_figures_in_no_time(text: str) -> None:
    start = time.perf_counter()
    for metric in compression.METRICS:
        for reference, answer in ((text, "GPU"), ("GPU a.b", text)):
            if metric.columns:
                found = metric.columns(row(reference, original_tokens=5), said(answer), Facts())
                assert found is None or all(math.isfinite(value) for value in found)
    assert time.perf_counter() - start < 10  # 1 s where the machine is free; quadratic time takes 30 and more
