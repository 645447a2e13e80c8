"""Constraints read from instructions, and the metrics of following them, against hand-computed cases."""

from __future__ import annotations

import json
import re
import time
from itertools import combinations

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from tunesmith.conversation import Conversation, Message
from tunesmith.evaluation import checks
from tunesmith.evaluation.constraints import CHECKS, INFINITE, found, number
from tunesmith.evaluation.instruct import METRICS, chrf, common, completed, repeats, rouge_l
from tunesmith.evaluation.metric import Facts, Heard, Said

DATA = ROOT / "src" / "tunesmith" / "assets" / "data"
MANY = INFINITE

# instruction, an answer that keeps it, one that breaks it, kind and values of the constraint
TABLE = [
    ("Describe the sea in exactly five words.", "Restless, salty, blue and endless.", "Blue.", "number of words", (5, 5)),
    ("Give a title of at most five words.", "A Year of Letters", "One two three four five six", "number of words", (0, 5)),
    ("Write under 4 words.", "One two three", "One two three four", "number of words", (0, 3)),
    ("Write a story with more than 3 words.", "One two three four", "One two three", "number of words", (4, MANY)),
    ("Reply in between two and four words.", "Not at all", "No", "number of words", (2, 4)),
    ("Use ten words or fewer.", "Short enough", "a b c d e f g h i j k", "number of words", (0, 10)),
    ("Please limit your answer to twenty-one words.", "Short", "word " * 22, "number of words", (0, 21)),
    ("Do not use more than three words.", "Short", "a b c d", "number of words", (0, 3)),
    ("It must not be longer than 3 words.", "Short", "a b c d", "number of words", (0, 3)),
    ("Write at least a hundred words.", "word " * 100, "word " * 99, "number of words", (100, MANY)),
    ("Write a six-word story.", "For sale: baby shoes, never worn.", "For sale.", "number of words", (6, 6)),
    ("What is the capital of Peru? Answer in one word.", "Lima", "It is Lima.", "number of words", (1, 1)),
    ("Summarise this in one sentence.", "Dr. Lee left at 3.5 p.m. today.", "He left. She stayed.", "number of sentences", (1, 1)),
    ("Explain rain in two or three sentences.", "It falls. It wets.", "It falls.", "number of sentences", (2, 3)),
    ("Write four lines about fog.", "a\nb\n\nc\nd", "a\nb\nc", "number of lines", (4, 4)),
    ("Write a haiku about snow.", "Soft\nwhite\nsnow", "Soft white snow", "number of lines", (3, 3)),
    ("Limerick about a cat, please.", "a\nb\nc\nd\ne", "a\nb", "number of lines", (5, 5)),
    ("Write three short paragraphs on tea.", "A\na\n\nB\n \nC", "A\n\nB", "number of paragraphs", (3, 3)),
    ("Answer in at most 10 characters.", "Yes, I do.", "Yes, I do so.", "number of characters", (0, 10)),
    ("Give your answer as two bullet points.", "- a\n  - b\n- c", "- a", "number of bullets", (2, 2)),
    ("Use at least 2 emojis.", "Hi 🎉🎉", "Hi 🎉", "number of emoji", (2, MANY)),
    ("Name three primary colours.", "red, blue and yellow", "red and blue", "number of items", (3, 3)),
    ("List 5 fruits.", "\n".join(f"{i}. fruit" for i in range(1, 6)), "- fig\n- kiwi", "number of items", (5, 5)),
    ("Give me two reasons for and two against it.", "- a\n- b\n\n- c\n- d", "- a\n- b", "number of items", (4, 4)),
    ("Suggest at least three names.", "Al, Bo, Cy, Di", "Al", "number of items", (3, MANY)),
    ("Write a menu with four items.", "a\nb\nc\nd", "a\nb", "number of items", (4, 4)),
    ("Reply as JSON.", '```json\n{"a": 1}\n```', "a: 1", "written like", ("json",)),
    ('Write an object with the keys "a" and "b".', '{"a": 1, "b": 2}', '{"a": 1}', "keys", ("a", "b")),
    ("Give the data as CSV.", 'a,b\n"c,d",e', "a,b\nc", "written like", ("csv",)),
    ("Put it in a table.", "| a | b |\n|---|:-:|\n| 1 | 2 |", "a b", "written like", ("table",)),
    ("Structure it with headings.", "# One\ntext", "One", "written like", ("heading",)),
    ("Reply with a code block.", "```\nx\n```", "x", "written like", ("code block",)),
    ("Turn it into bullet points.", "- a\n- b", "a, b", "written like", ("bullets",)),
    ("Give tips as a numbered list.", "1. a\n2. b", "- a\n- b", "written like", ("numbered",)),
    ("Write it in upper case.", "HELLO, YOU", "Hello, you", "written like", ("upper case",)),
    ("Answer without capital letters.", "hello", "Hello", "written like", ("lower case",)),
    ("Use title case.", "The Old Man and the Sea", "The old manor", "written like", ("title case",)),
    ("Give the words separated by commas.", "a, b", "a b", "written like", ("commas",)),
    ("List them, one per line.", "a\nb", "a, b", "written like", ("one per line",)),
    ("Put them in alphabetical order.", "ant, bee, cat", "bee, ant", "written like", ("alphabetical",)),
    ("Wrap your whole answer in double quotation marks.", '"Hi"', "Hi", "written like", ("quotes",)),
    ("How many? Reply with the number only.", "1,200", "It is 12.", "written like", ("number",)),
    ("Rephrase it as a question.", "Is it late?", "It is late.", "written like", ("question",)),
    ("Write the date as DD.MM.YYYY.", "On 03.11.1998", "3 November", "has a number like", (r"\d\d\.\d\d\.\d\d\d\d",)),
    ("Round to two decimal places.", "44.10 lb", "44.1 lb", "has a number like", (r"\d+[.,]\d{2}",)),
    ('Is it so? Answer "yes" or "no" only.', "No.", "No, it is not.", "yes or no", (True,)),
    ("Is 91 prime? Answer yes or no and say why.", "No, 91 = 7 × 13.", "It is not.", "yes or no", (False,)),
    ("Translate into French.", "Où se trouve la pharmacie ?", "Where is the pharmacy?", "language", ("fr",)),
    ("Answer in plain English.", "The key is under the mat.", "Der Schlüssel ist hier.", "language", ("en",)),
    ("Say something. It must contain the word river.", "The River runs.", "Rivers run.", "contains", ("river", 1, MANY)),
    ('Include the phrase "by the way".', "It is, by the way, so.", "By the by.", "contains", ("by the way", 1, MANY)),
    ('Use the word "so" at least twice.', "So, so.", "So.", "contains", ("so", 2, MANY)),
    ('Use "tea" exactly 2 times.', "Tea, tea", "tea tea tea", "contains", ("tea", 2, 2)),
    ("Use the words sun and moon.", "Moon and sun", "The moon", "contains", ("sun", 1, MANY)),
    ("Describe hunger without mentioning food.", "An empty mug", "Food!", "contains", ("food", 0, 0)),
    ('Write a slogan. Do not use the word "bread".', "Warm!", "Warm bread", "contains", ("bread", 0, 0)),
    ("Say it without using the letter e.", "A cat sits", "A dove", "without the letter", ("e",)),
    ("Write it without commas.", "One and two", "One, two", "without the signs", (",，、",)),
    ("Use no exclamation marks or emoji.", "Hi", "Hi 🎉", "without emoji", ()),
    ('Begin your answer with "Dear Sam".', "**Dear Sam**, hi", "Hello, dear Sam", "starts with", ("dear sam",)),
    ('End with the phrase "the end".', "It was the end.", "The end it was", "ends with", ("the end",)),
    ("Write an advert ending with an exclamation mark.", "Buy!", "Buy.", "ends with the sign", ("!！",)),
    ("Tell me, and end with a question.", "So what?", "So.", "ends with the sign", ("?？",)),
]  # fmt: skip


