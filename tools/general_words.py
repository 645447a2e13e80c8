"""Make src/tunesmith/facts/general_words.txt: how often words are said in general English, by the starter's own corpus.

    python tools/general_words.py

A line has a count and the words that are said so often; words are in the singular, as evaluation/domain.py compares them.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

from tunesmith.evaluation.domain import GENERAL, tokens

CORPUS = [Path(__file__).parent / "starter" / name for name in ("everyday.jsonl", "talk.jsonl")]
RAREST = 3  # a word that is said less often is as good as unknown: 6,000 words stay


def table() -> str:
    counts = Counter(
        word
        for path in CORPUS
        for line in path.read_text(encoding="utf-8").splitlines()
        for text in json.loads(line).values()
        for word in tokens(text)
        if word != "|"
    )
    by_count = defaultdict(list)
    for word, count in counts.items():
        if count >= RAREST:
            by_count[count].append(word)
    lines = [f"{count} {' '.join(sorted(by_count[count]))}" for count in sorted(by_count, reverse=True)]
    return "\n".join([f"{counts.total()} words in all; made by tools/general_words.py", *lines]) + "\n"


if __name__ == "__main__":
    GENERAL.write_text(table(), encoding="utf-8")
