"""The row report: planted rows are found, marks by hand-made tables, and what `data convert --drop-codes` leaves out."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT, Result, rows, write
from training import fit
from tunesmith import api
from tunesmith.conversation import Conversation, Message
from tunesmith.data.write import as_row
from tunesmith.evaluation import rowreport, suspicion
from tunesmith.evaluation.metric import Said
from tunesmith.evaluation.rowreport import CODES, Candidates, report
from tunesmith.evaluation.suspicion import belonging
from tunesmith.runs import ROW_LOSSES, Run

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k_test.jsonl"


def turn(prompt: str, answer: str, source: str = "") -> Conversation:
    return Conversation((Message("user", prompt), Message("assistant", answer)), source=source)


def planted(found: list[Conversation], count: int, seed: int) -> tuple[list[Conversation], set[str]]:
    """The rows, `count` of them with the answer of another of these; the prompts of those."""
    wrong = sorted(random.Random(seed).sample(range(len(found)), count))
    answers = [row.answer() for row in found]
    for here, other in zip(wrong, [*wrong[1:], *wrong[:1]], strict=True):
        answers[here] = found[other].answer()
    changed = [
        Conversation((*row.prompt(), Message("assistant", a)), tools=row.tools)
        for row, a in zip(found, answers, strict=True)
    ]
    return changed, {changed[i].digest() for i in wrong}


def sound() -> list[Conversation]:
    """256 rows of five kinds whose answers are their own."""
    parts = [api.load(part) for part in ("chat", "code", "domain", "emoji", "instruct")]
    return [row for part in parts for row in part if row.prompt()][:256]


@pytest.mark.skipif(not GSM8K.is_file(), reason="gsm8k lies beside the checkout only where it was provided")
def test_rows_with_another_rows_answer_are_found(tiny: Path, tmp_path: Path) -> None:
    """Of 20 among 256, 15 at least are in the first 40 findings; a model that has learnt nothing is all that was asked."""
    changed, wrong = planted(api.load(GSM8K)[:256], 20, 1)
    data = write(tmp_path / "d.jsonl", [as_row(row) for row in changed])
    run = fit(tmp_path / "run", data, tiny, max_steps=1, over_long="truncate")
    found = api.evaluate(run, rows=0, samples=0).training_rows
    assert found is not None and found.rows == found.looked_at == 256 and found.asked == 0
    first = found.findings[:40]
    assert len({f.digest for f in first} & wrong) >= 15
    assert [f.score for f in found.findings] == sorted((f.score for f in found.findings), reverse=True)
    assert {f.side for f in first} >= {"train"} and all(f.codes in (["contradicting"], ["doubtful"]) for f in first)
    places = {f.source: f.digest for f in found.findings}
    held = {
        row.source: row.digest() for side in ("train", "valid", "test") for row in api.load(run / f"data/{side}.jsonl")
    }
    assert places.items() <= held.items()  # the line that is named is the row's


@pytest.mark.parametrize(("name", "least"), [("mixed", 14), ("echo", 12)])
def test_texts_alone_find_most_of_them(name: str, least: int) -> None:
    """In the mean of ten plantings (measured: 16.0 and 13.5); by chance 3 of 20 would be among the first 40 of 256."""
    whole = sound() if name == "mixed" else api.load(name)
    found = []
    for seed in range(10):
        changed, wrong = planted(whole, 20, seed)
        scores = suspicion.suspicion([r.prompt()[-1].content for r in changed], [r.answer() for r in changed])
        first = sorted(range(256), key=lambda i: -scores[i])[:40]
        found.append(len({changed[i].digest() for i in first} & wrong))
    assert np.mean(found) >= least


def test_a_model_to_which_contexts_say_nothing_is_not_heard(tmp_path: Path) -> None:
    """Gains of both signs alike move no score; gains that are mostly positive do."""
    found = sound()[:40]
    noise = [1.0 if i % 2 else -1.0 for i in range(40)]
    alone = scores_of(told(tmp_path, found, None))
    assert scores_of(told(tmp_path, found, None, gains=noise)) == alone
    assert (
        scores_of(told(tmp_path, found, None, gains=[2.0 + x for x in noise[:39]] + [-9.0]))[found[39].digest()] >= 2.5
    )


def scores_of(result: rowreport.RowReport) -> dict[str, float]:
    return {f.digest: f.score for f in result.findings}


def test_sound_rows_are_left_alone() -> None:
    """`SUSPICIOUS` marks an eighth of them at most, and after shuffling all answers prompt and answer have nothing in common."""
    found = sound()
    prompts, answers = [r.prompt()[-1].content for r in found], [r.answer() for r in found]
    scores = suspicion.suspicion(prompts, answers)
    assert len(scores) == len(found) and sum(s >= rowreport.SUSPICIOUS for s in scores) <= len(found) / 8
    order = random.Random(0).sample(range(len(found)), len(found))
    own, shuffled = (np.array(belonging(prompts, a)) for a in (answers, [answers[i] for i in order]))
    error = 2 * shuffled.std() / len(shuffled) ** 0.5
    assert own.mean() > 1 and abs(shuffled.mean()) < 1.5 * error


# ---- suspicion by hand


def test_a_row_among_its_own_kind_is_found_by_hand() -> None:
    towns = {
        "France": "Paris",
        "Norway": "Oslo",
        "Kenya": "Nairobi",
        "Peru": "Lima",
        "Japan": "Tokyo",
        "Egypt": "Cairo",
    }
    prompts = [f"What is the capital of {country}?" for country in towns]
    answers = [f"{town} is the capital of {country}." for country, town in towns.items()]
    answers[5] = "Beat the eggs, add flour and sugar, and bake for an hour."
    scores = suspicion.suspicion(prompts, answers)
    assert max(range(6), key=lambda i: scores[i]) == 5 and scores[5] >= rowreport.SUSPICIOUS


def test_gains_of_a_model_count() -> None:
    """Where texts say nothing, a row whose own context helps less than others' does is above the rest. A model's gain of 1.0 for
    all but one row, and a spread of 0: nothing can be said of it. Of gains 0, 1.0 (four times), 1.05, 1.1 (four times) the
    median is 1.025 and that of the distances from it 0.05: 0 is 1.025 / (1.4826 * 0.05) = 13.8 under it, of which 6 count."""
    texts = ["same"] * 10
    assert suspicion.suspicion(texts, texts, [1.0] * 9 + [0.0]) == [0.0] * 10
    gains = [1.0, 1.1] * 4 + [1.05, 0.0]
    scores = suspicion.suspicion(texts, texts, gains)
    assert scores[9] == suspicion.MOST == 6.0 and scores[0] == pytest.approx(0.025 / (1.4826 * 0.05))
    assert suspicion.suspicion(texts, texts, [None] * 10) == [0.0] * 10
    some = suspicion.suspicion(texts, texts, [None, *gains[1:]])
    assert some[0] == 0.0 and some[9] == 6.0


def test_an_exchange_of_answers_by_hand() -> None:
    """Row 0 fits its own answer by 1 and row 1 by 0; the other way round it is 2 and 4: together they would gain 5. Row 2 would
    lose 1 by either exchange: 3 + 0 - 1 - 3 and 0 + 2 - 0 - 3."""
    fits = np.array([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0], [0.0, 2.0, 3.0]])
    assert suspicion._exchanged(fits).tolist() == [5.0, 5.0, -1.0]


def test_what_texts_have_in_common_by_hand() -> None:
    """Pieces are of words: " cat", "cat " and " cat " are a cat's; those in one text only say nothing."""
    assert list(suspicion._pieces("Cat, a")) == [" cat", "cat ", " cat ", " a ", " a "]
    like = suspicion._likeness(["a cat", "cat", "dog", "dog!", "hen"])
    want = np.zeros((5, 5))
    want[:2, :2] = want[2:4, 2:4] = 1
    assert like == pytest.approx(want, abs=1e-6)


