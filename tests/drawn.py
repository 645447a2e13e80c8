"""What a report's page draws, each interval and line computed anew from the files; and all that is wrong on a page."""

from __future__ import annotations

import re
from collections.abc import Callable
from statistics import fmean
from typing import Any

from placed import MARKS, Expected, misplaced
from reading import Page, at, within, wrong

Point = tuple[float, float]


def mistakes(html: str, files: dict[str, Any]) -> list[str]:
    """All that a page says or draws and the files do not: figures, the words that they stand under, pictures."""
    page = Page(html)
    return wrong(html, files) + misplaced(page, files) + misdrawn(page, files)


def misdrawn(page: Page, files: dict[str, Any]) -> list[str]:
    """Drawings that are not what the figures say: intervals, lines of losses and of rows, colours, what a column is sorted by."""
    want, sections = Expected(files), {e.get("id"): e for e in page.all("section")}
    found = _overall(page, sections["verdict"], want)
    for name, path in (("metrics", "metrics"), ("canary", "canary.metrics"), ("judge", "judge.comparison")):
        metrics = (at(files, path) if files[""][name] else None) or []
        rows = [row for row in within(sections[name], "tr") if list(within(row, "details"))] if metrics else []
        for row, m in zip(rows, metrics if isinstance(metrics, list) else [metrics], strict=True):
            pictures = list(within(row, "svg"))
            if len(pictures) != (m["low"] is not None):
                found.append(f"{m['metric']}: {len(pictures)} pictures")
            found += [
                f"{m['metric']}: {each}" for svg in pictures for each in _interval(svg, m, want.sign(m) or 1, 1.08)
            ]
            keys = [e["data-key"] for e in within(row, "td") if "data-key" in e]
            if keys != [str({"worse": 0, "cannot tell": 1, "better": 2}.get(m["verdict"], -1))]:
                found.append(f"{m['metric']}: is sorted by {keys}")
            classes = [
                set(e["class"].split())
                for tag in ("svg", "span")
                for e in within(row, tag)
                if e.get("class", "").split()[:1] in (["forest"], ["word"])
            ]
            found += [
                f"{m['metric']}: looks like {each}"
                for each in classes
                if each & set(MARKS) != {m["verdict"]} & {"better", "worse"}
            ]
    if files[""]["training_rows"]:
        found += _sparks(sections["rows"], files[""]["training_rows"]["findings"])
    return found + (_lines(sections["curves"], files["events"]) if "curves" in sections else [])


def _overall(page: Page, section: dict[str, Any], want: Expected) -> list[str]:
    m, kind = want.result["metrics"][0], (want.result["verdict"] or "cannot").split()[0]
    found = (
        []
        if page.all("title")[0]["text"].startswith(want.result["verdict"] or "no verdict")
        else ["the title has another verdict"]
    )
    found += [
        f"{e['tag']} looks like {e['class']}"
        for e in (section, *within(section, "h1"))
        if kind not in e["class"].split()
    ]
    pictures = list(within(section, "svg"))
    if len(pictures) != (m["low"] is not None):
        return [*found, "the verdict's interval is not drawn once"]
    return found + [f"the verdict: {each}" for svg in pictures for each in _interval(svg, m, want.sign(m) or 1, 1.45)]


def _interval(svg: dict[str, Any], m: dict[str, Any], way: int, room: float) -> list[str]:
    """Zero in the middle, `room` times the farthest figure at the edges, better to the right."""
    width = float(svg["viewbox"].split()[2])
    unit = width / 2 / (room * max(abs(m["low"]), abs(m["high"]), abs(m["difference"]), m["detectable"] or 0.0) or 1.0)
    low, high = sorted(width / 2 + way * unit * m[end] for end in ("low", "high"))
    miss = min(unit * (m["detectable"] or 0.0), width / 2)
    drawn = [(e.get("class"), float(e["x1"]), float(e["x2"])) for e in within(svg, "line")]
    drawn += [(e.get("class"), float(e["cx"]), float(e["cx"])) for e in within(svg, "circle")]
    drawn += [(e.get("class"), float(e["x"]), float(e["x"]) + float(e["width"])) for e in within(svg, "rect")]
    want = [("axis", width / 2, width / 2), ("bar", low, high)] + [("bar", x, x) for x in (low, high)] * (width > 200)
    point = width / 2 + way * unit * m["difference"]
    want += [("point", point, point), ("miss", width / 2 - miss, width / 2 + miss)]
    alike = [a[0] for a in drawn] == [b[0] for b in want] and same(
        [[a[1:] for a in drawn]], [[b[1:] for b in want]], 0.2
    )
    return [] if alike else [f"{drawn} is drawn, not {want}"]


