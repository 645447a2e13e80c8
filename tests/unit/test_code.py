"""Metrics of code against values computed by hand, and pass@k against HumanEval's own solutions."""

from __future__ import annotations

import math
from typing import Any

import pytest

from conftest import ROOT
from tunesmith.conversation import Conversation, Message
from tunesmith.data.check import load
from tunesmith.evaluation import code
from tunesmith.evaluation.code import edit_similarity, judge, normal, pass_at_k, program, same_patterns, test_of, valid
from tunesmith.evaluation.metric import Facts, Heard, Metric, Said
from tunesmith.evaluation.sandbox import Limits
from tunesmith.evaluation.syntax import code_of, kinds, language, languages, parses

HUMANEVAL = ROOT.parent / "shared" / "data" / "humaneval.jsonl"
METRICS = {metric.name: metric for metric in code.METRICS}
test_of.__test__ = False  # type: ignore[attr-defined]  # a function under test, not a test


def row(answer: str, prompt: str = "Write it.", **metadata: Any) -> Conversation:
    return Conversation((Message("user", prompt), Message("assistant", answer)), metadata)


def columns(name: str, one: Conversation, heard: Heard) -> tuple[float, ...] | None:
    found: Metric = METRICS[name]
    assert found.columns
    return found.columns(one, heard, Facts())


def heard(answer: str) -> Heard:
    return Heard(said=Said(answer))


# ---- code in an answer


def test_the_code_of_an_answer_is_its_first_block_and_those_like_it() -> None:
    assert code_of("x = 1") == ("x = 1", "")
    assert code_of("Here:\n```python\nx = 1\n```\nthen\n```python\ny = 2\n```\n") == ("x = 1\ny = 2\n", "python")
    assert code_of("```bash\npip install x\n```\n```Py title=a\nx\n```") == ("x\n", "py")
    assert code_of("```bash\nls\n```") == ("ls\n", "bash")
    assert code_of("~~~~\n```\nx\n~~~\n~~~~~\nafter") == ("```\nx\n~~~\n", "")
    assert code_of("```rust\nfn f() {}") == ("fn f() {}\n", "rust")
    assert code_of("") == ("", "")


def test_the_language_is_told_by_tag_then_metadata_then_reference() -> None:
    python = row("```python\nx = 1\n```", language="Rust")
    assert language(python, "go") == "go"
    assert language(python, "sql") == "rust"
    assert language(row("```python\nx\n```", lang="c++")) == "cpp"
    assert language(row("```js\nx\n```")) == "javascript"
    assert language(row("```sql\nSELECT 1\n```")) is None
    assert language(row("")) is None and language(row("neither this nor that")) is None
    assert language(row("    return a + b\n", "def add(a, b):\n")) == "python"


@pytest.mark.parametrize(
    ("name", "good", "broken"),
    [
        ("python", "def f(a):\n    return a\n", "def f(a):\nreturn a\n"),
        ("python", "print('a')", "print 'a'"),
        ("javascript", "function f(a) { return a; }", "function f(a { return a; }"),
        ("java", "public class A { int f() { return 1; } }", "public class A { int f() { return 1 } }"),
        ("go", "package main\n\nfunc f() int { return 1 }\n", "package main\n\nfunc f() int { return 1 \n"),
        ("rust", "fn f() -> i32 { 1 }", "fn f( -> i32 { 1 }"),
        ("c", "#include <stdio.h>\nint main(void) { return 0; }", "int main(void) { return 0 }"),
        ("cpp", "std::vector<int> a{1};\nclass A { public: A(); };", "class A { public A(; };"),
        ("typescript", "function f(a: number): string { return `${a}`; }", "function f(a: number: string { }"),
        ("tsx", "const a = <b x={1}>c</b>;", "const a = <b x={1}>c</d;"),
    ],
)
def test_syntax_validity(name: str, good: str, broken: str) -> None:
    fenced = row(f"```{name}\n{good}\n```")
    assert columns("syntax validity", fenced, heard(fenced.answer())) == (1, 1)
    assert columns("syntax validity", fenced, heard(broken)) == (0, 1)
    assert valid(row(good), good) is True  # the language told by the reference alone
    assert language(row(good)) == {"tsx": "javascript"}.get(name, name)  # JSX is in the grammar of JavaScript


def test_no_code_is_not_valid_and_an_unknown_language_is_not_judged() -> None:
    python = row("x = 1")
    for text in (
        "",
        "  \n",
        "# only a comment",
        "```python\n```",
        "I am sorry, I cannot.",
        "\0",
        "\ud800",
        "x" + "(" * 100_000,
    ):
        assert valid(python, text) is False, text[:20]
    assert valid(row("```sql\nSELECT 1\n```"), "```sql\nSELECT 1\n```") is None
    assert columns("syntax validity", python, Heard()) is None


