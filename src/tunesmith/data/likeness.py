"""The rows of a data set together: the same, nearly the same, or the same question with another answer."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tunesmith.conversation import Conversation, Issue
from tunesmith.data.findings import finding
from tunesmith.data.formats import in_turn
from tunesmith.data.scan import Progress


class Likeness:
    """Rows that are the same, alike, or contradict each other. Keeps hashes and sketches, not texts."""

    def __init__(self, near: bool) -> None:
        self._content, self._prompt, self._answer, self._line = (array("q") for _ in range(4))
        self._file = array("l")
        self._files: dict[str, int] = {}
        self._sketches = bytearray()  # grows in place: a list of arrays would be copied whole in the end
        self._texts: list[str] | None = [] if near else None
        self._held = 0

    def add(self, conversation: Conversation) -> None:
        messages = conversation.messages
        last = len(messages) - 1
        contents = tuple([m.content for m in messages])
        roles = tuple([m.role for m in messages])
        path, _, line = conversation.source.rpartition(":")
        self._file.append(self._files.setdefault(path, len(self._files)))
        self._line.append(int(line))
        calls = None if in_turn(roles) and all(contents) else repr([m.tool_calls for m in messages])
        self._content.append(hash((roles, contents, calls, repr(conversation.tools) if conversation.tools else None)))
        asks = roles[last] == "assistant" and last > 0
        self._prompt.append(_folded("\x1e".join(contents[:last])) if asks else 0)
        answer = contents[last]  # of short ones, case and a full stop make no other answer
        self._answer.append(0 if not asks else hash(answer) if len(answer) > 100 else _folded(answer.rstrip(" .")))
        if self._texts is not None:
            skip = 1 if roles[0] in ("system", "developer") else 0
            self._texts.append(" ".join(contents[skip:]))
            self._held += len(self._texts[-1])
            if self._held > 1 << 20:  # characters: what waits must not grow with the rows' length
                self.settle()

    def extend(self, later: Likeness) -> None:
        """The rows of another, settled one, after one's own."""
        files = [self._files.setdefault(path, len(self._files)) for path in later._files]
        self._file.extend(files[i] for i in later._file)
        for mine, theirs in zip(self._columns(), later._columns(), strict=True):
            mine.extend(theirs)
        self._sketches += later._sketches

    def _columns(self) -> tuple[array[int], ...]:
        return self._content, self._prompt, self._answer, self._line

    def settle(self) -> None:
        """Sketch the texts that still wait."""
        from tunesmith.data.dedup import sketches

        if self._texts:
            self._sketches += sketches(self._texts).data
            self._texts.clear()
            self._held = 0

    def _where(self, row: int) -> str:
        return f"{list(self._files)[self._file[row]]}:{self._line[row]}"

    def _pair(self, code: str, later: int, first: int, message: str, fix: str) -> Issue:
        """Alike in two files, which may be two sides of a split, is a leak."""
        if self._file[later] != self._file[first]:
            code, fix = "leak", "remove one of them, if the files are train and held out"
        return finding(code, self._where(later), f"{message} {self._where(first)}", fix)

    def findings(self, progress: Progress | None = None) -> Iterator[Issue]:
        import numpy as np

        content, prompt, answer = (np.frombuffer(a, np.int64) for a in (self._content, self._prompt, self._answer))
        again = np.zeros(len(content), bool)
        for later, first in _repeats(content):
            again[later] = True
            yield self._pair("duplicate", later, first, "the same as", "remove one of them")
        for later, first in _repeats(prompt):
            if prompt[later] and not again[later] and answer[later] != answer[first]:
                yield self._pair(
                    "contradiction",
                    later,
                    first,
                    "asks the same, and is answered otherwise, as",
                    "keep the better answer",
                )
        self.settle()
        if self._sketches:
            from tunesmith.data.dedup import BINS

            yield from self._near(np.frombuffer(self._sketches, np.uint8).reshape(-1, BINS), ~again, progress)

    def _near(self, sketch: Any, among: Any, progress: Progress | None) -> Iterator[Issue]:
        """One finding for each near duplicate, or for a whole template."""
        from tunesmith.data.dedup import most_alike, pairs, root

        parent = list(range(len(sketch)))
        found = list(pairs(sketch, among=among, progress=progress))
        for first, later, _ in found:
            low, high = sorted((root(parent, first), root(parent, later)))
            parent[high] = low
        sizes = Counter(root(parent, later) for _, later, _ in found)
        for low, count in sizes.items():
            if count >= most_alike(len(sketch)):
                message = f"{count + 1} rows are this one but for a few words"
                yield finding("template", self._where(low), message, "is it meant? If not, keep a few of them")
        for first, later, alike in sorted(found, key=lambda pair: pair[1]):
            if sizes[root(parent, later)] < most_alike(len(sketch)):
                yield self._pair("near-duplicate", later, first, f"{alike:.0%} alike to", "remove one of them")


def _folded(text: str) -> int:
    """Hash of a text, blind to case and spacing."""
    if "  " in text or "\n" in text or "\t" in text:
        text = " ".join(text.split())
    return hash(text.strip().casefold())


def _repeats(hashes: Any) -> Iterator[tuple[int, int]]:
    """(row, first row of the same hash) for every row that is not the first of its hash, in order."""
    import numpy as np

    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    owner = first[inverse]
    for row in np.flatnonzero(owner != np.arange(len(owner))):
        yield int(row), int(owner[row])
