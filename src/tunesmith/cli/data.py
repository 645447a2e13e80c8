"""tunesmith data check | preview."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.cli.options import Parser, coloured, columns, positive, show_json
from tunesmith.conversation import harmless
from tunesmith.errors import UsageError, counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tunesmith.conversation import Issue
    from tunesmith.render import Rendered, Renderer

SHOWN = 3  # findings printed of each kind; --json has all


def check(argv: list[str]) -> int:
    from tunesmith.recipe import fields

    parser = Parser(
        "data check",
        "Find every problem in a data set, each with line and fix, and grade it. Exit status 3 when there are errors.",
    ).with_json()
    parser.add_argument("dataset", nargs="*", help="files, folders, sample names or Hub data sets, checked as one")
    parser.add_argument(
        "--dataset", action="append", dest="named", metavar="DATASET", default=[], help="the same as DATASET"
    )
    parser.add_argument("--columns", metavar="MAP", help="prompt=question,completion=answer")
    parser.add_argument("--task", choices=fields()["task"].choices(), help="what it is for [chat]")
    parser.add_argument(
        "--provider", choices=("huggingface", "openai"), help="who will train: some findings weigh more"
    )
    parser.add_argument("--model", help="also find rows that are too long for this model")
    parser.add_argument(
        "--fix", metavar="OUT.jsonl", help="write a repaired copy, and what was changed to OUT.jsonl.changes.jsonl"
    )
    parser.add_argument("--report", metavar="OUT.html", help="write the findings as a page")
    parser.add_argument(
        "--no-near-duplicates", action="store_true", help="do not look for rows that are almost the same"
    )
    parser.add_argument(
        "--structure-only", action="store_true", help="JSON, roles and emptiness only: the fastest look"
    )
    parser.add_argument(
        "--num-workers", type=positive, metavar="N", help="processes [1; every core for files over 32 MB]"
    )
    parser.add_argument("--explain", action="store_true", help="say which row formats were recognised, and how")
    options = parser.parse_args(argv)
    datasets: list[str] = [*options.dataset, *options.named]
    if not datasets:
        raise UsageError("needs a data set", where="data check", fix="tunesmith data check DATASET")
    from tunesmith.cli.progress import Bar
    from tunesmith.data.check import by_severity, examine, grade

    if options.fix:
        from tunesmith.data.repair import refuse_taken

        refuse_taken(Path(options.fix))
    if options.report:
        from tunesmith.data.write import refuse_output

        refuse_output(Path(options.report))
        if options.report == options.fix:
            raise UsageError("cannot be written there", where=options.report, fix="name a new file in a folder that is")
    each = None
    if options.model:
        from tunesmith.preflight import over_long

        each = over_long(options.model)
    with Bar() as bar:
        found = examine(
            datasets,
            columns(options.columns),
            task=options.task or "chat",
            provider=options.provider,
            structure_only=options.structure_only,
            near_duplicates=not options.no_near_duplicates,
            each=each,
            progress=bar,
            processes=options.num_workers,
        )
    found.issues = by_severity(found.issues)
    word, reasons = grade(found)
    errors, warnings = found.count("error"), found.count("warning")
    if options.report:
        from tunesmith.data.report import write_report

        write_report(Path(options.report), found, word, reasons)
    fixed = None
    if options.fix:
        from tunesmith.data.repair import repair

        fixed = repair(datasets, Path(options.fix))
    explained = _explained(found.formats) if options.explain else {}
    if options.json:
        show_json(
            {
                "dataset": datasets,
                "rows": found.rows_in,
                "usable": found.usable,
                "formats": found.formats,
                **({"known_by": explained} if options.explain else {}),
                "grade": word,
                "reasons": reasons,
                "errors": errors,
                "warnings": warnings,
                "counts": found.counts,
                "not_listed": sum(found.counts.values()) - len(found.issues),
                "fixed": fixed,
                "issues": [
                    {
                        "code": i.code,
                        "severity": i.severity,
                        "file": i.where.rpartition(":")[0] if i.where.rpartition(":")[2].isdigit() else i.where,
                        "line": int(n) if (n := i.where.rpartition(":")[2]).isdigit() else None,
                        "message": i.message,
                        "fix": i.fix,
                    }
                    for i in found.issues
                ],
            }
        )
        return 3 if errors else 0
    for line in summary(found.issues, counts=found.counts):
        print(line)
    for name, known in explained.items():
        also = f"; also read: {', '.join(known['optional'])}" if known["optional"] else ""
        print(f"format   {name}: {found.formats[name]} rows, known by {' and '.join(known['required'])}{also}")
    kinds = ", ".join(f"{count} {name}" for name, count in found.formats.items()) or "no known format"
    print(
        f"{found.rows_in} rows ({kinds}): {found.usable} usable, {counted(errors, 'error')}, {counted(warnings, 'warning')}"
    )
    print(f"grade: {word} ({'; '.join(reasons)})")
    if fixed:
        print(f"{fixed['file']}: {fixed['rows']} rows, {fixed['changes']} changes, listed in {fixed['log']}")
    return 3 if errors else 0


def summary(issues: list[Issue], shown: int = SHOWN, counts: dict[str, int] | None = None) -> Iterator[str]:
    """Findings as lines, errors first, the first few of each kind with the number of the others (of all, by `counts`)."""
    from tunesmith.data.findings import ORDER

    kinds: dict[tuple[int, str], list[Issue]] = {}
    for issue in issues:
        kinds.setdefault((ORDER.index(issue.severity), issue.code), []).append(issue)
    for (_, code), found in sorted(kinds.items(), key=lambda item: item[0][0]):
        for issue in found[:shown]:
            yield f"{issue.severity:8} {issue.line()}"
        total = (counts or {}).get(code, len(found))
        if total > shown:
            yield f"{'':8} and {total - shown} more [{code}]"


WORST = {  # --worst: what comes first
    "long": lambda row: -len(row.ids),
    "short": lambda row: len(row.ids),
    "no-label": lambda row: sum(row.mask[1:]) / len(row.ids),
}


def _explained(formats: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """By which columns each format was recognised, and which it reads besides."""
    from tunesmith.data.formats import BY_NAME

    return {n: {"required": sorted(BY_NAME[n].required), "optional": sorted(BY_NAME[n].optional)} for n in formats}


def preview(argv: list[str]) -> int:
    parser = Parser(
        "data preview", "Show rows as the model sees them; what is learnt is highlighted (or between ⟦ and ⟧)."
    ).with_json()
    parser.add_argument("dataset", help="file, folder, sample name or Hub data set")
    parser.add_argument("--columns", metavar="MAP", help="prompt=question,completion=answer")
    parser.add_argument("--model", default="starter", help="whose tokenizer and template [starter]")
    parser.add_argument("--chat-template", metavar="T", help="another: chat, instruct, completion or a Jinja file")
    parser.add_argument(
        "--max-length", type=positive, metavar="N", help="where rows would be cut [the model's context]"
    )
    parser.add_argument(
        "--row",
        type=positive,
        action="append",
        metavar="N",
        help="show the N-th row (from 1); may be given several times",
    )
    parser.add_argument("--rows", type=positive, default=3, metavar="N", help="show the first N [3]")
    parser.add_argument(
        "--worst", choices=tuple(WORST), help="the first are the longest, the shortest, or those with least to learn"
    )
    parser.add_argument("--html", metavar="OUT.html", help="write the rows as a page")
    options = parser.parse_args(argv)
    from tunesmith import api
    from tunesmith.models import facts, find
    from tunesmith.render import Renderer, chosen_template

    if options.html:
        from tunesmith.data.write import refuse_output

        refuse_output(Path(options.html))
    found = api.check(options.dataset, columns(options.columns), near_duplicates=False)
    rows = found.conversations or found.require().conversations
    if found.errors():  # what can be shown helps to find out why
        print(f"warning: {found.count('error')} errors; see: tunesmith data check {options.dataset}", file=sys.stderr)
    folder = find(options.model)
    template = chosen_template(options.chat_template, folder) if options.chat_template else None
    renderer, limit = Renderer(folder, template), options.max_length or facts(folder).context
    for number in options.row or ():
        if number > len(rows):
            raise UsageError(f"no row {number}", where=options.dataset, fix=f"rows are 1 to {len(rows)}")
    if options.worst:
        shown = sorted(renderer.render_all(rows), key=WORST[options.worst])[: options.rows]
    else:
        wanted = options.row or range(1, min(options.rows, len(rows)) + 1)
        shown = [renderer.render(rows[n - 1]) for n in wanted]
    if options.html:
        from tunesmith.data.report import write_preview

        write_preview(Path(options.html), [(r, segments(r, renderer, limit)) for r in shown], limit)
    if options.json:
        show_json(
            [
                {
                    "where": r.source,
                    "text": r.text,
                    "ids": r.ids,
                    "mask": r.mask,
                    "cut": limit if len(r.ids) > limit else None,
                    "tokens": [renderer.tokenizer.id_to_token(i) for i in r.ids],
                }
                for r in shown
            ]
        )
        return 0
    for r in shown:
        cut = f", cut after {limit}" if len(r.ids) > limit else ""
        text = highlight(r, renderer, coloured(sys.stdout), cut_at=limit)
        print(f"{r.source}: {len(r.ids)} tokens{cut}, {sum(r.mask[1:])} learnt\n{text}\n")
    return 0


def segments(row: Rendered, renderer: Renderer, cut_at: int | None = None) -> list[tuple[bool, bool, str]]:
    """(learnt, beyond the cut, text) for each stretch of a row's tokens, special tokens and control characters visible."""
    marks = [(bool(learnt), cut_at is not None and i >= cut_at) for i, learnt in enumerate(row.mask)]
    return [
        (*mark, harmless(renderer.decode([token for token, _ in run], special=True)))
        for mark, run in groupby(zip(row.ids, marks, strict=True), key=lambda pair: pair[1])
    ]


def highlight(
    row: Rendered, renderer: Renderer, colour: bool, limit: int | None = None, cut_at: int | None = None
) -> str:
    """The row's tokens as text, special tokens visible, the learnt part green (or between ⟦ and ⟧).

    With a `limit` about so many characters: of each part its beginning and end, of many turns the last. ✂ marks where
    a model's context ends.
    """
    on, off = ("\x1b[32m", "\x1b[0m") if colour else ("⟦", "⟧")
    parts = segments(row, renderer, cut_at)
    if limit and sum(len(text) for *_, text in parts) > limit:
        left_out = len(parts) > 4
        parts = parts[-4:]
        each = max(40, limit // len(parts))
        parts = [(learnt, beyond, _middle_out(text, each)) for learnt, beyond, text in parts]
        parts = [(False, False, "… ")] * left_out + parts
    out, inside = "", True
    for learnt, beyond, text in parts:
        out += ("✂" if beyond and inside else "") + (f"{on}{text}{off}" if learnt else text)
        inside = not beyond
    return "\n".join(f"  | {line}" for line in out.rstrip("\n").split("\n"))


def _middle_out(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit * 2 // 3]} … {text[-limit // 3 :]}"
