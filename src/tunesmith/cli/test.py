"""tunesmith test: a model is tried before it is deployed."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from tunesmith.cli.options import Parser, positive, show_json
from tunesmith.errors import UsageError

if TYPE_CHECKING:
    from tunesmith.evaluation.smoke import Trial


def smoke_test(argv: list[str]) -> int:
    parser = Parser(
        "test",
        "Try a model before it is deployed: what it and its base answer to a few prompts, and whether template, stop tokens and "
        "answers are sound. Exit status 1 where they are not.",
    ).with_json()
    parser.add_argument("run", nargs="?", help="a run, or a model's folder or name")
    parser.add_argument("--model-path", metavar="PATH", help="the same as RUN")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="ask these: a line each, or the rows of a data file [the first of the run's test rows]",
    )
    parser.add_argument("--against", metavar="MODEL", help="compare with this model instead of the run's base")
    parser.add_argument("--max-tokens", type=positive, default=256, metavar="N", help="longest answer [256]")
    options = parser.parse_args(argv)
    name = options.run or options.model_path
    if not name or options.run and options.model_path:
        raise UsageError("needs one model", where="test", fix="tunesmith test RUN, or --model-path PATH")
    from tunesmith import api
    from tunesmith.cli.progress import Bar
    from tunesmith.evaluation import smoke
    from tunesmith.evaluation.observe import Tally
    from tunesmith.runs import run_of

    run = run_of(name)
    asked = smoke.prompts(run, options.prompts)
    against = options.against or (run.recipe().model if run else None)
    tuned, base = api.completer(name), api.completer(against, name) if against else None
    with Bar() as bar:
        tally = Tally(len(asked) * (2 if base else 1), len(asked), f"asking {name}", bar)
        result = smoke.attempt(asked, tuned, base, options.max_tokens, tally)
    if options.json:
        show_json(result)
    else:
        show(result)
    return 0 if result.passed else 1


def show(result: Trial) -> None:
    """Answers and checks on stdout."""
    from tunesmith.conversation import harmless

    for answer in result.answers:
        for who, text in (("ask", answer.prompt), ("base", answer.base), ("tuned", answer.tuned)):
            if text is not None:
                print(f"  {who:6}{textwrap.indent(harmless(text), ' ' * 8).strip() or '(nothing)'}")
        print()
    for check in result.checks:
        sign = {True: "✓", False: "✗" if check.severity == "error" else "!", None: "-"}[check.passed]
        print(f"{sign} {check.name}: {harmless(check.evidence)}")
        if check.passed is False:
            print(f"    next: {check.fix}")
