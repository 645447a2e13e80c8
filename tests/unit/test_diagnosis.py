"""Each diagnosis on evidence made by hand, just over its border and just under it; and on runs that were spoilt on purpose."""

from __future__ import annotations

import itertools
import math
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Result, rows, write
from training import fit
from tunesmith import api
from tunesmith.cli import COMMANDS
from tunesmith.cli.options import Parser
from tunesmith.conversation import Conversation, Message
from tunesmith.errors import DataError, TunesmithError
from tunesmith.evaluation.diagnosis import RULES, Evidence, curves, diagnose
from tunesmith.evaluation.metric import Heard, Said
from tunesmith.evaluation.result import Canary, Diagnosis
from tunesmith.evaluation.rowreport import RowReport
from tunesmith.evaluation.stats import Comparison
from tunesmith.preflight import Seen


def metric(name: str, base: float, tuned: float, verdict: str = "cannot tell", rows: int = 20) -> dict[str, Comparison]:
    return {
        name: Comparison(name, base, tuned, tuned - base, tuned - base - 0.1, tuned - base + 0.1, 0.01, verdict, rows)
    }


def steps(*losses: float) -> list[dict[str, Any]]:
    return [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]


def evals(*losses: float, every: int = 4, first: float | None = None) -> list[dict[str, Any]]:
    """Validations after every fourth step, an epoch each; before the first step where `first` is given."""
    before = [] if first is None else [{"step": 0, "epoch": 0.0, "loss": first}]
    return before + [{"step": every * (i + 1), "epoch": float(i + 1), "loss": loss} for i, loss in enumerate(losses)]


def said(*texts: str) -> list[Heard]:
    return [Heard(said=Said(text, True, 5)) for text in texts]


def answers(*texts: str) -> list[Conversation]:
    return [Conversation((Message("user", "?"), Message("assistant", text))) for text in texts]


def sampled(*samples: list[str]) -> list[Heard]:
    return [Heard(samples=[Said(text) for text in each]) for each in samples]


def report(asked: int = 0, recited: int = 0, looked_at: int = 0, belonging: Any = None, gain: Any = None) -> RowReport:
    return RowReport(looked_at, looked_at, asked, recited, belonging, gain, [])


FELL = steps(*[4.0] * 4, *[3.0] * 4, *[2.0] * 4, *[1.0] * 4)  # of four epochs
ROSE = evals(3.0, 2.5, 2.7, 2.9, first=4.0)
ALIKE = [["a b c d", "a b c d"], ["e f g h", "e f g h"]] * 4
MIXED = [["a b c d", "e f g h"], ["e f g h", "a b c d"]] * 4
ENDLESS, CUT = metric("end-of-turn rate", 0.9, 0.1, "worse"), Said("a b c d e", False, 5)
LOOP = "The sum is " + "0" * 40


def looping(loops: int, straight: int, ended: int) -> list[Heard]:
    """Answers that were cut in a loop, cut in the middle of other words, and that ended."""
    cut = [Said(LOOP, False, 40)] * loops + [Said("a b c d e", False, 40)] * straight
    return [Heard(9.0, 9, said=said) for said in [*cut, *[Said("yes", True, 2)] * ended]]


LOSS = metric("loss (nats per token)", 4.0, 3.0, "better")

