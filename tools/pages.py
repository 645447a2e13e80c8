"""Make docs/settings.md, docs/data-findings.md and the help pages of all commands from the code.

`--check` fails when one is not current.

    python tools/pages.py

The help pages are files so that help needs no imports: `train --help` takes 2 times a bare interpreter, not 5.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from importlib import import_module
from pathlib import Path

from tunesmith.cli import COMMANDS, HELP_WIDTH, help_page
from tunesmith.data.findings import table
from tunesmith.recipe import fields

SETTINGS = Path(__file__).parent.parent / "docs" / "settings.md"
FINDINGS = SETTINGS.with_name("data-findings.md")


def pages() -> dict[Path, str]:
    """Every made file with its text."""
    return {SETTINGS: settings(), FINDINGS: findings(), **{help_page(name): help_text(name) for name in COMMANDS}}


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
        cells = (f"`{code}`", severity, known["meaning"], known["fix"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    for path, text in pages().items():
        if "--check" not in sys.argv:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.name} is not current: run tools/pages.py")


if __name__ == "__main__":
    main()
