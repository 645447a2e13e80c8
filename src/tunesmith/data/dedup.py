"""Near duplicates: rows that say the same but for a few words, letters, capitals or marks.

Two texts are as alike as their sets of 5-byte shingles overlap (Jaccard: shared / all), taken after lower-casing and
turning punctuation and spaces into single spaces. The overlap is estimated from a sketch of 320 bytes a row
(one-permutation MinHash, Li, Owen and Zhang 2012, with optimal densification, Shrivastava 2017; one byte of each minimum,
Li and König 2010): the standard error is 0.028 at most. Candidates come from 64 bands of five (locality-sensitive
hashing), which find 99 % of the pairs that are 0.6 alike. Everything is seeded: same rows, same groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.conversation import Conversation

THRESHOLD = 0.55  # 5 % of the letters edited leaves 0.59 to 0.72; unrelated rows stay under 0.2
SHORTEST = 40  # bytes: in a shorter text one word is the whole difference
SHINGLE, BANDS, BAND = 5, 64, 5
BINS = BANDS * BAND
CHUNK = 1 << 19  # bytes of text sketched at a time: what fits the cache (0.2 MB 41,800 rows/s of 1 KB, 5 MB 15,500)

# Letters lower-cased, digits and bytes of other scripts as they are, all else a space
_FOLD = np.array([b | 32 if 65 <= b <= 90 else b if chr(b).isalnum() or b > 127 else 32 for b in range(256)], np.uint8)
_FOLD[0] = 0  # stands between two texts
_SEED = np.random.default_rng(0)
_BORROW = [_SEED.permutation(BINS) for _ in range(64)]  # where an empty bin looks, one try after the other


def body(row: Conversation) -> str:
    """The text that rows are compared by: all that is said, without instructions to the model."""
    return " ".join([m.content for m in row.messages if m.role not in ("system", "developer")])


def sketches(texts: Iterable[str]) -> NDArray[np.uint8]:
    """One row of BINS bytes for each text. A text under SHORTEST bytes gets zeros: it is like no other."""
    rest, parts = iter(texts), []
    while batch := list(_some(rest)):
        parts.append(_sketch(batch))
    return np.concatenate(parts) if parts else np.zeros((0, BINS), np.uint8)


def _some(texts: Iterator[str]) -> Iterator[bytes]:
    size = 0
    for text in texts:
        raw = (text if text.isascii() else text.casefold()).encode("utf-8", "replace")
        yield raw.replace(b"\0", b" ")
        size += len(raw)
        if size > CHUNK:
            return


def _sketch(texts: list[bytes]) -> NDArray[np.uint8]:
    folded = _FOLD[np.frombuffer(b"\0".join(texts) + b"\0", np.uint8)]
    space = folded == 32
    keep = np.ones(len(folded), bool)
    keep[1:] = ~(space[1:] & space[:-1])
    row = np.repeat(np.arange(len(texts), dtype=np.uint32), np.fromiter(map(len, texts), np.int64, len(texts)) + 1)
    folded, row = folded[keep], row[keep]
    if len(folded) < SHINGLE:
        return np.zeros((len(texts), BINS), np.uint8)
    wide = folded.astype(np.uint64)
    many = len(wide) - SHINGLE + 1
    shingle = wide[:many].copy()
    for i in range(1, SHINGLE):
        shingle = (shingle << np.uint64(8)) | wide[i : many + i]
    long = np.fromiter((len(t) >= SHORTEST for t in texts), bool, len(texts))
    inside = long[row[:many]] & (row[:many] == row[SHINGLE - 1 :]) & (folded[SHINGLE - 1 :] != 0)
    return _minima(_mix(shingle[inside]), row[:many][inside], len(texts))


def _mix(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser: every bit of the key moves every bit of the hash."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


def _minima(hashes: NDArray[np.uint64], row: NDArray[np.uint32], count: int) -> NDArray[np.uint8]:
    """The smallest hash of each bin, densified, and one byte of it."""
    chosen = ((hashes >> np.uint64(32)) * np.uint64(BINS) >> np.uint64(32)).astype(np.uint32)
    empty = np.uint32(0xFFFFFFFF)
    least = np.full(count * BINS, empty, np.uint32)
    np.minimum.at(least, row * np.uint32(BINS) + chosen, (hashes & np.uint64(0xFFFFFFFE)).astype(np.uint32))
    given = least.reshape(count, BINS)
    filled = given.copy()
    at, hole = np.nonzero(given == empty)
    for order in _BORROW:
        found = given[at, order[hole]]
        filled[at, hole] = found
        open_ = found == empty
        at, hole = at[open_], hole[open_]
        if not len(at):
            break
    # the lowest bits of a minimum are as good as random; the highest are all near zero
    return np.where(filled == empty, 0, (filled >> 1) & 0xFF).astype(np.uint8)


def likeness(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Estimated Jaccard overlap of rows of two arrays of sketches, pair by pair: equal bytes, less those by chance."""
    same: NDArray[np.float64] = (a == b).mean(axis=-1)
    return np.maximum(0.0, (same - 1 / 256) / (1 - 1 / 256))


def pairs(sketch: NDArray[np.uint8], threshold: float = THRESHOLD) -> Iterator[tuple[int, int, float]]:
    """(earlier row, later row, likeness) at or over the threshold: enough of them to connect every group."""
    count = len(sketch)
    usable = np.flatnonzero(sketch.any(axis=1))
    group = np.arange(count)
    for band in range(BANDS):
        keys = _band(sketch[usable, band * BAND : (band + 1) * BAND])
        order = np.argsort(keys, kind="stable")
        keys, rows = keys[order], usable[order]
        again = np.flatnonzero(keys[1:] == keys[:-1]) + 1
        first = np.maximum.accumulate(np.where(np.r_[True, keys[1:] != keys[:-1]], np.arange(len(keys)), 0))
        for before in (first[again], again - 1):  # with the first of its bucket, and with the one before it
            yield from _join(sketch, rows[before], rows[again], group, threshold)


def _band(part: NDArray[np.uint8]) -> NDArray[np.uint64]:
    key = np.zeros(len(part), np.uint64)
    for column in part.T:
        key = (key << np.uint64(8)) | column
    return key


def _join(
    sketch: NDArray[np.uint8], a: NDArray[np.int64], b: NDArray[np.int64], group: NDArray[np.int64], threshold: float
) -> Iterator[tuple[int, int, float]]:
    """Pairs that are alike and not yet in one group; `group` holds a parent of each row."""
    for start in range(0, len(a), 50_000):  # 16 MB of sketches on each side
        x, y = a[start : start + 50_000], b[start : start + 50_000]
        open_ = group[x] != group[y]
        x, y = x[open_], y[open_]
        alike = likeness(sketch[x], sketch[y])
        for i, j, share in zip(x, y, alike, strict=True):
            if share >= threshold and root(group, i) != root(group, j):
                low, high = sorted((root(group, i), root(group, j)))
                group[high] = low
                yield min(int(i), int(j)), max(int(i), int(j)), float(share)


def root(group: Any, i: int) -> int:
    """The representative of i's group in a forest of parents (a list or an array), whose paths are halved on the way."""
    while group[i] != i:
        group[i] = group[group[i]]
        i = group[i]
    return int(i)
