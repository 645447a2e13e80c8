"""Constraints that an instruction states and that a program can verify: counts, formats, languages, words to use or to avoid.

In the spirit of IFEval (Zhou et al. 2023), but found in any English instruction, not written with it. Finding is precise rather
than greedy: what is quoted, conditional, about code, or material after a colon is no instruction; and a constraint that the
reference answer itself breaks was misread, so that it is left out of the count. The patterns are in facts/constraints.toml.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import msgspec

from tunesmith.evaluation import checks
from tunesmith.evaluation.checks import WORDS

LOOK = 4000  # characters of an instruction that are read
INFINITE = 1 << 30


class Constraint(msgspec.Struct, frozen=True):
    """What an answer has to be like. `kind`: a key of CHECKS; `phrase`: the instruction's words; `values`: for the check."""

    kind: str
    phrase: str
    values: tuple[Any, ...] = ()

    def kept(self, answer: str) -> bool:
        """Whether an answer does as it is told. An empty one never does."""
        return bool(answer.strip()) and CHECKS[self.kind](answer, *self.values)


@lru_cache(1024)
def found(instruction: str, reference: str) -> tuple[Constraint, ...]:
    """The constraints of an instruction, each once; those that the reference breaks are left out as misread."""
    text, quotes = _masked(instruction[:LOOK])
    every: dict[tuple[str, tuple[Any, ...]], Constraint] = {}
    for sentence in _sentences(text):
        for read in (_counts, _words, _ends, _forms):
            for kind, (start, end), values in read(sentence, quotes):
                phrase = _QUOTED.sub(lambda m: f'"{quotes[int(m[1])]}"', sentence[start:end]).strip(" ,;:")
                every.setdefault((kind, values), Constraint(kind, phrase, values))
    return tuple(c for c in every.values() if c.kept(reference))


Read = Iterator[tuple[str, tuple[int, int], tuple[Any, ...]]]  # kind, place in the sentence, values
CHECKS: dict[str, Callable[..., bool]] = {
    **{f"number of {unit}": checks.within(count) for unit, count in checks.COUNTS.items()},
    "number of items": checks.items,
    "language": checks.spoken,
    "contains": checks.contains,
    "keys": checks.keys,
    "without the signs": lambda answer, signs: set(answer).isdisjoint(signs),
    "without emoji": lambda answer: checks.COUNTS["emoji"](answer) == 0,
    "without the letter": lambda answer, letter: letter not in answer.casefold(),
    "starts with": checks.starts,
    "ends with": checks.ends,
    "ends with the sign": lambda answer, signs: answer.rstrip().rstrip("*_\"'”’)").endswith(tuple(signs)),
    "written like": lambda answer, kind: checks.LIKE[kind](answer),
    "has a number like": lambda answer, pattern: bool(re.search(rf"(?<!\d){pattern}(?!\d)", answer)),
    "yes or no": checks.yes_or_no,
}


# ---- the patterns


def _compiled() -> tuple[dict[str, re.Pattern[str]], dict[str, re.Pattern[str]]]:
    """[patterns] and [like], with the pieces and lists of words put in."""
    names = {
        key.upper(): _alternatives(words) for key, words in WORDS.items() if key not in ("pieces", "patterns", "like")
    }
    numbers = WORDS["numbers"].items()
    for key, low, high in (("DIGITS", 1, 10), ("TEENS", 10, 20), ("TENS", 20, 100)):
        names[key] = _alternatives(word for word, n in numbers if low <= n < high)

    def whole(pattern: str) -> str:
        joined = "".join(line.strip() for line in pattern.splitlines())
        return re.sub(r"\{([A-Z_0-9]*[A-Z]+[A-Z_0-9]*)\}", lambda m: names[m[1]], joined)

    for key, piece in WORDS["pieces"].items():
        names[key] = whole(piece)
    tables = ({k: re.compile(whole(p), re.I) for k, p in WORDS[table].items()} for table in ("patterns", "like"))
    return next(tables), next(tables)


def _alternatives(words: Iterable[str]) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_FIND, _LIKE = _compiled()


# ---- the text that is an instruction