@pytest.mark.parametrize(("instruction", "kept", "broken", "kind", "values"), TABLE)
def test_a_constraint(instruction: str, kept: str, broken: str, kind: str, values: tuple[object, ...]) -> None:
    of_kind = [c for c in found(instruction, kept) if (c.kind, c.values) == (kind, values)]
    assert len(of_kind) == 1, found.__wrapped__(instruction, kept)
    assert of_kind[0].phrase.replace('"', "") in instruction.replace('"', "")
    assert of_kind[0].kept(kept) and not of_kind[0].kept(broken) and not of_kind[0].kept(" \n")


def test_the_table_has_every_kind() -> None:
    assert {kind for *_, kind, _ in TABLE} == set(CHECKS)
    assert {values[0] for *_, kind, values in TABLE if kind == "written like"} == set(checks.LIKE)


@pytest.mark.parametrize(
    "instruction",
    [
        'Translate "Answer in one word." for me.',  # quoted
        "Shorten this text: Reply in one word.",  # material after a colon
        "Translate the message.\n\nReply in one word.",  # the input part
        "If you do not know, answer in one word.",
        "Write a function that returns one word.",  # code
        "def f():\n    Answer in one word.",
        "How do I answer in one word?",
        "Write about one word.",  # vague
        "Say one word or so.",
        "Write a poem of one word per line.",
        "Explain what the last one word means.",
        "Combine these two sentences.",
        "Name 3 times 4.",
        "Write a name of a fruit, each of one word.",
        "What is the oldest word in English?",
    ],
)
def test_what_is_no_instruction(instruction: str) -> None:
    assert found(instruction, "Word") == ()


