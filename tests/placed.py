"""Under which words each figure of a report's page has to stand: headings of tables, rows, sentences; from the files alone."""

from __future__ import annotations

import re
from typing import Any

from reading import Page, at, said, within
from tunesmith.evaluation.marking import LONGEST

MARKS = {"better": "▲", "worse": "▼", "cannot tell": "◆"}
SEVERE = {"error": "✖", "warning": "!"}
HABITS = {
    "position bias": "position_bias",
    "first answer preferred": "first_preferred",
    "agreement": "agreement",
    "Cohen's kappa": "kappa",
    "length bias": "length_bias",
}


class Expected:
    """What a page has to say, and under which words: `sentences` by section, `tables` by section and headings."""

    def __init__(self, files: dict[str, Any]) -> None:
        self.files, self.result = files, files[""]
        self.sentences = {"header": ["evaluation of <tuned> against <base>"]}
        self.tables: dict[tuple[str, str], list[list[str]]] = {}
        for part in (
            self.verdict,
            self.metrics,
            self.curves,
            self.answers,
            self.rows,
            self.judge,
            self.exports,
            self.data,
        ):
            part()

    def of(self, path: str) -> str:
        """The path as `said` tells it, a dash where there is nothing at it."""
        try:
            value = at(self.files, path)
        except (KeyError, IndexError, TypeError):
            value = None
        return "–" if value is None or value == "" else f"<{path}>"

    def way(self, m: dict[str, Any]) -> str:
        """Which way a metric is better: as the result says, else as what it is or its verdict shows."""
        if m["metric"] in self.result["better"]:
            return f"<better.{m['metric']}> is better"
        return {1: "higher is better", -1: "lower is better", 0: "which way is better was not kept"}[self.sign(m)]

    def sign(self, m: dict[str, Any]) -> int:
        if m["metric"] in self.result["better"]:
            return {"higher": 1, "lower": -1}[self.result["better"][m["metric"]]]
        if m["metric"].startswith("loss"):
            return -1
        return (
            (1 if (m["difference"] > 0) == (m["verdict"] == "better") else -1)
            if m["verdict"] in ("better", "worse")
            else 0
        )

    def verdict(self) -> None:
        result, m, p = self.result, self.result["metrics"][0], "<metrics.0."
        found = ["<verdict>" if result["verdict"] else "no verdict"]
        found.append(
            f"On {p}rows> held-out rows the tuned model's {p}metric> is {p}tuned>, the base model's {p}base>; {self.way(m)}."
        )
        if m["low"] is None:
            found.append("This figure has no interval")
        else:
            zero = "holds" if m["low"] <= 0 <= m["high"] else "excludes"
            found.append(
                f"The difference is {p}difference>, and its <stats:LEVEL> interval, {p}low> to {p}high>, {zero} zero"
            )
            if zero == "excludes":
                few = m["verdict"] == "cannot tell" and m["rows"] < 8
                found.append("fewer than <stats:FEWEST> rows prove nothing" if few else f"(p = {p}p>)")
            ends = ("low", "high") if self.sign(m) >= 0 else ("high", "low")
            found.append(f"{p}{ends[0]}> {p}{ends[1]}> no difference ← worse better →")
        if m["rows_needed"]:
            found.append(f"About {p}rows_needed> rows like these would settle it")
        if m["detectable"] is not None:
            found.append(f"a difference of {p}detectable> would be found in <stats:POWER> of cases")
        found += [
            "<rule>",
            "tuned <tuned> base <base>",
            "held-out rows <rows> of <dataset>" + ", <tokens> tokens" * bool(result["tokens"]),
        ]
        found += ["task <task>; <answered> prompts answered", "trained <run.json:created>"]
        self.sentences["verdict"] = found
        self.sentences["diagnosis"] = [
            f"{SEVERE.get(d['severity'], 'i')} <{place}.severity> <{place}.name> <{place}.evidence>. Try next: <{place}.fix>"
            for place, d in self.each("diagnoses")
        ]

    def each(self, path: str) -> list[tuple[str, Any]]:
        return [(f"{path}.{i}", one) for i, one in enumerate(at(self.files, path))]

    def metrics(self) -> None:
        self.table_of_metrics("metrics", self.each("metrics"), self.result["about"])
        found = ["That one is found in <stats:POWER> of cases", "bootstrap of <stats:RESAMPLES> resamples"]
        self.sentences["metrics"] = found + ["Not to be had: <unavailable>."] * bool(self.result["unavailable"])
        if self.result["canary"]:
            self.table_of_metrics("canary", self.each("canary.metrics"), {})
            self.sentences["canary"] = self.trios("canary.answers")

    def table_of_metrics(self, section: str, metrics: list[tuple[str, Any]], about: dict[str, str]) -> None:
        columns = (
            "base",
            "tuned",
            "difference",
            "<stats:LEVEL> interval",
            "← worse better →",
            "detectable",
            "verdict",
            "rows",
        )
        self.tables[section, " | ".join(["metric", *columns])] = [
            self.comparison(place, m, about) for place, m in metrics
        ]

    def comparison(self, place: str, m: dict[str, Any], about: dict[str, str]) -> list[str]:
        none = m["low"] is None
        name = f"<{place}.metric>" + f" <about.{m['metric']}>" * (m["metric"] in about) + f" Here {self.way(m)}."
        name += f" Permutation test: p = <{place}.p>." * (m["p"] is not None)
        found = f" On these rows a difference of <{place}.detectable> would be found in <stats:POWER> of cases."
        name += found * (m["detectable"] is not None) + " This figure is no sum over rows and has no interval." * none
        word = f"{MARKS.get(m['verdict'], '')} <{place}.verdict>" if m["verdict"] else "no interval"
        word += f" needs about <{place}.rows_needed> rows" * bool(m["rows_needed"])
        interval, drawn = ("none", "no interval") if none else (f"<{place}.low> to <{place}.high>", "")
        detectable = f"± <{place}.detectable>" if m["detectable"] is not None else "–"
        figures = [self.of(f"{place}.{name}") for name in ("base", "tuned", "difference")]
        return [name, *figures, interval, drawn, detectable, word, f"<{place}.rows>"]

    def trios(self, path: str) -> list[str]:
        """A prompt's answers, each under its model's name."""
        found = []
        for place, one in self.each(path):
            parts = [self.of(f"{place}.prompt")]
            for side in ("base", "tuned", *(["reference"] if one["reference"] else [])):
                same = side == "tuned" and one["tuned"] and one["tuned"] == one["base"]
                cut = " cut here; all of it is in result.json" * (len(one[side]) > LONGEST)
                parts += [side, "the same as the base's"] if same else [side]
                parts.append((f"<{place}.{side}>" if one[side].strip() else "(nothing)") + cut)
            found.append(" ".join(parts))
        return found

    def curves(self) -> None:
        events = self.files["events"]
        evals, steps = events.get("eval", {}), events.get("step", {})
        if not evals and not steps:
            return
        stops = [step for step, e in evals.items() if e["loss"] is not None]
        best = [step for step in stops if evals[step]["best"]][-1:]
        found = [f"best: step <events:eval.{step}.step>, <events:eval.{step}.loss>" for step in best]
        found += [f"step <events:eval.{step}.step>: <events:eval.{step}.loss>" for step in stops]
        peak = max(steps, key=lambda step: steps[step]["lr"])
        found.append(f"learning rate by step, at most <events:step.{peak}.lr> at step <events:step.{peak}.step>")
        if done := events.get("done"):
            said = (
                "<events:done.step> steps in <events:done.seconds> s"
                + ", <events:done.tokens_per_second> tokens/s" * bool(done.get("tokens_per_second"))
            )
            said += ", peak memory <events:done.peak_memory_mb> MB" * bool(done.get("peak_memory_mb"))
            found.append(
                said
                + "; stopped early, no gain after step <events:done.best_step>" * bool(done.get("stopped_early"))
                + "."
            )
        self.sentences["curves"] = found
        columns = ("eval.step", "eval.epoch", "step.loss", "eval.loss", "step.lr")
        self.tables["curves", "step | epoch | training loss of the step | validation loss | learning rate"] = [
            [self.of(f"events:{name.replace('.', f'.{s}.')}") for name in columns] for s in stops
        ]

    def answers(self) -> None:
        if self.result["persona"]:
            p = "persona."
            counts = f"The tuned model says “<{p}name>” in <{p}tuned> of <{p}probes> answers, the base in <{p}base>."
            self.sentences["persona"] = [counts, *self.trios("persona.answers")]
        if self.result["samples"]:
            self.sentences["samples"] = self.trios("samples")

    def rows(self) -> None:
        report, p = self.result["training_rows"], "<training_rows."
        if not report:
            return
        said = f"{p}looked_at> of {p}rows> rows were weighed, {p}findings#> stand out."
        said += (
            f" Asked the {p}asked> training rows it knows best, the tuned model repeats {p}recited> answers word for word."
            * bool(report["asked"])
        )
        said += (
            f" Prompts and their own answers have more in common than other pairs by {p}belonging.0> ± {p}belonging.1> "
            "standard deviations" * bool(report["belonging"])
        )
        codes = {code for f in report["findings"] for code in f["codes"]}
        self.sentences["rows"] = [
            said,
            *(f"{code.replace('_', ' ')} ({p}findings#{code}>) <codes:{code}>" for code in codes),
        ]
        if report["findings"]:
            self.tables["rows", "row | side | codes | suspicion | loss by epoch | prompt | answer"] = [
                [
                    f"<{place}.source>", f"<{place}.side>",
                    ", ".join(f"<{place}.codes.{k}>" for k in range(len(f["codes"]))), f"<{place}.score>",
                    f"<{place}.losses.0> → <{place}.losses.{len(f['losses']) - 1}> <{place}.losses>" if f["losses"] else "–",
                    self.of(f"{place}.prompt"), self.of(f"{place}.answer"),
                ]
                for place, f in self.each("training_rows.findings")
            ]  # fmt: skip

    def judge(self) -> None:
        judge, p = self.result["judge"], "<judge."
        if not judge:
            return
        said = (
            f"Of {p}rows> rows, asked in both orders, the tuned model won {p}wins>, lost {p}losses> and tied {p}ties> "
        )
        said += f"({p}equal> of these had equal answers)."
        if judge["left_out"] or judge["missing"]:
            said += f" {p}left_out> rows were left out ({p}unreadable> replies unreadable, {p}refused> refused), "
            said += f"{p}missing> are missing."
        self.sentences["judge"] = ["Judged by <judge.model>", said + " <judge.failure>" * bool(judge["failure"])]
        if judge["comparison"]:
            self.table_of_metrics("judge", [("judge.comparison", judge["comparison"])], {})
        self.tables["judge", "figure | value | meaning"] = [[name, self.of(f"judge.{f}")] for name, f in HABITS.items()]

    def exports(self) -> None:
        table, checks, names = [], [], []
        for i, e in enumerate(self.files["exports"]):
            p, parity = f"exports:{i}.", e["parity"]
            failed = (
                [f"<{p}parity.checks.{k}.name>" for k, c in enumerate(parity["checks"]) if not c["passed"]]
                if parity
                else []
            )
            word = (
                "✓ deployable" if parity and parity["deployable"] else " ".join(["✖ not deployable", ", ".join(failed)])
            )
            if not parity:
                word = f"◆ gone {'passed' if e['deployable'] else 'failed'} when it was made"
            table.append(
                [
                    *(f"<{p}{name}>" for name in ("path", "form", "quantize", "when")),
                    word,
                    self.of(f"{p}parity.runtime") if parity else "–",
                ]
            )
            for k, c in enumerate(parity["checks"] if parity else []):
                place = f"{p}parity.checks.{k}"
                checks.append(
                    [
                        f"<{place}.name>",
                        "✓ passed" if c["passed"] else "✖ failed",
                        f"<{place}.found>" + f" <{place}.cause>" * bool(c["cause"]),
                        f"<{place}.limit>",
                    ]
                )
            names += [f"What was checked in <{p}path>"] * bool(parity)
        if table:
            self.sentences["exports"] = names
            self.tables["exports", "folder | form | type | when | certificate | runtime"] = table
        if checks:
            self.tables["exports", "check | result | found | wanted"] = checks

    def data(self) -> None:
        manifest, p = self.files["run.json"], "<run.json:plan."
        said = f"{p}rows.train> training, {p}rows.valid> validation and {p}rows.test> test rows"
        if manifest["plan"].get("supervised_tokens"):
            said += f"; {p}supervised_tokens.train> of {p}tokens.train> training tokens are learnt; "
            said += f"the longest row has {p}longest> tokens."
        issues = self.files["check.json"]
        self.sentences["data"] = [said, *["<check.json:#> in all, in data/check.json."] * bool(issues)]
        if issues:
            self.tables["data", "severity | where | finding"] = [
                [
                    f"<{place}.severity>",
                    f"<{place}.where>",
                    f"<{place}.message>" + f" <{place}.fix>" * bool(issue["fix"]),
                ]
                for place, issue in ((f"check.json:{i}", issue) for i, issue in enumerate(issues[:50]))
            ]
        self.sentences["settings"] = [", ".join(f"{name} <run.json:versions.{name}>" for name in manifest["versions"])]
        self.tables["settings", "setting | value | origin"] = [
            [name, f"<run.json:recipe.{name}>", self.of(f"run.json:origin.{name}")]
            for name, value in manifest["recipe"].items() if value not in (None, {})
        ]  # fmt: skip


