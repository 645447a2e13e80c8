"""Train, validation and test: exact counts, and nothing that is the same on two sides.

hash       the order of a seeded hash of each row's content: independent of the file's order
threshold  a row's side depends on that row alone (its prompt, or its group where one is given): it never changes
           when others are added; counts are approximate
shuffle    a seeded shuffle of the file's order; held out = ceil(n x fraction), the convention of scikit-learn and `datasets`
"""

from __future__ import annotations

import hashlib
import math
import random
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import numpy as np

from tunesmith.conversation import Conversation, Issue
from tunesmith.data.dedup import body, most_alike, pairs, root, sketches
from tunesmith.data.findings import finding
from tunesmith.data.store import Conversations, pick
from tunesmith.errors import DataError, UsageError

SIDES = ("train", "valid", "test")
Splits = dict[str, Conversations]  # the rows of each side


def split(
    rows: Conversations,
    valid: float = 0.1,
    test: float = 0.1,
    *,
    method: str = "hash",
    seed: int = 42,
    group_by: str | None = None,
) -> Splits:
    """The rows of each side, by shares: train, valid and test.

    Rows with the same prompt, nearly the same text, or equal in `group_by` stay together (threshold: those equal in `group_by`,
    or else with the same prompt).

    Counts are exact, ceil(n x share) held out, unless a group is larger than the room left on its side. Only where a side
    would get less than half of its rows, because most rows are one template filled in, is the template itself divided:
    `leaks` says so.
    Raises DataError when a side that was asked for would stay empty.
    """
    wanted = {"test": math.ceil(len(rows) * test), "valid": math.ceil(len(rows) * valid)}
    if len(rows) - sum(wanted.values()) < 1:
        raise DataError(
            f"too few rows ({len(rows)}) for train, {wanted['valid']} valid and {wanted['test']} test",
            where=_file(rows),
            fix="add rows, or set --valid-fraction 0 and --test-fraction 0",
        )
    if method == "threshold":
        sides = _by_threshold(rows, valid, test, seed, group_by)
    else:
        content, order = _orders(seed, rows)
        near = _near(rows, content)
        for apart in (False, True):
            groups = _groups(rows, group_by, near, apart)
            if method == "hash":
                groups.sort(key=lambda group: min(map(order.__getitem__, group)))
            else:
                random.Random(seed).shuffle(groups)
            sides = _fill(len(rows), groups, wanted)
            if all(2 * sides.count(side) >= count for side, count in wanted.items()):
                break
    numbers: dict[str, list[int]] = {side: [] for side in SIDES}
    for number, side in enumerate(sides):
        numbers[side].append(number)
    if method == "hash":  # the sides' own order, too, must not depend on the file's
        numbers = {side: sorted(part, key=order.__getitem__) for side, part in numbers.items()}
    result = {side: pick(rows, part) for side, part in numbers.items()}
    for side, share in (("train", 1.0), ("valid", valid), ("test", test)):
        if share and not len(result[side]):
            raise DataError(
                f"the {side} part would be empty",
                where=_file(rows),
                fix="rows with the same prompt (or group) stay together: add others",
            )
    return result


def leaks(parts: Splits) -> list[Issue]:
    """Rows of one side that are (nearly) the same as one of another: what is left after splitting."""
    return [issue for _, issue in _leaks(parts)]


def near_leaks(parts: Splits) -> list[Issue]:
    """Those of them that ask something else."""
    return [issue for near, issue in _leaks(parts) if near]


def _leaks(parts: Splits) -> Iterator[tuple[bool, Issue]]:
    """Each with whether it is only nearly the same."""
    ends = list(accumulate(len(parts[side]) for side in SIDES))

    def at(number: int) -> tuple[str, Conversation]:
        side = bisect_right(ends, number)
        return SIDES[side], parts[SIDES[side]][number - ([0, *ends])[side]]

    seen: dict[bytes, int] = {}
    asked = []
    for i, row in enumerate(row for side in SIDES for row in parts[side]):
        asked.append(_short(prompt_key(row)))
        first = seen.setdefault(asked[i], i)
        if bisect_right(ends, first) != bisect_right(ends, i):
            yield False, _leak(row, at(i)[0], "asks the same as", *at(first))
    for a, b, alike in pairs(sketches(body(row) for side in SIDES for row in parts[side])):
        if bisect_right(ends, a) != bisect_right(ends, b) and asked[a] != asked[b]:
            side, row = at(b)
            yield True, _leak(row, side, f"is {alike:.0%} alike to", *at(a))