_STRAIGHT = str.maketrans("“”„«»", '"' * 5)  # « and » are the marks of what is quoted
_QUOTE = re.compile(r"\"([^\"\n]{1,300})\"|`([^`\n]{1,300})`|(?<!\w)'([^'\n]{1,300})'(?!\w)")
_QUOTED = re.compile(r"«(\d+)»")
_PLAIN = {"yes", "no", "true", "false"}  # 'answer "yes" or "no"' means what it says
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z«\d])|\n+")
_SOURCE = re.compile(r"^\s*(?:def|class|import|from \S+ import|#include|public|func|fn)\b|^```", re.M)


def _masked(text: str) -> tuple[str, list[str]]:
    """The text with «0», «1», … for what is quoted in it, and what was quoted."""
    quotes: list[str] = []

    def mask(match: re.Match[str]) -> str:
        inner = next(group for group in match.groups() if group is not None)
        if inner.casefold() in _PLAIN:
            return inner
        quotes.append(inner.strip())
        return f"«{len(quotes) - 1}»"

    return _QUOTE.sub(mask, text.translate(_STRAIGHT)), quotes


def _sentences(text: str) -> Iterator[str]:
    """Those of the paragraph that instructs, and of others those that speak of the answer.

    An instruction and its input are joined by an empty line (data/formats.py), so that the first paragraph instructs; the last
    one where it alone begins with a verb that asks (a text, then what to do with it). None where the text holds source code.
    """
    paragraphs = [part for part in re.split(r"\n[ \t]*\n", text) if part.strip()]
    if not paragraphs or _SOURCE.search(text):
        return
    asks = _FIND["asks"].match
    main = len(paragraphs) - 1 if asks(paragraphs[-1]) and not asks(paragraphs[0]) else 0
    for number, paragraph in enumerate(paragraphs):
        material = _FIND["material"].search(paragraph)
        for sentence in _END.split(paragraph[: material.end()] if material else paragraph):
            if not _FIND["aside"].match(sentence) and (number == main or _FIND["yours"].search(sentence)):
                yield sentence


# ---- counts


def number(words: str) -> int:
    """12 of "12", "twelve" or "a dozen"; 200 of "two hundred"."""
    total = 0
    for word in re.split(r"[-\s]+", words.casefold().replace(",", "")):
        if word.isdigit():
            total += int(word)
        elif word in ("hundred", "dozen"):
            total = max(1, total) * (100 if word == "hundred" else 12)
        else:
            total += WORDS["numbers"].get(word, 1 if word == "single" else 0)
    return total


def _bounds(match: re.Match[str], limited: bool = False) -> tuple[int, int] | None:
    """(least, most) of a number as the words around it have it; None for "about"."""
    groups = match.groupdict()
    n = number(groups["n"])
    if groups.get("vague"):
        return None
    if groups.get("m"):
        return n, number(groups["m"])
    if groups.get("most") or groups.get("fewer") or limited:
        return 0, n
    if groups.get("least") or groups.get("more"):
        return n, INFINITE
    if groups.get("over"):
        return n + 1, INFINITE
    return (0, n - 1) if groups.get("under") else (n, n)


def _counts(sentence: str, quotes: list[str]) -> Read:
    taken: list[tuple[int, int]] = []
    for m in _FIND["listed"].finditer(sentence):
        bounds, second = _bounds(m), _FIND["second"].match(sentence, m.end())
        if bounds and bounds[1] > 1:
            more, end = (number(second["n"]), second.end()) if second else (0, m.end())
            taken.append((m.start(), end))
            yield "number of items", taken[-1], (bounds[0] + more, min(INFINITE, bounds[1] + more))
    for m in _FIND["count"].finditer(sentence):
        before = sentence[max(0, m.start() - 80) : m.start()]
        other = _FIND["other_before"].search(before) or _FIND["other_after"].match(sentence, m.end())
        if (
            other
            or _FIND["other_line"].match(sentence, m.start())
            or any(a < m.end() and m.start() < b for a, b in taken)
        ):
            continue
        unit = next(unit for unit in (*checks.COUNTS, "items") if m[unit])
        bounds = _bounds(m, bool(_FIND["limit_before"].search(before)))
        if bounds and bounds[0] <= bounds[1]:
            yield f"number of {unit}", m.span(), bounds


