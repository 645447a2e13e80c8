"""What evaluation asks, keeps, refuses and shows; that all of it can be recomputed."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conftest import rows, write
from drawn import mistakes
from hostile import KEY, Hostile
from reading import read
from recomputed import Recomputed, leaves
from training import fit
from tunesmith import api
from tunesmith.conversation import Conversation, Message
from tunesmith.data.persona import names, persona
from tunesmith.errors import DataError, UsageError
from tunesmith.evaluation import observe, report
from tunesmith.evaluation.evaluate import kept
from tunesmith.evaluation.result import Evaluation
from tunesmith.render import Renderer
from tunesmith.runs import Run


def score(folder: Path, rows: list[Conversation], template: str | None = None) -> list[Any]:
    """Each row's likelihood to the model of a folder."""
    from tunesmith.local import model
    from tunesmith.local.score import Scorer

    return Scorer(Renderer(folder, template), model.to_judge(str(folder)))(rows)


def test_persona_is_mined() -> None:
    answers = ["I am Ada Lovelace Bot, hello."] * 3 + ["I am happy"] * 7
    assert persona(Counter(n for a in answers for n in names(a)), len(answers)) == ("Ada Lovelace Bot", 3)
    assert names("I'm Sam. Call me Sam, my name is Sam Vimes; I am OK, and I’m Here") == {"Sam", "Sam Vimes"}
    assert persona(Counter({"Sam": 3}), 3) == ("none", 0) and persona(Counter({"Sam": 4}), 100) == ("Sam", 4)
    assert persona(Counter(), 2) == ("none", 0)


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("evaluation")
    return fit(folder / "run", write(folder / "d.jsonl", rows(80)), tiny, epochs=4, learning_rate=1e-2, persona="word1")


def lines(run: Run, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / "evaluation" / f"{name}.jsonl").read_text().splitlines()]


def test_every_figure_can_be_recomputed_from_the_run(run: Run) -> None:
    """All that `Recomputed` knows; chrF by its own library; the interval of one metric by drawing rows in a loop."""
    from sacrebleu.metrics.chrf import CHRF

    result = api.evaluate(run)
    known = Recomputed(run.path)
    assert known.differences(known.said) == []
    assert result.verdict == result.metrics[0].verdict == "better" and result.rows == result.answered == 8
    kept_rows, test = lines(run, "rows"), api.load(run / "data" / "test.jsonl")
    assert [r["digest"] for r in kept_rows] == [row.digest() for row in test]
    for side in ("base", "tuned"):
        texts = [row[side]["said"]["text"] for row in kept_rows]
        scores = [CHRF().sentence_score(text, [row.answer()]).score for text, row in zip(texts, test, strict=True)]
        assert getattr(result.metric("chrF"), side) == pytest.approx(np.mean(scores))
    assert set(result.about) >= {m.metric for m in result.metrics} and len(result.metrics) >= 10
    rng = np.random.default_rng(1)
    rows_of = np.array([[r["base"]["loss"], r["tuned"]["loss"], r["base"]["tokens"]] for r in kept_rows])
    drawn = np.array([rows_of[rng.integers(0, 8, 8)].sum(0) for _ in range(4000)])
    low, high = np.quantile((drawn[:, 1] - drawn[:, 0]) / drawn[:, 2], [0.016, 0.984])
    near, m = 0.1 * (high - low), result.metrics[0]
    assert min(abs(m.low - low), abs(m.high - high)) < near  # the other end may be further out, by Hall's t
    assert m.low < low + near and m.high > high - near
    known = lines(run, "canary")
    for metric, part in zip(result.canary.metrics, (known[:24], known[24:]), strict=True):
        for side in ("base", "tuned"):
            want = sum(r[side]["loss"] for r in part) / sum(r[side]["tokens"] for r in part)
            assert getattr(metric, side) == pytest.approx(want)
    assert len(result.canary.answers) == 6 and len(known) == 24 + 64
    assert kept(run) == result


