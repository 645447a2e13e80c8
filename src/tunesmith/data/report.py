"""Findings, figures and rows of a data set as pages without outside parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from tunesmith.data.check import Loaded
from tunesmith.data.findings import ORDER, table
from tunesmith.data.stats import Stats
from tunesmith.data.write import write_bytes

ASSETS = Path(__file__).parent.parent / "assets"
SHOWN = 200  # findings of one code on the page


def write_report(path: Path, found: Loaded, word: str, reasons: list[str]) -> None:
    """Write the page. Raises OSError where it cannot be written."""
    kinds = [
        (code, count, [i for i in found.issues if i.code == code][:SHOWN], table()[code])
        for code, count in found.counts.items()
    ]
    kinds.sort(key=lambda kind: (ORDER.index(kind[2][0].severity), -kind[1]))
    html = _page("report.html.jinja", found=found, word=word, reasons=reasons, kinds=kinds)
    write_bytes(path, html)


def write_stats(path: Path, found: Stats) -> None:
    """Write the figures and charts as a page."""
    charts = [
        ("Tokens a row", found.tokens),
        ("Characters of a prompt", found.prompt_characters),
        ("Characters of an answer", found.answer_characters),
        ("Answers a row", found.turns),
    ]
    html = _page("stats.html.jinja", found=found, charts=charts)
    write_bytes(path, html)


def write_preview(path: Path, rows: list[tuple[Any, list[tuple[bool, bool, str]]]], limit: int) -> None:
    """Write rows as the model sees them: (rendered, its (learnt, beyond the cut, text) stretches)."""
    write_bytes(path, _page("preview.html.jinja", rows=rows, limit=limit))


def _page(template: str, **values: Any) -> bytes:
    env = Environment(
        loader=FileSystemLoader([Path(__file__).parent, ASSETS]), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return env.get_template(template).render(**values).encode("utf-8", "replace")