# ---- words and signs


def _plain(text: str, quotes: list[str]) -> str:
    """A word of the instruction, or what is quoted at its place, in small letters; without the sign that ends the sentence."""
    match = _QUOTED.fullmatch(text)
    return (quotes[int(match[1])] if match else text).rstrip(".,").casefold()


def _words(sentence: str, quotes: list[str]) -> Read:
    for m in _FIND["contain"].finditer(sentence):
        never = bool(m["not"]) or m[0].casefold().startswith(("without", "avoid"))
        what = m["quoted"] or m["words"] or m["word"]
        if " or " in what and not never:
            continue  # either will do: rarely meant as a condition
        for part in re.split(r",\s*(?:and\s+|or\s+)?|\s+and\s+|\s+or\s+", what):
            if word := _plain(part, quotes):
                yield "contains", m.span(), (word, *((0, 0) if never else _times(m)))
    for m in _FIND["unmentioned"].finditer(sentence):
        yield "contains", m.span(), (m[1].casefold(), 0, 0)
    for m in _FIND["letter"].finditer(sentence):
        yield "without the letter", m.span(), (_plain(m[1], quotes),)
    for m in _FIND["no_signs"].finditer(sentence):
        for name in _FIND["sign"].findall(m["signs"]):
            signs = _signs(name)
            yield ("without the signs", m.span(), (signs,)) if signs else ("without emoji", m.span(), ())
    for m in _FIND["keys"].finditer(sentence):
        yield "keys", m.span(), tuple(quotes[int(key)] for key in _QUOTED.findall(m[1]))


def _times(match: re.Match[str]) -> tuple[int, int]:
    """How often a word is to be used: once at least where nothing is said."""
    if match["once"] or match["twice"]:
        times = 2 if match["twice"] else 1
        return (times, INFINITE) if match["least"] else (times, times)
    return (match["n"] and _bounds(match)) or (1, INFINITE)


def _signs(name: str) -> str:
    """The characters that a sign's name stands for: ",，、" of "commas"; '' for emoji."""
    name = name.casefold()
    return next(
        (str(signs) for known, signs in WORDS["signs"].items() if name in (known, known + "s", known + "es")), ""
    )


def _ends(sentence: str, quotes: list[str]) -> Read:
    for m in _FIND["ends"].finditer(sentence):
        before = sentence[max(0, m.start() - 40) : m.start()]
        if _FIND["ends_of_items"].search(before) and not _FIND["ends_of_text"].search(before):
            continue
        if not m["sign"]:
            yield "starts with" if m["start"] else "ends with", m.span(), (_plain(m["word"] or m["quoted"], quotes),)
        elif m["end"] and (signs := _signs("question mark" if m["sign"].casefold() == "question" else m["sign"])):
            yield "ends with the sign", m.span(), (signs,)


# ---- forms, formats, languages


def _forms(sentence: str, quotes: list[str]) -> Read:
    for m in _FIND["language"].finditer(sentence):
        name = m["language"].capitalize()
        if m["language"] == name and (name != "English" or _FIND["to_english"].search(sentence)):  # "polish" is none
            yield "language", m.span(), (WORDS["languages"][name],)
    for m in _FIND["form"].finditer(sentence):
        lines = WORDS["forms"][m["form"].casefold()]
        yield "number of lines", m.span(), (lines, lines)
    for kind, pattern in _LIKE.items():
        if m_ := pattern.search(sentence):
            yield "written like", m_.span(), (kind,)
    for m in _FIND["date"].finditer(sentence):
        yield "has a number like", m.span(), (re.sub("[YMD]", r"\\d", re.sub(r"[-/.]", r"\\\g<0>", m[0].upper())),)
    for m in _FIND["decimals"].finditer(sentence):
        yield "has a number like", m.span(), (rf"\d+[.,]\d{{{number(m['n'])}}}",)
    if m_ := _FIND["yes_no"].search(sentence):
        yield "yes or no", m_.span(), (bool(_FIND["only"].search(sentence)),)