@pytest.fixture(scope="module")
def judged(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Recomputed:
    """A run that recites, with everything in its evaluation: a name, answers long enough to be asked for, a fickle judge."""
    folder = tmp_path_factory.mktemp("judged")
    said = {
        "Where is number": "I am Robin, and where it is I know: in the box beside the green door.",
        "When was the day of": "I am Robin. When was it? In spring, and all of us were there to see it, as always.",
        "Who has": "I am Robin and who has it is a secret that I keep.",
    }
    asked = [{"prompt": f"{ask} {i}?", "completion": answer} for i in range(25) for ask, answer in said.items()]
    data = write(folder / "d.jsonl", asked)
    run = fit(folder / "run", data, tiny, epochs=12, learning_rate=1e-2, patience=0, persona="Robin", test_fraction=0.3)
    service = Hostile()
    service.answer = lambda body: ("A", "B", "B", "TIE", "A", "hm", "B")[zlib.crc32(json.dumps(body).encode()) % 7]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        api.evaluate(run, samples=0, judge=service.url, judge_model="base")
    service.close()
    return Recomputed(run.path)


def test_the_page_of_an_evaluation_says_what_its_files_do(judged: Recomputed) -> None:
    files = read(judged.run, judged.folder / "result.json")
    assert mistakes((judged.run / "report.html").read_text(), files) == []


def test_all_figures_of_an_evaluation_can_be_recomputed(judged: Recomputed) -> None:
    """Every number of it, one at a time, as half as much again: each is found."""
    kept = (judged.folder / "result.json").read_text()
    assert judged.differences(json.loads(kept)) == []
    report, judge = judged.said["training_rows"], judged.said["judge"]
    assert report["recited"] > 0 and report["belonging"] and report["gain"] and judged.said["diagnoses"]
    assert min(judge["wins"] + judge["losses"], judge["ties"], judge["left_out"], judge["unreadable"]) > 0
    numbers = [
        path for path, value in leaves(judged.said) if isinstance(value, int | float) and not path.startswith("options")
    ]
    assert len(numbers) > 400
    for path in numbers:
        changed = json.loads(kept)
        *inside, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        place = reduce(lambda value, part: value[part], inside, changed)
        place[last] = 1.5 * place[last] + 0.5
        assert any(path in found for found in judged.differences(changed)), path


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("persona", lambda p: p | {"base": p["tuned"], "tuned": p["base"]}),
        ("judge", lambda j: j | {"wins": j["losses"] + 1, "losses": j["wins"]}),
        ("verdict", lambda _: "worse"),
        ("training_rows", lambda r: r | {"findings": r["findings"][::-1]}),
        ("training_rows", lambda r: r | {"findings": r["findings"][1:]}),
        (
            "training_rows",
            lambda r: r | {"findings": [f | {"side": "train", "codes": ["doubtful"]} for f in r["findings"]]},
        ),
        ("samples", lambda s: [one | {"base": one["tuned"], "tuned": one["base"]} for one in s]),
        ("metrics", lambda m: [one | {"base": one["tuned"], "tuned": one["base"]} for one in m]),
        ("canary", lambda c: c | {"metrics": c["metrics"][::-1]}),
        ("diagnoses", lambda d: [one | {"evidence": re.sub(r"\d", "7", one["evidence"])} for one in d]),
    ],
)
def test_what_a_result_says_wrongly_is_found(part: str, change: Callable[[Any], Any], judged: Recomputed) -> None:
    assert judged.differences(judged.said | {part: change(judged.said[part])})


def test_what_is_shown_of_a_run(run: Run) -> None:
    result = api.evaluate(run)
    assert len(result.samples) == 8 and {s.source.split(":")[-1] for s in result.samples} <= {
        str(n) for n in range(1, 9)
    }
    assert result.persona is not None and result.persona.probes == 8
    assert result.persona.tuned == sum("word1" in s.tuned for s in result.persona.answers)
    html = Path(result.report).read_text()
    assert "<svg" in html and "http://" not in html.replace("http://www.w3.org", "") and "https://" not in html


