"""report.html: what an evaluation found, in one file without outside parts that runs no script but its own.

Every figure on the page is written by `Figures`, which reads it from the files of the run by a path and leaves that path in the
element's `data-from`, so that the page cannot say what the files do not:

    metrics.0.base            in evaluation/result.json; training_rows.findings# is how many there are
    run.json:plan.rows.train  in run.json; check.json:0.message in data/check.json
    events:eval.51.loss       of the event of that kind at that step; events:done.seconds of the last one of that kind
    exports:0.quantize        of the newest event "export" (the last of each folder), `when` its time as a date;
                              exports:0.parity.runtime in the parity.json that lies there now
    stats:LEVEL, codes:…      constants of evaluation/stats.py and the codes of evaluation/rowreport.py

A number is rounded to two significant digits of its uncertainty; `value` has all of it.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
import shlex
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from tunesmith.conversation import harmless
from tunesmith.data.write import write_bytes
from tunesmith.evaluation import stats
from tunesmith.evaluation.diagnosis import ANSWERS
from tunesmith.evaluation.marking import LONGEST, marked, named, shared
from tunesmith.evaluation.result import Evaluation
from tunesmith.evaluation.rowreport import CODES, FIRST
from tunesmith.evaluation.stats import Comparison
from tunesmith.models import STARTER
from tunesmith.recipe import fields
from tunesmith.runs import Run

ASSETS = STARTER.parent
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 760, 320, 56, 14, 46, 24  # of the chart of losses, in pixels
RATES = 96  # pixels, of the chart of learning rates
DRAWN = 400  # points of a line: half of the chart's pixels
STOPS = 30  # validations that the keyboard stops at; the table has all
SCROLLS = 700  # characters of an answer, from which on its box may scroll and has to be reached by keyboard
ISSUES = 50  # findings about the data that are listed
ORDER = {"worse": 0, "cannot tell": 1, "better": 2}  # in which verdicts are sorted
_COUNT = re.compile(r"([\w.]*)#(\w*)")
_FLAG = re.compile(r"(--[a-z][a-z-]+(?: \d[\w.,]*)?)")


def write_report(run: Run, result: Evaluation, path: Path) -> None:
    """Render the report of a run and an evaluation into a file."""
    sources = _sources(run, result)
    env = Environment(
        loader=FileSystemLoader([Path(__file__).parent, ASSETS]), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    told = Figures(sources)
    style, script = ((ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    recipe = sources["run.json"]["recipe"]
    issues = sources["check.json"]
    html = env.get_template("report.html.jinja").render(
        run=run,
        result=result,
        judge=result.judge,
        few=result.answered < ANSWERS,
        fig=told.number,
        text=told.text,
        answer=told.answer,
        flags=flags,
        breakable=breakable,
        digits=digits,
        forest=forest,
        spark=spark,
        better=lambda m: direction(result, m),
        order=ORDER,
        fewest=stats.FEWEST,
        shown=FIRST,
        issues=issues[:ISSUES] if issues is not None else None,
        codes=Counter(code for row in result.training_rows.findings for code in row.codes)
        if result.training_rows
        else {},
        chart=chart(run.metrics("step"), run.metrics("eval"), run.summary()["best_step"]),
        events=sources["events"],
        exports=sources["exports"],
        settings=[name for name in fields() if recipe.get(name) not in (None, {})],
        manifest=sources["run.json"],
        commands=commands(run, result, path, recipe.get("dataset") or "DATASET"),
        style=Markup(style),
        script=Markup(script),
        hashes=[base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (style, script)],
    )
    write_bytes(path, html.encode("utf-8", "replace"))


def commands(run: Run, result: Evaluation, path: Path, dataset: str) -> dict[str, str]:
    """What to type: to have this evaluation again, and to drop rows: the contradicting ones, else those of the commonest code."""
    found = Counter(code for row in result.training_rows.findings for code in row.codes) if result.training_rows else {}
    again = f"tunesmith evaluate {run:q}"
    if path.parent != run.path:  # not the run's own evaluation: two models, or other rows
        sides = (("--model", result.tuned), ("--against", result.base), ("--dataset", result.dataset))
        again += "".join(f" {flag} {shlex.quote(value)}" for flag, value in sides)
    again += "".join(f" --{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in result.options.items())
    code = "contradicting" if "contradicting" in found else max(found, key=lambda c: found[c], default="")
    drop = f"tunesmith data convert {shlex.quote(dataset)} -o clean.jsonl --drop-codes {code} --run {run:q}"
    return {"again": harmless(again), "drop": harmless(drop) if code else "", "code": code}


def direction(result: Evaluation, m: Comparison) -> int:
    """1 where higher is better, -1 where lower is, 0 where it is not known (of results kept before it was written down)."""
    word = result.better.get(m.metric)
    if word is None and m.metric.startswith("loss"):  # of the canary, or kept before it was written down
        return -1
    if word is None and m.verdict in ("better", "worse"):
        return 1 if (m.difference > 0) == (m.verdict == "better") else -1
    return {"higher": 1, "lower": -1, None: 0}[word]


def flags(text: str) -> Markup:
    """An advice with its options set as code."""
    parts = _FLAG.split(harmless(text))
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts))


def breakable(text: str) -> Markup:
    """A text that may be broken after its slashes: a path that is cut within a name is hard to read."""
    shown = escape(text)
    return Markup(str(shown).replace("/", "/<wbr>")) if "/" in text else shown


# ---- figures


def _sources(run: Run, result: Evaluation) -> dict[str, Any]:
    """What figures are read from, by the name before the colon; "" is the result."""
    check = run / "data" / "check.json"
    events: dict[str, Any] = {e["type"]: e for e in run.events()}
    for kind in ("step", "eval"):
        events[kind] = {str(e["step"]): e for e in run.metrics(kind)}
    return {
        "": msgspec.to_builtins(result),
        "run.json": run.manifest(),
        "check.json": msgspec.json.decode(check.read_bytes()) if check.exists() else None,
        "events": events,
        "exports": exports(run),
        "stats": vars(stats),
        "codes": CODES,
    }


class _Check(msgspec.Struct):
    name: str
    passed: bool
    found: str
    limit: str
    cause: str


class _Certificate(msgspec.Struct):
    """What the page says of a parity.json."""

    deployable: bool
    run: str | None
    runtime: str
    checks: list[_Check]


def exports(run: Run) -> list[dict[str, Any]]:
    """The run's exports, newest first, each with its certificate as it is now: None where it is gone."""
    newest: dict[str, Any] = {}
    for event in reversed(list(run.events("export"))):
        newest.setdefault(event["path"], event)
    return [e | {"when": _minute(e["time"]), "parity": _certificate(run, Path(e["path"]))} for e in newest.values()]