def test_a_bare_body_is_judged_with_its_prompt() -> None:
    body = row("    return a + b\n", "def add(a, b):\n")
    assert valid(body, "    return a + b") is True
    assert valid(body, "return a + b") is True  # the indentation of the first line is often lost
    assert valid(body, "s = a + b\n    return s") is True
    assert valid(body, "s = a + b\n        return s") is False
    assert valid(row("    return x; }", "int f(int x) {\n", language="c"), "return x; }") is True
    assert valid(row("x = 1"), "    return a + b") is False


# ---- nearness


def test_edit_similarity() -> None:
    # kitten -> sitting: 3 edits, the longer has 7 characters: 1 - 3 / 7
    assert edit_similarity("kitten", "sitting") == pytest.approx(4 / 7)
    assert edit_similarity("```py\nx = 1\n```", "x = 2\n") == pytest.approx(1 - 1 / 5)
    assert edit_similarity("", "") == 1 and edit_similarity("", "ab") == 0 and edit_similarity("ab", "ab") == 1
    assert columns("edit similarity", row("sitting"), heard("kitten")) == (pytest.approx(4 / 7), 1)
    assert columns("edit similarity", row("sitting"), Heard()) is None


def test_exact_match_but_for_white_space() -> None:
    assert normal("if a:\r\n\tb  =  1 \n\n\n") == "if a:\nb = 1"
    assert normal("    if a:\n        b\n    c") == "if a:\n    b\nc" == normal("if a:\n        b\n    c")
    right = row("    if a:\n        b\n    c\n")
    assert columns("code completion accuracy", right, heard("```py\nif a:\n        b\n    c\n\n```")) == (1, 1)
    assert columns("code completion accuracy", right, heard("if a:\n        b\n        c")) == (0, 1)
    assert columns("code completion accuracy", right, heard("")) == (0, 1)
    assert columns("code completion accuracy", right, Heard()) is None


def test_pattern_consistency() -> None:
    # x = 1: expression_statement, assignment, identifier, integer; f(1): expression_statement, call, identifier,
    # argument_list, integer. Common: 3 of 4 and 5: 2 * 3 / 9
    assert kinds("python", "x = 1") == {"expression_statement": 1, "assignment": 1, "identifier": 1, "integer": 1}
    assert same_patterns("x = 1", "f(1)", "python") == pytest.approx(6 / 9)
    assert same_patterns("y = 2  # other names", "x = 1", "python") == 1
    assert same_patterns("", "x = 1", "python") == 0 == same_patterns("", "", "python")
    # as multisets: a, a = 8 nodes of which 4 are common with the 4 of a: 2 * 4 / 12
    assert same_patterns("x = 1\ny = 2", "x = 1", "python") == pytest.approx(8 / 12)
    assert 0 < same_patterns("x = = 1", "x = 1", "python") <= 1
    assert columns("pattern consistency", row("x = 1"), heard("f(1)")) == (pytest.approx(6 / 9), 1)
    assert columns("pattern consistency", row("```sql\nx\n```"), heard("f(1)")) is None


def test_python_is_parsed_to_its_end() -> None:
    """Cut at 20,000 characters it would end within a text."""
    whole = "x = 1\n" * 3300 + 'y = """' + "z" * 1000 + '"""\n'
    assert parses("python", whole) and not parses("python", whole + "(")


@pytest.mark.parametrize(
    "text", ["", "\0", "\ud800", "(" * 100_000, '"' * 100_000, "```\n" * 20_000, "x\n" * 50_000, "é中😀" * 9_000]
)
def test_any_text_has_its_value(text: str) -> None:
    assert {"python", "javascript", "rust"} < set(languages())
    for name in ("python", "javascript", "rust"):
        one = row("x = 1", lang=name)
        for metric in code.METRICS[:4]:
            assert metric.columns
            found = metric.columns(one, heard(text), Facts())
            assert found and 0 <= found[0] <= 1 and found[1] == 1


# ---- tests


def test_pass_at_k_is_one_minus_the_chance_of_drawing_only_failures() -> None:
    assert pass_at_k(5, 2, 1) == pytest.approx(2 / 5)
    assert pass_at_k(5, 2, 3) == pytest.approx(1 - 1 / 10)  # C(3, 3) / C(5, 3) = 1 / 10
    assert pass_at_k(4, 0, 4) == 0 and pass_at_k(4, 1, 4) == 1 and pass_at_k(1, 1, 1) == 1
    for n in range(1, 12):
        for c in range(n + 1):
            for k in range(1, n + 1):
                assert pass_at_k(n, c, k) == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k))
    assert pass_at_k(100_000, 1, 10) == pytest.approx(1e-4)
    for wrong in ((0, 0, 1), (3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)):
        with pytest.raises(ValueError):
            pass_at_k(*wrong)