def test_pieces_are_summed_up_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [row.answer() for row in sound()[:30]]
    whole = suspicion._likeness(texts)
    monkeypatch.setattr(suspicion, "WIDTH", 7)
    assert suspicion._likeness(texts) == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize(
    "texts",
    [
        [],
        [""],
        ["one"],
        ["one", "two"],
        [""] * 9,
        ["same"] * 9,
        ["\0", "\0\0", "a\0b" * 9, ""],
        ["東京は大きい都市です", "กรุงเทพ", "مرحبا", "👋🏽" * 9, "\ud800", "e\u0301", "x" * 100_000, " \n\t ", "-1"],
    ],
)
def test_any_texts(texts: list[str]) -> None:
    for prompts, answers in ((texts, texts), (texts, texts[::-1]), ([""] * len(texts), texts)):
        scores = suspicion.suspicion(prompts, answers)
        assert len(scores) == len(texts) and np.isfinite(scores).all()
        found = belonging(prompts, answers)
        assert len(found) == (len(texts) if len(texts) > 2 else 0) and np.isfinite(found).all()


def test_large_sets_are_compared_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rows drawn at random: each row is weighed once, also where the last block is too small to say anything."""
    found = sound()[:121]
    prompts, answers = [r.prompt()[-1].content for r in found], [r.answer() for r in found]
    monkeypatch.setattr(suspicion, "BLOCK", 40)
    sizes: list[int] = []
    real = suspicion._relations
    monkeypatch.setattr(suspicion, "_relations", lambda p, a: sizes.append(len(p)) or real(p, a))
    scores = suspicion.suspicion(prompts, answers)
    assert sizes == [40, 40, 40] and len(scores) == 121 and len(belonging(prompts, answers)) == 40
    assert suspicion.suspicion(prompts, answers) == scores


# ---- what the losses say


def test_never_learnt_by_hand() -> None:
    """All fall from 4 to 1 (by 75 %) but row 3, from 4 to 3.9 (2.5 %, less than FELL), and row 5, to 3.7 (7.5 %)."""
    table = np.array([[4.0] * 10, [1.0] * 10], np.float32)
    table[1, [3, 5]] = 3.9, 3.7
    assert rowreport._marks(table) == {3: ["never_learnt"]}
    table[1, 3] = 0.0  # it was not seen in the second epoch, which therefore is none
    assert rowreport._marks(table) == {}
    assert rowreport._marks(np.array([[4.0] * 10, [3.9] * 10], np.float32)) == {}  # nothing was learnt at all
    assert rowreport._marks(np.zeros((3, 4), np.float32)) == {} == rowreport._marks(np.zeros((0, 0), np.float32))


def test_forgotten_by_hand() -> None:
    """The lowest of rows 0 to 3 is under the median of lowests (0.5, 0.5, 0.5, 0.5, 1, …: 1); 0 rises by 0.4, 1 by 0.2; 9 rises
    too, but was never among the better half."""
    table = np.array([[4.0] * 10, [0.5] * 4 + [1.0] * 5 + [2.0], [0.5] * 4 + [1.0] * 5 + [3.0]], np.float32)
    table[2, :2] = 0.9, 0.7
    assert rowreport._marks(table) == {0: ["forgotten"]}
    assert rowreport._marks(np.vstack([table, np.zeros((1, 10), np.float32)])) == {0: ["forgotten"]}  # an epoch unseen


def told(tmp_path: Path, found: list[Conversation], table: np.ndarray | None, **more: object) -> rowreport.RowReport:
    if table is not None:
        np.save(tmp_path / ROW_LOSSES, table.astype(np.float32))
    numbers = list(range(len(found)))
    recited = more.get("recited", [])
    candidates = Candidates(found, ["train"] * len(found), numbers, recited, len(found))  # type: ignore[arg-type]
    gains = more.get("gains", [None] * len(found))
    return report(Run(tmp_path), candidates, gains, [], more.get("said", []))  # type: ignore[arg-type]


def test_marks_are_told_with_the_rows(tmp_path: Path) -> None:
    found = [turn(f"Question {i}?", f"Answer {i}.", f"d.jsonl:{i + 1}") for i in range(10)]
    table = np.array([[4.0] * 10, [0.5] * 5 + [1.0] * 5, [0.5] * 5 + [1.0] * 5])
    table[2, 0], table[1:, 7] = 1.2, 4.0
    said = [Said("Answer\n 2. "), Said("Answer 4")]
    result = told(tmp_path, found, table, recited=[found[2], found[3]], said=said)
    marks = {f.source: (f.codes, f.losses) for f in result.findings}
    assert marks["d.jsonl:1"] == (["forgotten"], pytest.approx([4.0, 0.5, 1.2]))
    assert marks["d.jsonl:8"] == (["never_learnt"], [4.0, 4.0, 4.0])
    assert marks["d.jsonl:3"][0] == ["memorised"] and "d.jsonl:4" not in marks
    assert (result.asked, result.recited, result.looked_at, result.gain) == (2, 1, 10, None)
    assert {code for codes, _ in marks.values() for code in codes} <= set(CODES)
    none = told(tmp_path / "none", found, None)
    assert none.findings == [] and (none.asked, none.recited) == (0, 0)


def test_a_damaged_table_is_none(tmp_path: Path) -> None:
    found = [turn(f"Question {i}?", f"Answer {i}.") for i in range(10)]
    (tmp_path / ROW_LOSSES).write_bytes(b"\x93NUMPY")
    assert told(tmp_path, found, None).findings == []
    assert told(tmp_path, found, np.zeros((2, 10))).findings == []
    assert told(tmp_path, [], None).belonging is None


def test_rows_without_prompts(tmp_path: Path) -> None:
    """Plain text has no answer that could be another's."""
    found = [Conversation((Message("text", f"Some words on {i}, and more."),)) for i in range(12)]
    result = told(tmp_path, found, None)
    assert result.findings == [] and result.belonging is None


