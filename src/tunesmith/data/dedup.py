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
from tunesmith.data.scan import Progress

THRESHOLD = 0.55  # 5 % of the letters edited leaves 0.59 to 0.72; unrelated rows stay under 0.2
SHORTEST = 40  # bytes: in a shorter text one word is the whole difference
SHINGLE, BANDS, BAND = 5, 64, 5
BINS = BANDS * BAND
CHUNK = 1 << 18  # bytes of text sketched at a time: what fits the cache

# Letters lower-cased, digits and bytes of other scripts as they are, all else a space; 0 stands between two texts
_FOLD = bytes([0, *(b | 32 if 65 <= b <= 90 else b if chr(b).isalnum() or b > 127 else 32 for b in range(1, 256))])
_BORROW = np.random.default_rng(0).permuted(
    np.tile(np.arange(BINS), (64, 1)), axis=1
)  # where empty bins look, try by try
_EMPTY = np.uint32(0xFFFFFFFF)


def most_alike(rows: int) -> float:
    """A group of more rows that are nearly the same is a template that was filled in: ten, or 5 % of all."""
    return max(10, 0.05 * rows)


def body(row: Conversation) -> str:
    """The text that rows are compared by: all that is said, without instructions to the model."""
    return " ".join([m.content for m in row.messages if m.role not in ("system", "developer")])


def sketches(texts: Iterable[str]) -> NDArray[np.uint8]:
    """One row of BINS bytes for each text. A text under SHORTEST bytes gets zeros: it is like no other."""
    rest, found = iter(texts), bytearray()  # grows in place: a list of arrays would be copied whole in the end
    while batch := list(_some(rest)):
        found += _sketch(batch).data
    return np.frombuffer(found, np.uint8).reshape(-1, BINS)


def _some(texts: Iterator[str]) -> Iterator[bytes]:
    size = 0
    for text in texts:
        raw = (text if text.isascii() else text.casefold()).encode("utf-8", "replace")
        yield raw.replace(b"\0", b" ") if len(raw) >= SHORTEST else b""
        size += len(raw)
        if size > CHUNK:
            return


def _sketch(texts: list[bytes]) -> NDArray[np.uint8]:
    """Sketches of texts without NUL bytes. All arithmetic is of 32 bits: half the bytes of 64, and it is vectorised."""
    folded = np.frombuffer((b"\0".join(texts) + b"\0").translate(_FOLD), np.uint8)
    space = folded == 32
    folded = folded[np.r_[True, ~(space[1:] & space[:-1])]]
    many = max(0, len(folded) - SHINGLE + 1)
    wide = folded.astype(np.uint32)
    hashes = wide[:many].copy()
    for i in range(1, SHINGLE):  # a polynomial of the bytes
        hashes *= np.uint32(0x9E3779B1)
        hashes += wide[i : many + i]
    _mix(hashes)
    ends = np.flatnonzero(folded == 0)
    across = (ends - np.arange(SHINGLE)[:, None]).ravel()
    hashes[across[(across >= 0) & (across < many)]] = _EMPTY  # no shingle reaches from one text into the next
    bins = np.repeat(np.arange(len(texts), dtype=np.uint32) * np.uint32(BINS), np.diff(ends, prepend=-1))[:many]
    bins += (hashes * np.uint32(0x85EBCA77) >> np.uint32(16)) * np.uint32(BINS) >> np.uint32(16)
    least = np.full(len(texts) * BINS, _EMPTY, np.uint32)
    np.minimum.at(least, bins, hashes)
    return _dense(least)


def _mix(hashes: NDArray[np.uint32]) -> None:
    """murmur3's finaliser, in place: every bit moves every other."""
    hashes ^= hashes >> np.uint32(16)
    hashes *= np.uint32(0x85EBCA6B)
    hashes ^= hashes >> np.uint32(13)
    hashes *= np.uint32(0xC2B2AE35)
    hashes ^= hashes >> np.uint32(16)


def _dense(least: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """One byte of the smallest hash of each bin; an empty bin borrows that of another, the same for every text."""
    full = (least.reshape(-1, BINS) != _EMPTY).any(axis=1)  # a text too short for a shingle has nothing to borrow
    holes = np.flatnonzero((least == _EMPTY) & np.repeat(full, BINS))
    place = holes % BINS
    filled = least.copy()
    for order in _BORROW:
        found = least[holes - place + order[place]]
        filled[holes] = found
        open_ = found == _EMPTY
        holes, place = holes[open_], place[open_]
        if not len(holes):
            break
    filled[holes] = 0
    sketch = filled.astype(np.uint8).reshape(-1, BINS)  # the lowest bits of a minimum are random; the highest near zero
    return np.where(full[:, None], sketch, np.uint8(0))


def likeness(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Estimated Jaccard overlap of rows of two arrays of sketches, pair by pair: equal bytes, less those by chance."""
    same: NDArray[np.float64] = (a == b).mean(axis=-1)
    return np.maximum(0.0, (same - 1 / 256) / (1 - 1 / 256))


def pairs(
    sketch: NDArray[np.uint8],
    threshold: float = THRESHOLD,
    among: NDArray[np.bool_] | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[int, int, float]]:
    """(earlier row, later row, likeness) at or over the threshold: enough of them to connect every group.

    `among`: which rows are looked at (bool, one for each).
    """
    usable = np.flatnonzero(sketch.any(axis=1) if among is None else sketch.any(axis=1) & among)
    group = np.arange(len(sketch))
    bits = np.uint64(len(sketch).bit_length())
    for band in range(BANDS):
        if progress:
            progress(len(sketch), band / BANDS, "comparing")
        # key and row in one number: sorting numbers is some times as fast as finding their order
        both = np.sort((_band(sketch, band)[usable] << bits) | usable.astype(np.uint64))
        keys, rows = both >> bits, (both & np.uint64((1 << int(bits)) - 1)).astype(np.int64)
        again = np.flatnonzero(keys[1:] == keys[:-1]) + 1
        first = np.maximum.accumulate(np.where(np.r_[True, keys[1:] != keys[:-1]], np.arange(len(keys)), 0))
        for before in (first[again], again - 1):  # with the first of its bucket, and with the one before it
            yield from _join(sketch, rows[before], rows[again], group, threshold)


def _band(sketch: NDArray[np.uint8], band: int) -> NDArray[np.uint64]:
    key = np.zeros(len(sketch), np.uint64)
    for column in range(band * BAND, (band + 1) * BAND):
        key = (key << np.uint64(8)) | sketch[:, column]
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
