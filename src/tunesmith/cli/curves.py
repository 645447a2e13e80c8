"""Losses as a picture in a terminal: a sparkline for the live line, a chart for a run that is looked at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

BARS = "▁▂▃▄▅▆▇█"
_DOTS = (
    (0x01, 0x02, 0x04, 0x40),
    (0x08, 0x10, 0x20, 0x80),
)  # of a braille character: two columns of four, top to bottom
Points = Sequence[tuple[float, float]]


def sparkline(values: Sequence[float], width: int) -> str:
    """The values, averaged over `width` stretches of equal length, from the lowest bar to the highest."""
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    means = []
    for i in range(count):
        part = values[i * len(values) // count : (i + 1) * len(values) // count]
        means.append(sum(part) / len(part))
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((m - low) * scale)] for m in means)


def chart(training: Points, validation: Points, width: int = 60, height: int = 10) -> list[str]:
    """Lines of a chart of (step, loss): training as dots, each validation as a ring, the lowest of them as a filled one."""
    area = _area([*training, *validation], width, height)
    if not area:
        return []
    lines = area.dotted(training)
    best = min(validation, key=lambda point: point[1], default=None)
    for point in sorted(validation, key=lambda point: point == best):
        column, row = area.place(*point, width, height)
        lines[row][column] = "●" if point == best else "○"
    return area.framed(lines)


def several(curves: Sequence[Points], marks: str, width: int = 60, height: int = 14, steep: bool = False) -> list[str]:
    """Lines of a chart of several curves: dots from point to point, on some points, the lowest and the last the curve's mark, "*"
    where marks of two meet. `steep`: on a logarithmic scale."""
    area = _area([point for curve in curves for point in curve], width, height, steep)
    if not area:
        return []
    lines = area.dotted([point for curve in curves for point in between(curve, 4 * width)])
    taken: dict[tuple[int, int], str] = {}
    for curve, mark in zip(curves, marks, strict=True):
        best = min(curve, key=lambda point: point[1], default=None)
        for x, y in [*curve[:: max(1, len(curve) // 8)], *curve[-1:], *([best] if best else [])]:
            column, row = area.place(x, y, width, height)
            lines[row][column] = mark if taken.setdefault((row, column), mark) == mark else "*"
    return area.framed(lines)


def between(curve: Points, count: int) -> list[tuple[float, float]]:
    """The points of a curve and about so many on the straight lines from one to the next."""
    found = list(curve[:1])
    parts = max(1, count // max(1, len(curve) - 1))
    for (x, y), (further, then) in pairwise(curve):
        found += [(x + (further - x) * i / parts, y + (then - y) * i / parts) for i in range(1, parts + 1)]
    return found


class _Area:
    """Where points stand in a picture of so many signs."""

    def __init__(self, points: Points, width: int, height: int, steep: bool) -> None:
        self.width, self.height, self.steep = width, height, steep
        self.left, self.right = min(x for x, _ in points), max(x for x, _ in points)
        self.low, self.high = min(y for _, y in points), max(y for _, y in points)

    def place(self, x: float, y: float, across: int, down: int) -> tuple[int, int]:
        """(column, row) of a point among so many."""
        low, high, y = (math.log(v) if self.steep else v for v in (self.low, self.high, y))
        share = (high - y) / (high - low) if high > low else 0.5
        return round((x - self.left) / (self.right - self.left) * (across - 1)), round(share * (down - 1))

    def dotted(self, points: Points) -> list[list[str]]:
        """The signs, each point a dot."""
        cells = [[0] * self.width for _ in range(self.height)]
        for x, y in points:
            column, row = self.place(x, y, 2 * self.width, 4 * self.height)
            cells[row // 4][column // 2] |= _DOTS[column % 2][row % 4]
        return [[chr(0x2800 + dots) if dots else " " for dots in row] for row in cells]

    def framed(self, lines: list[list[str]]) -> list[str]:
        """The signs with their axes."""
        labels = {0: f"{self.high:.3g}", self.height - 1: f"{self.low:.3g}"}
        margin = max(map(len, labels.values()))
        found = [f"{labels.get(i, ''):>{margin}} ┤{''.join(line).rstrip()}" for i, line in enumerate(lines)]
        first = f"{self.left:g}"
        ends = f"{first}{f'step {self.right:g}':>{self.width - len(first)}}"
        return [*found, f"{'':{margin}} └{'─' * self.width}", f"{'':{margin}}  {ends}"]


def _area(points: Points, width: int, height: int, steep: bool = False) -> _Area | None:
    """None where there is no more than a point to see."""
    return _Area(points, width, height, steep) if len({x for x, _ in points}) > 1 else None


def of_run(steps: Sequence[dict[str, float]], evals: Sequence[dict[str, float]], width: int = 60) -> list[str]:
    """The chart of a run's events, with what its marks mean; empty where there is too little to see."""
    lines = chart([(e["step"], e["loss"]) for e in steps], [(e["step"], e["loss"]) for e in evals], width)
    legend = "loss: ⠢ training" + ("  ○ validation  ● its lowest" if evals else "")
    return [legend, *lines] if lines else []
