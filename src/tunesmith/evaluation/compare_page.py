"""Runs against one another as a picture (SVG) or a page (HTML): one file, without outside parts, light and dark."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from tunesmith.data.write import refuse_output, write_bytes
from tunesmith.errors import DataError, UsageError
from tunesmith.evaluation.compare import Table, steep
from tunesmith.evaluation.report import ticks
from tunesmith.evaluation.stats import Comparison
from tunesmith.models import STARTER

WIDTH, PLOT, LEFT, RIGHT, TOP = 760, 300, 56, 30, 22  # of the picture, in pixels; PLOT: down to the axis
LEGEND = 18  # pixels of a line of it
COLOURS = 8  # of curves.svg.jinja; further lines are dashed
DASHES = ("", "6 4", "2 4", "10 3 2 3")


def refuse(path: Path) -> None:
    """UsageError unless the path can become a page or a picture."""
    if path.suffix not in (".html", ".svg"):
        raise UsageError("a page or a picture?", where=str(path), fix="name it .html or .svg")
    refuse_output(path)


def write(found: Table, path: Path) -> None:
    """Write the page or, as .svg, the picture of the curves alone. Raises DataError where there is no curve to draw."""
    environment = Environment(
        loader=FileSystemLoader([Path(__file__).parent, STARTER.parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["signed"] = lambda value: f"{value:+.4f}"
    drawn = chart(found)
    if path.suffix == ".html":
        page = environment.get_template("compare.html.jinja").render(found=found, chart=drawn, metrics=by_metric(found))
    elif drawn:
        page = str(environment.get_template("curves.svg.jinja").module.curves(drawn)).lstrip()  # type: ignore[attr-defined]
    else:
        raise DataError("no curve: none of the runs has two validations", fix="name the file .html for the rest")
    write_bytes(path, page.encode("utf-8", "replace"))


def by_metric(found: Table) -> dict[str, list[tuple[str, Comparison]]]:
    """Each metric of the runs' own evaluations, with (letter, figures) of each run that has it."""
    metrics: dict[str, list[tuple[str, Comparison]]] = {}
    for entry in found.runs:
        for metric in entry.metrics:
            metrics.setdefault(metric.metric, []).append((entry.letter, metric))
    return metrics


def chart(found: Table) -> dict[str, Any]:
    """Geometry of the picture: lines in pixels, ticks, the legend; {} where there are no two steps to be seen."""
    curves = [entry.curve for entry in found.runs]
    every = [point for curve in curves for point in curve]
    if len({step for step, _ in every}) < 2:
        return {}
    logarithmic = steep(curves)
    left, right = min(step for step, _ in every), max(step for step, _ in every)
    low, high = min(loss for _, loss in every), max(loss for _, loss in every)
    room = 0.0 if logarithmic else 0.05 * (high - low) or 0.5
    low, high = low - room, high + room

    def scale(loss: float) -> float:
        return math.log(loss) if logarithmic else loss

    def x(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (step - left) / (right - left), 1)

    def y(loss: float) -> float:
        return round(TOP + (PLOT - TOP) * (scale(high) - scale(loss)) / (scale(high) - scale(low)), 1)

    lines = []
    for number, entry in enumerate(found.runs):
        points = [(x(step), y(loss), step, loss) for step, loss in entry.curve]
        name = "".join(sign if sign.isprintable() else "�" for sign in entry.run)
        said = "" if entry.best_loss is None else f" · {entry.best_loss:.4f} at step {entry.best_step}"
        lines.append(
            {
                "letter": entry.letter,
                "name": name if len(name) <= 70 else "…" + name[-69:],
                "said": said or " · no validation",
                "colour": number % COLOURS,
                "dash": DASHES[number // COLOURS % len(DASHES)],
                "best": entry.best_step,
                "points": points,
                "path": " ".join(f"{px},{py}" for px, py, *_ in points),
                "legend": PLOT + 52 + LEGEND * number,
            }
        )
    marks = _powers(low, high) if logarithmic else ticks(low, high)
    return {
        "width": WIDTH,
        "height": PLOT + 62 + LEGEND * (len(lines) - 1),
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "base": PLOT,
        "steep": logarithmic,
        "lines": lines,
        "x_ticks": [(x(t), f"{t:g}") for t in ticks(left, right)],
        "y_ticks": [(y(t), f"{t:g}") for t in marks],
    }


def _powers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from low to high, over four powers the powers alone."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [
        m * 10.0**k
        for k in range(first, last + 1)
        for m in ((1,) if last - first > 4 else (1, 2, 5))
        if low <= m * 10.0**k <= high
    ]
