"""The report: every figure on the page against the files, what it may load (nothing), who can read it, and hostile texts."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import shlex
import shutil
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from drawn import mistakes
from mutations import MUTATIONS, altered
from reading import Page, agrees, at, read, wrong
from tunesmith.data.write import write_json
from tunesmith.evaluation import report
from tunesmith.evaluation.evaluate import refresh_report
from tunesmith.evaluation.judgement import Judgement
from tunesmith.evaluation.result import Canary, Diagnosis, Evaluation, Persona, Sample
from tunesmith.evaluation.rowreport import RowFinding, RowReport
from tunesmith.evaluation.stats import Comparison
from tunesmith.exporting import forms
from tunesmith.recipe import Recipe
from tunesmith.runs import Run

CSS = (report.ASSETS / "page.css").read_text()
LOSS = Comparison(
    "loss (nats per token)", 5.2243, 4.4435, -0.7808, -1.0431, -0.5371, 0.0001, "better", 26, None, 0.3564
)
CHRF = Comparison("chrF", 9.881, 12.167, 2.286, -1.385, 5.655, 0.1876, "cannot tell", 26, 123, 4.959)
WHOLE = Comparison("distinct-2 over all answers", 0.50185, 0.2949, -0.20695, rows=26)
WORSE = Comparison(
    "loss on general text (nats per token)", 3.89, 4.04, 0.15, 0.09, 0.2, 0.0001, "worse", 24, None, 0.07
)
Judged = msgspec.defstruct("Judged", [("judge", Judgement | None, None)], bases=(Evaluation,), frozen=True)


def finding(number: int, folder: Path, **more: Any) -> RowFinding:
    """Every fifth is held out: it was not trained on and has no losses."""
    side = "valid" if number % 5 == 4 else "train"
    losses = [5.251, 3.502 + number / 50, 2.126 - number / 50] if side == "train" else []
    values: dict[str, Any] = {"losses": losses, "prompt": f"Ask {number}?", "answer": f"It is {number}."}
    codes = ["contradicting"] + ["memorised"] * (number % 3 == 0)
    values |= more
    return RowFinding(f"{folder}/data/{side}.jsonl:{number}", "d", side, codes, 6.04 - number / 64, **values)


def evaluation(folder: Path, findings: int = 44, **changed: Any) -> Any:
    """An evaluation with something in every section."""
    sample = Sample(
        "What is 3 + 4?", "It is 12.", "The sum of both is 7, I think", "The sum of both is 7.", "t.jsonl:1"
    )
    values: dict[str, Any] = {
        "verdict": "better",
        "rule": "The verdict is that of loss (nats per token): where the 95 % interval excludes zero.",
        "base": "starter",
        "tuned": f"{folder}/best_model",
        "task": "chat",
        "dataset": f"{folder}/data/test.jsonl",
        "rows": 26,
        "answered": 25,
        "tokens": 1855,
        "metrics": [LOSS, CHRF, WHOLE],
        "about": {"loss (nats per token)": "The mean of -ln p. Range: 0 and up. Source: Shannon 1948."},
        "persona": Persona("Echo", 8, 0, 7, [Sample("Who are you?", "I am Robin 5.", "I am ECHO, yes, Echo.")]),
        "canary": Canary([WORSE], [sample]),
        "diagnoses": [Diagnosis("overfitting", "warning", "it rose from 4.409 at step 102", "stop: --max-steps 102; rows")],
        "training_rows": RowReport(
            256, 250, 24, 3, (2.844, 0.442), None, [finding(i, folder) for i in range(findings)]
        ),
        "samples": [sample],
        "unavailable": "calibration: a service tells 0 likelihoods",
        "options": {"rows": 40, "seed": 7},
        "better": {"loss (nats per token)": "lower", "chrF": "higher"},
        "judge": Judgement(
            "judge-1", "http://x", 20, 11, 4, 5, 2, 1, 1, 1, 3, "", CHRF, 0.21, 0.55, 0.8, 0.44, None
        ),
    }  # fmt: skip
    return Judged(**values | changed)


def run_at(folder: Path, steps: int = 60) -> Run:
    """A run's directory, as much of it as the report reads."""
    (folder / "data").mkdir(parents=True)
    recipe = {"dataset": "my data.jsonl", "model": "starter", "task": "chat", "method": "full", "epochs": 3}
    recipe |= {"adam_beta1": 0.9, "learning_rate": 0.0005}
    plan = {"steps": steps, "rows": {"train": 204, "valid": 26, "test": 26}, "tokens": {"train": 20162}, "longest": 213}
    plan |= {"supervised_tokens": {"train": 15752}}
    manifest = {"provider": "huggingface", "recipe": recipe, "origin": {"epochs": "auto: 204 rows"}, "plan": plan}
    write_json(folder / "run.json", manifest | {"created": "2026-01-02", "versions": {"torch": "2.13.0+cpu"}})
    issue = {"severity": "warning", "code": "near", "where": "d.jsonl:9", "message": "85% alike to 2", "fix": "drop 1"}
    write_json(folder / "data" / "check.json", [issue] * 12)
    run = Run(folder)
    for step in range(steps + 1):
        if step:
            run.append(
                "step", step=step, loss=5 - step / 40 + math.sin(step) / 3, lr=5e-4 * step / steps, epoch=step / 20
            )
        if step % 20 == 0:
            run.append("eval", step=step, epoch=step / 20, loss=5 - 0.6 * math.sin(step / 20), best=step == 40)
    exported(run, "merged", "bf16", None)
    exported(run, "gguf", "q8_0", "4 tokens are cut otherwise")
    exported(run, "gguf", "q8_0", "")
    exported(run, "ollama", "q4_0", "every 2nd turn ends wrongly")
    run.append("done", step=steps, best_step=40, stopped_early=True, seconds=49.27, tokens_per_second=2045.9)
    return run