# ---- of a run


@pytest.fixture(scope="module")
def learnt(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model that was trained until it recites: 40 rows, more than eight words an answer."""
    folder = tmp_path_factory.mktemp("learnt")
    said = "All of it is kept in the box beside the green door, as always."
    asked = [{"prompt": f"Where is number {i}?", "completion": said} for i in range(40)]
    data = write(folder / "d.jsonl", asked)
    run = fit(folder / "run", data, tiny, epochs=10, learning_rate=1e-2, patience=0, valid_fraction=0.05)
    return run


def test_memorised(learnt: Run) -> None:
    found = api.evaluate(learnt, rows=4, samples=0).training_rows
    assert found is not None and found.asked == rowreport.RECITED == 24 and found.recited >= 20
    assert sum("memorised" in f.codes for f in found.findings) == found.recited
    assert all(f.side == "train" for f in found.findings if "memorised" in f.codes)


def test_what_is_asked_of_the_best_learnt(learnt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest losses first, without those whose answers are short."""
    table = rowreport.losses(learnt)
    assert table is not None
    training = api.load(learnt / "data" / "train.jsonl")
    monkeypatch.setattr(rowreport, "RECITED", 3)
    found = rowreport.candidates(learnt, 0)
    assert found.recited == [training[i] for i in np.argsort(table[-1], kind="stable")[:3]]
    monkeypatch.setattr(rowreport, "VERBATIM", 20)
    assert rowreport.candidates(learnt, 0).recited == [] == rowreport.candidates(learnt, 0, False).recited


def test_no_more_rows_than_asked_for_are_looked_at(learnt: Run) -> None:
    found = rowreport.candidates(learnt, 3, most=10)
    assert len(found.rows) == len(found.sides) == len(found.numbers) == 10 and found.total == 40
    training = api.load(learnt / "data" / "train.jsonl")
    for row, side, number in zip(found.rows, found.sides, found.numbers, strict=True):
        assert (training[number] == row) if side == "train" else number == -1
    assert rowreport.candidates(learnt, 3, most=10) == found != rowreport.candidates(learnt, 4, most=10)
    few = api.evaluate(learnt, rows=2, samples=0, weighed=10).training_rows
    assert few is not None and (few.looked_at, few.rows) == (10, 40)
    assert api.evaluate(learnt, rows=2, samples=0, weighed=0).training_rows is None


# ---- data convert --drop-codes


def test_marked_rows_are_left_out_and_no_others(learnt: Run, tmp_path: Path, cli: Callable[..., Result]) -> None:
    api.evaluate(learnt, rows=20, samples=0)
    place = learnt / "evaluation" / "result.json"
    kept = api.evaluate(learnt, rows=20, samples=0).training_rows
    assert kept is not None and place.exists()
    dataset = learnt.recipe().dataset
    marked = {code: {f.digest for f in kept.findings if code in f.codes} for code in CODES}
    assert marked["memorised"]
    for asked in ("memorised", "contradicting,never-learnt", " memorised , forgotten"):
        codes = {code.strip().replace("-", "_") for code in asked.split(",")}
        out = tmp_path / f"{len(asked)}.jsonl"
        done = cli("data", "convert", dataset, "-o", out, "--drop-codes", asked, "--run", learnt, "--json")
        assert done.code == 0, done.err
        gone = set().union(*(marked[code] for code in codes))
        want = [row.digest() for row in api.load(dataset) if row.digest() not in gone]
        assert [row.digest() for row in api.load(out)] == want and done.json()["rows"] == len(want)
        assert f"{len(gone)} of 40 rows left out" in done.err or not gone


def test_what_cannot_be_dropped_is_said(learnt: Run, tiny: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    data, run = write(tmp_path / "d.jsonl", rows(30)), tmp_path / "run"
    fit(run, data, tiny, max_steps=1)
    for options, words in (
        (["--drop-codes", "memorized", "--run", learnt], 'no code "memorized" (did you mean "memorised"?)'),
        (["--drop-codes", "memorised"], "--drop-codes and --run go together"),
        (["--run", learnt], "--drop-codes and --run go together"),
        (["--drop-codes", "memorised", "--run", run], f"tunesmith evaluate {run}"),
        (["--drop-codes", "memorised", "--run", tmp_path / "none"], "none"),
    ):
        done = cli("data", "convert", data, "-o", tmp_path / "out.jsonl", *options)
        assert done.code == 2 and words in done.err, done.err
        assert not (tmp_path / "out.jsonl").exists()
    (run / "evaluation").mkdir()
    (run / "evaluation" / "result.json").write_text("{half")
    done = cli("data", "convert", data, "-o", tmp_path / "out.jsonl", "--drop-codes", "memorised", "--run", run)
    assert done.code == 2 and "no evaluation" in done.err