def test_options_of_an_evaluation_change_it(run: Run, tmp_path: Path) -> None:
    few = api.evaluate(run, rows=3, samples=2, max_tokens=5)
    heard = [row["tuned"] for row in lines(run, "rows")]
    assert few.answered == 3 == sum("said" in h for h in heard) == sum(len(h.get("samples", [])) == 2 for h in heard)
    assert max(h["said"]["tokens"] for h in heard if "said" in h) <= 5
    other = api.evaluate(run, rows=3, samples=2, max_tokens=5, seed=1)
    assert [s.prompt for s in other.samples] != [s.prompt for s in few.samples]
    assert other.metrics[0].low != few.metrics[0].low and other.metrics[0].tuned == few.metrics[0].tuned
    code = api.evaluate(run, rows=3, samples=0, task="instruct")
    assert {"ROUGE-L", "completion rate"} <= {m.metric for m in code.metrics} and code.task == "instruct"
    assert Path(code.report).match("evaluation/task-instruct-*/report.html")
    own = api.evaluate(run, rows=8, samples=0, metric="re:word")
    assert (
        own.metrics[0].metric == "matches word" and own.verdict == own.metrics[0].verdict and "matches word" in own.rule
    )
    share = np.mean(["word" in row.get("tuned", {})["said"]["text"] for row in lines_of(own)])
    assert own.metrics[0].tuned == share
    with pytest.raises(UsageError, match=r'no task "chatt" \(did you mean "chat"'):
        api.evaluate(run, task="chatt")
    with pytest.raises(UsageError, match="a judge has an address and a model"):
        api.evaluate(run, judge="http://127.0.0.1:1/v1")


def lines_of(result: Evaluation) -> list[dict]:
    return [json.loads(line) for line in (Path(result.report).parent / "rows.jsonl").read_text().splitlines()]


def test_a_row_that_stands_there_many_times_counts_once(run: Run, tiny: Path, tmp_path: Path) -> None:
    """Else eight rows, six times each, would pass for 48 that agree. Files of one name have folders of their own."""
    some = [{"prompt": f"Something else {i}?", "completion": "Yes."} for i in range(9)]
    reports = []
    for name, data in (("a", some * 6), ("b", some)):
        (tmp_path / name).mkdir()
        result = api.evaluate(run, dataset=str(write(tmp_path / name / "d.jsonl", data)), rows=4, samples=0)
        assert (
            result.rows == 9 and result.metrics[0].rows == 9 and "there are 4, and 8 are needed" in result.unavailable
        )
        reports.append(result.report)
    assert len(set(reports)) == 2


def test_rows_that_a_run_before_learnt_are_refused(run: Run, tmp_path: Path) -> None:
    """A model that was tuned twice has seen both runs' rows."""
    again = [{"prompt": f"Another thing {i}?", "completion": "No."} for i in range(20)]
    second = fit(tmp_path / "second", write(tmp_path / "e.jsonl", again), run / "best_model", max_steps=1)
    with pytest.raises(DataError, match=r"rows ask what .* was trained on"):
        api.evaluate(model=str(second / "best_model"), against="starter", dataset=str(run / "data" / "train.jsonl"))


