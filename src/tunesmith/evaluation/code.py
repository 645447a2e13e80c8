"""Metrics of code: whether it parses, how near it is to the reference, and whether it passes the row's tests.

A row has tests where its metadata hold them: HumanEval's `test` with `entry_point` (Chen et al. 2021), or asserts as `test`,
`tests` or `test_list`, a text or a list of texts. Only Python is run, by `judge`, once, before `columns` read `Heard.passed`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Sequence

import msgspec

from tunesmith.conversation import Conversation
from tunesmith.evaluation import sandbox
from tunesmith.evaluation.metric import Facts, Heard, Metric
from tunesmith.evaluation.syntax import code_of, continued, kinds, language, parses, question, stands


class Judged(msgspec.Struct, frozen=True):
    """`heard` with `passed` filled in where a row has tests.

    `note`: why nothing was run, where this machine cannot shut a program in; "" otherwise.
    """

    heard: list[Heard]
    note: str = ""


def judge(
    rows: Sequence[Conversation],
    heard: Sequence[Heard],
    limits: sandbox.Limits | None = None,
    allow: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Judged:
    """Run the tests of all answers, as many at a time as there are processors; equal programs once.

    `progress(done, all)` counts programs. `allow`: limits that may be missing, see sandbox.run.
    """
    asked: list[list[tuple[str, str] | None]] = []
    for row, one in zip(rows, heard, strict=True):
        test = test_of(row) if one.said else None
        answers = [said.text for said in (one.said, *one.samples) if said] if test else []
        asked.append(
            [(text, test) if test and (text := program(row, answer)) is not None else None for answer in answers]
        )
    different = list(dict.fromkeys(pair for pairs in asked for pair in pairs if pair))
    if not any(asked):
        return Judged(list(heard))
    if different and not (able := sandbox.run("", "", limits, allow)).passed:
        return Judged(list(heard), note=f"no code was run: {able.error}")
    ended = dict(zip(different, sandbox.run_all(different, limits, allow, progress=progress), strict=True))
    passed = [[pair is not None and ended[pair].passed for pair in pairs] for pairs in asked]
    kept = [msgspec.structs.replace(one, passed=each) for one, each in zip(heard, passed, strict=True)]
    return Judged(kept)


def test_of(row: Conversation) -> str | None:
    """The program that tests an answer to this row; None where there is none, or none in Python."""
    held = next((found for key in ("test", "tests", "test_list") if (found := row.metadata.get(key))), None)
    lines = held if isinstance(held, list) else [held]
    test, entry = "\n".join(line for line in lines if isinstance(line, str)), entry_point(row)
    if not test.strip() or language(row) != "python":
        return None
    whole = f"{test}\ncheck({entry})\n" if entry and "def check(" in test else f"{test}\n"
    return whole if _tries(whole) else None


def _tries(test: str) -> bool:
    """Whether a test does anything when it runs: one that only defines things passes whatever it is given."""
    try:
        body = ast.parse(test).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    idle = (
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
        ast.Import,
        ast.ImportFrom,
        ast.Assign,
        ast.AnnAssign,
        ast.Pass,
    )
    return any(
        not isinstance(s, idle) and not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)) for s in body
    )


def entry_point(row: Conversation) -> str:
    """The name of the function that the tests call, '' where the row does not say."""
    name = row.metadata.get("entry_point")
    return name if isinstance(name, str) and name.isidentifier() else ""


def program(row: Conversation, answer: str) -> str | None:
    """The Python program that an answer is meant as; None where there is no way to read it as one without an error.

    An answer that defines the entry point stands after the prompt, with its imports and helpers; another one continues it.
    """
    code, entry = code_of(answer)[0], entry_point(row)
    if not entry:
        return stands("python", row, code)
    if re.search(rf"^(?:async +def|def|class) +{entry}\b|^{entry} *=", code, re.MULTILINE):
        ways = [f"{question(row)}\n{code}", code]
    else:
        ways = continued(row, code)
    return next((text for text in ways if parses("python", text)), None)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Of n answers c pass: the unbiased estimate that one of k passes, 1 - C(n - c, k) / C(n, k) (Chen et al. 2021), 0 to 1.

    As the product of (1 - k / i) for i from n - c + 1 to n, which neither overflows nor cancels. Raises ValueError where not
    0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"no estimate of pass@{k} from {c} of {n}")
    if n - c < k:
        return 1.0
    none = 1.0
    for i in range(n - c + 1, n + 1):
        none *= 1 - k / i
    return 1 - none


def valid(row: Conversation, answer: str) -> bool | None:
    """Whether the answer's code parses; no code, or comments alone, do not. None where the language is not known."""
    code, tag = code_of(answer)
    name = language(row, tag)
    if name is None:
        return None
    return bool(kinds(name, code)) and stands(name, row, code) is not None


