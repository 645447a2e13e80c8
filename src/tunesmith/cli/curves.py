"""Losses as a picture in a terminal: a sparkline for the live line, a chart for a run that is looked at."""

from __future__ import annotations

from collections.abc import Sequence

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
    every = [*training, *validation]
    if len({x for x, _ in every}) < 2:
        return []
    left, right = min(x for x, _ in every), max(x for x, _ in every)
    low, high = min(y for _, y in every), max(y for _, y in every)

    def place(x: float, y: float, across: int, down: int) -> tuple[int, int]:
        share = (high - y) / (high - low) if high > low else 0.5
        return round((x - left) / (right - left) * (across - 1)), round(share * (down - 1))

    cells = [[0] * width for _ in range(height)]
    for x, y in training:
        column, row = place(x, y, 2 * width, 4 * height)
        cells[row // 4][column // 2] |= _DOTS[column % 2][row % 4]
    lines = [[chr(0x2800 + dots) if dots else " " for dots in row] for row in cells]
    best = min(validation, key=lambda point: point[1], default=None)
    for point in sorted(validation, key=lambda point: point == best):
        column, row = place(*point, width, height)
        lines[row][column] = "●" if point == best else "○"
    labels = {0: f"{high:.3g}", height - 1: f"{low:.3g}"}
    margin = max(map(len, labels.values()))
    found = [f"{labels.get(i, ''):>{margin}} ┤{''.join(line).rstrip()}" for i, line in enumerate(lines)]
    ends = f"{left:g}{f'step {right:g}':>{width - len(f'{left:g}')}}"
    return [*found, f"{'':{margin}} └{'─' * width}", f"{'':{margin}}  {ends}"]


def of_run(steps: Sequence[dict[str, float]], evals: Sequence[dict[str, float]], width: int = 60) -> list[str]:
    """The chart of a run's events, with what its marks mean; empty where there is too little to see."""
    lines = chart([(e["step"], e["loss"]) for e in steps], [(e["step"], e["loss"]) for e in evals], width)
    legend = "loss: ⠢ training" + ("  ○ validation  ● its lowest" if evals else "")
    return [legend, *lines] if lines else []
