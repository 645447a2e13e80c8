"""Splits: exact, independent of order, and nothing equal on two sides."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.conversation import Conversation, Message
from tunesmith.data.split import SIDES, leaks, prompt_key, split
from tunesmith.errors import DataError, UsageError

WORDS = ("amber", "bridge", "cinder", "dapple", "ember", "fallow", "gusset", "hollow", "inkwell", "juniper")


def conversation(prompt: str, answer: str = "a", tree: int = 0) -> Conversation:
    return Conversation((Message("user", prompt), Message("assistant", answer)), {"tree_id": tree}, f"f:{prompt}")


def digests(parts: dict[str, list[Conversation]]) -> dict[str, list[str]]:
    return {side: [c.digest() for c in part] for side, part in parts.items()}


prompts = st.lists(
    st.text(min_size=1, max_size=8).filter(str.strip),
    min_size=10,
    max_size=60,
    unique_by=lambda s: " ".join(s.split()).casefold(),
)
shares = st.sampled_from([(0.1, 0.1), (0.2, 0.0), (0.0, 0.3), (0.25, 0.25)])


@given(prompts, shares, st.integers(0, 5), st.randoms())
def test_hash_is_exact_and_independent_of_order(
    texts: list[str], share: tuple[float, float], seed: int, rng: random.Random
) -> None:
    rows = [conversation(t) for t in texts]
    parts = split(rows, *share, seed=seed)
    assert [len(parts[s]) for s in ("valid", "test")] == [math.ceil(len(rows) * s) for s in share]
    assert sum(map(len, parts.values())) == len(rows)
    shuffled = rows[:]
    rng.shuffle(shuffled)
    assert digests(split(shuffled, *share, seed=seed)) == digests(parts)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=20, max_size=30),
    st.sampled_from(["hash", "shuffle"]),
    st.integers(0, 3),
    st.randoms(),
)
def test_equal_prompts_and_groups_never_straddle(sizes: list[int], method: str, seed: int, rng: random.Random) -> None:
    """Trees of one to four rows; neighbours in a tree ask the same; some prompts stand in two trees."""
    rows = [
        conversation(f"{(g // 2 if i == 3 else g)}-{i // 2}", str(i), tree=g)
        for g, n in enumerate(sizes)
        for i in range(n)
    ]
    rng.shuffle(rows)
    parts = split(rows, 0.2, 0.2, method=method, seed=seed, group_by="metadata.tree_id")
    assert sum(map(len, parts.values())) == len(rows) and all(parts.values())
    for key in (prompt_key, lambda c: c.metadata["tree_id"]):
        sides = [{key(c) for c in parts[side]} for side in SIDES]
        assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])


@settings(deadline=None)
@given(st.sampled_from(["hash", "shuffle"]), st.integers(0, 2**31))
def test_near_duplicates_never_straddle(method: str, seed: int) -> None:
    """Thirty texts, some twice or three times with a word changed, in any order."""
    rng = random.Random(seed)
    texts = [[f"{rng.choice(WORDS)}{rng.randrange(999)}" for _ in range(40)] for _ in range(30)]
    rows = []
    for i, words in enumerate(texts):
        for copy in range(
            12 if i == 0 else rng.choice((1, 1, 2, 3))
        ):  # twelve are more than 5 %, and stay together too
            rows.append(conversation(f"{copy} {i}?", " ".join([*words[:20], f"new{copy}", *words[21:]]), tree=i))
    rng.shuffle(rows)
    parts = split(rows, 0.2, 0.1, method=method, seed=seed)
    assert leaks(parts) == []
    sides = [{row.metadata["tree_id"] for row in parts[side]} for side in SIDES]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    if method == "hash":
        assert digests(split(sorted(rows, key=str), 0.2, 0.1, seed=seed)) == digests(parts)


def test_the_same_question_under_two_instructions_is_on_one_side() -> None:
    rows = [
        Conversation((Message("system", how), *conversation(f"{i}?", f"{how} {i}", i).messages), {"tree_id": i})
        for i in range(30)
        for how in ("Be kind.", "Be short.")
    ]
    parts = split(rows, 0.2, 0.2)
    sides = [{row.metadata["tree_id"] for row in part} for part in parts.values()]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and len(sides[1]) == 6


@given(prompts, st.integers(0, 3))
def test_threshold_never_moves_a_row(texts: list[str], seed: int) -> None:
    def side_of(rows: list[Conversation]) -> dict[str, str]:
        try:
            parts = split(rows, 0.3, 0.3, method="threshold", seed=seed)
        except DataError:
            return {}
        return {c.digest(): side for side, part in parts.items() for c in part}

    before, after = (
        side_of([conversation(t) for t in texts[: len(texts) // 2]]),
        side_of([conversation(t) for t in texts]),
    )
    assert all(after.get(k, side) == side for k, side in before.items())


@pytest.mark.parametrize(("rows", "share", "held"), [(474, 0.1, 48), (256, 0.2, 52), (1319, 0.1, 132), (10, 0.1, 1)])
@pytest.mark.parametrize("method", ["shuffle", "hash"])
def test_counts_of_the_guides(rows: int, share: float, held: int, method: str) -> None:
    parts = split([conversation(str(i)) for i in range(rows)], share, 0, method=method)
    assert (len(parts["train"]), len(parts["valid"]), len(parts["test"])) == (rows - held, held, 0)


def test_shuffle_depends_on_the_seed_and_on_nothing_else() -> None:
    rows = [conversation(str(i)) for i in range(50)]
    one, two, other = (digests(split(rows, method="shuffle", seed=s)) for s in (1, 1, 2))
    assert one == two != other


def test_too_few_rows_and_a_missing_group() -> None:
    with pytest.raises(DataError, match="too few"):
        split([conversation("a"), conversation("b")])
    with pytest.raises(DataError, match="would be empty"):
        split([conversation("same", str(i)) for i in range(20)])
    with pytest.raises(UsageError, match=r"metadata\.nope"):
        split([conversation(str(i)) for i in range(20)], group_by="metadata.nope")
