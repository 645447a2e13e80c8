"""Which training rows deserve a second look: never learnt, learnt then forgotten, contradicting, memorised verbatim.

The losses are those that the training loop wrote down for each row in each epoch (`row_losses.npy`). Validation and test rows are
looked at too, where no training is needed for it: whoever relabels a data set wants to see all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from tunesmith.conversation import Conversation
from tunesmith.data.convert import sample
from tunesmith.data.language import words
from tunesmith.data.scan import conversations
from tunesmith.evaluation.metric import Said
from tunesmith.evaluation.suspicion import belonging, suspicion
from tunesmith.runs import ROW_LOSSES, Run

CODES = {
    "contradicting": "the answer belongs to its prompt less than those of similar rows do: is it another row's?",
    "doubtful": "among the forty that come nearest to contradicting",
    "never_learnt": "its loss fell by less than a twentieth while that of most rows fell",
    "forgotten": "its loss rose again by more than 0.3 nats a token after it had been learnt",
    "memorised": "the tuned model repeats its answer word for word",
}
SUSPICIOUS = 2.5  # of the persona sample's sound rows 7 to 11 % are over it, of rows with another's answer 55 to 90 %
FIRST = 40  # rows that are shown at once
DOUBTFUL = 1.0  # suspicion from which on a row may be among them
ROSE = 0.3  # nats a token
FELL = 0.05  # of the loss in the first epoch
RECITED = 24  # training rows with the lowest losses whose prompts are answered
VERBATIM = 8  # words: shorter answers are the same by chance

Gains = Sequence[float | None]  # nats a token by which a row's own context makes its answer likelier than others' do


class RowFinding(msgspec.Struct, frozen=True):
    """A row that deserves a look."""

    source: str  # the row's place, "file:line"
    digest: str  # of its content
    side: str  # train, valid or test
    codes: list[str]  # of CODES
    score: float  # the suspicion: a sum of robust z-scores
    losses: list[float]  # nats a token in each epoch, of training rows
    prompt: str  # as one text
    answer: str  # the one to be learnt


class RowReport(msgspec.Struct, frozen=True):
    """Findings, and what was looked at.

    `belonging`: how much more prompt and answer have in common than other pairs; mean over rows in standard deviations, and
    twice its standard error. `gain`: the same for the tuned model's likelihood, nats a token, of rows it was not trained on.
    """

    rows: int  # of the data set, all sides
    looked_at: int  # of them, those that were weighed
    asked: int  # prompts of the best-learnt training rows that were answered
    recited: int  # of them, those whose answer came back word for word
    belonging: tuple[float, float] | None  # mean and twice its standard error, or not known
    gain: tuple[float, float] | None  # the same
    findings: list[RowFinding]  # the most suspicious first


class Candidates(msgspec.Struct, frozen=True):
    """Rows that are looked at, with their side and, of training rows, their number; those whose prompts are answered."""

    rows: list[Conversation]
    sides: list[str]
    numbers: list[int]
    recited: list[Conversation]
    total: int

    def held(self) -> list[Conversation]:
        """Those that were not trained on."""
        return [row for row, side in zip(self.rows, self.sides, strict=True) if side != "train"]


def candidates(run: Run, seed: int, answers: bool = True, most: int = 1000) -> Candidates:
    """The rows of a run that the report is about. Read one at a time: there may be more than memory holds.

    `answers`: whether the best-learnt rows' prompts can be answered. `most`: of more rows so many are chosen by the seed; each
    is scored five times.
    """
    counts = {side: int(run.manifest()["plan"]["rows"].get(side, 0)) for side in ("train", "valid", "test")}
    total = sum(counts.values())
    taken = set(sample(range(total), most, seed)) if total > most else set(range(total))
    ranks = {row: rank for rank, row in enumerate(_best_learnt(run))} if answers else {}
    rows, sides, numbers, recited = [], [], [], {}
    at = 0
    for side, count in counts.items():
        path = run / "data" / f"{side}.jsonl"
        for number, row in enumerate(conversations(str(path)) if count and path.exists() else ()):
            if at in taken:
                rows.append(row)
                sides.append(side)
                numbers.append(number if side == "train" else -1)
            if side == "train" and number in ranks and row.prompt() and len(words(row.answer())) >= VERBATIM:
                recited[ranks[number]] = row
            at += 1
    return Candidates(rows, sides, numbers, [recited[rank] for rank in sorted(recited)[:RECITED]], total)


def losses(run: Run) -> np.ndarray | None:
    """[epochs, rows] of the run's training rows, 0 where a row was not seen; None where they were not written down."""
    path = run / ROW_LOSSES
    try:
        return np.array(np.load(path, mmap_mode="r", allow_pickle=False)) if path.exists() else None
    except (OSError, ValueError):
        return None


