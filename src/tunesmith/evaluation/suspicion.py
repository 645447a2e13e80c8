"""How little a row's answer belongs to its prompt, among the rows of one data set: which ones may have another row's answer.

Each row gets several independent pieces of evidence, as robust z-scores over all rows (median and median absolute deviation):
how little prompt and answer have in common compared with other pairs of the set, in both directions; how unlike the answer is
what similar prompts are answered (kernel ridge regression from prompts to answers, each row predicted without itself); and how
little likelier the answer gets by its own context than by others', for models that were asked. Their sum is the suspicion: where
evidence says nothing of a data set (all rows alike), it is small for all.

Of 20 rows with another row's answer among 256, 20 were within the first 40 of gsm8k's questions, 18 of the persona
sample's (by their texts alone 20 and 10).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
GRAM = 4  # characters: no word borders needed, so any script will do
WIDTH = 8192  # hashed features
LONGEST = 2000  # characters of a text that are looked at
BLOCK = 2000  # rows that are compared with one another: 2000 x 2000 similarities are 16 MB
RIDGE = 0.3
LEAST, MOST = -1.0, 6.0  # of one piece of evidence: none may outweigh all others
RELATIONS = 3  # kinds of evidence from the texts
GAIN = 1.5  # weight of a model's evidence: the others are three views of the same words


def suspicion(
    prompts: Sequence[str], answers: Sequence[str], gains: Sequence[Sequence[float | None]] = ()
) -> list[float]:
    """A number for each row, 0 and less for most. `gains`: of each model, nats a token by which a row's own context helps."""
    n = len(prompts)
    evidence, weights = [np.zeros(n) for _ in range(RELATIONS)], [1.0] * RELATIONS
    order = np.random.default_rng(0).permutation(n)
    for start in range(0, n, BLOCK):
        block = order[start : start + BLOCK]
        if len(block) > 2:
            for all_rows, values in zip(
                evidence, _relations([prompts[i] for i in block], [answers[i] for i in block]), strict=True
            ):
                all_rows[block] = values
    for each in gains:
        evidence.append(-np.array([np.nan if gain is None else gain for gain in each], np.float64))
        weights.append(GAIN)
    parts = [weight * np.clip(_robust(values), LEAST, MOST) for weight, values in zip(weights, evidence, strict=True)]
    return [float(x) for x in np.sum(parts, axis=0)]


def belonging(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Of each row (BLOCK of them at most), how much more its prompt and answer have in common than other pairs, in standard
    deviations of those: about 0 in the mean where answers were shuffled."""
    if len(prompts) < 3:
        return []
    forward, backward, _ = _relations(prompts[:BLOCK], answers[:BLOCK])
    return [float(x) for x in -(forward + backward) / 2]


def _robust(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """z-scores that a share of outliers does not move; 0 where there is no value."""
    if np.isnan(values).all():
        return np.zeros(len(values))
    middle = np.nanmedian(values)
    spread = 1.4826 * np.nanmedian(np.abs(values - middle))
    return np.nan_to_num((values - middle) / (spread + 1e-9)) if spread > 1e-9 else np.zeros(len(values))


def _relations(prompts: Sequence[str], answers: Sequence[str]) -> list[NDArray[np.float64]]:
    asked, said = _features([*prompts, *answers])
    shared = asked @ said.T  # [prompt, answer]
    predicted = _left_out(asked @ asked.T) @ (said @ said.T)
    return [-_own(shared), -_own(shared.T), -_own(predicted)]


def _own(similarity: Array) -> NDArray[np.float64]:
    """How far each row's own similarity (the diagonal) is above those with the others, in their standard deviations."""
    n = len(similarity)
    own = np.diag(similarity).astype(np.float64)
    rest = similarity.sum(1, dtype=np.float64) - own
    mean = rest / (n - 1)
    square = (np.square(similarity).sum(1, dtype=np.float64) - own**2) / (n - 1) - mean**2
    return np.asarray((own - mean) / (np.sqrt(np.maximum(square, 0)) + 1e-6), np.float64)


def _left_out(kernel: Array) -> Array:
    """Weights [n, n] by which kernel ridge regression predicts each row from all others (the hat matrix, without itself)."""
    n = len(kernel)
    hat = kernel @ np.linalg.inv(kernel + RIDGE * np.eye(n, dtype=np.float32))
    weights = hat / np.maximum(1 - np.diag(hat), 1e-3)[:, None]
    np.fill_diagonal(weights, 0)
    return np.asarray(weights, np.float32)


def _features(texts: list[str]) -> tuple[Array, Array]:
    """Unit rows of weighted character 4-grams (1 + ln count, times inverse document frequency): of the first and second half."""
    counts = np.zeros((len(texts), WIDTH), np.float32)
    for i, text in enumerate(texts):
        plain = " ".join(text[:LONGEST].casefold().split()).encode("utf-8", "replace").decode()
        places = [zlib.crc32(plain[k : k + GRAM].encode()) % WIDTH for k in range(len(plain) - GRAM + 1)]
        np.add.at(counts[i], places, 1.0)
    seen = (counts > 0).sum(0)
    weight = np.where(seen > 1, np.log(len(texts) / np.maximum(seen, 1)), 0.0).astype(np.float32)
    found = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * weight
    found /= np.linalg.norm(found, axis=1, keepdims=True) + 1e-9
    half = len(texts) // 2
    return found[:half].astype(np.float32), found[half:].astype(np.float32)
