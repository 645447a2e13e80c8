"""Which languages a data set is written in, from a sample of its rows; and what a word is, in any script.

py3langid names the language of a text; it takes 0.75 s to load, so that texts which are plainly English never ask it.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator
from functools import cache

from tunesmith.conversation import Conversation, Issue
from tunesmith.data.findings import finding

SAMPLE = 500  # texts looked at, spread evenly over the data set
LOOK = 400  # characters of a message that its language is told from
LETTERS = 60  # a shorter text says too little
_ENGLISH = re.compile(r"\b(?:the|and|is|are|you|of|that|it|to|in|with|for|was|this|have|not|what|how)\b", re.I)
_CODE = re.compile(r"[{}<>=;]|\b(?:def|return|import|function|const)\b")
_PLAIN_WORD = re.compile(r"\w+")
_PERHAPS = re.compile(  # a text without these has neither combining marks nor scripts without spaces: four times as fast
    "[\u0300-\u036f\u0483-\u1dff\u200c\u200d\u20d0-\u20ff\u2cef-\u2dff\u3005-\uffee\U00010000-\U00011fff\U00020000-\U0003ffff]"
)
_SPACELESS = (  # Thai, Lao, Myanmar, Khmer; Japanese, Chinese: scripts that do not part words by spaces
    "\u0e01-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff"
    "\u3005-\u3007\u3040-\u30ff\u3100-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)


def words(text: str) -> list[str]:
    """The words of a text, case folded: runs of letters, digits and _. A letter keeps its combining marks, as in Hindi.

    Where a script has no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character is one.
    """
    folded = text.casefold()
    return (_word() if not folded.isascii() and _PERHAPS.search(folded) else _PLAIN_WORD).findall(folded)


def word_spans(text: str) -> list[tuple[int, int]]:
    """Where the words of a text begin and end."""
    word = _word() if not text.isascii() and _PERHAPS.search(text) else _PLAIN_WORD
    return [found.span() for found in word.finditer(text)]


@cache
def _word() -> re.Pattern[str]:
    """Compiled when the first such text comes: to find the marks takes 25 ms. Its parts exclude each other: time is linear."""
    marks = "".join(c for c in map(chr, range(0x300, 0x12000)) if unicodedata.category(c)[0] == "M") + "\u200c\u200d"
    return re.compile(f"[^\\W{_SPACELESS}]+(?:[{marks}]+[^\\W{_SPACELESS}]*)*|(?=\\w)[{_SPACELESS}][{marks}]*")


def language(text: str) -> str | None:
    """ISO 639-1 code of a text; None where it is too short, or code rather than language."""
    letters = sum(map(str.isalpha, text))
    dense = sum(c > "\u036f" and c.isalpha() for c in text) > letters / 2  # a script that says more in fewer letters
    if letters < (10 if dense else LETTERS):
        return None
    if not dense and len(_ENGLISH.findall(text)) >= max(3, len(text) // 120):
        return "en"
    if len(_CODE.findall(text)) > len(text) / 60:
        return None
    from py3langid import langid

    return str(langid.classify(text)[0])


def likeliest(text: str, among: Collection[str]) -> str | None:
    """Which of some languages a text of any length is most likely in, from its first LOOK characters; None without letters."""
    text = text[:LOOK]
    if not any(map(str.isalpha, text)):
        return None
    from py3langid import langid

    return next((name for name, _ in langid.rank(text) if name in among), None)


def languages(texts: list[str]) -> Counter[str]:
    """How many of the texts are in which language; those without one are not counted."""
    return Counter(name for name in map(language, texts) if name)


class Sample:
    """Texts of some rows, spread evenly over the data set, whose languages are looked at in the end.

    A row's rank is its line number times the golden ratio, modulo one: those of the lowest ranks are evenly spaced
    (Fibonacci hashing), always the same, and samples of parts add up to that of the whole.
    """

    def __init__(self, limit: int = 1 << 32) -> None:
        self.limit = limit  # higher ranks are not in it
        self._texts: list[tuple[int, str, str]] = []  # rank, place, text

    def add(self, conversation: Conversation) -> None:
        rank = int(conversation.source.rpartition(":")[2]) * 0x9E3779B1 & 0xFFFFFFFF
        if rank < self.limit:
            said = " ".join([m.content[:LOOK] for m in conversation.messages if m.role != "system"])
            self._texts.append((rank, conversation.source, said))
            if len(self._texts) >= 2 * SAMPLE:
                self._trim()

    def extend(self, later: Sample) -> None:
        """The rows of another, after one's own."""
        self._texts += [item for item in later._texts if item[0] < self.limit]
        if len(self._texts) >= 2 * SAMPLE:
            self._trim()

    def _trim(self) -> None:
        self._texts.sort(key=lambda item: item[0])
        del self._texts[SAMPLE:]
        self.limit = self._texts[-1][0]

    def findings(self) -> Iterator[Issue]:
        self._texts.sort(key=lambda item: item[0])
        named = [(language(text), where) for _, where, text in self._texts[:SAMPLE]]
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