def misplaced(page: Page, files: dict[str, Any]) -> list[str]:
    """Figures and words that stand where the files do not have them: under another heading, in another row or sentence."""
    want, found = Expected(files), []
    for section in [*page.all("header"), *page.all("section")]:
        name = section.get("id", "header")
        found += [f"{name}: {each}" for each in _unsaid(said(section, ("table",)), want.sentences.get(name, []))]
        tables = {key: rows for (place, key), rows in want.tables.items() if place == name}
        found += [f"{name}: {each}" for each in _mistaken(list(within(section, "table")), tables)]
    places = {section.get("id") for section in page.all("section")}
    return found + [
        f"there is no section {name}" for name in {*want.sentences, *(n for n, _ in want.tables)} - places - {"header"}
    ]


def _unsaid(text: str, sentences: list[str]) -> list[str]:
    """Sentences that a text lacks, and what figures are left when they are taken away."""
    found = []
    for sentence in sorted(sentences, key=len, reverse=True):
        if sentence not in text:
            found.append(f"does not say {sentence!r}")
        text = text.replace(sentence, " ", 1)
    return found + [f"nobody expects {each}" for each in re.findall(r"<[\w:#. ()-]+>", text)]


def _mistaken(tables: list[dict[str, Any]], want: dict[str, list[list[str]]]) -> list[str]:
    """Tables of the same headings are one, cut in parts."""
    there: dict[str, list[list[str]]] = {}
    found = []
    for table in tables:
        heads, *rows = [[cell for cell in row["parts"] if isinstance(cell, dict)] for row in within(table, "tr")]
        key = " | ".join(said(head) for head in heads)
        there.setdefault(key, []).extend([said(cell) for cell in row] for row in rows)
        found += [
            f"{label!r} stands for {head!r}"
            for head, label in _labels(heads, rows)
            if not _words(label) <= _words(head)
        ]
    if there.keys() != want.keys():
        return [*found, f"the tables are {sorted(there)}, not {sorted(want)}"]
    for key, rows in want.items():
        if len(rows) != len(there[key]):
            found.append(f"{len(there[key])} rows of {key}, not {len(rows)}")
        for row, cells in zip(rows, there[key], strict=False):
            found += [f"{w!r} is {c!r}" for w, c in zip(row, cells, strict=False) if w != c]
    return found


def _labels(heads: list[dict[str, Any]], rows: list[list[dict[str, Any]]]) -> list[tuple[str, str]]:
    """What each cell calls its column where the page is narrow, after the column's heading."""
    return [
        (said(head), cell["data-label"])
        for row in rows
        for head, cell in zip(heads, row, strict=True)
        if "data-label" in cell
    ]


def _words(text: str) -> set[str]:
    return set(re.findall("[a-z]+", text))
