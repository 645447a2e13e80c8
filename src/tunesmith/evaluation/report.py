"""report.html: the verdict, the curves, the answers and the settings of a run, in one file without outside parts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import Environment, FileSystemLoader

from tunesmith.conversation import Issue
from tunesmith.data.write import write_bytes
from tunesmith.evaluation.result import Evaluation
from tunesmith.evaluation.stats import FEWEST
from tunesmith.models import STARTER
from tunesmith.recipe import fields
from tunesmith.runs import Run

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 760, 300, 52, 34, 16  # of the chart, in pixels


def write_report(run: Run, result: Evaluation, path: Path) -> None:
    """Render the report of a run and an evaluation into a file."""
    manifest, summary = run.manifest(), run.summary()
    issues = msgspec.json.decode((run / "data" / "check.json").read_bytes(), type=list[Issue])
    env = Environment(
        loader=FileSystemLoader([Path(__file__).parent, STARTER.parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["signed"] = lambda value: "" if value is None else f"{value:+.4f}"
    settings = [(name, manifest["recipe"].get(name), manifest["origin"].get(name, "default")) for name in fields()]
    html = env.get_template("report.html.jinja").render(
        run=str(run),
        result=result,
        fewest=FEWEST,
        summary=summary,
        manifest=manifest,
        issues=issues,
        settings=[s for s in settings if s[1] not in (None, {})],
        chart=chart(run.metrics("step"), run.metrics("eval"), summary["best_step"]),
    )
    write_bytes(path, html.encode())


def chart(steps: list[dict[str, Any]], evals: list[dict[str, Any]], best: int | None) -> dict[str, Any]:
    """Geometry of the loss chart: polylines in pixels, ticks, the best step. Drawn by the template."""
    train = [(e["step"], e["loss"]) for e in steps]
    valid = [(e["step"], e["loss"]) for e in evals]
    losses = [loss for _, loss in train + valid if math.isfinite(loss)]
    if not losses:
        return {}
    low, high, last = min(losses), max(losses), max(train[-1][0] if train else 1, 1)
    low, high = max(0.0, low - 0.05 * (high - low)), high + 0.05 * (high - low) + 1e-9

    def x(step: float) -> float:
        return float(round(LEFT + (WIDTH - LEFT - 12) * step / last, 1))

    def y(loss: float) -> float:
        return float(round(TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low), 1))

    def line(points: list[tuple[int, float]]) -> str:
        return " ".join(f"{x(s)},{y(v)}" for s, v in points)

    best_loss = next((v for s, v in valid if s == best), None)
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - 12,
        "top": TOP,
        "base": HEIGHT - BOTTOM,
        "raw": line(train),
        "train": line(smooth(train)),
        "valid": line(valid),
        "points": [(x(s), y(v), s, v) for s, v in valid],
        "x_ticks": [(x(t), f"{t:g}") for t in ticks(0, last)],
        "y_ticks": [(y(t), f"{t:g}") for t in ticks(low, high)],
        "best": None
        if best_loss is None or best is None
        else {"x": x(best), "y": y(best_loss), "step": best, "loss": best_loss},
    }


def smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Moving average over a twentieth of the points: single small batches are noise."""
    size = max(1, len(points) // 20)
    return [
        (s, sum(v for _, v in points[max(0, i - size + 1) : i + 1]) / len(points[max(0, i - size + 1) : i + 1]))
        for i, (s, _) in enumerate(points)
    ]


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers from low to high."""
    raw = (high - low) / 6
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