def _best_learnt(run: Run) -> list[int]:
    """The training rows with the lowest last losses, these first: more than are asked, as those with short answers are not."""
    table = losses(run)
    if table is None or not table.size:
        return []
    last = np.where(table > 0, table, np.nan)
    whole = last[~np.isnan(last).any(1)]  # an epoch that broke off says nothing of most rows
    seen = whole if len(whole) else last[~np.isnan(last).all(1)]
    return [] if not len(seen) else [int(i) for i in np.argsort(seen[-1], kind="stable")[: 4 * RECITED]]


def report(run: Run, found: Candidates, gains: Gains, held: Gains, said: Sequence[Said]) -> RowReport:
    """What is to be said of the candidates: from the gains of the base, which has learnt none of them; the tuned model's gains on
    the rows that were held out; and its answers to the recited rows' prompts."""
    prompts = [
        "\n".join(m.content for m in row.prompt() if m.role not in ("system", "developer")) for row in found.rows
    ]
    answers = [row.answer() for row in found.rows]
    helps = _mean(gains)
    scores = suspicion(prompts, answers, gains if helps and helps[0] > helps[1] else None)  # else they are noise
    verbatim = {
        row.digest()
        for row, s in zip(found.recited, said, strict=True)
        if " ".join(s.text.split()) == " ".join(row.answer().split())
    }
    table = losses(run)
    marks = _marks(table) if table is not None else {}
    findings = []
    least = max(DOUBTFUL, sorted(scores, reverse=True)[:FIRST][-1]) if scores else DOUBTFUL
    for row, side, number, prompt, score in zip(found.rows, found.sides, found.numbers, prompts, scores, strict=True):
        codes = ["contradicting"] if score >= SUSPICIOUS else ["doubtful"] if score >= least else []
        codes += marks.get(number, [])
        codes += ["memorised"] if side == "train" and row.digest() in verbatim else []
        if codes:
            curve = [float(x) for x in table[:, number] if x > 0] if table is not None and number >= 0 else []
            findings.append(
                RowFinding(row.source, row.digest(), side, codes, score, curve, _short(prompt), _short(row.answer()))
            )
    findings.sort(key=lambda f: -f.score)
    own = [x for x, row in zip(belonging(prompts, answers), found.rows, strict=False) if row.prompt()]
    return RowReport(
        found.total,
        len(found.rows),
        len(found.recited),
        len(verbatim),
        _mean(own),
        _mean(held),
        findings,
    )


def _marks(table: np.ndarray) -> dict[int, list[str]]:
    """never_learnt and forgotten, by the number of the training row."""
    seen = np.where(table > 0, table, np.nan)
    whole = seen[~np.isnan(seen).any(1)]
    if len(whole) < 2:
        return {}
    first, last, lowest = whole[0], whole[-1], whole.min(0)
    found: dict[int, list[str]] = {}
    if np.median(last / first) < 1 - 2 * FELL:
        for row in np.flatnonzero((last > first * (1 - FELL)) & (last > np.median(last))):
            found.setdefault(int(row), []).append("never_learnt")
    learnt = (lowest < np.median(lowest)) & (lowest < first * (1 - FELL))
    for row in np.flatnonzero(learnt & (last > lowest + ROSE)):
        found.setdefault(int(row), []).append("forgotten")
    return found


def _mean(values: Sequence[float | None]) -> tuple[float, float] | None:
    """The mean and twice its standard error; None of fewer than 8."""
    known = [value for value in values if value is not None]
    if len(known) < 8:
        return None
    return float(np.mean(known)), float(2 * np.std(known, ddof=1) / len(known) ** 0.5)


def _short(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
