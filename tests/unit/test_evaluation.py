"""Verdicts against hand-computed cases; what evaluation keeps, refuses and shows."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from conftest import rows, write
from training import fit
from tunesmith import api
from tunesmith.data.persona import names, persona
from tunesmith.errors import DataError, UsageError
from tunesmith.evaluation import report
from tunesmith.evaluation.stats import compare
from tunesmith.runs import Run


def array(*values: float) -> np.ndarray:
    return np.array(values, np.float64)


def test_a_clear_effect() -> None:
    rng = np.random.default_rng(0)
    base, weight = rng.normal(40, 5, 100), np.full(100, 10.0)
    found = compare("loss", base, base - 5 + rng.normal(0, 1, 100), weight, lower_is_better=True)
    assert found.verdict == "better" and found.difference == pytest.approx(-0.5, abs=0.03)
    assert found.low < found.difference < found.high < 0
    assert compare("loss", base, base + 5, weight, True).verdict == "worse"
    assert compare("accuracy", base, base + 5, weight, False).verdict == "better"


def test_the_interval_is_that_of_the_theory() -> None:
    """For equal weights the bootstrap's interval is mean +- 1.96 s / sqrt(n), to a few percent."""
    rng = np.random.default_rng(1)
    difference = rng.normal(0.1, 1.0, 400)
    found = compare("loss", np.zeros(400), difference, np.ones(400), True)
    half = 1.96 * difference.std() / math.sqrt(400)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)


def test_perplexity_has_an_interval_of_its_own() -> None:
    """That of the difference of perplexities, both drawn anew: here against the bootstrap written out in full."""
    rng = np.random.default_rng(7)
    base, tuned = rng.normal(50, 8, 60), rng.normal(45, 8, 60)
    weight = np.full(60, 10.0)
    found = compare("perplexity", base, tuned, weight, True, shape=np.exp)
    draws = rng.integers(0, 60, (10_000, 60))
    want = np.exp(tuned[draws].sum(1) / 600) - np.exp(base[draws].sum(1) / 600)
    assert found.base == pytest.approx(math.exp(base.sum() / 600))
    assert (found.low, found.high) == pytest.approx(np.quantile(want, [0.0236, 0.9764]), rel=0.1)


def test_cannot_tell_says_how_many_rows() -> None:
    rng = np.random.default_rng(2)
    difference = rng.normal(0.05, 1.0, 50)
    found = compare("loss", np.zeros(50), difference, np.ones(50), True)
    assert found.verdict == "cannot tell"
    want = 50 * ((found.high - found.low) / 2 / found.difference) ** 2
    assert found.rows_needed == math.ceil(want) > 50
    assert compare("loss", array(1.0), array(0.5), array(1.0), True).verdict == "cannot tell"  # one row proves nothing
    same = compare("loss", array(1, 2, 3), array(1, 2, 3), array(1, 1, 1), True)
    assert same.verdict == "cannot tell" and same.rows_needed is None


def test_wrong_verdicts_are_as_rare_as_promised() -> None:
    """Two equal models, 40 rows, 200 trials: at most 5 % and a margin may be called different. So with 8 rows; never with 7."""
    rng, wrong = np.random.default_rng(3), 0
    few = [compare("loss", np.zeros(8), rng.normal(0, 1, 8), np.ones(8), True, s).verdict for s in range(300)]
    assert 3 <= 300 - few.count("cannot tell") <= 27  # 9 %: three standard errors over 5
    fewer = compare("loss", np.full(7, 9.0), np.arange(7) / 9, np.ones(7), True)
    assert fewer.high < 0 and fewer.verdict == "cannot tell" and fewer.rows_needed == 8
    for seed in range(200):
        base = rng.normal(3, 1, 40)
        wrong += compare("loss", base, base + rng.normal(0, 0.3, 40), np.ones(40), True, seed).verdict != "cannot tell"
    assert wrong / 200 < 0.09


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


