"""A report's page as a parser sees it, and the files of the run that its figures come from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal, InvalidOperation
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tunesmith.evaluation import stats
from tunesmith.evaluation.marking import LONGEST
from tunesmith.evaluation.rowreport import CODES

BLOCK = re.compile("h[1-4]|section|header|p|div|dl|dt|dd|td|th|tr|li|text|title|summary|details|article|small|br")


class Page(HTMLParser):
    """`elements`: each with its tag, attributes and whole text. `loose`: text with digits that no element answers for."""

    VOID = frozenset({"meta", "br", "line", "circle", "rect", "polyline", "path", "wbr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[dict[str, Any]] = []
        self.loose: list[str] = []
        self._open: list[dict[str, Any]] = []
        self.feed(html)
        self.close()
        assert not self._open, "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute twice in {tag}"
        element = {"tag": tag, "text": "", "inside": [e["tag"] for e in self._open], "parts": [], **dict(attrs)}
        self.elements.append(element)
        if self._open:
            self._open[-1]["parts"].append(element)
        if tag not in self.VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()["tag"] == tag, f"{tag} closes something else"

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element["text"] += data
        if self._open:
            self._open[-1]["parts"].append(data)
        answered = any(
            e.get("data-from") or e.get("data-quoted") or e["tag"] in ("style", "script")
            or e.get("class") in ("ticks", "command") for e in self._open
        )  # fmt: skip
        if re.search(r"\d", data) and not answered:
            self.loose.append(data)

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [e for e in self.elements if e["tag"] == tag]


def within(element: dict[str, Any], tag: str) -> Iterator[dict[str, Any]]:
    """All elements of a tag in an element, in the order of the page."""
    for part in element["parts"]:
        if isinstance(part, dict):
            if part["tag"] == tag:
                yield part
            yield from within(part, tag)


def said(element: dict[str, Any], but: tuple[str, ...] = ()) -> str:
    """What an element says, each figure as <the path that it is of>: what stands at the path is the business of `agrees`."""

    def told(e: dict[str, Any]) -> str:
        if e.get("data-from"):
            return f"<{e['data-from']}>"
        if e["tag"] in but or e.get("data-quoted") or e.get("class") == "ticks":
            return " "
        inner = "".join(part if isinstance(part, str) else told(part) for part in e["parts"])
        return f" {inner} " if BLOCK.fullmatch(e["tag"]) else inner

    return " ".join(told(element).split())


def read(folder: Path, result: Path) -> dict[str, Any]:
    """The files of a run that figures come from, and those of `result`, read without the program."""
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    events: dict[str, Any] = {e["type"]: e for e in lines}
    events |= {kind: {str(e["step"]): e for e in lines if e["type"] == kind} for kind in ("step", "eval")}
    return {
        "": json.loads(result.read_text()),
        "run.json": json.loads((folder / "run.json").read_text()),
        "check.json": json.loads((folder / "data" / "check.json").read_text()),
        "events": events,
        "exports": exports(lines),
        "stats": {"LEVEL": stats.LEVEL, "POWER": stats.POWER, "RESAMPLES": stats.RESAMPLES, "FEWEST": stats.FEWEST},
        "codes": CODES,
    }


def exports(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events of exports, the newest first and one of each folder, with its date and the certificate that lies there."""
    found: list[dict[str, Any]] = []
    for event in reversed(lines):
        if event["type"] == "export" and event["path"] not in [e["path"] for e in found]:
            when = datetime.fromtimestamp(event["time"]).isoformat(" ", "minutes")
            path = Path(event["path"]) / "parity.json"
            found.append({**event, "when": when, "parity": json.loads(path.read_text()) if path.exists() else None})
    return found


def at(files: dict[str, Any], path: str) -> Any:
    """What stands at a path of the page, as `report` documents paths. Raises KeyError or IndexError where nothing does."""
    source, _, rest = path.partition(":") if path.split(":")[0] in files else ("", "", path)
    value = files[source]
    if "#" in rest:
        rest, _, code = rest.partition("#")
        found = at(files, f"{source}:{rest}" if source else rest) if rest else value
        return len([each for each in found if not code or code in each["codes"]])
    if rest.startswith(("about.", "better.")):  # names of metrics may have dots
        name, _, rest = rest.partition(".")
        return value[name][rest]
    for part in rest.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def number(text: str) -> tuple[float, float]:
    """The number that a text says, and half a unit of its last digit."""
    percent = text.endswith("\u00a0%")
    plain = Decimal(text.removesuffix("\u00a0%").replace("−", "-").replace(",", ""))
    unit = Decimal(10) ** int(plain.as_tuple().exponent) / (100 if percent else 1)
    return float(plain / (100 if percent else 1)), float(unit / 2) * (1 + 1e-9)


def agrees(shown: str, value: Any) -> bool:
    """Whether a text says the value: a number to its last digit, a list number by number, a text word by word (or its end)."""
    if isinstance(value, list):
        parts = shown.split()
        return len(parts) == len(value) and all(map(agrees, parts, value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            said, unit = number(shown)
        except InvalidOperation:
            return False
        return abs(said - value) <= unit
    words = [re.sub(r"[\W_]", "", text) for text in (shown, str(value))]
    if not words[0]:
        return shown.strip() == str(value).strip()
    return words[1].endswith(words[0]) or (len(shown) == LONGEST and words[1].startswith(words[0]))


def wrong(html: str, files: dict[str, Any]) -> list[str]:
    """What the page says and the files do not."""
    page = Page(html)
    found = [f"nobody answers for {text!r}" for text in page.loose if text not in files["run.json"]["recipe"]]
    for e in page.elements:
        if path := e.get("data-from"):
            try:
                value = at(files, path)
            except (KeyError, IndexError, TypeError):
                found.append(f"{path}: nothing is there")
                continue
            if not agrees(e["text"], value):
                found.append(f"{path}: {e['text']!r} is not {value!r}")
            if e["tag"] == "data" and float(e["value"]) != value:
                found.append(f"{path}: value {e['value']} is not {value!r}")
        if path := e.get("data-quoted"):
            for quote in re.findall("“(.*?)”", e["text"]):
                if quote not in at(files, path):
                    found.append(f"{path}: does not say {quote!r}")
    return found
