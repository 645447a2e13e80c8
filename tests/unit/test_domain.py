"""Terms mined from training answers, and their recall, against hand-computed cases."""

from __future__ import annotations

import json
import math
import runpy
import time

import pytest

from conftest import ROOT
from tunesmith.conversation import Conversation, Message
from tunesmith.evaluation.domain import GENERAL, METRICS, general_words, keyness, mine_terms, recall, singular, tokens
from tunesmith.evaluation.metric import Facts, Heard, Said

DATA = ROOT / "src" / "tunesmith" / "assets" / "data"


def answers(name: str, column: str) -> list[str]:
    return [json.loads(line)[column] for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


def test_the_terms_of_beekeeping() -> None:
    """The first 30, which read like beekeeping but for "box" and "per"; and what is no term of it."""
    terms = mine_terms(answers("domain", "answer"))
    assert terms[:30] == [
        *("brood", "hive", "colony", "bee", "queen", "comb", "worker", "cell", "brood box", "capped"),
        *("larvae", "honey", "entrance", "cappings", "inspection", "drone", "spores", "wax", "frame", "mite"),
        *("brood comb", "forager", "hive tool", "super", "swarming", "worker cell", "swarm", "disease", "box", "per"),
    ]
    assert len(terms) == 62 == len(set(terms))
    assert {"queen cell", "propolis", "swarm cell", "nectar", "dead larvae"} <= set(terms)
    assert not {"the", "few", "most honey", "new queen", "temperate", "three days"} & set(
        terms
    )  # the fifth only within a longer
    assert mine_terms(answers("domain", "answer"), most=3) == terms[:3]


def test_no_terms_where_there_is_nothing_to_tell_them_from() -> None:
    german = ["Die Imkerin öffnet den Bienenstock und prüft die Waben der Königin."] * 5
    assert (
        mine_terms(german)
        == mine_terms([])
        == mine_terms(["", "\0", "\ud800"])
        == mine_terms(["The bees swarm."])
        == []
    )
    assert mine_terms(["The bees swarm in the old hive."] * 3) == ["bees swarm", "hive"]


def test_keyness_by_hand() -> None:
    """10 in 1,000 words against 10 in 9,000: expected 20 / 10,000 of each: 2 and 18."""
    assert keyness(10, 1000, 10, 9000) == pytest.approx(2 * (10 * math.log(10 / 2) + 10 * math.log(10 / 18)))
    assert keyness(5, 1000, 0, 4000) == pytest.approx(2 * 5 * math.log(5 / 1))
    assert keyness(1, 1000, 10, 9000) == 0.0  # rarer here


def test_words_are_alike_in_singular_and_plural() -> None:
    pairs = (
        "bee bees",
        "colony colonies",
        "box boxes",
        "queen queen's",
        "bush bushes",
        "glass glasses",
        "virus virus",
        "gas gas",
    )
    assert all(singular(a) == singular(b) for a, b in map(str.split, pairs))
    assert tokens("The Queen’s cells, 3 of them!") == ["the", "queen", "cell", "|", "|", "of", "them", "|"]


def test_recall_by_hand() -> None:
    terms = ["queen cells", "brood box", "mite", "wax", "bees"]
    reference = "Queen cells hang in the brood box; bees build them of wax."  # 4 of the terms
    assert recall("A queen cell of the bee.", reference, terms) == (2, 4)
    assert recall("", reference, terms) == (0, 4) and recall(reference, reference, terms) == (4, 4)
    assert recall("waxy beeswax; queen, cells", reference, terms) == (0, 4)  # whole words, no mark between
    assert recall("wax", "nothing of it", terms) == (0, 0) and recall("a", "a", ["", "a", "a"]) == (1, 1)


def test_the_metric_of_a_row() -> None:
    row = Conversation((Message("user", "How?"), Message("assistant", "The queen lays eggs.")))
    [metric] = METRICS
    facts, said = Facts(terms=["queen", "egg", "mite"]), Heard(said=Said("Queens do."))
    assert metric.columns and metric.columns(row, said, facts) == (1, 2)
    assert metric.columns(row, Heard(), facts) is None and metric.columns(row, said, Facts()) is None


def test_any_text_and_a_bounded_time() -> None:
    start = time.process_time()
    mine_terms(["bee " * 25_000] * 100)  # 10 MB
    for piece in ("\0", "a-", "'", "é", "好", " ", "9", "\ud800"):
        text = piece * 100_000
        assert recall(text, text, ["bee", piece]) is not None and mine_terms([text, text]) == []
    assert time.process_time() - start < 30


def test_the_general_words_are_what_the_tool_makes() -> None:
    made = runpy.run_path(str(ROOT / "tools" / "general_words.py"))["table"]()
    assert GENERAL.read_text() == made and len(made.encode()) < 60_000
    words, total = general_words()
    assert total == 582_258 and len(words) > 5000 and words["a"] == max(words.values())