def _minute(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _certificate(run: Run, folder: Path) -> dict[str, Any] | None:
    """None too where the folder holds an export of another run by now."""
    try:
        found = msgspec.json.decode((folder / "parity.json").read_bytes(), type=_Certificate)
    except (OSError, msgspec.MsgspecError):
        return None
    maker = Path(found.run) if found.run else run.path
    return None if maker.exists() and not maker.samefile(run.path) else msgspec.to_builtins(found)


class Figures:
    """Writes what stands at a path of the sources, and where it stands."""

    def __init__(self, sources: dict[str, Any]) -> None:
        self._sources = sources

    def at(self, path: str) -> Any:
        """The value at a path, None where there is none. Keys may have dots: the longest that fits is taken."""
        name, colon, rest = path.partition(":")
        if not colon or name not in self._sources:
            name, rest = "", path
        if count := _COUNT.fullmatch(rest):
            found = _walk(self._sources[name], count[1]) or []
            return sum(count[2] in each["codes"] for each in found) if count[2] else len(found)
        return _walk(self._sources[name], rest)

    def number(
        self, path: str, places: int | None = None, signed: bool = False, percent: bool = False, tag: str = "data"
    ) -> Markup:
        """A number with so many digits after the point, else with four significant ones at most. `tag`: tspan in a picture."""
        value = self.at(path)
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            return Markup("–")
        shown = written(100 * value if percent else value, places, signed) + ("\u00a0%" if percent else "")
        return _element(tag, path, shown, f' value="{value!r}"' if tag == "data" else "")

    def text(self, path: str, without: str = "") -> Markup:
        """A text as it is, but for the folder `without` that it begins with."""
        value = self.at(path)
        shown = harmless(str(value).removeprefix(without)) if value is not None else ""
        return _element("bdi", path, breakable(shown)) if shown else Markup("–")

    def answer(self, path: str, other: str = "", name: str = "") -> Markup:
        """A model's answer, with what it shares with another text, or a name, marked; its first LONGEST characters."""
        whole = harmless(str(self.at(path) or ""))
        text = whole[:LONGEST]
        if not text.strip():
            return Markup('<p class="text soft">(nothing)</p>')
        spans = named(text, name) if name else shared(text, other) if other else []
        scrolls = ' tabindex="0"' if len(text) > SCROLLS else ""
        html = _element("p", path, marked(text, spans), f' class="text" dir="auto"{scrolls}')
        if other and spans:
            said = "; ".join(f"“{text[a:b]}”" for a, b in spans[:12])
            html += Markup('<p class="hidden" data-quoted="{}">In common with the reference: {}</p>').format(path, said)
        if len(whole) > LONGEST:
            html += Markup('<p class="soft">cut here; all of it is in result.json</p>')
        return html


def _element(tag: str, path: str, content: str, attributes: str = "") -> Markup:
    """Not by Markup.format, which takes three times as long: a report may have ten thousand of them."""
    return Markup(f'<{tag}{attributes} data-from="{escape(harmless(path))}">{escape(content)}</{tag}>')


def _walk(value: Any, path: str) -> Any:
    if not path or value is None:
        return value
    head, _, rest = path.partition(".")
    if isinstance(value, list | tuple):
        return _walk(value[int(head)], rest) if head.isdigit() and int(head) < len(value) else None
    while isinstance(value, dict):
        if head in value:
            return _walk(value[head], rest)
        if not rest:
            return None
        more, _, rest = rest.partition(".")
        head = f"{head}.{more}"
    return None


def written(value: float, places: int | None = None, signed: bool = False) -> str:
    """A number as text: 1,234 · −0.78 · 0.0005. The minus is the sign for it, which screen readers read out."""
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    sign = "+" if signed and value else ""
    if isinstance(value, int):
        shown = f"{value:{sign},}"
    elif places is None or abs(value) >= 1e6:
        shown = f"{value:{sign}.4g}"
    else:
        shown = f"{value:{sign},.{places}f}"
    return shown.replace("-", "−") if not shown.count("e") else shown.replace("-", "−", int(value < 0))


def digits(m: Comparison) -> int:
    """Digits after the point that show two significant ones of half the interval: 2 for ±0.25, 0 for ±50. Without an interval
    those that show three of the larger figure."""
    scale = (m.high - m.low) / 20 if m.low is not None and m.high is not None else 0.0
    scale = scale or max(abs(m.base), abs(m.tuned)) / 100
    return min(6, max(0, -math.floor(math.log10(scale)))) if scale and math.isfinite(scale) else 0


# ---- pictures


def forest(m: Comparison, better: int, width: int = 200, room: float = 1.08) -> dict[str, float]:
    """An interval in pixels, zero in the middle and better to the right: `low`, `high` its left and right end, `point`, and
    `miss`, half the width of the band of differences that are found in fewer than 80 % of cases. {} where there is none."""
    if m.low is None or m.high is None or not math.isfinite(m.difference):
        return {}
    half = room * max(abs(m.low), abs(m.high), abs(m.difference), m.detectable or 0.0) or 1.0
    scale = width / 2 / half
    low, high = sorted((better or 1) * side for side in (m.low, m.high))
    return {
        "width": width,
        "zero": width / 2,
        "low": round(width / 2 + low * scale, 1),
        "high": round(width / 2 + high * scale, 1),
        "point": round(width / 2 + (better or 1) * m.difference * scale, 1),
        "miss": round(min((m.detectable or 0.0) * scale, width / 2), 1),
    }


def spark(losses: list[float], width: int = 84, height: int = 22) -> str:
    """The points of a line through a row's losses, from zero to the highest of them."""
    top = max([loss for loss in losses if math.isfinite(loss)], default=0.0) or 1.0
    step = (width - 4) / max(1, len(losses) - 1)
    return " ".join(
        f"{2 + i * step:.0f},{2 + (height - 4) * (1 - max(0.0, v) / top):.1f}"
        for i, v in enumerate(losses)
        if math.isfinite(v)
    )


def chart(steps: list[dict[str, Any]], evals: list[dict[str, Any]], best: int | None) -> dict[str, Any]:
    """Geometry of the charts of loss and learning rate by step: lines in pixels, ticks, the best step; {} without losses."""
    train, valid = _points(steps, "loss"), _points(evals, "loss")
    losses = [loss for _, loss in train + valid]
    if not losses:
        return {}
    low, high, last = min(losses), max(losses), max([step for step, _ in train + valid] + [1])
    low, high = max(0.0, low - 0.05 * (high - low)), high + 0.05 * (high - low) + 1e-9

    def x(step: float) -> float:
        return float(round(LEFT + (WIDTH - LEFT - RIGHT) * step / last, 1))

    def y(loss: float) -> float:
        return float(round(TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low), 1))

    def line(points: list[tuple[int, float]]) -> str:
        return " ".join(f"{x(s)},{y(v)}" for s, v in points)

    rates = _points(steps, "lr")
    peak = max(rates, key=lambda point: point[1], default=(0, 0.0))
    every = max(1, math.ceil(len(valid) / STOPS))
    best_loss = next((v for s, v in valid if s == best), None)
    seen = [s for s, _ in valid] or [s for s, _ in train[:: max(1, math.ceil(len(train) / STOPS))]]
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "top": TOP,
        "base": HEIGHT - BOTTOM,
        "raw": line(extremes(train)),
        "train": line(smooth(train)[:: max(1, math.ceil(len(train) / DRAWN))]),
        "valid": line(extremes(valid)),
        "points": [(x(s), y(v), s, v) for i, (s, v) in enumerate(valid) if i % every == 0 or s in (best, valid[-1][0])],
        "x_ticks": [(x(t), f"{t:g}") for t in ticks(0, last)],
        "y_ticks": [(y(t), f"{t:g}") for t in ticks(low, high)],
        "steps": seen,
        "best": None
        if best_loss is None or best is None
        else {"x": x(best), "y": y(best_loss), "step": best, "loss": best_loss},
        "rates": " ".join(f"{x(s)},{round(RATES - 8 - (RATES - 30) * v / peak[1], 1)}" for s, v in extremes(rates))
        if peak[1]
        else "",
        "rates_height": RATES,
        "peak": {"x": x(peak[0]), "step": peak[0]},
    }


def _points(events: list[dict[str, Any]], field: str) -> list[tuple[int, float]]:
    """(step, value) of the events that have the value: a loss that is no number is null in the log."""
    found = ((e["step"], e.get(field)) for e in events)
    return [(s, float(v)) for s, v in found if isinstance(v, int | float) and math.isfinite(v)]


def extremes(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The lowest and the highest of each of DRAWN stretches: a peak must not get lost."""
    size = math.ceil(2 * len(points) / DRAWN)
    if size <= 2:
        return points
    parts = (points[i : i + size] for i in range(0, len(points), size))
    return [p for part in parts for p in sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})]


def smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Moving average over a twentieth of the points: single small batches are noise."""
    size, total, found = max(1, len(points) // 20), 0.0, []
    for i, (step, value) in enumerate(points):
        total += value - (points[i - size][1] if i >= size else 0.0)
        found.append((step, total / min(i + 1, size)))
    return found


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers from low to high."""
    raw = (high - low) / 6
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