def exported(run: Run, form: str, quantize: str, cause: str | None) -> None:
    """An export with a certificate that fails by `cause`, or passes where there is none. None: its folder is gone."""
    folder = run.path.parent / f"exports of {run.path.name}" / f"{form}-{quantize}"
    run.append("export", path=str(folder), form=form, quantize=quantize, deployable=not cause)
    if cause is not None:
        folder.mkdir(parents=True, exist_ok=True)
        drift = {
            "name": "log-probabilities",
            "passed": True,
            "found": "0.0007 nats apart at 128 places",
            "limit": "0.04 nats",
        }
        ends = {
            "name": "stopping",
            "passed": not cause,
            "found": "14 of 16 answers end",
            "limit": "all",
            "cause": cause,
        }
        known = {"run": str(run), "runtime": "llama.cpp 0.4.5", "model": "m", "checks": [drift | {"cause": ""}, ends]}
        write_json(folder / "parity.json", {"deployable": not cause, **known})


def rendered(folder: Path, result: Any, run: Run | None = None) -> str:
    run = run or run_at(folder)
    path = folder / "report.html"
    report.write_report(run, result, path)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("report") / "run"
    result = evaluation(folder)
    html = rendered(folder, result)
    write_json(folder / "result.json", result)
    return folder, html


# ---- figures


def test_every_figure_on_the_page_is_that_of_the_files(page: tuple[Path, str]) -> None:
    folder, html = page
    files = read(folder, folder / "result.json")
    assert mistakes(html, files) == []
    paths = {e["data-from"] for e in Page(html).elements if e.get("data-from")}
    for m, comparison in enumerate((LOSS, CHRF)):
        named = (k for k, v in msgspec.to_builtins(comparison).items() if v is not None and k != "verdict")
        assert {f"metrics.{m}.{name}" for name in named} <= paths
    for path in (
        *("training_rows.findings#memorised", "training_rows.findings.43.losses", "canary.metrics.0.difference"),
        *("events:eval.40.loss", "events:done.seconds", "run.json:plan.rows.train", "judge.wins", "persona.tuned"),
        *(
            "exports:0.parity.checks.1.cause",
            "exports:1.parity.checks.0.found",
            "exports:2.when",
            "exports:0.parity.runtime",
        ),
        *("stats:LEVEL", "check.json:11.message", "run.json:recipe.learning_rate", "diagnoses.0.evidence"),
    ):
        assert path in paths, path