def _sparks(section: dict[str, Any], findings: list[dict[str, Any]]) -> list[str]:
    """A line through a row's losses: 80 pixels wide, its highest loss 18 above zero."""
    rows = [row for row in within(section, "tr") if list(within(row, "td"))]
    found = []
    for row, f in zip(rows, findings, strict=True):
        losses, (cell,) = f["losses"], [e for e in within(row, "td") if e.get("data-label") == "loss by epoch"]
        drawn = [points(e) for e in within(cell, "polyline")]
        apart = 80 / max(1, len(losses) - 1)
        want = [[(2 + apart * i, 20 - 18 * loss / max(losses)) for i, loss in enumerate(losses)]] if losses else []
        if not same(drawn, want, 0.51) or cell.get("data-key") != (repr(losses[-1]) if losses else None):
            found.append(f"{f['source']}: {drawn} is drawn, not {want}, and {cell.get('data-key')} sorted by")
    return found


def _lines(section: dict[str, Any], events: dict[str, Any]) -> list[str]:
    """Lines and points of the charts, by the scale that a reader has: the ticks of the axes."""
    losses, *others = [e for e in within(section, "svg") if e.get("class") == "curve"]
    ticks = [
        (e["text"], e)
        for g in within(losses, "g")
        if g.get("class") == "ticks"
        for e in within(g, "text")
        if re.fullmatch(r"[\d.e-]+", e["text"])
    ]
    x = scale([(float(t), float(e["x"])) for t, e in ticks if e["text-anchor"] == "middle"])
    y = scale([(float(t), float(e["y"]) - 4) for t, e in ticks if e["text-anchor"] == "end"])
    if x(0) > x(1) or y(0) < y(1):
        return ["more is to the left, or below"]
    step, valid = (
        [(e["step"], e["loss"]) for e in events.get(kind, {}).values() if e["loss"] is not None]
        for kind in ("step", "eval")
    )
    many = max(1, len(step) // 20)
    smooth = [(s, fmean(loss for _, loss in step[max(0, i - many + 1) : i + 1])) for i, (s, _) in enumerate(step)]
    found = []
    for name, line in (("raw", step), ("train", smooth), ("valid", valid)):
        (drawn,) = [points(e) for e in within(losses, "polyline") if e["class"] == name]
        if len(line) <= 200 and not same([drawn], [[(x(s), y(v)) for s, v in line]], 0.6):
            found.append(f"the line {name} is {drawn}")
    stops = [(float(e["cx"]), float(e["cy"])) for e in within(losses, "circle")]
    names = [e["text"].strip() for g in within(losses, "g") if g.get("class") == "stop" for e in within(g, "text")]
    if len(valid) <= 30 and (not same([stops], [[(x(s), y(v)) for s, v in valid]], 0.6) or len(names) != len(valid)):
        found.append(f"the validations are {stops}")
    best = [s for s, e in ((e["step"], e) for e in events.get("eval", {}).values()) if e["best"]][-1:]
    bars = [float(e[end]) for e in within(losses, "line") if e["class"] == "best" for end in ("x1", "x2")]
    if not same([[(b, 0.0) for b in bars]], [[(x(s), 0.0) for s in best * 2]], 0.6):
        found.append(f"the best step is at {bars}")
    rates = [(e["step"], e["lr"]) for e in events.get("step", {}).values()]
    top, base = max(rate for _, rate in rates), float(next(within(others[0], "line"))["y1"])
    (drawn,) = [points(e) for e in within(others[0], "polyline")]
    if len(rates) <= 200 and not same([drawn], [[(x(s), base - 66 * rate / top) for s, rate in rates]], 0.6):
        found.append(f"the learning rates are {drawn}")
    return found


def points(polyline: dict[str, Any]) -> list[Point]:
    return [(float(x), float(y)) for x, y in (point.split(",") for point in polyline["points"].split())]


def same(drawn: list[list[Point]], want: list[list[Point]], pixels: float) -> bool:
    """Whether as many lines of as many points are drawn, each as near to where it should be."""
    if list(map(len, drawn)) != list(map(len, want)):
        return False
    one, other = ([value for line in lines for point in line for value in point] for lines in (drawn, want))
    return all(abs(a - b) <= pixels for a, b in zip(one, other, strict=True))


def scale(ticks: list[Point]) -> Callable[[float], float]:
    """From values to pixels, by the first and the last tick of an axis; the others stand between them where they should."""
    (low, first), (high, last) = ticks[0], ticks[-1]

    def pixel(value: float) -> float:
        return first + (value - low) * (last - first) / (high - low)

    assert all(abs(pixel(value) - where) <= 0.2 for value, where in ticks), "the ticks are no scale"
    return pixel