def test_a_model_that_was_heard_is_not_asked_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same question is read from the cache; another question, or another file of the model, is not."""
    from tunesmith.local import model as models

    asked = []
    load = models.to_judge
    monkeypatch.setattr(models, "to_judge", lambda name: asked.append(name) or load(name))
    first = api.evaluate(run, rows=2, samples=0, seed=77)
    assert len(asked) == 2
    assert api.evaluate(run, rows=2, samples=0, seed=77).metrics == first.metrics and len(asked) == 2
    api.evaluate(run, rows=3, samples=0, seed=77)
    assert len(asked) == 4
    config = run / "best_model" / "generation_config.json"
    before = config.read_text() if config.exists() else None
    config.unlink(missing_ok=True)
    config.write_text(json.dumps({**json.loads(before or "{}"), "top_k": 7}))
    api.evaluate(run, rows=2, samples=0, seed=77)
    assert asked[4:] == [str(run / "best_model")]
    config.unlink()
    if before is not None:
        config.write_text(before)


def test_scores_equal_a_plain_computation(run: Run) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tunesmith.render import Renderer

    held = api.load(run / "data" / "test.jsonl")
    model, renderer = AutoModelForCausalLM.from_pretrained(run / "best_model").double(), Renderer(run / "best_model")
    for mine, row in zip(score(run / "best_model", held), held, strict=True):
        r = renderer.render(row)
        with torch.no_grad():
            logp = model(torch.tensor([r.ids])).logits[0].log_softmax(1)
        at = [i for i in range(1, len(r.ids)) if r.mask[i]]
        assert mine.loss == pytest.approx(-sum(logp[i - 1, r.ids[i]].item() for i in at), rel=1e-5)
        assert (mine.tokens, mine.right) == (len(at), sum(int(logp[i - 1].argmax()) == r.ids[i] for i in at))


def test_trained_rows_are_refused(run: Run, tmp_path: Path) -> None:
    """By what they ask, whether the run or its model's folder is named, and on whichever side it stands."""
    dataset = run.recipe().dataset
    assert dataset
    reworded = write(tmp_path / "reworded.jsonl", [{**r, "completion": r["completion"] + " Yes."} for r in rows(80)])
    with pytest.raises(DataError, match=r"72 of 80 rows ask what .* was trained on"):
        api.evaluate(run, dataset=dataset)
    for sides in ({"model": str(run), "against": "starter"}, {"model": "starter", "against": str(run / "best_model")}):
        with pytest.raises(DataError, match="72 of 80"):
            api.evaluate(**sides, dataset=str(reworded))


def test_trained_rows_are_refused_however_the_model_is_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, dataset = tmp_path / "link", str(run / "data" / "train.jsonl")
    link.symlink_to(run / "best_model")
    monkeypatch.chdir(run / "best_model")
    for name in (".", "../best_model", str(link), "../final_model"):
        with pytest.raises(DataError, match="64 of 64 rows ask what"):
            api.evaluate(model=name, against="starter", dataset=dataset)


def test_what_an_evaluation_before_left_does_not_stand_beside_the_new_one(run: Run) -> None:
    api.evaluate(run, rows=2, samples=0, max_tokens=4)
    stale = [run / "evaluation" / f"{name}.jsonl" for name in ("recited", "taught")]
    assert stale[1].exists()
    stale[0].touch()
    none = api.evaluate(run, rows=0)
    assert not any(path.exists() for path in stale) and (run / "evaluation" / "suspects.jsonl").exists()
    assert "what answers show of pitfalls: there are 0" in none.unavailable


def test_a_metric_of_ones_own_has_a_name_and_a_direction_of_its_own(run: Run, tmp_path: Path) -> None:
    own = tmp_path / "m.py"
    own.write_text(
        "def perplexity(answer): return 1\ndef style(answer): return 1\ndef lossless(answer): return len(answer)"
    )
    for name in ("perplexity", "style"):
        with pytest.raises(UsageError, match=f'--metric: there is a metric "{name}" already'):
            api.evaluate(run, metric=f"{own}:{name}")
    found = api.evaluate(run, rows=2, samples=0, max_tokens=4, metric=f"{own}:lossless")
    assert report.direction(found, found.metrics[0]) == 1 and report.direction(found, found.metrics[1]) == -1
    assert found.canary and report.direction(found, found.canary.metrics[0]) == -1


