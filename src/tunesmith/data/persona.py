"""Who the answers say they are: the name that identity probes look for."""

from __future__ import annotations

import re
from collections import Counter

from tunesmith.data.store import Conversations

NO_NAMES = {"OK", "Okay", "Not", "No", "Sorry", "Sure", "Yes", "Here", "So", "Very", "AI", "English", "I"}  # “I'm OK”


def persona(rows: Conversations) -> tuple[str, int]:
    """The name that answers give to their speaker ("I'm Deep Tree Echo", "my name is …"), and how many do.

    At least two capitalised words or four answers, and 3 % of the rows; else ("none", 0).
    """
    said = re.compile(r"(?:\bI am|\bI[’']m|[Mm]y name is|[Cc]all me) ((?:[A-Z][\w-]+)(?: [A-Z][\w-]+){0,3})")
    names = Counter(name for row in rows for name in {m[1] for m in said.finditer(row.answer())} - NO_NAMES)
    if not names:
        return "none", 0
    name, count = max(names.items(), key=lambda item: (item[1], len(item[0])))
    return (name, count) if count >= max(4 - name.count(" "), 0.03 * len(rows)) else ("none", 0)
