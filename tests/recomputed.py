"""The figures of evaluation/result.json once more, in plain code, from what lies beside it and in the run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import msgspec
import numpy as np

from reading import number
from tunesmith import api
from tunesmith.evaluation import stats, tasks
from tunesmith.evaluation.evaluate import measured
from tunesmith.evaluation.metric import Facts, Heard
from tunesmith.evaluation.suspicion import belonging, suspicion


class Recomputed:
    """`result`: what evaluation/result.json should say, part by part; of metrics only what `by_hand` knows."""

    def __init__(self, run: Path) -> None:
        self.run, self.folder = run, run / "evaluation"
        self.said = json.loads((self.folder / "result.json").read_text())
        self.rows = self.lines("rows")
        self.data = {side: _lines(run / "data" / f"{side}.jsonl") for side in ("train", "valid", "test")}
        self.events = _lines(run / "events.jsonl")

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / f"{name}.jsonl"
        return _lines(path) if path.exists() else []

    @cached_property
    def result(self) -> dict[str, Any]:
        return {
            "verdict": self.said["metrics"][0]["verdict"],
            "rows": len(self.rows),
            "answered": sum("said" in row["base"] for row in self.rows),
            "tokens": sum(row["tuned"].get("tokens", 0) for row in self.rows),
            "metrics": self.metrics(),
            "canary": {"metrics": [self.canary(part) for part in (slice(0, 24), slice(24, None))]},
            "persona": self.persona(),
            "training_rows": self.training_rows(),
            "judge": self.judge(),
            "samples": [self.sample(s["source"]) for s in self.said["samples"]],
        }

    # ---- metrics

    def metrics(self) -> list[dict[str, Any]]:
        """By their own definitions, from what is kept; both figures by hand where `by_hand` knows them."""
        facts = msgspec.json.decode((self.folder / "facts.json").read_bytes(), type=Facts)
        sides = [msgspec.convert([row[side] for row in self.rows], list[Heard]) for side in ("base", "tuned")]
        known = {"same_tokens": True, "scored": True, "compressed": False, "with_persona": bool(self.said["persona"])}
        chosen = tasks.metrics(self.said["task"], own=None, **known)
        found = msgspec.to_builtins(measured(chosen, api.load(self.run / "data" / "test.jsonl"), *sides, facts, 0))
        own = {side: by_hand([row[side] for row in self.rows]) for side in ("base", "tuned")}
        for m in found:
            m |= {side: own[side].get(m["metric"], m[side]) for side in own}
            m["difference"] = m["tuned"] - m["base"]
        return list(found)

    def canary(self, part: slice) -> dict[str, Any]:
        """24 general texts, then the starter's questions. The interval is that of `stats`, of sums by hand."""
        rows = self.lines("canary")[part]
        sides = (np.array([[row[side]["loss"], row[side]["tokens"]] for row in rows]) for side in ("base", "tuned"))
        found = stats.compare("", *sides, lower_is_better=True)
        base, tuned = (sum(r[s]["loss"] for r in rows) / sum(r[s]["tokens"] for r in rows) for s in ("base", "tuned"))
        own = {"base": base, "tuned": tuned, "difference": tuned - base, "rows": len(rows)}
        return {name: getattr(found, name) for name in ("low", "high", "p", "verdict", "detectable")} | own

    def persona(self) -> dict[str, Any] | None:
        if not (said := self.said["persona"]):
            return None
        answers, name = said["answers"], said["name"].casefold()
        base, tuned = (sum(name in one[side].casefold() for one in answers) for side in ("base", "tuned"))
        return {"probes": len(answers), "base": base, "tuned": tuned}

    def row(self, source: str) -> dict[str, Any]:
        """A row of the run's data by its place, FILE:LINE."""
        path, _, line = source.rpartition(":")
        row: dict[str, Any] = self.data[Path(path).stem][int(line) - 1]
        return row

    def sample(self, source: str) -> dict[str, Any]:
        heard = next(row for row in self.rows if row["source"] == source)
        row = self.row(source)
        texts = {side: heard[side]["said"]["text"] for side in ("base", "tuned")}
        return {"source": source, "prompt": _prompt(row)[-1]["content"], "reference": _answer(row), **texts}

    # ---- rows

    def training_rows(self) -> dict[str, Any]:
        suspects, recited = self.lines("suspects"), self.lines("recited")
        rows = [self.row(s["source"]) for s in suspects]
        sides = [Path(s["source"].rpartition(":")[0]).stem for s in suspects]
        prompts = [
            "\n".join(m["content"] for m in _prompt(r) if m["role"] not in ("system", "developer")) for r in rows
        ]
        answers = [_answer(row) for row in rows]
        verbatim = {
            r["digest"] for r in recited if r["recited"]["text"].split() == _answer(self.row(r["source"])).split()
        }
        gains = [s["suspects"] for s in suspects]
        held = self.lines("held")
        assert [h["digest"] for h in held] == [
            s["digest"] for s, side in zip(suspects, sides, strict=True) if side != "train"
        ]
        own = [x for x, row in zip(belonging(prompts, answers), rows, strict=False) if _prompt(row)]
        return {
            "rows": sum(len(side) for side in self.data.values()),
            "looked_at": len(suspects),
            "asked": len(recited),
            "recited": len(verbatim),
            "belonging": _mean(own),
            "gain": _mean([h["held"] for h in held if h["held"] is not None]),
            "findings": self.findings(suspects, sides, prompts, answers, gains, verbatim),
        }

    def findings(
        self,
        suspects: list[Any],
        sides: list[str],
        prompts: list[str],
        answers: list[str],
        gains: list[Any],
        verbatim: set[str],
    ) -> list[dict[str, Any]]:
        helps = _mean([gain for gain in gains if gain is not None])
        scores = suspicion(prompts, answers, gains if helps and helps[0] > helps[1] else None)
        least = max(1.0, sorted(scores)[-40:][0])
        table = np.load(self.run / "row_losses.npy").tolist()
        marks, found = self.marks(table), []
        for suspect, side, prompt, answer, score in zip(suspects, sides, prompts, answers, scores, strict=True):
            place = int(suspect["source"].rpartition(":")[2]) - 1 if side == "train" else -1
            codes = ["contradicting"] if score >= 2.5 else ["doubtful"] if score >= least else []
            codes += marks.get(place, []) + ["memorised"] * (side == "train" and suspect["digest"] in verbatim)
            losses = [epoch[place] for epoch in table if epoch[place] > 0] if place >= 0 else []
            known = {"source": suspect["source"], "digest": suspect["digest"], "side": side, "codes": codes}
            known |= {"score": score, "losses": losses, "prompt": _short(prompt), "answer": _short(answer)}
            found += [known] * bool(codes)
        return sorted(found, key=lambda f: -f["score"])

    @staticmethod
    def marks(table: list[list[float]]) -> dict[int, list[str]]:
        """By the number of a training row: never learnt, or forgotten, over epochs that saw all rows."""
        whole = [epoch for epoch in table if all(loss > 0 for loss in epoch)]
        if len(whole) < 2:
            return {}
        first, last, lowest = whole[0], whole[-1], [min(losses) for losses in zip(*whole, strict=True)]
        fell = median(b / a for a, b in zip(first, last, strict=True)) < 0.9
        found = {}
        for i, (a, b, low) in enumerate(zip(first, last, lowest, strict=True)):
            never = fell and b > 0.95 * a and b > median(last)
            forgot = low < median(lowest) and low < 0.95 * a and b > low + 0.3
            found[i] = ["never_learnt"] * never + ["forgotten"] * forgot
        return found

    # ---- the judge

    def judge(self) -> dict[str, Any] | None:
        if not self.said["judge"]:
            return None
        by_row: dict[int, list[dict[str, Any]]] = {}
        for said in self.lines("judge"):
            by_row.setdefault(said["row"], []).append(said)
        whole = {row: said for row, said in by_row.items() if len(said) == 2 or said[0]["order"] == "equal"}
        replies = [said["read"] for one in by_row.values() for said in one]
        words = {row: [_side(said) for said in one] for row, one in whole.items()}
        liked = {row: sides[0] if {*sides} == {sides[0]} else 0 for row, sides in words.items() if None not in sides}
        votes = list(liked.values())
        shares = np.array([[[(1 - v) / 2, 1], [(1 + v) / 2, 1]] for v in votes], np.float64)
        compared = stats.compare("", shares[:, 0], shares[:, 1], lower_is_better=False)
        names = ("base", "tuned", "difference", "low", "high", "p", "verdict", "rows", "rows_needed", "detectable")
        automatic = self.automatic()
        pairs = [(automatic[row], vote) for row, vote in liked.items()]
        alike = fmean(a == b for a, b in pairs)
        chance = sum(fmean(a == k for a, _ in pairs) * fmean(b == k for _, b in pairs) for k in (-1, 0, 1))
        decided = [reads for one in whole.values() if {*(reads := tuple(said["read"] for said in one))} <= {"A", "B"}]
        placed = [read for one in whole.values() for said in one if (read := said["read"]) in ("A", "B")]
        lengths = [whole[row][0]["lengths"] for row in liked]
        return {
            "rows": len(votes), "wins": votes.count(1), "ties": votes.count(0), "losses": votes.count(-1),
            "equal": sum(one[0]["order"] == "equal" for one in whole.values()), "left_out": len(whole) - len(liked),
            "unreadable": replies.count("unreadable"), "refused": replies.count("refused"),
            "missing": len(automatic) - len(whole), "comparison": {name: getattr(compared, name) for name in names},
            "position_bias": fmean(first == second for first, second in decided),
            "first_preferred": fmean(word == "A" for word in placed),
            "agreement": alike, "kappa": (alike - chance) / (1 - chance),
            "length_bias": _spearman(votes, [tuned - base for base, tuned in lengths]),
        }  # fmt: skip

    def automatic(self) -> list[int]:
        """Of each row that was answered, which model finds its reference likelier."""
        gains = [row["base"]["loss"] - row["tuned"]["loss"] for row in self.rows if "said" in row["base"]]
        return [(gain > 0) - (gain < 0) for gain in gains]

    # ---- diagnoses

    @cached_property
    def evidence(self) -> dict[str, list[float]]:
        """The numbers of a diagnosis in the order of its sentence."""
        steps = [e["loss"] for e in self.events if e["type"] == "step"]
        after = [e for e in self.events if e["type"] == "eval" and e["step"] > 0]
        best, last = min(after, key=lambda e: e["loss"]), after[-1]
        rows = self.result["training_rows"]
        metrics = {m["metric"]: (m["base"], m["tuned"]) for m in self.result["metrics"]}
        rose = [
            m for m in self.result["canary"]["metrics"] if m["verdict"] == "worse" and m["difference"] > 0.1 * m["base"]
        ][:1]
        shares = {
            name: [100 * share for share in metrics[name][::-1]] for name in ("self-repetition", "end-of-turn rate")
        }
        return {
            "worse than the base": [*metrics.get("loss (nats per token)", ())],
            "shuffled answers": [*(rows["belonging"] or ()), rows["looked_at"]],
            "never stops": shares["end-of-turn rate"],
            "overfitting": [
                best["loss"],
                best["step"],
                best["epoch"],
                last["loss"],
                last["step"],
                fmean(steps[-8:]),
                best["step"],
            ],
            "memorisation": [rows["asked"], rows["recited"]],
            "loss of general capability": [x for m in rose for x in (m["base"], m["tuned"], 95, m["low"], m["high"])],
            "repetition": shares["self-repetition"],
            "style not learnt": [*metrics.get("style", ())[::-1], 1],
            "underfitting": [e["loss"] for e in after[-2:]],
        }

    def differences(self, result: dict[str, Any]) -> list[str]:
        """Where a result is not what was recomputed, and numbers of it that nobody recomputes."""
        want, found = dict(leaves(self.result)), []
        for path, value in leaves(
            {k: v for k, v in result.items() if k not in ("options", "about", "better", "diagnoses")}
        ):
            if path in want and not _near(value, want[path]):
                found.append(f"{path} is {value!r}, not {want[path]!r}")
            if path not in want and isinstance(value, int | float):
                found.append(f"nobody recomputes {path}")
        found += [f"there is no {path}" for path in want.keys() - dict(leaves(result)).keys()]
        for one in result["diagnoses"]:
            said = [number(text) for text in re.findall(r"-?\d+(?:\.\d+)?", one["evidence"])]
            known = self.evidence[one["name"]]
            near = [abs(value - true) <= unit for (value, unit), true in zip(said, known, strict=False)]
            if len(said) != len(known) or not all(near):
                found.append(f"{one['evidence']!r} is said of {known}")
        return found


