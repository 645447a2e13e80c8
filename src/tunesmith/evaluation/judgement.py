"""What the replies of a judge amount to: rows won, and how far the judge can be believed.

Everything is computed from the transcripts, so that it can be recomputed from judge.jsonl.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from tunesmith.conversation import Conversation
from tunesmith.evaluation.instruct import chrf
from tunesmith.evaluation.metric import Heard
from tunesmith.evaluation.stats import Comparison, compare

ORDERS = ("base first", "tuned first")
VERDICTS = ("A", "B", "TIE")
EARLIER = -1


class Transcript(msgspec.Struct, frozen=True):
    """A request to the judge and what came of it: a line of judge.jsonl.

    `row`: number of the prompt, from 0; EARLIER: of another evaluation, kept so that it need not be paid for again.
    `order`: one of ORDERS, or "equal" where nobody was asked. `read`: one of VERDICTS, "unreadable", or "refused" by the
    service. `asked`: hash of judge and request. `lengths`: characters of base and tuned.
    """

    row: int
    prompt: str
    order: str
    reply: str
    read: str
    asked: str
    lengths: tuple[int, int]


class Judgement(msgspec.Struct, frozen=True):
    """What a judge thinks of the tuned model's answers, against the base's. A share without rows to take it of is None."""

    model: str  # the judge
    service: str  # its address
    rows: int  # judged
    wins: int  # of them, rows of which the tuned answer is preferred
    ties: int  # no preference, or another one in each order
    losses: int  # rows of which the base's is preferred
    equal: int  # ties of answers that are the same: nobody is asked
    left_out: int  # rows with an unreadable or refused reply
    unreadable: int  # replies
    refused: int  # replies
    missing: int  # rows that the service did not come to
    failure: str  # why, "" where none is missing
    comparison: Comparison | None  # share of rows won, a tie as half of one [0, 1]; None without rows
    position_bias: float | None  # share of rows whose two replies name the same place [0, 1] (Zheng et al. 2023)
    first_preferred: float | None  # share of replies that prefer the first answer [0, 1]; 0.5 without bias
    agreement: float | None  # share of rows on which the judge and the deciding metric say the same [0, 1]
    kappa: float | None  # the same, corrected for chance [-1, 1] (Cohen 1960)
    length_bias: float | None  # Spearman's rank correlation (1904) of preference with extra length
    transcripts: list[Transcript] = []  # every request with its reply; judge.jsonl


def figures(
    found: Sequence[Transcript],
    rows: int,
    model: str,
    automatic: Sequence[int | None] = (),
    seed: int = 0,
    service: str = "",
    failure: str = "",
) -> Judgement:
    """The judgement that transcripts of so many rows amount to; all of it can be recomputed from judge.jsonl."""
    found = [one for one in found if one.row != EARLIER]
    by_row: dict[int, list[Transcript]] = {}
    for one in found:
        by_row.setdefault(one.row, []).append(one)
    whole = {row: said for row, said in by_row.items() if len(said) == 2 or said[0].order == "equal"}
    liked = {row: p for row, said in whole.items() if (p := preference(said)) is not None}
    preferences = list(liked.values())
    longer = [whole[row][0].lengths[1] - whole[row][0].lengths[0] for row in liked]
    known = [(automatic[row], p) for row, p in liked.items()] if automatic else []
    agreement, kappa = agreed([(a, p) for a, p in known if a is not None])
    bias, first = positions(list(whole.values()))
    return Judgement(
        model,
        service,
        rows=len(liked),
        wins=preferences.count(1),
        ties=preferences.count(0),
        losses=preferences.count(-1),
        equal=sum(said[0].order == "equal" for said in whole.values()),
        left_out=len(whole) - len(liked),
        unreadable=sum(t.read == "unreadable" for t in found),
        refused=sum(t.read == "refused" for t in found),
        missing=rows - len(whole),
        failure=failure,
        comparison=_compared(preferences, seed) if preferences else None,
        position_bias=bias,
        first_preferred=first,
        agreement=agreement,
        kappa=kappa,
        length_bias=rank_correlation(preferences, longer),
        transcripts=found,
    )


def preferred(row: Conversation, base: Heard, tuned: Heard) -> int:
    """Whom a row speaks for: 1 the tuned model, -1 the base. By the reference's likelihood, else by chrF of the answers."""
    if base.loss is not None and tuned.loss is not None:
        gain = base.loss - tuned.loss
    else:
        before, after = (chrf(side.said.text, row.answer()) if side.said else 0.0 for side in (base, tuned))
        gain = after - before
    return (gain > 0) - (gain < 0)


def preference(said: Sequence[Transcript]) -> int | None:
    """1 where the tuned answer won in both orders, -1 where the base's did, else 0; None where a reply could not be read."""
    if said[0].order == "equal":
        return 0
    sides = [_side(one) for one in said]
    if None in sides:
        return None
    return sides[0] if sides[0] == sides[1] else 0


def _side(one: Transcript) -> int | None:
    """Whom a reply prefers: -1 the base, 0 neither, 1 the tuned model."""
    first = -1 if one.order == ORDERS[0] else 1
    return {"A": first, "B": -first, "TIE": 0}.get(one.read)


def _compared(preferences: Sequence[int], seed: int) -> Comparison:
    tuned = np.array([(p + 1) / 2 for p in preferences], np.float64)
    base, tuned = (np.stack([wins, np.ones(len(tuned))], 1) for wins in (1 - tuned, tuned))
    return compare("judge: share of rows won", base, tuned, lower_is_better=False, seed=seed)


def positions(pairs: Sequence[Sequence[Transcript]]) -> tuple[float | None, float | None]:
    """(position bias, share of first answers preferred), both [0, 1] (Zheng et al. 2023).

    The bias is the share of rows whose two replies name the same place, A and A or B and B, of those where neither reply is a
    tie: 0 for a judge that heeds the answers alone, 1 for one that heeds the place alone. The other is the share of A in all
    replies that are A or B: 0.5 without bias. None where there is nothing to count.
    """
    read = [[one.read for one in said] for said in pairs]
    decided = [said for said in read if len(said) == 2 and {*said} <= {"A", "B"}]
    named = [word for said in read for word in said if word in ("A", "B")]
    bias = sum(first == second for first, second in decided) / len(decided) if decided else None
    return bias, named.count("A") / len(named) if named else None


def agreed(pairs: Sequence[tuple[int, int]]) -> tuple[float | None, float | None]:
    """(share of rows on which two judges say the same [0, 1], Cohen's kappa [-1, 1]), for pairs of -1, 0 or 1.

    Kappa (Cohen 1960) is (share - chance) / (1 - chance), chance the share that two judges with these habits reach without
    looking: 0 no better than that, 1 always the same. None without rows, kappa also where chance is 1.
    """
    if not pairs:
        return None, None
    n = len(pairs)
    share = sum(a == b for a, b in pairs) / n
    chance = sum(sum(a == k for a, _ in pairs) * sum(b == k for _, b in pairs) for k in (-1, 0, 1)) / n**2
    return share, (share - chance) / (1 - chance) if chance < 1 else None


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's rank correlation [-1, 1]: Pearson's of the ranks, equal values sharing their mean rank. None where one of the
    two is always the same."""
    first, second = _ranks(one), _ranks(other)
    spread = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / spread if spread else None


def _ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """Ranks around their mean; equal values share theirs."""
    _, place, counts = np.unique(np.array(values, np.float64), return_inverse=True, return_counts=True)
    mean = np.cumsum(counts) - (counts - 1) / 2
    ranks: NDArray[np.float64] = mean[place] - (len(values) + 1) / 2
    return ranks
