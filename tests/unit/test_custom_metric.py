"""A metric of one's own: a function by path or a pattern; what goes wrong says where."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.conversation import Conversation, Message
from tunesmith.errors import UsageError
from tunesmith.evaluation.custom import PARAMETERS, metric_from
from tunesmith.evaluation.metric import Facts, Heard, Said

ROW = Conversation(
    (Message("system", "Be kind."), Message("user", "Two and two?"), Message("assistant", "Four.")),
    metadata={"level": 3},
    source="d.jsonl:7",
)


def columns(spec: str, said: str | None = "It is four.", ended: bool | None = True) -> Any:
    metric = metric_from(spec)
    assert metric.columns
    return metric.columns(ROW, Heard(said=None if said is None else Said(said, ended)), Facts())


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(text)
        return str(path)

    return write


def test_a_function(file: Callable[[str], str]) -> None:
    path = file(
        "def same(prompt: str, answer: str, reference: str) -> float:\n    return len(answer) / len(reference)\n"
    )
    assert columns(f"{path}:same") == (11 / 5, 1)
    assert columns(f"{path}:same", None) is None
    metric = metric_from(f"{path}:same")
    assert (metric.name, metric.better) == ("same", "higher")
    assert metric_from(f"{path}:same:lower").better == "lower" and metric_from(f"{path}:same:higher").better == "higher"


@pytest.mark.parametrize(
    ("signature", "value", "want"),
    [
        ("(answer)", "'four' in answer", 1.0),
        ("(reference, answer)", "reference == 'Four.' and answer == 'It is four.'", 1.0),
        ("(prompt, unused=1, *rest, **more)", "prompt == 'Two and two?' and not more", 1.0),
        ("(metadata)", "metadata['level']", 3.0),
        ("(messages)", "[m['role'] for m in messages] == ['system', 'user'] and len(messages)", 2.0),
        ("(*, ended)", "ended", 1.0),
        ("()", "False", 0.0),
        ("(answer)", "__import__('numpy').float32(0.5)", 0.5),
    ],
)
def test_parameters_by_name(file: Callable[[str], str], signature: str, value: str, want: float) -> None:
    assert columns(f"{file(f'def f{signature}: return {value}')}:f") == (want, 1)


def test_none_leaves_a_row_out_and_classes_work(file: Callable[[str], str]) -> None:
    text = "import dataclasses\n@dataclasses.dataclass\nclass Rule:\n    n: int\n    def __call__(self, answer): return None\n"
    assert columns(f"{file(text + 'rule = Rule(3)')}:rule") is None


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("def score(answer): return 1", "scor", 'mine.py: no function "scor" (did you mean "score"?)'),
        ("score = 3", "score", 'mine.py: no function "score" -- define it there: def score(answer)'),
        (
            "def f(anwser): return 1",
            "f",
            'parameter "anwser" is not known (did you mean "answer"?) -- known: prompt, answer, ',
        ),
        ("def f(answer, /): return 1", "f", 'parameter "answer" can only be given by place'),
        ("async def f(answer): return 1", "f", "f is asynchronous -- def, not async def"),
        ("f = {}.get", "f", "its parameter"),
        ("def f(:", "f", "cannot be loaded: SyntaxError"),
        ("import sys\nsys.exit(3)", "f", "cannot be loaded: SystemExit in line 2: 3"),
        ("\n\n1 / 0", "f", "cannot be loaded: ZeroDivisionError in line 3: division by zero"),
        ("import no_such_package_here", "f", "ModuleNotFoundError in line 1: No module named"),
        (
            "def f(answer):\n    x = 1\n    return answer.nothing",
            "f",
            "d.jsonl:7: f raised AttributeError in line 3: 'str' object",
        ),
        ("def f(answer): raise SystemExit", "f", "d.jsonl:7: f raised SystemExit in line 1"),
        ("def f(answer): return f(answer)", "f", "f raised RecursionError"),
        (
            "def f(answer): return float('nan')",
            "f",
            "d.jsonl:7: f gave nan -- return a finite number (up to 1e+100), or True or False",
        ),
        ("def f(answer): return float('-inf')", "f", "f gave -inf"),
        ("def f(answer): return 1e308", "f", "f gave 1e+308"),
        ("def f(answer): return '0.5'", "f", "f gave a value of type str"),
        ("def f(answer): return [1]", "f", "f gave a value of type list"),
        ("def f(answer): return 10 ** 400", "f", "f gave a value of type int"),
    ],
)
def test_what_goes_wrong_says_where(file: Callable[[str], str], text: str, name: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        columns(f"{file(text)}:{name}")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_line_is_told_where_the_path_is_relative(
    file: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(file("def f(answer):\n    return 1 / 0")).parent)
    with pytest.raises(UsageError, match="f raised ZeroDivisionError in line 2"):
        columns("mine.py:f")


def test_specs_that_name_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("def f(answer): return 1")
    wrong = {
        "bleu": 'no metric is named "bleu" -- path/to/file.py:function, or re:PATTERN',
        "": "no metric is named",
        "a.py:": "no metric is named",
        f"{tmp_path}/none.py:f": "none.py: no such file",
        f"{tmp_path}:f": "no such file",
        f"{tmp_path}/mine.txt:f": "mine.txt: no Python file",
        "re:(": "re:(: no regular expression: missing )",
        "re:" + "(" * 5000: "no regular expression",
    }
    for spec, said in wrong.items():
        with pytest.raises(UsageError) as caught:
            metric_from(spec)
        assert said in str(caught.value)


def test_a_pattern() -> None:
    assert columns("re:four") == (True, 1) and columns("re:^four") == (False, 1)
    assert columns(r"re:(?i)FOUR\.$") == (True, 1) and columns("re:x", None) is None
    assert columns("re:a", "\ud800a\0") == (True, 1)
    metric = metric_from("re:as an AI:lower")
    assert (metric.name, metric.better, metric.span) == ("matches as an AI", "lower", "0 to 1")
    assert columns("re:x:lower:higher", "x:lower") == (True, 1) and columns("re:x:lower", "x") == (True, 1)


def test_a_pattern_without_end_is_stopped() -> None:
    """Python's own re would take 2 ** 40 steps over 40 letters."""
    start = time.monotonic()
    with pytest.raises(
        UsageError, match=r"d.jsonl:7: re:\(a\+\)\+\$ did not come to an end over one answer \(1 s at most\)"
    ):
        columns("re:(a+)+$", "a" * 5000 + "b")
    assert time.monotonic() - start < 20


def test_the_parameters_are_documented() -> None:
    assert metric_from.__doc__ and all(f"`{name}`" in metric_from.__doc__ for name in PARAMETERS)
