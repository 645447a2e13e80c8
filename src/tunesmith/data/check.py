"""Every check of a data set in one pass: what would waste a run is found first, with line, field and fix.

`examine` streams: besides the conversations, where they are asked for, it keeps some 350 bytes a row, whatever the row's
length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from tunesmith.conversation import Conversation, Issue
from tunesmith.data import text as texts
from tunesmith.data.findings import ORDER, finding, graded
from tunesmith.data.language import Sample
from tunesmith.data.likeness import Likeness
from tunesmith.data.read import files
from tunesmith.data.scan import Block, Progress, Rows, Spare, converted, scan, size
from tunesmith.data.spread import can_fork, cores, spread
from tunesmith.errors import DataError, counted

if TYPE_CHECKING:
    from tunesmith.data.store import Conversations, Packed, Store, StoreWriter

FEW_ROWS, SOME_ROWS, HOSTED_ROWS = 50, 200, 10  # OpenAI: at least 10, start with 50; 200 to 500 is what most tasks want
KEPT = 10_000  # findings of one code that are kept with place and text; all are counted
LARGE = 32 << 20  # bytes: under a second's work is not worth starting processes for


class Loaded(msgspec.Struct):
    """What a data set holds."""

    dataset: str  # as it was named
    conversations: list[Conversation] = []  # what is usable, in the file's order
    stored: Store | None = None  # instead of them, of a large data set that is kept on disk
    issues: list[Issue] = []  # findings, the first of each code
    rows_in: int = 0  # usable rows and those with an error
    usable: int = 0  # rows without an error
    warned: int = 0  # usable rows with a warning
    formats: dict[str, int] = {}  # rows of each format
    counts: dict[str, int] = {}  # findings of each code, all of them

    def rows(self) -> Conversations:
        """What is usable, in memory or on disk."""
        return self.conversations if self.stored is None else self.stored

    def errors(self) -> list[Issue]:
        return [i for i in self.issues if i.severity == "error"]

    def count(self, severity: str) -> int:
        """How many findings have a severity."""
        known = {i.code: i.severity for i in self.issues}
        return sum(n for code, n in self.counts.items() if known[code] == severity)

    def require(self) -> Loaded:
        """Itself, or DataError with the first error and the count of the others."""
        bad, more = self.errors(), self.count("error") - 1
        if bad:
            others = f" (and {more} more; see: tunesmith data check {self.dataset})" if more > 0 else ""
            raise DataError(f"{bad[0].message} [{bad[0].code}]{others}", where=bad[0].where, fix=bad[0].fix)
        return self

    def add(self, issue: Issue) -> None:
        self.counts[issue.code] = self.counts.get(issue.code, 0) + 1
        if self.counts[issue.code] <= KEPT:
            self.issues.append(issue)


def load(dataset: str, columns: dict[str, str] | None = None, **options: Any) -> Loaded:
    """Read and check a data set whole. Raises DataError only when nothing can be read at all. Options as of `examine`."""
    return examine([dataset], columns, keep=True, **options)


def examine(
    datasets: list[str],
    columns: dict[str, str] | None = None,
    *,
    task: str | None = None,
    provider: str | None = None,
    keep: bool = False,
    structure_only: bool = False,
    near_duplicates: bool = True,
    each: Callable[[Conversation], Iterable[Issue]] | None = None,
    progress: Progress | None = None,
    processes: int | None = None,
    store: Path | None = None,
    rewritten: bool = False,
) -> Loaded:
    """Check data sets as one. `keep` the conversations; `each` may add findings about every usable one.

    Structure only: JSON, roles and emptiness, but nothing about what the texts say or whether rows are alike.
    `rewritten`: the rows go to the provider as we write them, so that what else the file holds is no matter.
    `store`: the file in which conversations are kept, instead of in memory. `processes`: how many share the work, unless they
    are kept in memory; None: every core for more than LARGE bytes.
    """
    keep = keep or store is not None
    how = How(columns or {}, task, provider, keep, structure_only, near_duplicates, each, rewritten)
    if processes is None:
        large = size((name, files(name)) for name in datasets) > LARGE
        processes = cores() if large else 1
    whole = Pass(how, ", ".join(datasets))

    mine = Sample()  # of the process that this comes to run in: what it has seen bounds what it sends

    def one(part: Block | Rows) -> tuple[Pass, float, Packed | None]:
        done = Pass(how, limit=mine.limit).take(part)
        if done.sample:
            mine.extend(done.sample)
        return done, part.share, _packed(done) if store else None

    alone = processes < 2 or not can_fork()
    parts = scan(datasets, how.columns, placed=not alone and not (keep and store is None))
    writer = _writer(store) if store else None
    if writer or not (alone or keep):
        for done, share, packed in spread(one, parts, processes, lambda part: isinstance(part, Rows)):
            whole.add(done)
            if writer and packed:
                writer.add(packed)
            if progress:
                progress(whole.found.rows_in, share, "reading")
    else:
        for part in parts:
            whole.take(part)
            if progress:
                progress(whole.found.rows_in, part.share, "reading")
    if writer:
        whole.found.stored = writer.close()
    return whole.end(progress)


def _writer(store: Path) -> StoreWriter:
    from tunesmith.data.store import StoreWriter

    return StoreWriter(store)


def _packed(done: Pass) -> Packed:
    """The conversations of a part, which it then has no longer."""
    from tunesmith.data.store import Packed

    found = Packed.of(done.kept)
    done.kept.clear()
    return found


class How(msgspec.Struct, frozen=True):
    """What `examine` was asked for."""

    columns: dict[str, str]
    task: str | None
    provider: str | None
    keep: bool
    structure_only: bool
    near_duplicates: bool
    each: Callable[[Conversation], Iterable[Issue]] | None
    rewritten: bool = False


class Pass:
    """What is found in some parts of a data set. The passes over its parts, added in order, are that of the whole."""

    def __init__(self, how: How, dataset: str = "", limit: int = 1 << 32) -> None:
        self.kept: list[Conversation] = []
        self.found = Loaded(dataset, self.kept)
        self._how = how
        self._warned: set[str] = set()  # places of the usable rows with a warning
        self._formats: Counter[str] = Counter()
        self._spare = Spare()
        self._alike = None if how.structure_only else Likeness(how.near_duplicates)
        self.sample = None if how.structure_only else Sample(limit)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_how": None}  # a process that is done sends what it found, not what it was asked for

    def take(self, part: Block | Rows) -> Pass:
        """Look at a part; self."""
        how, found = self._how, self.found
        counted_only = how.structure_only and not how.keep and not how.each
        batch, plain = converted(part, how.columns, None if counted_only else self._spare)
        found.rows_in += len(batch) + plain
        found.usable += plain
        self._formats["messages"] += plain
        for item, name, well_formed in batch:
            if isinstance(item, Issue):
                found.add(graded(item, how.task, how.provider))
                continue
            self._formats[name] += 1
            issues = [] if well_formed else list(structure(item))
            if not how.structure_only and not texts.innocent([m.content for m in item.messages]):
                issues += said(item)
            if how.each:
                issues += how.each(item)
            if issues:
                issues = [graded(i, how.task, how.provider) for i in issues]
                for issue in issues:
                    found.add(issue)
                if any(i.severity == "error" for i in issues):
                    continue
                if any(i.severity == "warning" for i in issues):
                    self._warned.add(item.source)
            found.usable += 1
            if self._alike and self.sample:
                self._alike.add(item)
                self.sample.add(item)
            if how.keep:
                self.kept.append(item)
        if self._alike:
            self._alike.settle()
        return self

    def add(self, later: Pass) -> None:
        """What another pass found in the parts that follow."""
        for issue in later.found.issues:
            self.found.add(issue)
        for code, count in later.found.counts.items():  # beyond those that were kept
            self.found.counts[code] += max(0, count - KEPT)
        self.found.rows_in += later.found.rows_in
        self.found.usable += later.found.usable
        self._warned |= later._warned
        self._formats.update(later._formats)
        self._spare.add(later._spare)
        if self._alike and self.sample and later._alike and later.sample:
            self._alike.extend(later._alike)
            self.sample.extend(later.sample)

    def end(self, progress: Progress | None) -> Loaded:
        """The findings, with those about the rows together."""
        how, found = self._how, self.found
        if not found.rows_in:
            raise DataError("no rows in it", where=found.dataset, fix="is it the right file?")
        for issue in self._alike.findings(progress) if self._alike else ():
            issue = graded(issue, how.task, how.provider)
            if issue.severity == "warning":
                self._warned.add(issue.where)
            found.add(issue)
        found.warned = len(self._warned)
        found.formats = dict(+self._formats)
        others = [
            *few(found),
            *(self.sample.findings() if self.sample else ()),
            *self._spare.findings(found.dataset, found.formats, None if how.rewritten else how.provider),
        ]
        for issue in others:
            found.add(graded(issue, how.task, how.provider))
        return found


# ---- one conversation


def structure(conversation: Conversation) -> Iterator[Issue]:
    """Findings about one conversation's turns."""
    where, messages = conversation.source, conversation.messages
    learnt = [m for m in messages if m.role == "text" or (m.role == "assistant" and m.weight != 0)]
    if not learnt:
        yield finding(
            "no-answer",
            where,
            "nothing here is to be learnt: no assistant message",
            "add the answer the model should give",
        )
    for i, message in enumerate(messages):
        place = f"message {i + 1} ({message.role})"
        if not message.content.strip() and not message.tool_calls and message.role not in ("tool", "function"):
            code = "empty-answer" if message in learnt else "empty-text"
            yield finding(code, where, f"{place} is empty", "write the text or remove the row")
        if i and message.role == messages[i - 1].role and message.role in ("user", "assistant"):
            yield finding(
                "same-role-twice",
                where,
                f"{place} follows another of the same role",
                "join them, or add the turn between",
            )
        if message.role == "system" and i:
            yield finding("late-system", where, f"{place} is not the first", "put the system message first")
    called = {call.get("id") for m in messages for call in m.tool_calls or ()}
    for i, message in enumerate(messages):
        if message.role == "tool" and (message.tool_call_id is None or message.tool_call_id not in called):
            what = f"answers no call: tool_call_id is {message.tool_call_id!r}"
            yield finding("tool-result", where, f"message {i + 1} (tool) {what}", "give the call and the answer one id")
    if learnt and messages[-1].role == "user":
        yield finding("trailing-turn", where, "ends with a user turn that nothing answers", "remove the last turn")


