"""What the trials of the learning-rate search say: a rate, its evidence, and whether the difference is more than noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from tunesmith.evaluation.stats import compare

if TYPE_CHECKING:
    from tunesmith.local.lr_finder import Trial


class Advice(msgspec.Struct, frozen=True):
    """What a search for a learning rate has found."""

    rate: float  # the one to take
    certain: bool  # its lead over the next is more than the noise of these validation rows
    reason: str  # why this one, in words
    rounds: list[list[tuple[float, int, float | None]]]  # of trials, best first: rate, steps, loss (None: diverged)


def advise(rounds: Sequence[Sequence[Trial]]) -> Advice:
    """The best rate of the last round; where it does not lead for certain, the lower of the two, which is the safer one."""
    table = [[(t.rate, t.steps, t.loss() if math.isfinite(t.loss()) else None) for t in trials] for trials in rounds]
    best, second = rounds[-1][0], rounds[-1][1]
    if not math.isfinite(best.loss()):
        return Advice(min(best.rate, second.rate) / 8, False, "every rate diverged: far lower ones are needed", table)
    if math.isfinite(second.loss()):
        worse, better = (np.stack([np.array(t.losses), np.array(t.tokens, float)], 1) for t in (second, best))
        verdict = compare("loss", worse, better, lower_is_better=True)
        words = f"{verdict.difference:+.4f} nats, 95 % interval {verdict.low:+.4f} to {verdict.high:+.4f}, p {verdict.p:.2f}"
        if verdict.verdict != "better":
            lower = min(best.rate, second.rate)
            reason = f"cannot tell {best.rate:.2g} from {second.rate:.2g} on {len(best.losses)} rows ({words}): the lower one"
            return Advice(lower, False, reason, table)
        tried = [trial.rate for trial in rounds[0]]
        if best.rate in (min(tried), max(tried)):
            edge = "lowest" if best.rate == min(tried) else "highest"
            again = f"search again around it: --learning-rate {best.rate:.2g}"
            return Advice(best.rate, False, f"the {edge} that was tried leads ({words}): {again}", table)
        return Advice(best.rate, True, f"better than {second.rate:.2g}: {words}", table)
    return Advice(best.rate, False, f"{second.rate:.2g} diverged, so that nothing is left to compare it with", table)


def chart(advice: Advice) -> str:
    """The trials as an SVG picture: validation loss over the rate (logarithmic), a line for each round."""
    seen = [(r, loss) for trials in advice.rounds for r, _, loss in trials if loss is not None] or [(advice.rate, 0.0)]
    low, high = min(loss for _, loss in seen), max(loss for _, loss in seen)
    left, right = (math.log10(f(r for r, _ in seen)) for f in (min, max))

    def point(rate: float, loss: float) -> tuple[float, float]:
        across = (math.log10(rate) - left) / max(1e-9, right - left)
        return 60 + 500 * across, 30 + 240 * (high - loss) / max(1e-9, high - low)

    parts = []
    for number, trials in enumerate(advice.rounds):
        points = [point(rate, loss) for rate, _, loss in sorted(trials) if loss is not None]
        if not points:
            continue
        colour = ("#9db4d0", "#4f7cac", "#12355b")[min(number, 2)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in points]
        x, y = points[-1]
        parts.append(f'<text x="{x + 8:.1f}" y="{y + 4:.1f}" fill="{colour}">{trials[0][1]} steps</text>')
    for rate in sorted({rate for rate, _ in seen}):
        x, _ = point(rate, low)
        parts.append(f'<text x="{x:.1f}" y="296" text-anchor="middle">{rate:.1e}</text>')
    x, _ = point(advice.rate, low)
    parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="20" y2="278" stroke="#b3412f" stroke-dasharray="4 4"/>')
    parts += [f'<text x="50" y="{y}" text-anchor="end">{v:.2f}</text>' for y, v in ((34, high), (274, low))]
    body = "\n".join(parts)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 330" font-family="sans-serif" font-size="12">'
        f'\n<rect width="660" height="330" fill="white"/>\n{body}\n'
        '<text x="310" y="320" text-anchor="middle">learning rate</text>'
        '<text x="60" y="16">validation loss (nats)</text>\n</svg>\n'
    )