def test_an_altered_figure_is_found(page: tuple[Path, str]) -> None:
    """Any digit of any figure, a sign, a figure without a path, and a file that says something else."""
    folder, html = page
    files = read(folder, folder / "result.json")
    figures = [e for e in Page(html).elements if e.get("data-from") and re.search(r"\d", e["text"])]
    assert len(figures) > 300
    for e in figures:
        value = at(files, e["data-from"])
        for digit in re.finditer(r"\d", e["text"]):
            altered = e["text"][: digit.start()] + str((int(digit[0]) + 1) % 10) + e["text"][digit.end() :]
            assert not agrees(altered, value), (e["data-from"], altered)
    assert wrong(html.replace(">−0.78<", ">+0.78<", 1), files)
    assert wrong(html.replace("Diagnosis</h2>", "Diagnosis of 3</h2>"), files)
    files[""]["metrics"][0]["tuned"] += 0.01
    assert any("metrics.0.tuned" in each for each in wrong(html, files))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, dict[str, Any]]:
    """A run, an evaluation with six rows in the report, of which three are shown at once, and the files."""
    folder = tmp_path_factory.mktemp("small") / "run"
    run_at(folder)
    result = evaluation(folder, 6)
    write_json(folder / "result.json", result)
    return folder, result, read(folder, folder / "result.json")


