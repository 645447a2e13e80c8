"""What verifies constraints: checks of what an answer counts, contains, begins with and is written like, all in linear time."""

from __future__ import annotations

import csv
import re
import tomllib
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import msgspec

from tunesmith.data.convert import emoji_in
from tunesmith.data.language import likeliest
from tunesmith.recipe import FACTS

with (FACTS / "constraints.toml").open("rb") as _stream:
    WORDS: dict[str, Any] = tomllib.load(_stream)
_MARK = re.compile(r"^(?P<indent>[ \t]*)(?:\*\*)?(?:(?P<bullet>[-*+•–])|(?P<number>\(?\d{1,3}[.)]))[ \t]+(?=\S)", re.M)
_STOP = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]*_]*+(?=\s|$)|[。！？]")
_NEXT = re.compile(r"\s*+(\S?)")
_NUMBER = re.compile(r"[-+−]?[$€£]?\d[\d.,\s]*+(?:%|°[CF]?)?\.?")
_RULE = re.compile(r"^[ \t]*+\|?[ \t]*+:?-++:?[ \t]*+(?:\|[ \t:-]*+)+$", re.M)
_HEADING = re.compile(r"^#{1,6} \S", re.M)
_FENCE = re.compile(r"\A\s*```[^\n`]*\n(.*?)\n?```\s*\Z", re.S)


def words(text: str) -> int:
    """Words: what stands between spaces and has a letter or a figure; a list's numbers are none."""
    return sum(any(map(str.isalnum, word)) for word in _MARK.sub("", text).split())


def lines(text: str) -> int:
    """Lines that are not empty."""
    return sum(bool(line.strip()) for line in text.splitlines())


def paragraphs(text: str) -> int:
    """Blocks between empty lines."""
    filled = [False, *(bool(line.strip()) for line in text.splitlines())]
    return sum(now and not before for before, now in pairwise(filled))


def sentences(text: str) -> int:
    """Sentences: up to a full stop, a question or exclamation mark before a space; a paragraph or list item ends one too."""
    return sum(_sentences(block) for block in _blocks(_MARK.sub("\n\n", text)))


def _blocks(text: str) -> Iterator[str]:
    block: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.strip():
            block.append(line)
        elif block:
            yield "\n".join(block)
            block = []


def _sentences(block: str) -> int:
    count = last = 0
    for m in _STOP.finditer(block):
        before = block[max(last, m.start() - 12) : m.start()].split()
        word = before[-1].casefold().lstrip("(\"'“") if before else ""
        short = (
            word in WORDS["abbreviations"] or len(word) == 1 and word.isalpha() and before[-1].isupper() and word != "i"
        )
        after = _NEXT.match(block, m.end())[1]  # type: ignore[index]  # it matches anything
        if m[0][0] == "." and short and after or m[0][-1] in "\"'”’)" and after.islower():  # "Go!" and …
            continue
        count += any(map(str.isalnum, block[last : m.end()]))
        last = m.end()
    return count + any(map(str.isalnum, block[last:]))


def bullets(text: str) -> int:
    """Lines that begin with a list's sign or number: those of the outermost list."""
    marks = [len(m["indent"]) for m in _MARK.finditer(text)]
    return marks.count(min(marks)) if marks else 0


COUNTS: dict[str, Callable[[str], int]] = {
    "words": words,
    "sentences": sentences,
    "lines": lines,
    "paragraphs": paragraphs,
    "characters": lambda text: len(text.strip()),
    "bullets": bullets,
    "emoji": emoji_in,
}


def within(count: Callable[[str], int]) -> Callable[[str, int, int], bool]:
    """A check that a count is at least the first number and at most the second."""
    return lambda answer, low, high: low <= count(answer) <= high


def items(answer: str, low: int, high: int) -> bool:
    """Whether so many things are named: list items; where there is no list, lines; in one line, parts or sentences."""
    if listed := bullets(answer):
        counts = {listed}
    elif lines(answer) > 1:
        counts = {lines(answer), paragraphs(answer)}
    else:
        counts = {len(_parts(answer)), sentences(answer)}
    return any(low <= count <= high for count in counts)


