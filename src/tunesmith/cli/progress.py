"""Progress on stderr: one live line on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import Any

from tunesmith.cli.curves import of_run, sparkline
from tunesmith.errors import counted
from tunesmith.runs import Event, Run

EVERY_SECONDS = 5.0  # between progress lines where the line cannot be rewritten
LEAST = 20  # columns into which a long text is still wrapped


class Progress:
    """Called with each event of a run; draws step, loss, tokens/s and ETA."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._last_line = self._began = time.monotonic()
        self._shown = 0
        self._first: Event | None = None
        self._valid: float | None = None
        self._steps, self._job = 0, ""
        self._losses: list[float] = []
        self.seen = 0  # events

    def __call__(self, run: Run, event: Event) -> None:
        kind = event["type"]
        self.seen += 1
        if not self._steps:
            self._steps = run.manifest()["plan"]["steps"]
            self._say(f"run {run}")
        self._steps = event.get("total_steps", self._steps)
        if kind == "step":
            self._first = self._first or event
            self._losses.append(event["loss"])
            self._step(event)
        elif kind == "eval":
            self._valid = event["loss"]
            name = "base model" if event["step"] == 0 else f"step {event['step']}"
            self._say(f"{name}: validation loss {event['loss']:.4f}")
        elif kind in ("warning", "overfitting"):
            self._say(f"warning: {event['message']}")
        elif kind == "message":
            self._say(event["message"])
        elif kind == "state" and event.get("at") == "service" and not self._job:
            self._job = run.job() or "unknown"
            self._say(f"the job is {self._job}")
        elif kind == "prefix_cache" and event["side"] == "train":
            what = "read from" if event["found"] else "kept in"
            self._say(f"output of the frozen layers is {what} {event['path']}")
        elif kind == "resumed":
            self._say(f"resumed after step {event['step']}")
        elif kind == "done" and "model" in event:
            bill, tokens = run.manifest()["plan"].get("bill") or {}, event["tokens"]
            planned = f" (the plan said {bill['billed_tokens']})" if bill else ""
            said = "" if tokens is None else f", {tokens} tokens{planned}"
            self._say(f"trained {counted(event['step'], 'step')}{said}: {event['model']}")
            self._curves(run)
        elif kind == "done":
            early = f", stopped early (no gain since step {event['best_step']})" if event["stopped_early"] else ""
            self._say(
                f"trained {counted(event['step'], 'step')} "
                f"in {event['seconds']:.0f} s at {event['tokens_per_second']:.0f} tokens/s, "
                f"peak memory {event['peak_memory_mb']} MB; best step {event['best_step']}{early}"
            )
            self._curves(run)

    def _curves(self, run: Run) -> None:
        if self._live:
            width = min(72, shutil.get_terminal_size().columns - 12)
            for line in of_run(run.metrics("step"), run.metrics("eval"), width):
                self._say(line)

    def _step(self, event: Event) -> None:
        assert self._first is not None
        done, now = event["step"], time.monotonic()
        if not self._live and now - self._last_line < EVERY_SECONDS and done != self._steps:
            return
        self._last_line = now
        since, took = done - self._first["step"], event["time"] - self._first["time"]
        eta = [f"ETA {clock(took / since * (self._steps - done))}"] if since else []  # the first step tells nothing
        valid = f"  valid {self._valid:.4f}" if self._valid is not None else ""
        first = f"step {done}/{self._steps}"
        speed = [f"{event['tokens_per_second']:.0f} tokens/s"] if "tokens_per_second" in event else []
        rest = [f"loss {event['loss']:.4f}{valid}", *speed, *eta]
        epoch = f"epoch {event['epoch']:.2f}" if event.get("epoch") is not None else ""
        text = "  ".join(filter(None, [first, epoch, *rest]))
        if self._live:
            text = fit(done / max(1, self._steps), first, epoch, rest, self._losses)
            _write(f"\r{text}{' ' * max(0, self._shown - len(text))}")
            self._shown = len(text)
        else:
            _write(f"{text}\n")

    def _say(self, text: str) -> None:
        if self._live and self._shown:
            _write(f"\r{' ' * self._shown}\r")
            self._shown = 0
        _write(f"{text}\n")

    def close(self) -> None:
        """End the live line."""
        if self._live and self._shown:
            _write("\n")
            self._shown = 0


class Bar:
    """Progress of work on rows: called with their number, the share that is done and what is done; as a context it ends
    its line."""

    def __init__(self) -> None:
        self._live, self._began, self._last, self._shown = sys.stderr.isatty(), time.monotonic(), time.monotonic(), 0
        self._doing = ""

    def __call__(self, rows: int, share: float, doing: str) -> None:
        now = time.monotonic()
        if doing != self._doing:
            self._doing, self._began = doing, now
        if now - self._last < (0.2 if self._live else EVERY_SECONDS):
            return
        self._last, took = now, now - self._began
        eta = took / share * (1 - share) if share else 0.0
        words = [doing, *([f"{rows:,} rows"] if rows else []), f"ETA {clock(eta)}"]
        if self._live:
            text = fit(share, f"{share:4.0%}", "", words)
            _write(f"\r{text}{' ' * max(0, self._shown - len(text))}")
            self._shown = len(text)
        else:
            _write("  ".join([f"{share:.0%}", *words]) + "\n")

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the live line."""
        if self._shown:
            _write(f"\r{' ' * self._shown}\r")
            self._shown = 0


def _write(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal went away: training goes on to its checkpoint
        print(text, end="", file=sys.stderr, flush=True)


def fit(share: float, first: str, epoch: str, rest: list[str], losses: Sequence[float] = ()) -> str:
    """The live line, no wider than the terminal (a line that wraps cannot be rewritten): curve, bar and epoch give way first."""
    width = shutil.get_terminal_size().columns - 1
    plain = "  ".join([first, *rest])
    for text in ("  ".join(filter(None, [first, epoch, *rest])), plain):
        bar = min(20, width - len(text) - 3)
        if bar >= 5:
            full = round(bar * share)
            line = f"[{'█' * full}{'·' * (bar - full)}] {text}"
            curve = sparkline(losses, min(24, width - len(line) - 2)) if len(losses) > 4 else ""
            return f"{line}  {curve}" if len(curve) > 4 else line
    return plain[:width]


def clock(seconds: float) -> str:
    """75 -> "1:15"; 3700 -> "1:01:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def table(rows: list[tuple[Any, ...]], indent: str = "  ") -> str:
    """Rows as aligned columns; numbers to the right. A long last column goes on below itself where a terminal is too narrow."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in texts) for i in range(len(texts[0]))] if texts else []
    numeric = [all(isinstance(row[i], int | float) for row in rows[1:]) for i in range(len(widths))]
    place = len(indent) + sum(2 + width for width in widths[:-1])
    room = shutil.get_terminal_size().columns - place
    if sys.stdout.isatty() and LEAST <= room < max(widths[-1:], default=0):
        below = "\n" + " " * place
        wrapped = (textwrap.wrap(row[-1], room, break_long_words=False, break_on_hyphens=False) for row in texts)
        texts = [[*row[:-1], below.join(lines)] for row, lines in zip(texts, wrapped, strict=True)]
        widths[-1] = 0
    lines = [
        "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)).rstrip()
        for row in texts
    ]
    return "\n".join(indent + line for line in lines)