def edit_similarity(answer: str, reference: str) -> float:
    """1 - the Levenshtein distance of the codes / the length of the longer, in characters, 0 to 1; of two empty ones 1."""
    from rapidfuzz.distance import Levenshtein

    return float(Levenshtein.normalized_similarity(*(code_of(text)[0].strip() for text in (answer, reference))))


def normal(code: str) -> str:
    """Code without the white space that may differ: blank lines, ends of lines, more than one blank within a line, and two
    indentations: of the first line, which answers often lose, and what all further lines share (a tab: to the next 8)."""
    lines = [line.expandtabs() for line in code.splitlines() if line.strip()]
    depths = [len(line) - len(line.lstrip()) for line in lines]
    least = min(depths[1:], default=0)
    outer = [0, *(depth - least for depth in depths[1:])]
    return "\n".join(" " * depth + " ".join(line.split()) for depth, line in zip(outer, lines, strict=False))


def same_patterns(answer: str, reference: str, name: str) -> float:
    """How far two codes are made of the same kinds of syntax nodes: 2 * common / (both), as multisets (Dice 1945), 0 to 1."""
    one, other = (kinds(name, code_of(text)[0]) for text in (answer, reference))
    return 2 * (one & other).total() / max(1, one.total() + other.total())


def _valid(row: Conversation, heard: Heard, facts: Facts) -> tuple[float, float] | None:
    parsed = valid(row, heard.said.text) if heard.said else None
    return None if parsed is None else (float(parsed), 1.0)


def _near(row: Conversation, heard: Heard, facts: Facts) -> tuple[float, float] | None:
    return (edit_similarity(heard.said.text, row.answer()), 1.0) if heard.said and row.answer().strip() else None


def _exact(row: Conversation, heard: Heard, facts: Facts) -> tuple[float, float] | None:
    if not heard.said or not row.answer().strip():
        return None
    said, meant = (normal(code_of(text)[0]) for text in (heard.said.text, row.answer()))
    return float(said == meant), 1.0


def _patterns(row: Conversation, heard: Heard, facts: Facts) -> tuple[float, float] | None:
    name = language(row) if heard.said else None
    return (same_patterns(heard.said.text, row.answer(), name), 1.0) if heard.said and name else None


def _greedy(row: Conversation, heard: Heard, facts: Facts) -> tuple[float, float] | None:
    return (pass_at_k(1, heard.passed[0], 1), 1.0) if heard.passed else None


def _one_sample(row: Conversation, heard: Heard, facts: Facts) -> tuple[float, float] | None:
    drawn = heard.passed[1:]
    return (pass_at_k(len(drawn), sum(drawn), 1), 1.0) if drawn else None


def _any_sample(row: Conversation, heard: Heard, facts: Facts) -> tuple[float, float] | None:
    drawn = heard.passed[1:]
    return (pass_at_k(len(drawn), sum(drawn), len(drawn)), 1.0) if len(drawn) > 1 else None


SHARE = "0 to 1"
METRICS = (
    Metric(
        "syntax validity",
        "higher",
        SHARE,
        "The share of answers whose code parses, alone or after its prompt. An answer without code counts as one that does "
        "not parse; rows whose language is not known are left out.",
        "CPython's compiler for Python, tree-sitter grammars for the other languages",
        _valid,
    ),
    Metric(
        "edit similarity",
        "higher",
        SHARE,
        "1 - (Levenshtein distance of the answer's code from the reference's) / (length of the longer), in characters, the mean "
        "over answers.",
        "Edit similarity of Svyatkovskiy et al. 2020 (arXiv:2005.08025)",
        _near,
    ),
    Metric(
        "code completion accuracy",
        "higher",
        SHARE,
        "The share of answers whose code is the reference's but for white space.",
        "Exact match of Lu et al. 2021, CodeXGLUE (arXiv:2102.04664)",
        _exact,
    ),
    Metric(
        "pattern consistency",
        "higher",
        SHARE,
        "How far the answer's code is made of the same kinds of syntax nodes as the reference's: 2 * (nodes in common) / (nodes "
        "of both), the mean over answers.",
        "The coefficient of Dice 1945, on the nodes of tree-sitter",
        _patterns,
    ),
    Metric(
        "pass@1",
        "higher",
        SHARE,
        "The share of rows with tests whose greedy answer passes them.",
        "Chen et al. 2021 (arXiv:2107.03374)",
        _greedy,
    ),
    Metric(
        "pass@1 of samples",
        "higher",
        SHARE,
        "The estimated probability that one answer sampled at temperature 0.8 passes the tests, the mean over rows with tests.",
        "Chen et al. 2021 (arXiv:2107.03374), the unbiased estimate",
        _one_sample,
    ),
    Metric(
        "pass@k of samples",
        "higher",
        SHARE,
        "The share of rows with tests where at least one of the k sampled answers passes them; k is all that were drawn.",
        "Chen et al. 2021 (arXiv:2107.03374), the unbiased estimate",
        _any_sample,
    ),
)