def _parts(line: str) -> list[str]:
    """What commas, semicolons and a last "and" separate."""
    parts = [part.strip(" .\n") for part in re.split("[,;，、；]", line)]
    parts[-1:] = re.split(r"\b(?:and|or|&)\b", parts[-1], maxsplit=1)
    return [part for part in parts if part.strip()]


def _entries(answer: str) -> list[str]:
    """The items of a list, the lines, or the parts of one line."""
    if bullets(answer) or lines(answer) > 1:
        return [line.strip() for line in _MARK.sub("", answer).splitlines() if line.strip()]
    return _parts(answer)


def spoken(answer: str, code: str) -> bool:
    """Whether this is the likeliest of the languages that instructions are known to ask for."""
    return likeliest(answer, WORDS["languages"].values()) == code


def contains(answer: str, what: str, low: int, high: int) -> bool:
    """Whether a whole word or phrase stands in it so often, in any case."""
    left, right = (r"(?<!\w)" if what[0].isalnum() else ""), (r"(?!\w)" if what[-1].isalnum() else "")
    return low <= len(re.findall(left + re.escape(what) + right, answer.casefold())) <= high


def starts(answer: str, what: str) -> bool:
    return answer.casefold().lstrip(" \n\t*_#>\"'“‘(").startswith(what)


def ends(answer: str, what: str) -> bool:
    text = answer.casefold().rstrip(" \n\t*_\"'”’)")
    return text.endswith(what) or text.rstrip(".!?…").endswith(what)


def unfenced(answer: str) -> str:
    """What stands in the code block, where the answer is one."""
    fenced = _FENCE.match(answer)
    return fenced[1] if fenced else answer


def parsed(answer: str) -> object:
    """The JSON object or array that the answer is, None where it is none."""
    try:
        value = msgspec.json.decode(unfenced(answer).encode("utf-8", "replace"))
    except (msgspec.DecodeError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def keys(answer: str, *names: str) -> bool:
    """Whether it is a JSON object, or a list of them, with these keys."""
    value = parsed(answer)
    objects = value if isinstance(value, list) else [value]
    return bool(objects) and all(isinstance(item, dict) and set(names) <= set(item) for item in objects)


def _csv(answer: str) -> bool:
    """Two lines at least, all with the same number of fields, two at least."""
    try:
        counts = {len(row) for row in csv.reader(unfenced(answer).strip().splitlines()) if row}
    except csv.Error:
        return False
    return lines(unfenced(answer)) > 1 and len(counts) == 1 and counts.pop() > 1


def _titled(answer: str) -> bool:
    """Whether the first word and all of more than three letters begin with a capital."""
    found = re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", answer)
    return bool(found) and all(word[0].isupper() for word in [found[0], *found] if len(word) > 3 or word is found[0])


def _sorted(answer: str) -> bool:
    entries = [entry.casefold() for entry in _entries(answer)]
    return len(entries) > 1 and entries == sorted(entries)


LIKE: dict[str, Callable[[str], bool]] = {
    "json": lambda answer: parsed(answer) is not None,
    "csv": _csv,
    "table": lambda answer: bool(_RULE.search(answer)),
    "heading": lambda answer: bool(_HEADING.search(answer)),
    "code block": lambda answer: answer.count("```") > 1,
    "bullets": lambda answer: sum(bool(m["bullet"]) for m in _MARK.finditer(answer)) > 1,
    "numbered": lambda answer: sum(bool(m["number"]) for m in _MARK.finditer(answer)) > 1,
    "upper case": str.isupper,
    "lower case": str.islower,
    "title case": _titled,
    "commas": lambda answer: "," in answer and lines(answer) == 1,
    "one per line": lambda answer: lines(answer) > 1,
    "alphabetical": _sorted,
    "quotes": lambda answer: len(answer.strip()) > 1 and answer.strip()[0] in '"“„«' and answer.strip()[-1] in '"”“»',
    "number": lambda answer: bool(_NUMBER.fullmatch(answer.strip())),
    "question": lambda answer: answer.rstrip(" \n\t*_\"'”’)").endswith(("?", "？", "؟")),
}


def yes_or_no(answer: str, only: bool) -> bool:
    found = re.match(r"\W*(?:yes|no)\b", answer, re.I)
    return bool(found) and (not only or words(answer) == 1)
