"""tunesmith data stats."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.cli.options import Parser, columns, show_json
from tunesmith.errors import UsageError

if TYPE_CHECKING:
    from tunesmith.conversation import Conversation
    from tunesmith.data.scan import Progress
    from tunesmith.data.stats import Spread, Stats

BAR = 40  # characters of the longest bar


def stats(argv: list[str]) -> int:
    parser = Parser(
        "data stats", "Figures about a data set: lengths, turns, variety, emoji, languages, near duplicates."
    ).with_json()
    parser.add_argument("dataset", nargs="+", help="files, folders, sample names or Hub data sets, taken as one")
    parser.add_argument("--columns", metavar="MAP", help="prompt=question,completion=answer")
    parser.add_argument(
        "--model",
        default="starter",
        help="whose tokens are counted; a hosted one (gpt-4o-mini) is also billed [starter]",
    )
    parser.add_argument(
        "--price", type=float, metavar="DOLLARS", help="for a million trained tokens, instead of the known price"
    )
    parser.add_argument("--report", metavar="OUT.html", help="write the figures as a page with charts")
    options = parser.parse_args(argv)
    from tunesmith.cli.progress import Bar
    from tunesmith.data.check import load
    from tunesmith.data.stats import bill, describe, hosted_model, openai_lengths

    if options.price is not None and not 0 <= options.price < 1e6:
        raise UsageError(f"no price: {options.price}", where="--price", fix="dollars for a million tokens: 3.00")
    if options.report:
        from tunesmith.data.write import refuse_output

        refuse_output(Path(options.report))
    hosted = hosted_model(options.model)
    if options.price is not None and not hosted:
        raise UsageError("only a hosted model has a price", where="--price", fix="--model gpt-4o-mini")
    with Bar() as bar:
        rows = [
            row
            for name in options.dataset
            for row in load(name, columns(options.columns), near_duplicates=False, progress=bar).require().conversations
        ]
        lengths = openai_lengths(rows, options.model, bar) if hosted else model_lengths(rows, options.model, bar)
        cost = bill(lengths, options.model, options.price) if hosted else None
        found = describe(rows, ", ".join(options.dataset), options.model, lengths, cost, bar)
    if options.report:
        from tunesmith.data.report import write_stats

        write_stats(Path(options.report), found)
    if options.json:
        show_json(found)
    else:
        show(found)
    return 0


def model_lengths(rows: list[Conversation], model: str, progress: Progress) -> list[int]:
    """Tokens of each row as a local model sees it."""
    from tunesmith.models import find
    from tunesmith.render import Renderer

    lengths = []
    from tunesmith.data.stats import hosted

    for rendered in Renderer(
        find(model, *(short.rpartition("-20")[0] or short for short in hosted()["models"]))
    ).render_all(rows):
        lengths.append(len(rendered.ids))
        if len(lengths) % 1024 == 0:
            progress(len(rows), len(lengths) / len(rows), "counting tokens")
    return lengths


def show(found: Stats) -> None:
    """The figures on stdout."""
    from tunesmith.cli.progress import table

    print(f"{found.rows} rows; {', '.join(f'{n} {role}' for role, n in found.roles.items())} messages")
    rows: list[tuple[object, ...]] = [("", "mean", "min", "5 %", "25 %", "median", "75 %", "95 %", "max")]
    for name, spread in (
        ("turns", found.turns),
        ("prompt, characters", found.prompt_characters),
        ("answer, characters", found.answer_characters),
        (f"row, tokens of {found.model}", found.tokens),
    ):
        rows.append((name, f"{spread.mean:.1f}", *(f"{q:g}" for q in spread.quantiles)))
    print(table(rows))
    print(f"\n  tokens a row\n{histogram(found.tokens)}")
    v, e, near = found.vocabulary, found.emoji, found.near_duplicates
    lines = {
        "words": f"{v['words']:.0f} in answers, {v['different_words']:.0f} different; "
        f"distinct-1 {v['distinct_1']:.3f}, distinct-2 {v['distinct_2']:.3f}",
        "prompts": f"{v['distinct_prompts']:.0%} different; {v['distinct_openings']:.0%} by their first three words",
        "emoji": f"{e['emoji']:.0f}: {e['per_answer']:.2f} an answer; in {e['answers_with']:.0%} of answers; "
        f"over five in {e['answers_with_over_5']:.0%}",
        "languages": f"{', '.join(f'{name} {n}' for name, n in found.languages.items()) or 'none named'} (of a sample)",
        "alike": f"{near['rows']} rows in {near['clusters']} groups of near duplicates, the largest of {near['largest']}",
    }
    if b := found.bill:
        cost = "unknown" if b.cost is None else f"${b.cost:.2f} at ${b.price:g} a million"
        lines["estimate"] = (
            f"{b.model}: {b.tokens_per_epoch} tokens x {b.epochs} epochs = {b.billed_tokens} billed; "
            f"{b.steps} steps; cost {cost}\n{'':13}({b.note})"
        )
    print("\n" + "\n".join(f"  {name:10} {line}" for name, line in lines.items()))


def histogram(spread: Spread) -> str:
    """Bars of the values, one line a step."""
    top = max(spread.bars)
    return "\n".join(
        f"  {low:7.0f} … {high:<7.0f} {'█' * max(round(BAR * n / top), n > 0)} {n}"
        for low, high, n in zip(spread.edges, spread.edges[1:], spread.bars, strict=False)
    )
