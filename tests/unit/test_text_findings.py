"""What is taken for a secret, a number of a person or a refusal, and what looks like one and is not."""

from __future__ import annotations

import re
import time

import pytest

from tunesmith.data.language import language
from tunesmith.data.text import SECRETS, findings


@pytest.mark.parametrize(
    "text",
    [
        "<<1000-450-300=250>> dollars",
        "1 400 000 000 people live",
        "100 200 300",
        "1914-1918 1939-1945 and 12 000 000 dead",
        "on 20231105 142233 it ran",
        "DOI 10.1017/0004972700002872",
        "git@github.com:user/repo.git",
        "a <| b |> c",
        "the class sk-fading-circle-container-big",
        "sk-learn-compatible-estimators-are-great",
        "I can't help but smile.",
        "As an AI researcher, I study",
        "Sorry, I can't make it to dinner on Friday",
        "I cannot provide enough thanks!",
        "sk-your-api-key-here-please",
        "Call me Ishmael in 1851 and 1952 again",
        "the total is 123 456 789 units",
        "4111 1111 1111 1112",  # a card number but for its check digit
        "GB82 WEST 1234 5698 7654 33",  # an account number but for its check digits
    ],
)
def test_what_only_looks_like_it(text: str) -> None:
    assert list(findings(text, True)) == []


@pytest.mark.parametrize(
    "text",
    [
        "+44 (0)20 7946 0958",
        "Phone: 07700 900123",
        "call 1-800-273-8255",
        "my tel is 01 23 45 67 89",
        "(555) 123-4567 12",
        "I'm unable to assist with that",
        "I apologize, but I cannot help with it",
        "Unfortunately, I can't provide that",
        "sk-abcdefghij1234567890xyz",
        "sk_live_abcdefghijklmnopqrst",
        "<|reserved_special_token_0|>",
        "<fim_prefix>x",
        "As an AI language model, I",
        "I'm sorry, but I can't help with that.",
        "4111 1111 1111 1111",
        "GB82 WEST 1234 5698 7654 32",
    ],
)
def test_what_it_is(text: str) -> None:
    assert len(list(findings(text, True))) == 1


def test_no_search_takes_longer_the_square_of_a_text() -> None:
    for text in ("a-" * 40_000 + "://", "eyJ" + "a" * 80_000, "eyJ" * 30_000, "sk-" * 30_000, "call " * 20_000):
        for whole in SECRETS.values():
            began = time.perf_counter()
            re.search(whole, text)
            assert time.perf_counter() - began < 2  # 5 s before the repetitions were bounded


@pytest.mark.parametrize("text", ["Sure 🐍 go to python.org now", "Ask Zoë, she knows Łódź", "It’s fine — naïve ✅"])
def test_a_few_words_are_no_other_language(text: str) -> None:
    assert language(text) in (None, "en")


def test_dense_scripts_say_more_in_fewer_letters() -> None:
    assert (
        language("これは日本語の文章です。とても短い。") == "ja" and language("Это русский текст, он короткий.") == "ru"
    )