@pytest.mark.parametrize("name", ["nothing", *MUTATIONS])
def test_what_a_page_says_in_the_wrong_place_is_found(
    name: str, small: tuple[Path, Any, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutations of the report's own source: a figure under another's name has the right path and the right value."""
    assert len(MUTATIONS) == 68
    folder, result, files = small
    module = altered(name, tmp_path)
    monkeypatch.setattr(module, "FIRST", 3)
    module.write_report(Run(folder), result, tmp_path / "report.html")
    found = mistakes((tmp_path / "report.html").read_text(encoding="utf-8"), files)
    assert bool(found) == (name in MUTATIONS), found


def test_exports_stand_as_they_are_now(page: tuple[Path, str]) -> None:
    """The newest first, one row for each folder, with the certificate that lies there now; what is gone is said to be."""
    found = Page(page[1])
    rows = [e["text"] for e in found.all("tr") if "exports of run" in e["text"]]
    assert ["ollama-q4_0" in rows[0], "gguf-q8_0" in rows[1], "merged-bf16" in rows[2], len(rows)] == [
        True,
        True,
        True,
        3,
    ]
    assert "✖ not deployable stopping" in rows[0] and "log-probabilities" not in rows[0]
    assert "✓ deployable" in rows[1] and "llama.cpp 0.4.5" in rows[1]
    assert "◆ gone passed when it was made" in rows[2]
    shown = [e["text"] for e in found.all("details") if "What was checked in" in e["text"]]
    assert (
        len(shown) == 2 and "every 2nd turn ends wrongly" in shown[0] and "0.0007 nats apart at 128 places" in shown[1]
    )


def test_a_folder_that_another_run_has_now_is_gone(tmp_path: Path) -> None:
    run, other = run_at(tmp_path / "run"), run_at(tmp_path / "other")
    path = Path(run.last("export")["path"]) / "parity.json"
    for maker, there in ((str(run), True), (None, True), ("moved/run", True), (str(other), False)):
        write_json(path, {**msgspec.json.decode(path.read_bytes()), "run": maker})
        assert (report.exports(run)[0]["parity"] is not None) is there
    path.write_text("{")
    assert report.exports(run)[0]["parity"] is None


def test_the_report_is_written_again_for_an_export(tmp_path: Path, tiny: Path) -> None:
    run = run_at(tmp_path / "run")
    shutil.copytree(tiny, run / "best_model")
    shutil.copyfile(tiny / "config.json", run / "config.json")
    manifest = run.manifest()
    write_json(
        run / "run.json",
        manifest | {"recipe": {**msgspec.to_builtins(Recipe()), **manifest["recipe"]}, "data_hashes": {}},
    )
    refresh_report(run)
    assert not (run / "report.html").exists()  # no evaluation
    (run / "evaluation").mkdir()
    write_json(run / "evaluation" / "result.json", evaluation(run.path))
    done = forms.export(run, tmp_path / "new", prompts=1)
    assert f"What was checked in {tmp_path}/new" in next(
        e["text"] for e in Page(html_of(run)).all("details") if "checked" in e["text"]
    )
    forms.parity(done.path, prompts=1)
    assert html_of(run).count("What was checked in") == 3


def html_of(run: Run) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("low", "high", "base", "want"),
    [
        (-1.0431, -0.5371, 5.2243, 2),  # half the interval is 0.253: 25 of hundredths
        (-159.0, -58.9, 185.7, 0),  # 50
        (0.0303, 0.0791, 0.18, 3),  # 0.0244
        (-1.385, 5.655, 9.9, 1),  # 3.52
        (None, None, 0.50185, 3),  # no interval: three digits of the figure
        (0.0, 0.0, 0.0, 0),
        (-1e-12, 1e-12, 1.0, 6),
    ],
)
def test_figures_have_two_digits_of_their_uncertainty(
    low: float | None, high: float | None, base: float, want: int
) -> None:
    assert report.digits(Comparison("m", base, base, 0.0, low, high)) == want


def test_numbers_as_text() -> None:
    assert [report.written(-0.7808, 2, True), report.written(2.286, 1, True), report.written(0.0, 2, True)] == [
        "−0.78",
        "+2.3",
        "0.00",
    ]
    assert [report.written(1855), report.written(0.0005), report.written(2e-5), report.written(-3e-9)] == [
        "1,855",
        "0.0005",
        "2e-05",
        "−3e-09",
    ]
    assert [report.written(math.inf, 2), report.written(-math.inf), report.written(3.2e9, 2)] == ["∞", "−∞", "3.2e+09"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "excludes zero: chance alone hardly does this"),
        ({"low": -1.6, "high": 0.04, "verdict": "cannot tell", "rows_needed": 61}, "holds zero"),
        ({"low": -1.6, "high": 0.04, "verdict": "cannot tell", "rows_needed": 61}, "About 61 rows like these"),
        ({"verdict": "cannot tell", "rows": 7, "rows_needed": 8}, "fewer than 8 rows prove nothing"),
        ({"verdict": "cannot tell", "p": 0.0712}, "the permutation test does not agree (p\u00a0=\u00a00.0712)"),
        (
            {"tuned": 5.2243, "difference": 0.0, "low": 0.0, "high": 0.0, "verdict": "cannot tell"},
            "no difference at all",
        ),
        ({"low": None, "high": None, "p": None, "verdict": "", "detectable": None}, "has no interval"),
        ({"tuned": math.inf, "difference": math.inf, "low": None, "high": None, "verdict": "cannot tell"}, "is ∞"),
        ({"tuned": math.nan, "difference": math.nan, "low": None, "high": None, "verdict": "cannot tell"}, "is –"),
    ],
)
def test_the_verdict_is_explained(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    m = msgspec.structs.replace(LOSS, **changed)
    html = rendered(tmp_path / "run", evaluation(tmp_path / "run", 3, verdict=m.verdict, metrics=[m]))
    lead = next(e["text"] for e in Page(html).all("p") if e.get("class") == "lead")
    assert said in re.sub(r"[ \n]+", " ", lead)
    assert next(e["text"] for e in Page(html).all("h1")) == (m.verdict or "no verdict")


def test_a_bare_evaluation(tmp_path: Path) -> None:
    """Without curves, canary, persona, rows, judge or check: no empty section, no link to one."""
    bare = evaluation(
        tmp_path / "run", canary=None, persona=None, training_rows=None, samples=[], judge=None, diagnoses=[], about={}
    )
    run = run_at(tmp_path / "run")
    (run / "events.jsonl").write_text("")
    (run / "data" / "check.json").unlink()
    html = rendered(tmp_path / "run", bare, run)
    page = Page(html)
    assert [e["id"] for e in page.all("section")] == ["verdict", "diagnosis", "metrics", "data", "settings", "again"]
    assert "nothing found" in html and "was not kept" in html


def test_commands_can_be_typed(tmp_path: Path) -> None:
    run = run_at(tmp_path / "my run")
    own = report.commands(run, evaluation(run.path), run / "report.html", "my data.jsonl")
    assert shlex.split(own["again"]) == ["tunesmith", "evaluate", str(run), "--rows", "40", "--seed", "7"]
    convert = ["tunesmith", "data", "convert", "my data.jsonl", "-o", "clean.jsonl"]
    assert shlex.split(own["drop"]) == [*convert, "--drop-codes", "contradicting", "--run", str(run)]
    other = report.commands(
        run, evaluation(run.path, options={"task": "chat"}), run / "evaluation" / "on-x" / "report.html", "d.jsonl"
    )
    assert shlex.split(other["again"])[3:] == (
        [
            "--model",
            f"{run}/best_model",
            "--against",
            "starter",
            "--dataset",
            f"{run}/data/test.jsonl",
            "--task",
            "chat",
        ]
    )
    text = next(e["text"] for e in Page(rendered(run.path, evaluation(run.path), run)).all("code") if e.get("class"))
    assert text == own["drop"]


# ---- pictures


def test_intervals_are_drawn_where_they_are() -> None:
    """Half the width stands for the largest of 2, 6, 2 and 4: 6. Lower is better, so that -2 is 100 + 2/6 of 100."""
    m = Comparison("loss", 3.0, 5.0, 2.0, -2.0, 6.0, 0.3, "cannot tell", 9, 99, 4.0)
    drawn = report.forest(m, better=-1, width=200, room=1.0)
    assert drawn == {"width": 200, "zero": 100, "low": 0.0, "high": 133.3, "point": 66.7, "miss": 66.7}
    assert report.forest(m, better=1, width=200, room=1.0)["point"] == 133.3
    assert report.forest(WHOLE, 1) == {}


def test_direction(tmp_path: Path) -> None:
    kept = evaluation(tmp_path, better={"chrF": "higher"})
    assert [report.direction(kept, m) for m in (LOSS, CHRF, WHOLE)] == [-1, 1, 0]
    odd = Comparison("mine", 1.0, 0.5, -0.5, -0.6, -0.4, 0.01, "better", 9)
    assert report.direction(kept, odd) == -1


def test_the_axes_of_the_chart_tell_the_truth(page: tuple[Path, str]) -> None:
    """Two validations fix the scale; every tick, and the other validations, stand where it says."""
    svg = page[1].split('class="curve"', 1)[1].split("</svg>")[0]
    stops = re.findall(r'cx="([\d.]+)" cy="([\d.]+)".*?>(\d+)</tspan>: <tspan[^>]*>([\d.]+)<', svg)
    points = [tuple(map(float, stop)) for stop in stops]  # x, y, step, loss
    assert len(points) == 4
    (x0, y0, s0, v0), (x1, _, s1, _) = points[0], points[-1]
    _, y2, _, v2 = max(points, key=lambda p: abs(p[3] - v0))
    ticks = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([\d.]+)<', svg.split("</g>")[0])
    assert len(ticks) > 8
    for x, y, anchor, label in ticks:
        if anchor == "end":
            assert y0 + (float(label) - v0) * (y2 - y0) / (v2 - v0) == pytest.approx(float(y) - 4, abs=0.5)
        else:
            assert x0 + (float(label) - s0) * (x1 - x0) / (s1 - s0) == pytest.approx(float(x), abs=0.5)
    for x, y, step, loss in points:
        assert x0 + (step - s0) * (x1 - x0) / (s1 - s0) == pytest.approx(x, abs=0.2)
        assert y0 + (loss - v0) * (y2 - y0) / (v2 - v0) == pytest.approx(y, abs=0.2)


def test_chart_geometry() -> None:
    assert report.ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    steps = [{"step": s, "loss": 5 - s / 10} for s in range(1, 21)]
    drawn = report.chart(steps, [{"step": 10, "loss": 4.5}, {"step": 20, "loss": 4.0}], 20)
    assert drawn["best"] == {"x": drawn["points"][1][0], "y": drawn["points"][1][1], "step": 20, "loss": 4.0}
    assert report.chart([], [], None) == {} == report.chart([{"step": 1, "loss": None}], [], None)


def test_long_curves_are_thinned_and_keep_their_peaks() -> None:
    many: list[tuple[int, float]] = [(s, 1.0) for s in range(1, 100_001)]
    many[54_321] = (54_322, 9.0)
    assert (54_322, 9.0) in report.extremes(many) and len(report.extremes(many)) <= report.DRAWN
    assert report.smooth(list(enumerate([4.0, 2.0] * 20)))[:4] == [(0, 4.0), (1, 3.0), (2, 3.0), (3, 3.0)]  # of two
    drawn = report.chart([{"step": s, "loss": v} for s, v in many], [{"step": s, "loss": 2.0} for s in range(999)], 7)
    assert len(drawn["points"]) <= report.STOPS + 2 and 7 in [step for _, _, step, _ in drawn["points"]]
    assert sum(len(drawn[line]) for line in ("raw", "train", "valid")) < 20_000


def test_sparks() -> None:
    """From zero to the highest, 4: at heights 2, 2 + 18/2 and 20 of 22."""
    assert report.spark([4.0, 2.0, 0.0]) == "2,2.0 42,11.0 82,20.0"
    assert report.spark([]) == "" and report.spark([math.inf]) == ""


# ---- texts

HOSTILE = "</style></script><script>alert(1)</script><img src=x onerror=alert(1)>\u202e\u2066\0\x1b[2J\x85\ud800 & 12 {{ 7*7 }}"


def test_hostile_texts_are_only_texts(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    sample = Sample(HOSTILE, HOSTILE * 900, HOSTILE, HOSTILE, HOSTILE)
    result = evaluation(
        folder,
        rule=HOSTILE,
        base=HOSTILE,
        task=HOSTILE,
        unavailable=HOSTILE,
        metrics=[msgspec.structs.replace(LOSS, metric=HOSTILE)],
        about={HOSTILE: HOSTILE},
        persona=Persona(HOSTILE, 1, 0, 1, [sample]),
        diagnoses=[Diagnosis(HOSTILE, "error", HOSTILE, HOSTILE)],
        training_rows=RowReport(1, 1, 0, 0, None, None, [finding(1, folder, prompt=HOSTILE, answer=HOSTILE)]),
        samples=[sample, Sample("", "", "")],
    )
    html = rendered(folder, result)
    found = Page(html)
    assert len(found.all("script")) == len(found.all("style")) == 1 and not found.all("img")
    assert not any(c in html for c in "\u202e\u2066\0\x1b\x85") and "{{ 7*7 }}" in html
    assert len(html) < 200_000 and "cut here" in html


# ---- the page itself


def test_nothing_is_loaded_and_no_script_runs_but_its_own(page: tuple[Path, str]) -> None:
    found = Page(page[1])
    policy = next(e["content"] for e in found.all("meta") if e.get("http-equiv") == "Content-Security-Policy")
    for tag in ("style", "script"):
        (only,) = found.all(tag)
        digest = base64.b64encode(hashlib.sha256(only["text"].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    assert not re.search(r"url\(|@import|@font-face", CSS)
    for e in found.elements:
        assert not {"src", "srcset", "style", "action", "data", "poster", "xlink:href"} & set(e), e
        assert not [name for name in e if name.startswith("on")] and e["tag"] not in (
            "link",
            "iframe",
            "object",
            "base",
        )
        assert e.get("href", "#").startswith("#")
    assert len(page[1]) < 250_000


def test_structure_for_keyboards_and_screen_readers(page: tuple[Path, str]) -> None:
    found = Page(page[1])
    ids = [e["id"] for e in found.elements if e.get("id")]
    assert len(ids) == len(set(ids))
    for e in found.elements:
        assert set(e.get("aria-labelledby", "").split()) <= set(ids), e
    assert all(e["href"][1:] in ids for e in found.all("a")) and found.all("a")[0]["class"] == "skip"
    assert found.all("html")[0]["lang"] == "en" and [len(found.all(t)) for t in ("main", "nav", "h1")] == [1, 1, 1]
    levels = [int(e["tag"][1]) for e in found.elements if re.fullmatch("h[1-6]", e["tag"])]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(e.get("scope") in ("col", "row") for e in found.all("th")) and len(found.all("th")) > 80
    for e in found.all("svg"):
        named = e.get("aria-label") or e.get("aria-labelledby")
        assert e.get("aria-hidden") or e.get("role") in ("img", "group") and named, e
    for e in found.elements:
        if "scroll" in e.get("class", "").split():
            assert e["tabindex"] == "0" and e["role"] == "region" and e["aria-label"]
        if e.get("class") == "stop":
            assert e["tabindex"] == "0" and e["role"] == "img"
    words = {e["text"].split(" ", 1)[1] for e in found.all("span") if (e.get("class") or "").startswith("word")}
    assert {"better", "worse", "cannot tell", "warning"} <= words  # never by colour alone


def test_rows_beyond_the_first_are_folded(page: tuple[Path, str]) -> None:
    tables = [e for e in Page(page[1]).all("table") if "rows" in e.get("class", "").split()]
    assert ["details" in e["inside"] for e in tables] == [False, True]
    assert tables[0]["text"].count(".jsonl:") == report.FIRST == 40 and tables[1]["text"].count(".jsonl:") == 4


def test_contrast_is_enough_in_both_themes() -> None:
    """WCAG 2.1: (L1 + 0.05) / (L2 + 0.05), L of linear red, green and blue; 4.5 for text, 3 for what is drawn."""
    themes = [dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in re.findall(r":root \{([^}]*)\}", CSS)]
    assert len(themes) == 2 and set(themes[0]) == set(themes[1])

    def light(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        high, low = sorted((light(one), light(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    assert contrast("#000", "#fff") == pytest.approx(21) and contrast("#767676", "#fff") == pytest.approx(
        4.54, abs=0.01
    )
    for theme in themes:
        text = [(ink, on) for ink in ("ink", "soft", "good", "bad", "open", "a") for on in ("card", "page")]
        for ink, on in [*text, ("ink", "mark"), ("ink", "code"), ("ink", "line")]:
            assert contrast(theme[ink], theme[on]) >= 4.5, (ink, on, theme[ink], theme[on])
        assert contrast(theme["b"], theme["card"]) >= 3


def test_two_thousand_rows_are_rendered_within_a_second(tmp_path: Path) -> None:
    run = run_at(tmp_path / "run")
    result = evaluation(run.path, 2000)
    start = time.process_time()
    html = rendered(run.path, result, run)
    assert time.process_time() - start < 1
    assert html.count('class="long"') == 2 * 2000
