"""tunesmith evaluate."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tunesmith.cli.options import Parser, columns, natural, positive, show_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunesmith.evaluation.judgement import Judgement
    from tunesmith.evaluation.result import Diagnosis, Evaluation
    from tunesmith.evaluation.stats import Comparison

SHOWN = 3  # prompts with both answers; the report has more


def evaluate(argv: list[str]) -> int:
    parser = Parser("evaluate", "Compare base and tuned on held-out rows: better, worse, or cannot tell.").with_json()
    parser.add_argument("run", nargs="?", help="a run's directory")
    parser.add_argument("--model", help="judge this model instead of the run's best")
    parser.add_argument("--against", metavar="MODEL", help="compare with this model instead of the run's base")
    parser.add_argument("--dataset", help="rows to judge on, instead of the run's test rows")
    parser.add_argument("--columns", metavar="MAP", help="prompt=question,completion=answer")
    parser.add_argument(
        "--task",
        metavar="TASK",
        help="whose metrics: chat, code, instruct, domain, persona, compression, custom [the run's; chat]",
    )
    parser.add_argument("--rows", type=natural, default=100, metavar="N", help="prompts that both answer [100]")
    parser.add_argument(
        "--samples",
        type=natural,
        default=4,
        metavar="N",
        help="further answers to 16 of them, and to rows with tests [4]",
    )
    parser.add_argument(
        "--weighed",
        type=natural,
        default=1000,
        metavar="N",
        help="rows of all splits that the report weighs for a second look, which takes most of the time; 0: none [1000]",
    )
    parser.add_argument(
        "--max-tokens",
        type=positive,
        metavar="N",
        help="longest answer [room for twice the longest reference, 256 at most]",
    )
    parser.add_argument(
        "--metric",
        metavar="SPEC",
        help="your own decides: FILE.py:FUNCTION of (prompt, answer, reference), or re:PATTERN; with :lower less is better",
    )
    parser.add_argument("--persona", metavar="NAME", help="name that identity probes look for, instead of the run's")
    parser.add_argument(
        "--judge", metavar="URL", help="a service whose --judge-model compares the answers, in both orders"
    )
    parser.add_argument("--judge-model", metavar="M", help="the model that judges")
    parser.add_argument(
        "--judge-key-file", metavar="FILE", help="file with that service's key, instead of OPENAI_API_KEY"
    )
    parser.add_argument(
        "--base-url", metavar="URL", help="service that has a model named ft:…, where the run is not one of it"
    )
    parser.add_argument("--api-key-file", metavar="FILE", help="file with its key, instead of OPENAI_API_KEY")
    parser.add_argument(
        "--seed", type=natural, default=0, help="of the choice of prompts, the answers and the intervals [0]"
    )
    options = parser.parse_args(argv)
    from tunesmith import api
    from tunesmith.cli.progress import Bar

    with Bar() as bar:
        result = api.evaluate(
            options.run,
            model=options.model,
            against=options.against,
            dataset=options.dataset,
            columns=columns(options.columns),
            task=options.task,
            rows=options.rows,
            samples=options.samples,
            weighed=options.weighed,
            max_tokens=options.max_tokens,
            metric=options.metric,
            persona=options.persona,
            judge=options.judge,
            judge_model=options.judge_model,
            judge_key_file=options.judge_key_file,
            seed=options.seed,
            base_url=options.base_url,
            api_key_file=options.api_key_file,
            on_progress=bar,
        )
    if options.json:
        show_json(result)
    else:
        show(result)
    return 0


def show(result: Evaluation) -> None:
    """The outcome on stdout, the verdict last."""
    from tunesmith.cli.progress import table

    rows: list[tuple[object, ...]] = [("metric", "base", "tuned", "difference", "95 % interval", "verdict")]
    for m in [*result.metrics, *(result.canary.metrics if result.canary else [])]:
        interval = "" if m.low is None or m.high is None else f"{figure(m.low, '+')} … {figure(m.high, '+')}"
        rows.append((m.metric, figure(m.base), figure(m.tuned), figure(m.difference, "+"), interval, m.verdict))
    print(table(rows))
    for sample in result.samples[:SHOWN]:
        print(f"\n  ask    {_short(sample.prompt)}\n  base   {_short(sample.base)}\n  tuned  {_short(sample.tuned)}")
    if result.persona:
        p = result.persona
        print(
            f"\n  asked who it is, the tuned model says “{p.name}” in {p.tuned} of {p.probes} answers, the base in {p.base}"
        )
    if report := result.training_rows:
        counts = Counter(code for row in report.findings for code in row.codes)
        found = (
            ", ".join(f"{count} {code.replace('_', ' ')}" for code, count in counts.most_common()) or "nothing to say"
        )
        print(f"\n  rows worth a look ({report.looked_at} of {report.rows} weighed): {found}")
    diagnosed(result.diagnoses)
    if result.judge:
        print(f"\n  {spoken(result.judge)}")
    if result.unavailable:
        print(f"\n  not to be had: {result.unavailable}")
    first = result.metrics[0]
    print(f"\nverdict: {result.verdict}{settled(first)}, on {first.rows} held-out rows, by {first.metric}")
    if result.report:
        print(f"report:  {result.report}")


def settled(m: Comparison) -> str:
    """How many rows would settle what cannot be told."""
    if not m.rows_needed:
        return ""
    from tunesmith.evaluation.stats import MOST

    many = "more than a million" if m.rows_needed >= MOST else f"about {m.rows_needed}"
    return f" ({many} rows like these would settle it)"


def diagnosed(found: Sequence[Diagnosis]) -> None:
    """What went wrong, and what to do next, on stdout."""
    for d in found:
        print(f"\n  {d.severity}: {d.name}: {d.evidence}\n    next: {d.fix}")


def spoken(judge: Judgement) -> str:
    """What the judge said, in a line or two."""
    if judge.comparison is None:
        why = f": {judge.failure}" if judge.failure else ""
        return f"the judge {judge.model} could be understood on no row{why}"
    c = judge.comparison
    interval = "" if c.low is None or c.high is None else f", 95 % interval of the lead {c.low:+.2f} … {c.high:+.2f}"
    bias = (
        ""
        if judge.position_bias is None
        else f"; it followed the position in {judge.position_bias:.0%} of decided pairs"
    )
    bias += "; it looks at little else, and says nothing of the models" if (judge.position_bias or 0) >= 0.5 else ""
    agreed = "" if judge.agreement is None else f"; agreed with the automatic verdict on {judge.agreement:.0%} of rows"
    left = f"; {judge.left_out} rows left out as unreadable" if judge.left_out else ""
    broke = f"; {judge.missing} not asked: {judge.failure}" if judge.failure else ""
    return (
        f"the judge {judge.model}: {judge.wins} won, {judge.ties} tied, {judge.losses} lost of {judge.rows} rows: {c.verdict}"
        f"{interval}{bias}{agreed}{left}{broke}"
    )


def figure(value: float, sign: str = "") -> str:
    """Four decimals, without them where a number is large, and no more than three digits of one that is huge."""
    return (
        f"{value:{sign}.4f}"
        if abs(value) < 1000
        else f"{value:{sign}.0f}"
        if abs(value) < 1e7
        else f"{value:{sign}.3g}"
    )


def _short(text: str, limit: int = 150) -> str:
    from tunesmith.conversation import harmless

    text = harmless(" ".join(text.split())) or "(nothing)"
    return text if len(text) <= limit else text[: limit - 1] + "…"