def said(conversation: Conversation) -> Iterator[Issue]:
    """Findings about what one conversation's messages say."""
    for i, m in enumerate(conversation.messages):
        for code, message, fix in texts.findings(m.content, m.role == "assistant" and m.weight != 0):
            yield finding(code, conversation.source, f"message {i + 1} ({m.role}) {message}", fix)


def few(found: Loaded) -> Iterator[Issue]:
    """Whether there are enough rows."""
    n = found.usable
    if n < HOSTED_ROWS:
        yield finding(
            "too-few-rows",
            found.dataset,
            f"{counted(n, 'row')}; hosted services ask for {HOSTED_ROWS} at least",
            f"add {HOSTED_ROWS - n}",
        )
    if n < FEW_ROWS:
        yield finding(
            "few-rows",
            found.dataset,
            f"{n} rows; expect a model that memorises them",
            f"{FEW_ROWS} to 500 good rows are a better start",
        )
    elif n < SOME_ROWS:
        yield finding(
            "some-rows",
            found.dataset,
            f"{n} rows; enough to begin with",
            f"most tasks want {SOME_ROWS} to 500 good ones",
        )


def grade(found: Loaded) -> tuple[str, list[str]]:
    """A word for the whole (unusable, weak, fair or good) and the reasons for it.

    unusable: any error. weak: under 50 rows, or a warning for over 20 % of them. fair: under 200 rows, or over 5 %.
    """
    share = found.warned / max(1, found.usable)
    warned = f"{found.warned} of {found.usable} rows ({share:.0%}) have a warning"
    if found.count("error"):
        return "unusable", [f"{counted(found.count('error'), 'error')}: training would not start"]
    reasons = {
        "weak": [f"under {FEW_ROWS} rows"] * (found.rows_in < FEW_ROWS) + [warned] * (share > 0.2),
        "fair": [f"under {SOME_ROWS} rows"] * (found.rows_in < SOME_ROWS) + [warned] * (share > 0.05),
    }
    word = next((w for w, why in reasons.items() if why), "good")
    return word, reasons.get(word, [f"{found.rows_in} rows, {warned}"])


def by_severity(issues: Iterable[Issue]) -> list[Issue]:
    """Errors first; within a severity in the order found."""
    return sorted(issues, key=lambda i: ORDER.index(i.severity))