def test_what_the_reference_breaks_was_misread() -> None:
    assert [c.kind for c in found("Turn this 500-word article into a headline of two words.", "Bridge Opens")] == [
        "number of words"
    ]
    assert found("Answer in one word.", "In two") == ()
    assert found("Answer in one word.", "") == ()


def test_where_the_instruction_is() -> None:
    text = "A long text about rain.\n\n"
    assert [c.phrase for c in found(text + "Summarise it in one sentence.", "Rain.")] == ["one sentence"]
    assert [c.phrase for c in found("Write a poem.\n\nYour answer must have two lines.", "a\nb")] == ["two lines"]


def test_numbers() -> None:
    words = {
        "12": 12,
        "1,200": 1200,
        "twelve": 12,
        "twenty-one": 21,
        "ninety nine": 99,
        "a dozen": 12,
        "two hundred": 200,
    }
    assert {word: number(word) for word in words} == words
    assert (number("a single"), number("hundred")) == (1, 100)


def test_counts_by_hand() -> None:
    text = "1. Mr. Lee met J. Ray at 3.5 p.m. yesterday. Was it late?\n2. No…\n\nHe said “Go!” and “Stay!” Then"
    assert checks.sentences(text) == 5  # Mr. … yesterday. | Was it late? | No… | He said “Go!” … Stay!” | Then
    assert checks.words("1. one, two -- three\n- four") == 4
    assert checks.lines("a\n\n b \n") == 2 and checks.paragraphs("\na\nb\n\n\nc\n") == 2
    assert checks.bullets("1. a\n   - b\n2) c\n") == 2 and checks.bullets("a - b") == 0


def test_the_sample_data_by_hand() -> None:
    """Of 64 rows 44 have something that can be verified, and all references keep it, for else it is not counted."""
    rows = [json.loads(line) for line in (DATA / "instruct.jsonl").read_text().splitlines()]
    every = [found(r["instruction"] + (f"\n\n{r['input']}" if r.get("input") else ""), r["output"]) for r in rows]
    assert len(rows) == 64 and sum(map(bool, every)) == 44
    kinds = {
        r["instruction"][:20]: sorted(c.kind for c in constraints) for r, constraints in zip(rows, every, strict=True)
    }
    assert kinds["Extract the name, th"] == ["has a number like", "keys", "written like"]
    assert kinds["Name the three prima"] == ["number of items", "written like", "written like"]
    assert kinds["Make up an acrostic "] == []  # "one short line per letter"


