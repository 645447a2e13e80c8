"""Every check of a data set in one pass: what would waste a run is found first, with line, field and fix.

`examine` streams: besides the conversations, where they are asked for, it keeps some 350 bytes a row, whatever the row's
length. Plain chats in JSONL take a fast road (`formats.plain_chat`), all else `formats.convert`; both make the same rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from tunesmith.conversation import Conversation, Issue
from tunesmith.data import text as texts
from tunesmith.data.findings import ORDER, finding, graded
from tunesmith.data.formats import BY_NAME, convert, plain_chat, unused
from tunesmith.data.language import Sample
from tunesmith.data.likeness import Likeness
from tunesmith.data.read import NotLines, array, blocks, container, files, hub, opened, record, rows, unreadable
from tunesmith.errors import DataError

FEW_ROWS, SOME_ROWS, HOSTED_ROWS = 50, 200, 10  # OpenAI: at least 10, start with 50; 200 to 500 is what most tasks want
KEPT = 10_000  # findings of one code that are kept with place and text; all are counted
Progress = Callable[[int, float], None]  # rows so far, share of the bytes read


class Loaded(msgspec.Struct):
    """What a data set holds. rows_in = usable + rows with an error; `counts`: findings by code, `issues`: the first of each."""

    dataset: str
    conversations: list[Conversation] = []
    issues: list[Issue] = []
    rows_in: int = 0
    usable: int = 0
    warned: int = 0  # usable rows with a warning
    formats: dict[str, int] = {}
    counts: dict[str, int] = {}

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
) -> Loaded:
    """Check data sets as one. `keep` the conversations; `each` may add findings about every usable one.

    Structure only: JSON, roles and emptiness, but nothing about what the texts say or whether rows are alike.
    """
    found = Loaded(", ".join(datasets))
    formats: Counter[str] = Counter()
    spare = Spare()
    warned: set[str] = set()  # places of the usable rows with a warning
    alike = None if structure_only else Likeness(near_duplicates)
    sample = None if structure_only else Sample()
    quick = structure_only and not keep and not each
    for batch, plain in scan(datasets, columns or {}, progress, None if quick else spare):
        found.rows_in += len(batch) + plain
        found.usable += plain
        formats["messages"] += plain
        for item, name, well_formed in batch:
            if isinstance(item, Issue):
                found.add(graded(item, task, provider))
                continue
            formats[name] += 1
            issues = [] if well_formed else list(structure(item))
            if not structure_only and not texts.innocent([m.content for m in item.messages]):
                issues += said(item)
            if each:
                issues += each(item)
            if issues:
                issues = [graded(i, task, provider) for i in issues]
                for issue in issues:
                    found.add(issue)
                if any(i.severity == "error" for i in issues):
                    continue
                if any(i.severity == "warning" for i in issues):
                    warned.add(item.source)
            found.usable += 1
            if alike and sample:
                alike.add(item)
                sample.add(item)
            if keep:
                found.conversations.append(item)
    for issue in alike.findings() if alike else ():
        issue = graded(issue, task, provider)
        if issue.severity == "warning":
            warned.add(issue.where)
        found.add(issue)
    found.warned = len(warned)
    found.formats = dict(+formats)
    for issue in (*size(found), *(sample.findings() if sample else ()), *spare.findings(found, provider)):
        found.add(graded(issue, task, provider))
    if not found.rows_in:
        raise DataError("no rows in it", where=found.dataset, fix="is it the right file?")
    return found


# A row, the name of its format ("" of an Issue's), and whether it is already known to have no structural finding
Item = tuple[Conversation | Issue, str, bool]


def scan(
    datasets: list[str], columns: dict[str, str], progress: Progress | None = None, spare: Spare | None = None
) -> Iterator[tuple[list[Item], int]]:
    """The rows of the data sets in order, some at a time; without `spare`, those without structural finding only counted."""
    listed = [(name, files(name)) for name in datasets]
    single = sum(len(paths or [0]) for _, paths in listed) == 1
    total = sum(path.stat().st_size for _, paths in listed for path in paths or ()) or 1
    before, count = 0, 0
    for name, paths in listed:
        if paths is None:
            yield from (([_converted(row, columns, spare)], 0) for row in hub(name))
        for path in paths or ():
            try:
                if columns or container(path) in (".csv", ".tsv", ".parquet", ".json"):
                    yield from (([_converted(row, columns, spare)], 0) for row in rows(path))
                else:
                    for batch, plain, at in _lines(path, spare):
                        yield batch, plain
                        count += len(batch) + plain
                        if progress:
                            progress(count, min(1.0, (before + at) / total))
            except DataError as error:
                if single:
                    raise
                yield [(unreadable(error), "", False)], 0
            before += path.stat().st_size


def _converted(row: Any, columns: dict[str, str], spare: Spare | None) -> Item:
    result = row if isinstance(row, Issue) else convert(row, columns)
    if isinstance(result, Issue):
        return result, "", False
    if spare and not columns:
        spare.see(unused(row.value, BY_NAME[result[1]]), row.where)
    return (*result, False)


def _lines(path: Path, spare: Spare | None) -> Iterator[tuple[list[Item], int, int]]:
    """Blocks of a JSONL file as of `scan`, with the bytes of the file read so far (of .zst: unpacked)."""
    with opened(path) as stream:
        if stream is None:
            yield [_converted(row, {}, spare) for row in rows(path)], 0, 0
            return
        at = 0
        try:
            for first, block in blocks(path, stream):
                packed = getattr(stream, "fileobj", None)  # of gzip: how far the packed bytes were read
                at = packed.tell() if packed else at + len(block)
                batch: list[Item] = []
                plain = 0
                for number, line in enumerate(block.split(b"\n"), first):
                    if found := plain_chat(line):
                        if spare is None:
                            plain += 1
                            continue
                        (chat, more), where = found, f"{path}:{number}"
                        if more:
                            spare.see(more, where)
                        batch.append((Conversation(chat.messages, chat.metadata, where, chat.tools), "messages", True))
                    elif line and not line.isspace():
                        batch.append(_converted(record(line, f"{path}:{number}"), {}, spare))
                yield batch, plain, at
        except NotLines as whole:
            yield [_converted(row, {}, spare) for row in array(path, stream, whole)], 0, at


class Spare:
    """Columns that nothing is made of: how many rows have each, and where the first stands."""

    def __init__(self) -> None:
        self._count: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def see(self, names: Iterable[str], where: str) -> None:
        for name in names:
            self._count[name] += 1
            self._first.setdefault(name, where)

    def findings(self, found: Loaded, provider: str | None) -> Iterator[Issue]:
        for name, count in self._count.most_common(20):
            yield finding(
                "unused-column",
                self._first[name],
                f'"{name}" is not trained on ({count} rows)',
                "--columns maps columns",
            )
        if provider == "openai" and (self._count or set(found.formats) - {"messages"}):
            names = [*(set(found.formats) - {"messages"}), *self._count][:5]
            yield finding(
                "extra-field",
                found.dataset,
                f"a service takes messages and tools alone; here: {', '.join(names)}",
                "train --provider openai converts it; for an upload of your own: data convert --strip-metadata",
            )


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


def size(found: Loaded) -> Iterator[Issue]:
    """Whether there are enough rows."""
    n = found.usable
    if n < HOSTED_ROWS:
        yield finding(
            "too-few-rows",
            found.dataset,
            f"{n} rows; hosted services ask for {HOSTED_ROWS} at least",
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
        return "unusable", [f"{found.count('error')} errors: training would not start"]
    reasons = {
        "weak": [f"under {FEW_ROWS} rows"] * (found.rows_in < FEW_ROWS) + [warned] * (share > 0.2),
        "fair": [f"under {SOME_ROWS} rows"] * (found.rows_in < SOME_ROWS) + [warned] * (share > 0.05),
    }
    word = next((w for w, why in reasons.items() if why), "good")
    return word, reasons.get(word, [f"{found.rows_in} rows, {warned}"])


def by_severity(issues: Iterable[Issue]) -> list[Issue]:
    """Errors first; within a severity in the order found."""
    return sorted(issues, key=lambda i: ORDER.index(i.severity))
