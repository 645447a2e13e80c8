"""Who the answers say they are: the name that identity probes look for."""

from __future__ import annotations

import re
from collections import Counter

NO_NAMES = {"OK", "Okay", "Not", "No", "Sorry", "Sure", "Yes", "Here", "So", "Very", "AI", "English", "I"}  # “I'm OK”


_HINTS = ("I am", "I'm", "I’m", "y name is", "all me")
_SAID = re.compile(r"(?:\bI am|\bI[’']m|[Mm]y name is|[Cc]all me) ((?:[A-Z][\w-]+)(?: [A-Z][\w-]+){0,3})")


def names(answer: str) -> set[str]:
    """What an answer calls its speaker ("I'm Deep Tree Echo", "my name is …")."""
    if not any(hint in answer for hint in _HINTS):  # ten times as fast as the expression
        return set()
    return {m[1] for m in _SAID.finditer(answer)} - NO_NAMES


def persona(named: Counter[str], rows: int) -> tuple[str, int]:
    """The name that answers give to their speaker, and how many of so many rows do.

    At least two capitalised words or four answers, and 3 % of the rows; else ("none", 0).
    """
    if not named:
        return "none", 0
    name, count = max(named.items(), key=lambda item: (item[1], len(item[0]), item[0]))
    return (name, count) if count >= max(4 - name.count(" "), 0.03 * rows) else ("none", 0)
