"""Which languages a data set is written in, from a sample of its rows.

py3langid names the language of a text; it takes 0.75 s to load, so that texts which are plainly English never ask it.
"""

from __future__ import annotations

import re
from collections import Counter

SAMPLE = 500  # texts looked at, spread evenly over the data set
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
