"""Tokens of a text by way of its words, each of which the tokenizer has to see only once.

Most tokenizers begin a new piece of the text wherever one space stands between two characters that are none, and no token
reaches across. What such a piece becomes does not depend on its neighbours, and most of them are words that came before:
looking them up takes a fifth of the time.
"""

from __future__ import annotations

import re
from itertools import chain, product

from tokenizers import Tokenizer

MOST = 1 << 18  # words that are remembered: some 60 MB
LONGEST = 40  # characters of a word worth remembering
_WORDS = re.compile(r"(?<=\S)(?= \S)")
_LINES = re.compile(r"(?<=\S)(?= \S)|(?<=\n)(?=\S)")
_SIDES = (
    *("a", "Z", "7", "é", "ß", "я", "你", "か", "ع", "한", "😀", "\u0301", "<|", "'s"),
    *(".", ",", "'", '"', "(", "}", "-", "_", "/", "#", "="),
)


def border(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Where a text can be cut into words that a tokenizer treats one by one: before a space, for many also after a line
    break. None: nowhere. Tried on pairs of letters, digits, marks and scripts."""
    if tokenizer.pre_tokenizer is None or getattr(tokenizer.model, "dropout", None):
        return None
    for token in tokenizer.get_added_tokens_decoder().values():
        melts = token.lstrip or token.rstrip or token.single_word or token.normalized and tokenizer.normalizer
        if melts or any(c.isspace() for c in token.content):
            return None
    spaced = [(f" m{left}", f" {right}m") for left, right in product(_SIDES, _SIDES)]
    broken = [
        (f" m{left}{end}", f"{right}m")
        for left, right in product(_SIDES[::3], _SIDES[::2])
        for end in ("\n", "\n\n", " \n")
    ]
    return next(
        (at for at, pairs in ((_LINES, spaced + broken), (_WORDS, spaced)) if _apart(tokenizer, at, pairs)), None
    )


def _apart(tokenizer: Tokenizer, at: re.Pattern[str], pairs: list[tuple[str, str]]) -> bool:
    said = [word for pair in pairs for word in pair]
    text = "".join(said)
    pieces = {word: tokenizer.pre_tokenizer.pre_tokenize_str(word) for word in {*said}}
    ids = {word: tokenizer.encode(word, add_special_tokens=False).ids for word in {*said}}
    whole = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    return (
        at.split(text) == said
        and whole == [piece for word in said for piece, _ in pieces[word]]
        and tokenizer.encode(text, add_special_tokens=False).ids == [i for word in said for i in ids[word]]
    )


class Words:
    """Ids of words, each encoded when it is first asked for. `border`: of the tokenizer."""

    def __init__(self, tokenizer: Tokenizer, border: re.Pattern[str]) -> None:
        self._tokenizer = tokenizer
        self.split = border.split
        self._known: dict[str, list[int]] = {}
        added = sorted((t.content for t in tokenizer.get_added_tokens_decoder().values()), key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(map(re.escape, added))})") if added else None

    def ids(self, words: list[str]) -> list[int]:
        """Those of some words, one after the other."""
        known = self._known
        try:
            return list(chain.from_iterable(map(known.__getitem__, words)))
        except KeyError:
            return list(chain.from_iterable([known[word] if word in known else self._new(word) for word in words]))

    def _new(self, word: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(word, add_special_tokens=False).ids
        if len(word) <= LONGEST:
            if len(self._known) >= MOST:
                self._known.clear()
            self._known[word] = ids
        return ids

    def around_added(self, word: str) -> list[str]:
        """A word in parts: its special tokens, and what stands between them."""
        return [part for part in self._added.split(word) if part] if self._added else [word]
