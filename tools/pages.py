"""Make docs/settings.md, docs/data-findings.md, docs/metrics.md and the help pages of all commands from the code.

`--check` fails when one is not current.

    python tools/pages.py

The help pages are files so that help needs no imports: `train --help` takes 2 times a bare interpreter, not 5.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from tunesmith.cli import COMMANDS, HELP_WIDTH, help_page
from tunesmith.data.findings import table
from tunesmith.evaluation import likelihood, rowreport, stats, tasks
from tunesmith.evaluation.diagnosis import ANSWERS, PITFALLS
from tunesmith.evaluation.metric import Metric
from tunesmith.recipe import fields

SETTINGS = Path(__file__).parent.parent / "docs" / "settings.md"
FINDINGS = SETTINGS.with_name("data-findings.md")
METRICS = SETTINGS.with_name("metrics.md")
VERDICTS = f"""
# Metrics

What `tunesmith evaluate` measures, by `--task`. Made from the tables in `src/tunesmith/evaluation/`. How to use it:
[guides/evaluating.md](guides/evaluating.md).

## Verdicts

Both models are judged on the same held-out rows. A metric is computed from sums over rows, and the difference is tuned - base.

- **Interval**: {100 * stats.LEVEL:.0f} %, by the expanded percentile bootstrap (Efron 1979; Hesterberg 2015): in each of
  {stats.RESAMPLES:,} samples as many rows are drawn with replacement, the same for both models. Where the differences have a long
  tail, widened to the end of Hall's transformed t (1992), which corrects for skewness.
- **Test**: paired permutation (Fisher 1935): in each of {stats.RESAMPLES:,} trials base and tuned change places in a row by the
  throw of a coin.
- **Verdict**: *better* or *worse* where the interval excludes zero, p is at most {stats.SURE}, and there are {stats.FEWEST} rows
  at least; else *cannot tell*. Of two models that are equally good, about {100 * stats.SURE:.0f} % of test sets say so.
- **Rows needed** would settle it in {100 * stats.POWER:.0f} % of cases, if difference and spread are those seen.
  **Detectable** is the difference that would be found in {100 * stats.POWER:.0f} % of cases on rows like these.

The verdict of the whole is that of one metric, the first of these that there is: your own (`--metric`); the loss (per byte
where the two models do not count tokens alike); chrF, where a service tells no likelihoods. The other metrics explain it. Each
has its own error: of thirty that measure nothing, one looks like something.

Rows of which a metric says nothing are left out of it, for both models. What is marked *none* has no interval and no verdict.
"""
NOTES = {  # what is to be said of a task's metrics beside their table
    "domain": "To be read beside the perplexity and chrF of every task.",
    "persona": "Reported with any task where the run has a persona, mined from its training answers or given by `--persona`.",
    "compression": f"Reported with any task where the references have {tasks.EMOJI} emoji each in the mean, or rows name "
    "`original_tokens` in their metadata.",
    "custom": "Only those of every task, and your own: `--metric` takes a function or a regular expression, whose mean over "
    "answers decides.",
}
DIAGNOSES = (
    "What went wrong, by name; a healthy run has none. Those about answers need "
    f"{ANSWERS} of them, those about curves the run's own evaluation."
)


def pages() -> dict[Path, str]:
    """Every made file with its text."""
    made = {SETTINGS: settings(), FINDINGS: findings(), METRICS: metrics()}
    return {**made, **{help_page(name): help_text(name) for name in COMMANDS}}


def help_text(name: str) -> str:
    """What the command's own parser prints for --help."""
    os.environ["COLUMNS"] = str(HELP_WIDTH)
    module, _, function = COMMANDS[name][0].partition(":")
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        getattr(import_module(f"tunesmith.cli.{module}"), function)(["--help"])
    return out.getvalue()


def settings() -> str:
    lines = [
        "# Settings",
        "",
        "Each is a flag of `train` and `plan`, a key of a `--config` file, and a keyword of `ts.train`. Made from `recipe.py`.",
    ]
    group = ""
    for field in fields().values():
        if field.group != group:
            group = field.group
            lines += ["", f"## {group}", "", "| flag | default | meaning |", "|---|---|---|"]
        names = ", ".join(f"`--{n.replace('_', '-')}`" for n in (field.name, *field.aliases))
        default = (
            ""
            if field.default in (None, {})
            else f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"
        )
        choices = f" ({', '.join(field.choices())})" if field.choices() else ""
        lines.append(f"| {names} | {default} | {field.help}{choices} |")
    return "\n".join(lines) + "\n"


def findings() -> str:
    lines = [
        "# Data findings",
        "",
        "What `tunesmith data check`, `plan` and `train` may report. Codes are stable. Errors stop a run (exit status 3); "
        "warnings and notes are shown and",
        "recorded in the run's `data/check.json`. [How a data set is graded and split](data-rules.md). Made from "
        "`facts/findings.toml`.",
        "",
        "| code | severity | meaning | what to do |",
        "|---|---|---|---|",
    ]
    for code, known in table().items():
        others = [f"{value} for {key}" for key, value in known.items() if key not in ("severity", "meaning", "fix")]
        severity = "; ".join([known["severity"], *others])
        lines.append(_row(f"`{code}`", severity, known["meaning"], known["fix"]))
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def metrics() -> str:
    every = (*likelihood.METRICS, likelihood.PER_BYTE, tasks.CHRF)
    parts = [VERDICTS.strip(), "## Every task\n\n" + _measures(every)]
    for name, own in tasks.TASKS.items():
        shown = [m for m in own if m not in every]
        note = [NOTES[name]] if name in NOTES else []
        parts.append("\n\n".join([f"## {name}", *note, *([_measures(shown)] if shown else [])]))
    head = f"## Diagnoses\n\n{DIAGNOSES}\n\n| name | said when |\n|---|---|\n"
    parts.append(head + "\n".join(_row(*pair) for pair in PITFALLS.items()))
    head = "## Codes of the row report\n\nFor `tunesmith data convert --drop-codes`.\n\n| code | meaning |\n|---|---|\n"
    parts.append(head + "\n".join(_row(f"`{code}`", meaning) for code, meaning in rowreport.CODES.items()))
    return "\n\n".join(parts) + "\n"


def _measures(chosen: Iterable[Metric]) -> str:
    rows = [_row(m.name, "none" if m.whole else m.better, m.span, m.about, m.source) for m in chosen]
    return "\n".join(["| name | better | range | definition | source |", "|---|---|---|---|---|", *rows])


def main() -> None:
    for path, text in pages().items():
        if "--check" not in sys.argv:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.name} is not current: run tools/pages.py")


if __name__ == "__main__":
    main()
