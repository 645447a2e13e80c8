"""How little a row's answer belongs to its prompt, among the rows of one data set: which ones may have another row's answer.

Each row gets several pieces of evidence, as robust z-scores over all rows (median and median absolute deviation): how little
prompt and answer have in common compared with other pairs of the set; how much more they and another pair would have if the two
exchanged their answers; how unlike the answer is what similar prompts are answered (kernel ridge regression from prompts to
answers, each row predicted without itself); and how little likelier the answer gets by its own context than by others', for a
model that was asked. Their sum is the suspicion: where evidence says nothing of a data set (all rows alike), it is small for all.

Of 20 rows with another row's answer among 256, 15 (12 to 18) of the persona sample's were within the first 40, mean and range of
24 plantings (docs/LOG.md): where answers do not take up their prompts' words, texts and a small model do not tell them all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
WORD = re.compile(r"\w+")
SIZES = (4, 5)  # characters; a script without spaces has long words, which is no harm
WIDTH = 4096  # pieces whose counts are held at once
LONGEST = 2000  # characters of a text that are looked at
BLOCK = 2000  # rows that are compared with one another: 2000 x 2000 similarities are 16 MB
RIDGE = 0.3
LEAST, MOST = -1.0, 6.0  # of one piece of evidence: none may outweigh all others
RELATIONS = 3  # kinds of evidence from the texts


def suspicion(
    prompts: Sequence[str], answers: Sequence[str], gains: Sequence[float | None] | None = None
) -> list[float]:
    """A number for each row, 0 and less for most. `gains`: nats a token by which a row's own context helps a model."""
    n = len(prompts)
    evidence = [np.zeros(n) for _ in range(RELATIONS)]
    order = np.random.default_rng(0).permutation(n)
    for start in range(0, n, BLOCK):
        block = order[start : start + BLOCK]
        if len(block) > 2:
            for all_rows, values in zip(
                evidence, _relations([prompts[i] for i in block], [answers[i] for i in block]), strict=True
            ):
                all_rows[block] = values
    if gains is not None:
        evidence.append(-np.array([np.nan if gain is None else gain for gain in gains], np.float64))
    return [float(x) for x in np.sum([np.clip(_robust(values), LEAST, MOST) for values in evidence], axis=0)]


def belonging(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Of each row (BLOCK of them at most), how much more its prompt and answer have in common than other pairs, in standard
    deviations of those: about 0 in the mean where answers were shuffled."""
    if len(prompts) < 3:
        return []
    return [float(x) for x in -_relations(prompts[:BLOCK], answers[:BLOCK])[0]]


def _robust(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """z-scores that a share of outliers does not move; 0 where there is no value."""
    if np.isnan(values).all():
        return np.zeros(len(values))
    middle = np.nanmedian(values)
    spread = 1.4826 * np.nanmedian(np.abs(values - middle))
    return np.nan_to_num((values - middle) / (spread + 1e-9)) if spread > 1e-9 else np.zeros(len(values))


def _relations(prompts: Sequence[str], answers: Sequence[str]) -> list[NDArray[np.float64]]:
    n, like = len(prompts), _likeness([*prompts, *answers])
    shared = like[:n, n:]  # [prompt, answer]
    fits = (_standard(shared) + _standard(shared.T).T) / 2
    predicted = _left_out(like[:n, :n]) @ like[n:, n:]
    return [-np.diag(fits), -np.diag(_standard(predicted)), _exchanged(fits)]


def _standard(similarity: Array) -> NDArray[np.float64]:
    """Each row's similarities, less the mean of those with others (all but the diagonal), in their standard deviations."""
    n, own = len(similarity), np.diag(similarity).astype(np.float64)
    mean = (similarity.sum(1, dtype=np.float64) - own) / (n - 1)
    square = (np.square(similarity).sum(1, dtype=np.float64) - own**2) / (n - 1) - mean**2
    return np.asarray((similarity - mean[:, None]) / (np.sqrt(np.maximum(square, 0)) + 1e-6)[:, None], np.float64)


def _exchanged(fits: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a row and another would gain together if they exchanged their answers: the most that it is with any."""
    own = np.diag(fits)
    gain = fits + fits.T - own[:, None] - own
    np.fill_diagonal(gain, -np.inf)
    return np.asarray(gain.max(1), np.float64)


def _left_out(kernel: Array) -> Array:
    """Weights [n, n] by which kernel ridge regression predicts each row from all others (the hat matrix, without itself)."""
    n = len(kernel)
    hat = kernel @ np.linalg.inv(kernel + RIDGE * np.eye(n, dtype=np.float32))
    weights = hat / np.maximum(1 - np.diag(hat), 1e-3)[:, None]
    np.fill_diagonal(weights, 0)
    return np.asarray(weights, np.float32)


def _likeness(texts: Sequence[str]) -> Array:
    """Cosines [n, n] of weighted pieces of words (1 + ln count, times inverse document frequency); what stands in one text only
    says nothing. Summed up over WIDTH pieces at a time: a thousand rows have some 30,000."""
    counts = [Counter(_pieces(text[:LONGEST])) for text in texts]
    seen = Counter(piece for each in counts for piece in each)
    places = {piece: place for place, piece in enumerate(piece for piece, n in seen.items() if n > 1)}
    weight = np.log(len(texts) / np.array([seen[piece] for piece in places], np.float32))
    kernel = np.zeros((len(texts), len(texts)), np.float32)
    entries = [(places[p], i, n) for i, each in enumerate(counts) for p, n in each.items() if p in places]
    column, row, count = np.array(sorted(entries), np.int64).reshape(-1, 3).T
    for start in range(0, len(places), WIDTH):
        part = slice(*np.searchsorted(column, [start, start + WIDTH]))
        dense = np.zeros((len(texts), WIDTH), np.float32)
        dense[row[part], column[part] - start] = (1 + np.log(count[part])) * weight[column[part]]
        kernel += dense @ dense.T
    length = np.sqrt(np.diag(kernel)) + 1e-9
    return np.asarray(kernel / np.outer(length, length), np.float32)


def _pieces(text: str) -> Iterator[str]:
    """4 and 5 characters in a row of each word and its borders; a shorter word is one piece."""
    for word in WORD.findall(text.casefold()):
        edged = f" {word} "
        for size in SIZES:
            for start in range(max(1, len(edged) - size + 1)):
                yield edged[start : start + size]