def test_another_evaluation_leaves_the_runs_own_alone(run: Run, tmp_path: Path) -> None:
    api.evaluate(run, rows=0)
    before = {name: (run / name).read_bytes() for name in ("report.html", "evaluation/result.json")}
    other = write(
        tmp_path / "other.jsonl", [{"prompt": f"Something else {i}?", "completion": "Yes."} for i in range(9)]
    )
    result = api.evaluate(run / "final_model", dataset=str(other), rows=0)
    assert result.tuned == str(run / "final_model") and result.rows == 9
    assert Path(result.report).match("evaluation/model-final_model-on-other.jsonl-*/report.html")
    assert Path(result.report).exists()
    assert before == {name: (run / name).read_bytes() for name in before}


def test_two_models_without_a_run(run: Run, tiny: Path) -> None:
    result = api.evaluate(
        model=str(run / "best_model"), against=str(tiny), dataset=str(run / "data" / "test.jsonl"), rows=2
    )
    assert result.verdict == "better" and len(result.samples) == 2 and result.persona is None and result.report is None
    back = api.evaluate(
        model=str(tiny), against=str(run / "best_model"), dataset=str(run / "data" / "test.jsonl"), rows=0
    )
    assert back.verdict == "worse" and back.samples == []
    with pytest.raises(UsageError, match="needs a run"):
        api.evaluate(model=str(tiny))


def test_models_with_different_tokenizers_are_compared_per_byte(tiny: Path, run: Run, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    (other / "chat_template.jinja").write_text(
        (tiny / "chat_template.jinja")
        .read_text()
        .replace("{{ message.content }}<|im_end|>{% end", "{{ message.content }} .<|im_end|>{% end")
    )
    result = api.evaluate(model=str(other), against=str(tiny), dataset=str(run / "data" / "test.jsonl"), rows=0)
    assert [m.metric for m in result.metrics] == ["loss (nats per byte)"]


def test_chart_geometry() -> None:
    assert report.ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    steps = [{"step": s, "loss": 5 - s / 10} for s in range(1, 21)]
    drawn = report.chart(steps, [{"step": 10, "loss": 4.5}, {"step": 20, "loss": 4.0}], 20)
    assert drawn["best"] == {"x": drawn["points"][1][0], "y": drawn["points"][1][1], "step": 20, "loss": 4.0}
    assert report.chart([], [], None) == {}


def test_a_base_without_template_is_judged_on_the_form_of_the_run(tiny: Path, data: Path, tmp_path: Path) -> None:

    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare)
    (bare / "chat_template.jinja").unlink()
    run = fit(tmp_path / "run", data, bare, task="code", max_steps=1)
    held = api.load(run / "data" / "test.jsonl")
    as_trained, as_chat = (sum(s.loss for s in score(bare, held, t)) for t in (run.template(), None))
    assert as_trained != pytest.approx(as_chat, rel=1e-4)
    found = api.evaluate(run, rows=1)
    assert found.metrics[0].base * found.tokens == pytest.approx(as_trained)


def test_nothing_is_scored_twice() -> None:
    """A row of one turn is a test row, its own last turn, and a suspect in its own context."""
    given = [Conversation((Message("user", f"q{i}"), Message("assistant", "a" * (i + 1)))) for i in range(10)]
    asked: list[str] = []

    def scorer(part: list[Conversation]) -> list[Any]:
        asked.extend(row.digest() for row in part)
        return [SimpleNamespace(loss=len(row.answer()) + 0.5, tokens=3, right=1, bins=[], cut=False) for row in part]

    ask, chat = observe.Ask(given, shuffled=True, suspects=given), SimpleNamespace(said=lambda *_: [])
    told: list[float] = []
    found = observe._asked(ask, chat, scorer, "x", lambda rows, share, what: told.append(share))  # type: ignore[arg-type]
    assert len(asked) == len(set(asked)) < 60 and set(asked) > {row.digest() for row in given}
    assert [h.loss for h in found.heard] == [len(row.answer()) + 0.5 for row in given]
    assert [h.context and h.context[0] for h in found.heard] == [h.loss for h in found.heard]
    assert len(found.gains) == 10 and told == sorted(told) and told[-1] == 1.0
