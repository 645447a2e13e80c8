"""`tunesmith test`: each check where it passes and where it fails, and what every option changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from conftest import STARTER, rows, write
from training import fit, made
from tunesmith import api
from tunesmith.cli import main
from tunesmith.conversation import Conversation, Message
from tunesmith.errors import DataError
from tunesmith.evaluation.smoke import CHECKS, Check, attempt, prompts
from tunesmith.render import TEMPLATES, Renderer
from tunesmith.runs import Run

ASKED = [Conversation((Message("user", text),)) for text in ("Hello?", "Who are you?", "When are you open?")]
GOOD = ("Hello.", "I am Ann.", "At nine.")


class Fake:
    """Says what it was given to say, over and over; without a renderer it is a service's."""

    def __init__(self, *texts: str, ended: bool | None = True, renderer: Renderer | None = None) -> None:
        self.texts, self.ended = texts, ended
        self.asked: list[tuple[list[str], int]] = []
        if renderer:
            self.renderer = renderer

    def said(
        self, asked: list[Conversation], max_tokens: int, told: Callable[[int], object] = lambda _: None
    ) -> list[tuple[str, bool | None, int]]:
        self.asked.append(([p.messages[-1].content for p in asked], max_tokens))
        told(len(asked))
        return [(self.texts[i % len(self.texts)], self.ended, 3) for i in range(len(asked))]


