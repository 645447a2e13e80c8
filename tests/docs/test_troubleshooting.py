"""The symptoms in the guide are in the words of the program: each piece between `…` stands somewhere in its source."""

from __future__ import annotations

import re

from conftest import ROOT


def said_by_the_program() -> str:
    """All source text, with strings that go on in the next line joined."""
    files = [p for kind in ("py", "toml") for p in sorted((ROOT / "src/tunesmith").rglob(f"*.{kind}"))]
    assert len(files) > 150
    text = "\n".join(path.read_text(encoding="utf-8") for path in files).replace("\\'", "'")
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_symptoms_are_what_the_program_says() -> None:
    guide = (ROOT / "docs/guides/troubleshooting.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0] for line in guide.splitlines() if line.startswith("| ")]
    symptoms = [row for row in rows if not row.startswith("| it says")]
    assert len(symptoms) >= 40
    program = said_by_the_program()
    missing = []
    for quoted in (q for row in symptoms for q in re.findall(r"`([^`]+)`", row)):
        for piece in re.split(r"…|[\[\]()]|: (?=…|$)", quoted):
            words = piece.strip(" :,;.'")
            if len(words) > 3 and words not in program:
                missing.append(words)
    assert not missing
