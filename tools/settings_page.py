"""Make docs/settings.md from the Recipe. `--check` fails when the page is not current.

python tools/settings_page.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from tunesmith.recipe import fields

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"


def page() -> str:
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


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(
            0
            if PAGE.read_text(encoding="utf-8") == page()
            else "docs/settings.md is not current: run tools/settings_page.py"
        )
    PAGE.write_text(page(), encoding="utf-8")
