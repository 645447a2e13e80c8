"""The findings of a data set as one page without outside parts."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from tunesmith.data.check import Loaded
from tunesmith.data.findings import table
from tunesmith.data.write import write_bytes

ASSETS = Path(__file__).parent.parent / "assets"
SHOWN = 200  # findings of one code on the page


def write_report(path: Path, found: Loaded, word: str, reasons: list[str]) -> None:
    """Write the page. Raises OSError where it cannot be written."""
    env = Environment(
        loader=FileSystemLoader([Path(__file__).parent, ASSETS]), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    kinds = [
        (code, count, [i for i in found.issues if i.code == code][:SHOWN], table()[code])
        for code, count in found.counts.items()
    ]
    kinds.sort(key=lambda kind: (("error", "warning", "info").index(kind[2][0].severity), -kind[1]))
    html = env.get_template("report.html.jinja").render(found=found, word=word, reasons=reasons, kinds=kinds)
    write_bytes(path, html.encode("utf-8", "replace"))
