"""tunesmith evaluate."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tunesmith.cli.options import Parser, columns, natural, show_json

if TYPE_CHECKING:
    from tunesmith.evaluation.evaluate import Evaluation


def evaluate(argv: list[str]) -> int:
    parser = Parser("evaluate", "Compare base and tuned on held-out rows: better, worse, or cannot tell.").with_json()
    parser.add_argument("run", nargs="?", help="a run's directory")
    parser.add_argument("--model", help="judge this model instead of the run's best")
    parser.add_argument("--against", metavar="MODEL", help="compare with this model instead of the run's base")
    parser.add_argument("--dataset", help="rows to judge on, instead of the run's test rows")
    parser.add_argument("--columns", metavar="MAP", help="prompt=question,completion=answer")
    parser.add_argument("--samples", type=natural, default=6, metavar="N", help="prompts answered side by side [6]")
    parser.add_argument("--persona", metavar="NAME", help="name that identity probes look for, instead of the run's")
    parser.add_argument(
        "--base-url", metavar="URL", help="service that has a model named ft:…, where the run is not one of it"
    )
    parser.add_argument("--api-key-file", metavar="FILE", help="file with its key, instead of OPENAI_API_KEY")
    parser.add_argument("--seed", type=natural, default=0, help="seed of the bootstrap [0]")
    options = parser.parse_args(argv)
    from tunesmith import api

    result = api.evaluate(
        options.run,
        model=options.model,
        against=options.against,
        dataset=options.dataset,
        columns=columns(options.columns),
        samples=options.samples,
        persona=options.persona,
        seed=options.seed,
        base_url=options.base_url,
        api_key_file=options.api_key_file,
        on_progress=lambda text: print(text, file=sys.stderr),
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
    rows += [
        (
            m.metric,
            f"{m.base:.4f}",
            f"{m.tuned:.4f}",
            f"{m.difference:+.4f}",
            f"{m.low:+.4f} … {m.high:+.4f}",
            m.verdict,
        )
        for m in result.metrics
    ]
    print(table(rows))
    for sample in result.samples:
        print(f"\n  ask    {_short(sample.prompt)}\n  base   {_short(sample.base)}\n  tuned  {_short(sample.tuned)}")
    if result.persona:
        p = result.persona
        print(
            f"\n  asked who it is, the tuned model says “{p.name}” in {p.tuned} of {p.probes} answers, the base in {p.base}"
        )
    if result.unavailable:
        print(f"\n  not to be had: {result.unavailable}")
    loss = result.metrics[0]
    more = f" (about {loss.rows_needed} rows like these would settle it)" if loss.rows_needed else ""
    print(f"\nverdict: {result.verdict}{more}, on {result.rows} held-out rows")
    if result.report:
        print(f"report:  {result.report}")


def _short(text: str, limit: int = 150) -> str:
    text = " ".join(text.split()) or "(nothing)"
    return text if len(text) <= limit else text[: limit - 1] + "…"