def tried(
    *texts: str,
    folder: Path = STARTER,
    template: str | None = None,
    ended: bool | None = True,
    base: Sequence[str] | None = ("base", "base"),
    asked: Sequence[Conversation] = ASKED,
) -> dict[str, Check]:
    tuned: Any = Fake(*(texts or GOOD), ended=ended, renderer=Renderer(folder, template))
    other: Any = Fake(*base) if base else None
    result = attempt(asked, tuned, other, 16)
    assert [c.name for c in result.checks] == [name for name, *_ in CHECKS] and len(result.checks) == 8
    assert result.passed == (not any(c.passed is False and c.severity == "error" for c in result.checks))
    return {c.name: c for c in result.checks}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The starter without its weights."""
    (tmp_path / "model").mkdir()
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        shutil.copyfile(STARTER / name, tmp_path / "model" / name)
    return tmp_path / "model"


def test_a_sound_model_passes_all() -> None:
    assert [c.passed for c in tried().values()] == [True] * 8
    for name, template in TEMPLATES.items():
        stops = tried(template=template.read_text())["the end of a turn is a stop token"]
        assert stops.passed, name


def test_a_template_that_refuses(folder: Path) -> None:
    own = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + own
    )
    system = Conversation((Message("system", "Be kind."), *ASKED[0].messages))
    found = tried(folder=folder, asked=[*ASKED, system])
    check = found["the template renders every prompt"]
    assert check.passed is False and check.evidence.startswith("3 of 4 prompts: ") and "no system" in check.evidence
    assert found["no answer is empty"].passed  # the others are asked
    nothing = tried(folder=folder, asked=[system, system])
    assert [c.passed for c in nothing.values()] == [False, None, True, None, None, None, None, None]


def test_tokens_that_do_not_survive(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["decoder"] = {
        "type": "Sequence",
        "decoders": [tokenizer["decoder"], {"type": "Replace", "pattern": {"String": "o"}, "content": "0"}],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    check = tried(folder=folder)["tokens survive decoding"]
    assert (check.passed, check.severity) == (False, "warning") and check.evidence == "0 of 3 prompts"


@pytest.mark.parametrize(("file", "ids", "passed"), [
    ("generation_config.json", [5, 2], True),
    ("generation_config.json", 5, False),
    ("generation_config.json", None, False),
    ("config.json", 2, True),
    ("config.json", 5, False),
])  # fmt: skip
def test_the_stop_token(file: str, ids: object, passed: bool, folder: Path) -> None:
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    known = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**known, "eos_token_id": ids}))
    check = tried(folder=folder)["the end of a turn is a stop token"]
    assert check.passed is passed and check.evidence.startswith("a turn ends with '<|im_end|>' (2); stop ids: [")


def test_the_stop_token_of_an_adapter_is_its_bases(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(folder, adapter)
    for name in ("config.json", "generation_config.json"):
        (adapter / name).unlink()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    assert tried(folder=adapter)["the end of a turn is a stop token"].passed
    (folder / "generation_config.json").write_text("{}")
    assert tried(folder=adapter)["the end of a turn is a stop token"].passed is False


def test_answers_that_do_not_end_or_are_empty_or_all_the_same() -> None:
    endless = tried(ended=False)["answers end by themselves"]
    assert endless.passed is False and endless.evidence == "0 of 3 answers, within 16 tokens"
    assert tried(ended=None)["answers end by themselves"].passed is None
    assert tried("a", " \n")["no answer is empty"].evidence == "1 of 3 answers are empty"
    assert tried("a", "")["no answer is empty"].passed is False
    assert tried("the same")["answers differ by prompt"].passed is False
    assert tried("the same", asked=[ASKED[0], ASKED[0]])["answers differ by prompt"].passed is None
    changed = tried(*GOOD, base=GOOD)["training has changed answers"]
    assert (changed.passed, changed.severity) == (False, "warning")
    assert tried(base=("Hello.", "I am Bob.", "At nine."))["training has changed answers"].passed
    assert tried(base=None)["training has changed answers"].passed is None


@pytest.mark.parametrize(("text", "template", "leak"), [
    ("Yes.<|im_end|>", None, "<|im_end|>"),
    ("Yes.<|eot_id|>", None, "<|eot_id|>"),
    ("Yes. [INST] And", None, "[INST]"),
    ("Yes.\n<|im_start|>user\nAnd", None, "<|im_start|>"),
    ("Yes.\n<|im_st", None, "<|im_st"),
    ("Yes.\n\n### Response: No.", None, "### Response:"),
    ("Yes.\n\n### Instruc", "instruct", "### Instruc"),
    ("Yes.\n\nUser: And you?", "chat", "User:"),
    ("Yes.\n\nUser: And you?", None, None),
    ("Ask the User: he knows.", "chat", None),
    ("a < b | c, ### and <b>", None, None),
])  # fmt: skip
def test_pieces_of_templates_in_answers(text: str, template: str | None, leak: str | None) -> None:
    given = TEMPLATES[template].read_text() if template else None
    check = tried("Fine.", text, template=given, folder=STARTER)["no template pieces in answers"]
    assert check.passed is (leak is None), check.evidence
    assert leak is None or check.evidence == f"1 of 3 answers have some, such as {leak!r}"


def test_a_services_model_is_judged_by_its_answers_alone() -> None:
    tuned: Any = Fake(*GOOD, ended=None)
    result = attempt(ASKED, tuned, None, 16)
    assert [c.passed for c in result.checks] == [None, None, None, None, True, True, True, None] and result.passed
    assert result.checks[0].evidence == "a service keeps its template and tokens"


# ---- what is asked


def texts(found: Sequence[Conversation]) -> list[str]:
    return [p.messages[-1].content for p in found]


def test_prompts_come_from_a_file_the_test_rows_or_the_facts(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    general = texts(prompts(None, None))
    assert (
        len(general) == 6
        and general[0] == "How do I install Python on my computer?"
        and texts(prompts(run, None)) == general
    )
    write(run / "data" / "test.jsonl", [{"text": "no prompt"}, *rows(9)])
    assert texts(prompts(run, None)) == [f"Question number {i}?" for i in range(6)]
    (tmp_path / "p.txt").write_text("\ufeffOne?\n\n  Two?  \n", encoding="utf-8")
    assert texts(prompts(run, str(tmp_path / "p.txt"))) == ["One?", "Two?"]
    chat = {
        "messages": [
            {"role": "system", "content": "Be."},
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "A"},
        ]
    }
    for name, row in (("a.jsonl", chat), ("b.jsonl", {"question": "Q", "answer": "A"})):
        assert texts(prompts(None, str(write(tmp_path / name, [row])))) == ["Q"]
    (tmp_path / "latin").write_bytes("café?".encode("latin-1"))
    (tmp_path / "empty").touch()
    for name, message in (("none", "no such file"), ("latin", "not UTF-8"), ("empty", "no prompts in it")):
        with pytest.raises(DataError, match=f"{name}: {message}"):
            prompts(None, str(tmp_path / name))


# ---- the command


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    made: dict[str, Fake] = {}
    for name in ("tuned", "starter", "other"):
        made[name] = Fake(*GOOD, name, renderer=Renderer(STARTER))
    monkeypatch.setattr(api, "completer", lambda name, beside=None: made[Path(name).name])
    return made


def test_every_option_is_heard(models: dict[str, Fake], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(tmp_path / "tuned")
    (tmp_path / "p.txt").write_text("One?\nTwo?\nThree?\nFour?\n")
    words = ["test", str(run), "--prompts", str(tmp_path / "p.txt")]
    assert main([*words, "--max-tokens", "7"]) == 0
    out = capsys.readouterr().out
    assert "  ask   Four?\n  base  starter\n  tuned tuned\n" in out and out.count("✓ ") == 8
    assert models["tuned"].asked == models["starter"].asked == [(["One?", "Two?", "Three?", "Four?"], 7)]
    assert main([*words, "--against", "other"]) == 0
    assert models["other"].asked[0][1] == 256 and len(models["starter"].asked) == 1
    capsys.readouterr()
    assert main(["test", "--model-path", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"passed", "answers", "checks"} and found["passed"] and len(found["answers"]) == 6
    assert found["answers"][3] == {
        "prompt": "I'm really happy with your help, thank you so much!",
        "base": "starter",
        "tuned": "tuned",
    }
    assert set(found["checks"][0]) == {"name", "severity", "passed", "evidence", "fix"}
    for wrong in (["test"], ["test", "a", "--model-path", "b"]):
        assert main(wrong) == 2 and "needs one model" in capsys.readouterr().err


def test_the_exit_status_says_whether_an_error_was_found(
    models: dict[str, Fake], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(tmp_path / "tuned")
    models["tuned"].texts = (*GOOD, "starter")
    assert main(["test", str(run)]) == 0  # a warning is none
    assert (
        "! training has changed answers: 0 of 6 answers are not the base's\n    next: more" in capsys.readouterr().out
    )
    models["tuned"].texts = ("Yes.\x1b[31m<|im_end|>",)
    assert main(["test", str(run)]) == 1
    out = capsys.readouterr().out
    assert "✗ no template pieces in answers" in out and "✗ answers differ by prompt" in out and "\x1b" not in out


def test_a_trained_run_and_a_model_without_one(
    tiny: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run: Run = fit(tmp_path / "run", data, tiny, epochs=8, learning_rate=1e-2)
    assert main(["test", str(run), "--max-tokens", "32", "--json"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    passed = {c["name"]: c["passed"] for c in found["checks"]}
    assert [a["prompt"] for a in found["answers"]] == [c.messages[0].content for c in prompts(run, None)]
    assert passed["training has changed answers"] and passed["the end of a turn is a stop token"]
    assert passed["tokens survive decoding"] and passed["the template renders every prompt"]
    assert main(["test", str(tiny), "--max-tokens", "4", "--json"]) == 1  # random weights end nothing
    found = json.loads(capsys.readouterr().out)
    assert len(found["answers"]) == 6 and found["answers"][0]["base"] is None