def _short(digest: str) -> bytes:
    """Half of a hash, in a tenth of the memory."""
    return bytes.fromhex(digest[:32])


def _leak(row: Conversation, side: str, how: str, other_side: str, other: Conversation) -> Issue:
    return finding("leak", row.source, f"({side}) {how} {other.source} ({other_side})", "remove one of them")


def _fill(n: int, groups: list[list[int]], wanted: dict[str, int]) -> list[str]:
    """Give whole groups to test, then to valid, while they fit; all others are for training."""
    sides = ["train"] * n
    for group in groups:
        for side in ("test", "valid"):
            if len(group) <= wanted[side]:
                wanted[side] -= len(group)
                for i in group:
                    sides[i] = side
                break
    return sides


def _by_threshold(rows: Conversations, valid: float, test: float, seed: int, group_by: str | None) -> list[str]:
    sides = []
    for row in rows:
        share = int(_hash(seed, _group(row, group_by) if group_by else prompt_key(row))[:13], 16) / 16**13
        sides.append("test" if share < test else "valid" if share < test + valid else "train")
    return sides


def _orders(seed: int, rows: Conversations) -> tuple[array[int], array[int]]:
    """For each row 64 bits of a hash of what it says, and of that with the seed: two orders that are not the file's."""
    content, seeded = array("Q"), array("Q")
    for row in rows:
        digest = row.digest()
        content.append(int(digest[:16], 16))
        seeded.append(int(_hash(seed, digest)[:16], 16))
    return content, seeded


def _near(rows: Conversations, content: array[int]) -> array[int]:
    """For each row the representative of its group of near duplicates."""
    near = array("q", range(len(rows)))
    order = np.argsort(
        np.frombuffer(content, np.uint64), kind="stable"
    )  # the pairs must not depend on the file's order
    for a, b, _ in pairs(sketches(body(rows[int(i)]) for i in order)):
        near[root(near, int(order[b]))] = root(near, int(order[a]))
    return array("q", (root(near, i) for i in range(len(rows))))


def _groups(rows: Conversations, group_by: str | None, near: array[int], apart: bool) -> list[list[int]]:
    """Rows that ask the same, are nearly the same or share a group, as lists of indices, in order of first appearance.

    `apart`: rows that are nearly the same because they are a template filled in do not count as such.
    """
    parent = array("q", range(len(rows)))
    seen: dict[bytes, int] = {}
    for i, row in enumerate(rows):
        keys: list[bytes] = [_short(prompt_key(row))] + ([_group(row, group_by).encode()] if group_by else [])
        for key in keys:
            parent[root(parent, i)] = root(parent, seen.setdefault(key, i))
    sizes = Counter(near)
    for i in range(len(rows)):
        if not apart or sizes[near[i]] <= most_alike(len(rows)):
            parent[root(parent, i)] = root(parent, near[i])
    members = defaultdict(list)
    for i in range(len(rows)):
        members[root(parent, i)].append(i)
    return list(members.values())


def prompt_key(row: Conversation) -> str:
    """Hash of what is asked, blind to case, spacing and instructions; of the whole text where nothing is asked."""
    said = [m for m in row.prompt() if m.role not in ("system", "developer")] or row.messages
    return hashlib.sha256(
        "\x1f".join(f"{m.role}\x1e{' '.join(m.content.split()).casefold()}" for m in said).encode(errors="replace")
    ).hexdigest()


def _group(row: Conversation, group_by: str) -> str:
    value: Any = {"metadata": row.metadata}
    for key in group_by.split("."):
        if not isinstance(value, dict) or key not in value:
            raise UsageError(
                f'no "{group_by}" in this row',
                where=row.source,
                fix="name a field that every row has, such as metadata.tree_id",
            )
        value = value[key]
    return repr(value)


def _hash(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


def _file(rows: Conversations) -> str:
    return rows[0].source.rpartition(":")[0] if len(rows) else ""
