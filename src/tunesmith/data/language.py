"""Which languages a data set is written in, from a sample of its rows.

py3langid names the language of a text; it takes 0.75 s to load, so that texts which are plainly English never ask it.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator

from tunesmith.conversation import Conversation, Issue
from tunesmith.data.findings import finding

SAMPLE = 500  # texts looked at, spread evenly over the data set
LOOK = 400  # characters of a message that its language is told from
LETTERS = 60  # a shorter text says too little
_ENGLISH = re.compile(r"\b(?:the|and|is|are|you|of|that|it|to|in|with|for|was|this|have|not|what|how)\b", re.I)
_CODE = re.compile(r"[{}<>=;]|\b(?:def|return|import|function|const)\b")


def language(text: str) -> str | None:
    """ISO 639-1 code of a text; None where it is too short, or code rather than language."""
    letters = sum(map(str.isalpha, text))
    if letters < LETTERS and text.isascii() or letters < 10:
        return None
    if text.isascii() and len(_ENGLISH.findall(text)) >= max(3, len(text) // 120):
        return "en"
    if len(_CODE.findall(text)) > len(text) / 60:
        return None
    from py3langid import langid

    return str(langid.classify(text)[0])


def languages(texts: list[str]) -> Counter[str]:
    """How many of the texts are in which language; those without one are not counted."""
    return Counter(name for name in map(language, texts) if name)


class Sample:
    """Texts of some rows, whose languages are looked at in the end: reservoir sampling (Vitter 1985), always the same."""

    def __init__(self) -> None:
        self._rng, self._seen = random.Random(0), 0
        self._texts: list[tuple[str, str]] = []

    def add(self, conversation: Conversation) -> None:
        self._seen += 1
        at = len(self._texts) if len(self._texts) < SAMPLE else int(self._rng.random() * self._seen)
        if at < SAMPLE:
            said = " ".join([m.content[:LOOK] for m in conversation.messages if m.role != "system"])
            self._texts[at : at + 1] = [(conversation.source, said)]

    def findings(self) -> Iterator[Issue]:
        named = [(language(text), where) for where, text in self._texts]
        counts = Counter(name for name, _ in named if name)
        most = max(counts, key=lambda name: counts[name], default=None)
        for name, count in counts.items():
            if name != most and count >= max(3, 0.02 * counts.total()):
                where = next(place for found, place in named if found == name)
                share = count / counts.total()
                yield finding(
                    "language-mix",
                    where,
                    f'about {share:.0%} of the rows are in "{name}", most are in "{most}"',
                    "is it meant?",
                )