def by_hand(heard: list[dict[str, Any]]) -> dict[str, float]:
    """Likelihoods and rates, from what one model did with each row."""
    tokens = sum(h["tokens"] for h in heard)
    loss = sum(h["loss"] for h in heard) / tokens
    bins = [[sum(h["bins"][b][i] for h in heard) for i in range(3)] for b in range(10)]
    found = {
        "loss (nats per token)": loss,
        "perplexity": math.exp(loss),
        "token accuracy": sum(h.get("right", 0) for h in heard) / tokens,
        "calibration error": sum(abs(sure - right) for _, sure, right in bins) / tokens,
    }
    if asked := [h for h in heard if "said" in h]:
        found["end-of-turn rate"] = fmean(h["said"]["ended"] for h in asked)
    if known := [h["context"] for h in heard if h.get("context")]:
        found["turn coherence"] = sum(other - own for own, other, _ in known) / sum(n for _, _, n in known)
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _prompt(row: dict[str, Any]) -> list[dict[str, str]]:
    """The messages before the last answer."""
    messages: list[dict[str, str]] = row["messages"]
    return messages[:-1]


def _answer(row: dict[str, Any]) -> str:
    return str(row["messages"][-1]["content"])


def _short(text: str) -> str:
    return text if len(text) <= 300 else text[:299] + "…"


def _mean(values: Sequence[float]) -> list[float] | None:
    """The mean and twice its standard error; None of fewer than 8."""
    return [fmean(values), 2 * stdev(values) / math.sqrt(len(values))] if len(values) >= 8 else None


def _side(said: dict[str, Any]) -> int | None:
    """Whom a reply of the judge prefers: -1 the base, 1 the tuned model."""
    if said["read"] == "TIE":
        return 0
    tuned = {"base first": "B", "tuned first": "A"}.get(said["order"])
    return None if said["read"] not in ("A", "B") else 1 if said["read"] == tuned else -1


def _spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Pearson's correlation of ranks; equal values share the middle of theirs."""
    first, second = (
        [sum(b < a for b in side) + (side.count(a) - 1) / 2 for a in side] for side in map(list, (one, other))
    )
    return float(np.corrcoef(first, second)[0, 1])


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of everything that is no list or object; an empty one is a value too."""
    if isinstance(value, dict | list) and value:
        for name, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(each, f"{path}.{name}" if path else str(name))
    else:
        yield path, value


def _near(one: Any, other: Any) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)
    return bool(one == other)