def test_pass_metrics_read_the_greedy_answer_first_and_then_the_samples() -> None:
    one = row("x")
    told = Heard(passed=[False, True, False, False, True])
    assert columns("pass@1", one, told) == (0, 1)
    assert columns("pass@1 of samples", one, told) == (pytest.approx(1 / 2), 1)
    assert columns("pass@k of samples", one, told) == (1, 1)
    assert columns("pass@1", one, Heard(passed=[True])) == (1, 1)
    assert columns("pass@1 of samples", one, Heard(passed=[True])) is None
    assert columns("pass@k of samples", one, Heard(passed=[True, False])) is None
    assert columns("pass@k of samples", one, Heard(passed=[True, False, False])) == (0, 1)
    assert columns("pass@1", one, Heard()) is None


PROMPT = 'from math import floor\n\n\ndef half(x):\n    """Half of x, rounded down."""\n'
CHECK = "def check(candidate):\n    assert candidate(5) == 2\n"


def test_rows_with_tests() -> None:
    reference = "    return floor(x / 2)\n"
    assert test_of(row(reference, PROMPT, test=CHECK, entry_point="half")) == f"{CHECK}\ncheck(half)\n"
    assert (
        test_of(row("def f(): return 1", test_list=["assert f() == 1", "assert f() < 2"]))
        == "assert f() == 1\nassert f() < 2\n"
    )
    assert test_of(row("x = 1", tests="assert x")) == "assert x\n"
    for idle in (CHECK, "# no test yet", "import os\nlimit = 3", "assert ("):  # they would pass whatever they are given
        assert test_of(row("x = 1", test=idle)) is None
    assert test_of(row("x = 1")) is None and test_of(row("x = 1", tests=[None, 3, ""])) is None
    assert test_of(row("fn f() {}", tests="assert x")) is None
    assert test_of(row("x = 1", tests="assert x", entry_point="f(); import os")) == "assert x\n"


def test_an_answer_is_read_as_a_body_or_as_a_whole_function_after_its_prompt() -> None:
    one = row("    return floor(x / 2)\n", PROMPT, test=CHECK, entry_point="half")
    assert program(one, "    return x // 2\n") == PROMPT + "    return x // 2\n"
    assert program(one, "return x // 2") == PROMPT + "\n    return x // 2"
    whole = "def half(x):\n    return floor(x / 2)\n"
    assert program(one, f"Sure!\n```python\n{whole}```\n") == f"{PROMPT}\n{whole}"
    assert program(one, "def half(x:") is None
    said = ["return x // 2", f"```python\n{whole}```", "    return floor(x / 2", "    return x", "", "while True: pass"]
    done = judge([one], [Heard(said=Said(said[0]), samples=[Said(text) for text in said[1:]])], Limits(seconds=2))
    assert done.heard[0].passed == [True, True, False, False, False, False] and done.note == ""


def test_equal_programs_run_once_and_rows_without_tests_are_left_alone() -> None:
    one, other = row("x = 1", tests="assert x"), row("x = 1")
    seen: list[tuple[int, int]] = []
    told = [heard("x = 1"), heard("x = 1"), heard("x = 1"), Heard()]
    done = judge([one, one, other, one], told, progress=lambda count, whole: seen.append((count, whole)))
    assert [each.passed for each in done.heard] == [[True], [True], [], []] and seen == [(1, 1)]
    assert judge([other], [heard("x")]).heard == [heard("x")]


def test_where_nothing_can_be_shut_in_the_rows_stay_unjudged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code.sandbox.sys, "platform", "win32")
    told = [heard("x = 1")]
    done = judge([row("x = 1", tests="assert x")], told)
    assert done.heard == told and done.note == "no code was run: no limit can be set on Windows"


@pytest.mark.skipif(not HUMANEVAL.is_file(), reason="HumanEval lies beside the checkout only where it was provided")
def test_humaneval_solutions_pass_and_broken_ones_fail() -> None:
    """All 164: the canonical body, then one that gives back nothing; in one run of the tests."""
    rows = load(str(HUMANEVAL), {"prompt": "prompt", "completion": "canonical_solution"}).conversations
    assert rows and len(rows) == 164
    told = [Heard(said=Said(one.answer()), samples=[Said("    return None\n")]) for one in rows]
    done = judge(rows, told)
    assert [each.passed[0] for each in done.heard] == [True] * 164
    assert [each.passed[1] for each in done.heard] == [False] * 164
    figures = [columns("pass@1", one, each) for one, each in zip(rows, done.heard, strict=True)]
    assert sum(figure[0] for figure in figures if figure) / 164 == 1.0
    broken = [
        columns("pass@1", one, Heard(passed=each.passed[1:2])) for one, each in zip(rows, done.heard, strict=True)
    ]
    assert sum(figure[0] for figure in broken if figure) / 164 == 0.0