CASES: dict[str, tuple[str, Evidence, list[str], Evidence]] = {  # name, what fires, what it says, what is near and does not
    "diverged": (
        "diverged",
        Evidence("worse", {}, steps(5.0, 9.0, 8.0, 7.0), evals(6.0, first=5.0)),
        ["5.00", "7.00"],
        Evidence("worse", {}, steps(5.0, 9.0, 6.0, 5.4), evals(6.0, first=5.0)),  # 5.4 is not over 5.0 * 1.1
    ),
    "diverged, then better": (
        "diverged",
        Evidence("worse", {}, steps(5.0, 4.0, 7.0, 7.0)),
        ["5.00", "7.00"],
        Evidence("", {}, steps(5.0, 4.0, 7.0, 7.0), evals(4.9, 6.0, every=2, first=5.0)),  # it was better for a while
    ),
    "overfitting": (
        "overfitting",
        Evidence("better", LOSS, FELL, ROSE),
        ["2.500 at step 8 (epoch 2.0)", "2.900 at step 16", "1.500", "--epochs 2"],  # the last 8 losses: (2 + 1) / 2
        Evidence("better", LOSS, FELL, evals(3.0, 2.5, 2.54, 2.54, first=4.0)),  # under 2.5 * 1.02 = 2.55
    ),
    "overfitting that was stopped in time": (
        "overfitting",
        Evidence("better", LOSS, FELL, ROSE, stopped_early=True, epochs=40.0),
        ["step 8"],
        Evidence("better", LOSS, FELL, ROSE, stopped_early=True, epochs=4.0),  # not over twice the 2 that were good
    ),
    "overfitting where training fails too": (
        "overfitting",
        Evidence("better", LOSS, FELL, ROSE),
        ["1.500"],
        Evidence("better", LOSS, steps(*[1.0] * 8, *[2.0] * 8), ROSE),
    ),
    "underfitting": (
        "underfitting",
        Evidence("cannot tell", LOSS, FELL, evals(3.98, 3.96, first=4.0)),
        ["3.960", "4.000"],
        Evidence("cannot tell", LOSS, FELL, evals(3.9, 3.9, first=4.0)),
    ),
    "underfitting, still falling": (
        "underfitting",
        Evidence("better", LOSS, FELL, evals(3.5, 3.4, first=4.0)),
        ["3.500", "3.400"],
        Evidence("better", LOSS, FELL, evals(3.45, 3.4, first=4.0)),  # 3.4 is not under 3.45 * 0.98
    ),
    "memorisation": (
        "memorisation",
        Evidence("better", LOSS, training_rows=report(asked=10, recited=5)),
        ["10", "5 answers"],
        Evidence("better", LOSS, training_rows=report(asked=10, recited=4)),
    ),
    "memorisation of few": (
        "memorisation",
        Evidence("better", LOSS, training_rows=report(asked=8, recited=8)),
        ["8"],
        Evidence("better", LOSS, training_rows=report(asked=7, recited=7)),
    ),
    "shuffled answers": (
        "shuffled answers",
        Evidence("cannot tell", LOSS, training_rows=report(looked_at=64, belonging=(0.05, 0.2))),
        ["0.05", "0.20", "64"],
        Evidence("cannot tell", LOSS, training_rows=report(looked_at=64, belonging=(0.3, 0.2))),
    ),
    "shuffled answers, though the model gains": (
        "shuffled answers",
        Evidence("cannot tell", LOSS, training_rows=report(looked_at=64, belonging=(0.05, 0.2), gain=(0.1, 0.2))),
        ["64"],
        Evidence("cannot tell", LOSS, training_rows=report(looked_at=64, belonging=(0.05, 0.2), gain=(0.3, 0.2))),
    ),
    "worse than the base": (
        "worse than the base",
        Evidence("worse", metric("loss (nats per token)", 3.0, 4.25, "worse")),
        ["3.000", "4.250"],
        Evidence("cannot tell", metric("loss (nats per token)", 3.0, 4.25)),
    ),
    "loss of general capability": (
        "loss of general capability",
        Evidence("better", LOSS, canary=Canary([*metric("loss on text", 4.0, 4.5, "worse").values()], [])),
        ["4.000", "4.500", "0.400", "0.600"],
        Evidence("better", LOSS, canary=Canary([*metric("loss on text", 4.0, 4.39, "worse").values()], [])),
    ),
    "repetition": (
        "repetition",
        Evidence("better", LOSS | metric("self-repetition", 0.1, 0.4, "worse")),
        ["40%", "10%"],
        Evidence("better", LOSS | metric("self-repetition", 0.1, 0.3, "worse")),
    ),
    "repetition of the base's own": (
        "repetition",
        Evidence("better", LOSS | metric("self-repetition", 0.5, 0.6, "worse")),
        ["60%", "50%"],
        Evidence("better", LOSS | metric("self-repetition", 0.5, 0.54, "worse")),
    ),
    "repetition of a few characters": (
        "repetition",
        Evidence("better", LOSS, rows=answers(*["x"] * 20), base=looping(2, 0, 18), tuned=looping(11, 0, 9)),
        ["55%", "10%"],
        Evidence("better", LOSS, rows=answers(*["x"] * 20), base=looping(2, 0, 18), tuned=looping(10, 0, 10)),
    ),
    "repetition of a few characters, the base's own": (
        "repetition",
        Evidence("better", LOSS, rows=answers(*["x"] * 20), base=looping(11, 0, 9), tuned=looping(16, 0, 4)),
        ["80%", "55%"],
        Evidence("better", LOSS, rows=answers(*["x"] * 20), base=looping(13, 0, 7), tuned=looping(16, 0, 4)),
    ),
    "never stops": (
        "never stops",
        Evidence("better", LOSS | metric("end-of-turn rate", 0.9, 0.6, "worse"), run="a/run"),
        ["60%", "90%", "a/run"],
        Evidence("better", LOSS | metric("end-of-turn rate", 0.9, 0.75, "worse")),
    ),
    "never stops, as its base": (
        "never stops",
        Evidence("better", LOSS | metric("end-of-turn rate", 0.0, 0.05)),
        ["5%", "0%"],
        Evidence("better", LOSS | metric("end-of-turn rate", 0.3, 0.15)),
    ),
    "never stops, which is no loop": (  # of what does not loop 10 of 16 ended, or all
        "never stops",
        Evidence(
            "better",
            LOSS | metric("end-of-turn rate", 0.9, 0.5, "worse"),
            rows=answers(*["x"] * 20),
            tuned=looping(4, 6, 10),
        ),
        ["50%"],
        Evidence(
            "better",
            LOSS | metric("end-of-turn rate", 0.9, 0.5, "worse"),
            rows=answers(*["x"] * 20),
            tuned=looping(10, 0, 10),
        ),
    ),
    "never stops, in a loop": (  # where none ends, none has learnt to
        "never stops",
        Evidence(
            "better",
            LOSS | metric("end-of-turn rate", 0.9, 0.05, "worse"),
            rows=answers(*["x"] * 20),
            tuned=looping(19, 0, 1),
        ),
        ["5%"],
        Evidence(
            "better",
            LOSS | metric("end-of-turn rate", 0.9, 0.1, "worse"),
            rows=answers(*["x"] * 20),
            tuned=looping(18, 0, 2),
        ),
    ),
    "never stops, which is no wonder": (  # of answers with 5 tokens that were cut, references have 4, or 12
        "never stops",
        Evidence("better", LOSS | ENDLESS, rows=answers(*"abcdefgh"), tuned=[Heard(9.0, 4, said=CUT)] * 8),
        ["10%"],
        Evidence("better", LOSS | ENDLESS, rows=answers(*"abcdefgh"), tuned=[Heard(9.0, 12, said=CUT)] * 8),
    ),
    "style not learnt": (
        "style not learnt",
        Evidence("better", LOSS | metric("style", 0.2, 0.3)),
        ["0.30", "0.20"],
        Evidence("better", LOSS | metric("style", 0.2, 0.3, "better")),
    ),
    "emoji absent": (
        "emoji absent",
        Evidence("better", LOSS, rows=answers(*["yes 🎉"] * 8), tuned=said(*["yes"] * 7, "🎉")),  # 0.125 < 0.2
        ["0.12", "1.00"],
        Evidence("better", LOSS, rows=answers(*["yes 🎉"] * 8), tuned=said(*["yes"] * 6, "🎉", "🎉")),  # 0.25
    ),
    "emoji spam": (
        "emoji spam",
        Evidence("better", LOSS, rows=answers(*["yes"] * 8), tuned=said(*["🎉" * 6] * 2, *["no"] * 6)),  # 0.25 >= 0.2
        ["25%", "0%"],
        Evidence("better", LOSS, rows=answers(*["yes"] * 8), tuned=said(*["🎉" * 6], *["🎉" * 5] * 7)),  # 0.125
    ),
    "inconsistent outputs": (
        "inconsistent outputs",
        Evidence("better", LOSS, rows=answers(*"abcdefgh"), base=sampled(*ALIKE), tuned=sampled(*MIXED)),
        ["0.00", "1.00", "8 prompts"],
        Evidence("better", LOSS, rows=answers(*"abcdefgh"), base=sampled(*MIXED), tuned=sampled(*MIXED)),  # so was the base
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_rule_fires_at_its_border(case: str) -> None:
    name, over, words, under = CASES[case]
    found = [d for d in diagnose(over) if d.name == name]
    assert len(found) == 1, diagnose(over)
    for word in words:
        assert word in f"{found[0].evidence} {found[0].fix}", found[0]
    assert name not in [d.name for d in diagnose(under)]


def test_every_rule_has_a_case() -> None:
    names = {d.name for _, over, _, _ in CASES.values() for d in diagnose(over)}
    fired = {rule.__name__ for rule in RULES for _, over, _, _ in CASES.values() if list(rule(over))}
    assert fired == {rule.__name__ for rule in RULES} and names == {name for name, *_ in CASES.values()}


@pytest.mark.parametrize("name", ["self-repetition", "end-of-turn rate", "style"])
def test_few_answers_say_nothing_of_habits(name: str) -> None:
    for count, expected in ((8, 1), (7, 0)):
        after = {"self-repetition": 0.4, "end-of-turn rate": 0.05, "style": 0.2}[name]
        metrics = LOSS | metric(name, 0.1, after, "worse", count)
        assert len(diagnose(Evidence("better", metrics))) == expected


def test_healthy_evidence_gives_none() -> None:
    healthy = Evidence(
        "better",
        LOSS
        | metric("self-repetition", 0.1, 0.12)
        | metric("end-of-turn rate", 0.5, 1.0, "better")
        | metric("style", 0.1, 0.9, "better"),
        FELL,
        evals(3.0, 2.6, 2.5, 2.5, first=4.0),
        answers(*["yes 🎉"] * 8),
        said(*["no"] * 8),
        said(*["yes 🎉"] * 8),
        Canary([*metric("loss on text", 4.0, 4.05, "worse").values()], []),
        report(24, 0, 64, (1.0, 0.1), (0.3, 0.1)),
    )
    assert (
        diagnose(healthy) == [] == diagnose(Evidence("better", LOSS)) == curves([], []) == curves(FELL, healthy.evals)
    )


def test_what_follows_from_a_divergence_is_left_out_and_errors_come_first() -> None:
    _, over, _, _ = CASES["diverged"]
    worse = metric("loss (nats per token)", 5.0, 7.0, "worse")
    all_at_once = Evidence(
        "worse", worse | metric("style", 0.1, 0.1), over.steps, over.evals, training_rows=report(8, 8)
    )
    assert [d.name for d in diagnose(all_at_once)] == ["diverged", "worse than the base"]
    assert [d.name for d in curves(over.steps, over.evals)] == ["diverged"]
    assert [d.name for d in curves(FELL, ROSE)] == ["overfitting"]
    mixed = Evidence("worse", worse, FELL, evals(3.5, 3.4, first=4.0), training_rows=report(8, 8))
    assert [d.severity for d in diagnose(mixed)] == ["error", "warning", "info"]


# ---- what is advised can be done


class _Stop(Exception):
    """A parser that is not to go on."""


def flags_of(command: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The options that a command's own parser knows."""
    found: set[str] = set()

    def caught(self: Parser, *_: object) -> None:
        found.update(self._option_string_actions)
        raise _Stop

    monkeypatch.setattr(Parser, "parse_args", caught)
    module, function = COMMANDS[command][0].split(":")
    with pytest.raises(_Stop):
        getattr(__import__(f"tunesmith.cli.{module}", fromlist=["x"]), function)([])
    monkeypatch.undo()
    return found


def advised(fix: str) -> Iterator[tuple[str, str]]:
    """(command, flag) of a piece of advice; a flag that stands before any command is one of train."""
    parts = re.split(r"tunesmith ", fix)
    yield from (("train", flag) for flag in re.findall(r"--[a-z-]+", parts[0]))
    for part in parts[1:]:
        words = part.split()
        command = next(c for c in (" ".join(words[:2]), words[0]) if c in COMMANDS)
        inside, outside = re.match(r"([^;),]*(?:,[\d.]+)?)(.*)", part, re.S).groups()  # type: ignore[union-attr]
        yield from ((command, flag) for flag in re.findall(r"--[a-z-]+", inside))
        yield from (("train", flag) for flag in re.findall(r"--[a-z-]+", outside))
        yield command, "--help"


def test_all_that_is_advised_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    fixes = {d.fix for _, over, _, _ in CASES.values() for d in diagnose(over)}
    asked = {pair for fix in fixes for pair in advised(fix)}
    assert len(fixes) >= 14 and ("data convert", "--weights") in asked and ("train", "--freeze-ratio") in asked
    known = {command: flags_of(command, monkeypatch) for command in {command for command, _ in asked}}
    assert not {(command, flag) for command, flag in asked if flag not in known[command]}


# ---- runs that were spoilt on purpose


def names(found: list[Diagnosis]) -> set[str]:
    return {d.name for d in found}


def same(count: int, answer: str, first: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"Where is number {i}?", "completion": answer} for i in range(first, first + count)]


BOX = "All of it is kept in the box beside the green door, as always."
SHELF = "Some were seen today upon the shelf behind our old house, my friend."


def test_forty_epochs_on_thirty_rows(tiny: Path, tmp_path: Path) -> None:
    """The last model knows its rows by heart; the best one does not, and the epoch to stop at is named for both."""
    data, held = write(tmp_path / "d.jsonl", same(30, BOX)), write(tmp_path / "v.jsonl", same(10, SHELF, 100))
    test = write(tmp_path / "t.jsonl", same(10, SHELF, 200))
    sides = {"valid_dataset": str(held), "test_dataset": str(test)}
    run = fit(tmp_path / "run", data, tiny, epochs=40, patience=0, learning_rate=3e-3, batch_size=6, **sides)
    last, best = (api.evaluate(run, model=str(run / name), samples=0) for name in ("final_model", "best_model"))
    assert names(last.diagnoses) >= {"overfitting", "memorisation"}
    assert "overfitting" in names(best.diagnoses) and "memorisation" not in names(best.diagnoses)
    epoch = max(1, round(next(e["epoch"] for e in run.metrics("eval") if e["step"] == run.summary()["best_step"])))
    assert epoch < 20
    for found in (last, best):
        assert next(d.fix for d in found.diagnoses if d.name == "overfitting").startswith(
            f"stop there: --epochs {epoch};"
        )


def test_a_learning_rate_of_ten(
    tiny: Path, tmp_path: Path, data: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where training comes to its end, the evaluation says it, and where the numbers end before, `runs show`."""
    many = write(tmp_path / "many.jsonl", rows(100))
    run = fit(tmp_path / "run", many, tiny, max_steps=8, patience=0, learning_rate=10.0)
    found = api.evaluate(run, rows=0, samples=0)
    assert [d.name for d in found.diagnoses] == ["diverged", "worse than the base"] and found.verdict == "worse"
    norm, steps = torch.nn.utils.clip_grad_norm_, itertools.count(1)
    with monkeypatch.context() as patched:  # when the numbers end by themselves differs by processor
        patched.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: norm(*a) * (math.inf if next(steps) > 8 else 1))
        with pytest.raises(TunesmithError, match="the gradient became inf at step 9"):
            fit(tmp_path / "failed", data, tiny, epochs=3, patience=0, learning_rate=10.0)
    for place in ("run", "failed"):
        shown = cli("runs", "show", tmp_path / place)
        assert shown.code == 0 and "error: diverged: the training loss went from" in shown.out
        assert "next: tunesmith lr-find" in shown.out
        told = cli("runs", "show", tmp_path / place, "--json").json()["diagnoses"]
        assert [(d["name"], d["severity"]) for d in told] == [("diverged", "error")]
    fine = fit(tmp_path / "fine", data, tiny)
    assert cli("runs", "show", fine, "--json").json()["diagnoses"] == []
    assert "diverged" not in cli("runs", "show", fine).out


def varied(count: int) -> list[dict[str, str]]:
    """Rows whose answers say again what was asked."""
    chance = random.Random(0)
    text = " ".join(row.answer() for row in api.load("domain"))
    plain = sorted({w for w in text.split() if w.isalpha() and len(w) > 3})
    pick = [chance.sample(plain, 3) for _ in range(count)]
    return [
        {"prompt": f"Tell of {a}, {b}, {c}.", "completion": f"First {a}, then {b}; at last {c}."} for a, b, c in pick
    ]


def test_shuffled_answers(tiny: Path, tmp_path: Path) -> None:
    good = varied(96)
    order = random.Random(2).sample(range(96), 96)
    mixed = [{**row, "completion": good[i]["completion"]} for row, i in zip(good, order, strict=True)]
    found = []
    for name, asked in (("good", good), ("mixed", mixed)):
        run = fit(tmp_path / name, write(tmp_path / f"{name}.jsonl", asked), tiny, max_steps=4, batch_size=16)
        found.append(names(api.evaluate(run, rows=0, samples=0).diagnoses))
    assert "shuffled answers" in found[1] and "shuffled answers" not in found[0]


def test_no_end_token(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The template writes none after an answer, so that none is learnt: refused. Where it was trained nevertheless, the answers
    show it; with it, the same rows end."""
    bare = tmp_path / "endless"
    shutil.copytree(tiny, bare)
    template = (tiny / "chat_template.jinja").read_text()
    without = template.replace("{{ message.content }}<|im_end|>{% end", "{{ message.content }}{% end")
    assert without != template
    (bare / "chat_template.jinja").write_text(without)
    data, found = write(tmp_path / "d.jsonl", same(90, BOX)), {}
    with pytest.raises(
        DataError, match=r"72 of 72 rows never teach the model to stop \[no-end-of-turn\] -- end the answer"
    ):
        api.plan(data, model=str(bare))
    monkeypatch.setattr(Seen, "training", lambda seen, vocabulary: [])
    for name, model in (("bare", bare), ("whole", tiny)):
        run = fit(tmp_path / name, data, model, epochs=4, patience=0, learning_rate=1e-2)
        found[name] = names(api.evaluate(run, rows=10, samples=0).diagnoses)
    assert "never stops" in found["bare"] and "never stops" not in found["whole"]


def test_a_healthy_run(tmp_path: Path) -> None:
    """The sample persona and the starter, one epoch; of its rows some are looked at."""
    run = fit(tmp_path / "run", "echo", "starter", batch_size=8, learning_rate=5e-4)
    found = api.evaluate(run, rows=10, samples=0, weighed=24, max_tokens=48)
    assert found.verdict == "better" and found.diagnoses == []