def test_plain_questions_hold_few_constraints() -> None:
    """Of 10,442 everyday questions only those that ask for a number of things; anything else would be misread."""
    lines = (ROOT / "tools" / "starter" / "everyday.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    every = [c for r in rows for c in found(r["prompt"], r["completion"])]
    assert len(rows) == 10_442 and {c.kind for c in every} == {"number of items"} and len(every) == 144
    assert {c.phrase.split()[0] for c in every} <= {"Name", "name"}


def odd_texts() -> list[str]:
    n = 100_000
    pieces = [
        "\0",
        " ",
        "\n",
        " \n",
        ".",
        "1. ",
        "- ",
        "|-",
        '"',
        "*",
        "A. ",
        "🎉",
        "好",
        "\ud800",
        "[",
        '{"a":',
        ",",
        "```\n",
        "1\t",
    ]
    return ["", *(piece * (n // len(piece)) + "x" for piece in pieces)]


def test_any_answer_and_instruction_in_linear_time() -> None:
    """100 kB of each: well under a second, where a quadratic expression would take minutes."""
    values = {kind: values for *_, kind, values in TABLE}
    asked = [(kind, values[kind]) for kind in CHECKS if kind != "written like"]
    asked += [("written like", (kind,)) for kind in checks.LIKE]
    checks.spoken("load the languages", "en")
    for text in odd_texts():
        for kind, value in asked:
            start = time.process_time()
            assert CHECKS[kind](text, *value) in (True, False)
            assert time.process_time() - start < 2, (kind, text[:5])
        start = time.process_time()
        found.__wrapped__(text, "x")
        assert time.process_time() - start < 2, text[:5]


# ---- ROUGE-L, chrF, completion


def test_rouge_l_by_hand() -> None:
    """Lin 2004, section 3.1: police killed the gunman | police kill the gunman: LCS 3 of 4 and 4; the gunman kill police: 2."""
    assert rouge_l("Police kill the gunman.", "police killed the gunman") == pytest.approx(2 * 3 / (4 + 4))
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(2 * 2 / (4 + 4))
    assert rouge_l("a b", "a x b y z w") == pytest.approx(2 * 2 / (2 + 6))
    assert rouge_l("", "a") == rouge_l("a", "?!") == 0.0 and rouge_l("Same!", "same") == 1.0
    assert rouge_l("我喜欢茶", "我喜茶") == pytest.approx(2 * 3 / (4 + 3))


@given(st.lists(st.sampled_from("abc"), max_size=9), st.lists(st.sampled_from("abc"), max_size=9))
def test_the_subsequence_is_the_longest(a: list[str], b: list[str]) -> None:
    """By the definition: the longest of all choices of places in one that is also a choice of places in the other."""
    of_b = {run for n in range(len(b) + 1) for run in combinations(b, n)}
    assert common(a, b) == max(n for n in range(len(a) + 1) for run in combinations(a, n) if run in of_b)


def test_rouge_l_of_long_texts() -> None:
    start = time.process_time()
    assert 0 < rouge_l("a b c d " * 25_000, "d c b a " * 25_000) < 1
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("answer", "reference"),
    [("The cat sat.", "A cat sat down."), ("", "a"), ("x", "y"), ("同じ", "同じ"), ("\ud800", "a"), ("a" * 9, "a")],
)
def test_chrf_is_that_of_sacrebleu(answer: str, reference: str) -> None:
    assert chrf(answer, reference) == sacrebleu.sentence_chrf(answer, [reference]).score
    assert chrf(answer, reference) == pytest.approx(sacrebleu.corpus_chrf([answer], [[reference]]).score)


def test_chrf_by_hand() -> None:
    """ "ab" for "abc": n = 1: P 2/2, R 2/3; n = 2: P 1/1, R 1/2; n = 3 has none in the answer. Averages of the two orders
    P 1, R 7/12, and F with beta 2 = 5 P R / (4 P + R) = 5 * 7/12 / (4 + 7/12) = 35/55."""
    assert chrf("ab", "abc") == pytest.approx(100 * 35 / 55)


def test_completion() -> None:
    asked = "Name the capital of Peru."
    assert completed(Said("Lima", True), asked, "Lima") and completed(Said("Lima"), asked, "Lima")
    assert completed(Said("🎉"), asked, "Lima")
    assert not completed(Said("Lima is", False), asked, "Lima")
    assert not completed(Said(" \n"), asked, "Lima")
    assert not completed(Said("name the capital of peru name the capital"), asked, "Lima")
    assert not completed(Said("I'm sorry, but I can't help with that."), asked, "Lima")
    assert completed(Said("I'm sorry, but I can't help with that."), asked, "Sorry, I can't assist.")
    assert completed(Said("A B"), "a b", "A B") and not completed(Said("A B"), "a b", "c")
    assert not repeats("Name the capital", asked) and not repeats("?", "?")


def test_the_metrics_of_a_row() -> None:
    def row(asked: str, reference: str) -> Conversation:
        return Conversation((Message("user", asked), Message("assistant", reference)), source="d.jsonl:1")

    def columns(asked: str, reference: str, said: str | None) -> dict[str, tuple[float, ...] | None]:
        heard = Heard(said=None if said is None else Said(said, True))
        return {m.name: m.columns(row(asked, reference), heard, Facts()) for m in METRICS if m.columns}

    asked = "List three colours, separated by commas."
    assert columns(asked, "red, blue, green", "red, blue") == {
        "constraints kept": (1, 2),  # commas, but two colours
        "ROUGE-L": (pytest.approx(2 * 2 / 5), 1),
        "chrF": (chrf("red, blue", "red, blue, green"), 1),
        "completion rate": (True, 1),
    }
    assert set(columns(asked, "red, blue, green", None).values()) == {None}
    assert columns("Hello", "Hi", "Hi")["constraints kept"] is None
    assert columns("Hello", "", "Hi")["ROUGE-L"] is None and columns("Hello", "", "Hi")["chrF"] is None


def test_patterns_are_all_read() -> None:
    """Every pattern of the facts is asked for by its name."""
    code = (ROOT / "src" / "tunesmith" / "evaluation" / "constraints.py").read_text()
    names = set(re.findall(r'_FIND\["(\w+)"\]', code))
    assert names == set(checks.WORDS["patterns"]) and set(checks.WORDS["like"]) == set(checks.LIKE)