def test_evaluate_a_run(run: Run, tiny: Path) -> None:
    result = api.evaluate(run)
    assert result.verdict == "better" and result.rows == 8
    assert [m.metric for m in result.metrics] == ["loss (nats per token)", "perplexity", "token accuracy"]
    lines = [json.loads(line) for line in (run / "evaluation" / "rows.jsonl").read_text().splitlines()]
    assert len(lines) == 8  # every number can be recomputed from these
    for side in ("base", "tuned"):
        loss = sum(line[side]["loss"] for line in lines) / sum(line[side]["tokens"] for line in lines)
        assert getattr(result.metrics[0], side) == pytest.approx(loss)
        assert getattr(result.metrics[1], side) == pytest.approx(math.exp(loss))
        assert getattr(result.metrics[2], side) == pytest.approx(
            sum(line[side]["right"] for line in lines) / sum(line[side]["tokens"] for line in lines)
        )
    assert len(result.samples) == 6 and result.persona is not None and result.persona.probes == 8
    assert result.persona.tuned == sum("word1" in s.tuned for s in result.persona.answers)
    html = Path(result.report).read_text()
    assert (
        "<svg" in html
        and "best: step" in html
        and "http://" not in html.replace("http://www.w3.org", "")
        and "https://" not in html
    )
    from tunesmith.evaluation.evaluate import kept

    assert kept(run) == result


def test_scores_equal_a_plain_computation(run: Run) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tunesmith.local.score import score
    from tunesmith.render import Renderer

    held = api.load(run / "data" / "test.jsonl")
    model, renderer = AutoModelForCausalLM.from_pretrained(run / "best_model").double(), Renderer(run / "best_model")
    for mine, row in zip(score(str(run / "best_model"), held), held, strict=True):
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


def test_another_evaluation_leaves_the_runs_own_alone(run: Run, tmp_path: Path) -> None:
    api.evaluate(run, samples=0)
    before = {name: (run / name).read_bytes() for name in ("report.html", "evaluation/result.json")}
    other = write(
        tmp_path / "other.jsonl", [{"prompt": f"Something else {i}?", "completion": "Yes."} for i in range(9)]
    )
    result = api.evaluate(run / "final_model", dataset=str(other), samples=0)
    assert result.tuned == str(run / "final_model") and result.rows == 9
    assert result.report == str(run / "evaluation" / "model-final_model-on-other.jsonl" / "report.html")
    assert Path(result.report).exists()
    assert before == {name: (run / name).read_bytes() for name in before}


def test_two_models_without_a_run(run: Run, tiny: Path) -> None:
    result = api.evaluate(
        model=str(run / "best_model"), against=str(tiny), dataset=str(run / "data" / "test.jsonl"), samples=2
    )
    assert result.verdict == "better" and len(result.samples) == 2 and result.persona is None and result.report is None
    back = api.evaluate(
        model=str(tiny), against=str(run / "best_model"), dataset=str(run / "data" / "test.jsonl"), samples=0
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
    result = api.evaluate(model=str(other), against=str(tiny), dataset=str(run / "data" / "test.jsonl"), samples=0)
    assert [m.metric for m in result.metrics] == ["loss (nats per byte)"]


def test_chart_geometry() -> None:
    assert report.ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    steps = [{"step": s, "loss": 5 - s / 10} for s in range(1, 21)]
    drawn = report.chart(steps, [{"step": 10, "loss": 4.5}, {"step": 20, "loss": 4.0}], 20)
    assert drawn["best"] == {"x": drawn["points"][1][0], "y": drawn["points"][1][1], "step": 20, "loss": 4.0}
    assert report.chart([], [], None) == {}


def test_a_base_without_template_is_judged_on_the_form_of_the_run(tiny: Path, data: Path, tmp_path: Path) -> None:
    from tunesmith.local.score import score

    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare)
    (bare / "chat_template.jinja").unlink()
    run = fit(tmp_path / "run", data, bare, task="code", max_steps=1)
    held = api.load(run / "data" / "test.jsonl")
    as_trained, as_chat = (sum(s.loss for s in score(str(bare), held, t)) for t in (run.template(), None))
    assert as_trained != pytest.approx(as_chat, rel=1e-4)
    found = api.evaluate(run, samples=1)
    assert found.metrics[0].base * found.tokens == pytest.approx(as_trained)
