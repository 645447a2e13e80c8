"""tunesmith data check | split | preview."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.cli.options import Parser, coloured, columns, natural, positive, show_json
from tunesmith.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tunesmith.conversation import Issue
    from tunesmith.render import Rendered, Renderer

SHOWN = 3  # findings printed of each kind; --json has all


def check(argv: list[str]) -> int:
    parser = Parser(
        "data check", "Find every problem in a data set, each with line and fix. Exit status 3 when there are errors."
    ).with_json()
    parser.add_argument("dataset", help="file, folder, sample name or Hub data set")
    parser.add_argument("--columns", metavar="MAP", help="prompt=question,completion=answer")
    parser.add_argument("--model", help="also find rows that are too long for this model")
    parser.add_argument("--explain", action="store_true", help="say which row formats were recognised, and how")
    options = parser.parse_args(argv)
    from tunesmith import api

    found = api.check(options.dataset, columns(options.columns))
    issues = list(found.issues)
    if options.model and found.conversations:
        from tunesmith.planning import length_issues

        issues += length_issues(found.conversations, options.model)
    errors = sum(i.severity == "error" for i in issues)
    warnings = sum(i.severity == "warning" for i in issues)
    if options.json:
        show_json(
            {
                "dataset": options.dataset,
                "rows": found.rows_in,
                "usable": len(found.conversations),
                "formats": found.formats,
                "errors": errors,
                "warnings": warnings,
                "issues": [
                    {
                        "code": i.code,
                        "severity": i.severity,
                        "file": i.where.rpartition(":")[0] if i.where.rpartition(":")[2].isdigit() else i.where,
                        "line": int(n) if (n := i.where.rpartition(":")[2]).isdigit() else None,
                        "message": i.message,
                        "fix": i.fix,
                    }
                    for i in issues
                ],
            }
        )
        return 3 if errors else 0
    for line in summary(issues):
        print(line)
    if options.explain:
        from tunesmith.data.formats import BY_NAME

        for name, count in found.formats.items():
            known = BY_NAME[name]
            print(
                f"format   {name}: {count} rows, known by {' and '.join(sorted(known.required))}"
                + (f"; also read: {', '.join(sorted(known.optional))}" if known.optional else "")
            )
    kinds = ", ".join(f"{count} {name}" for name, count in found.formats.items()) or "no known format"
    print(f"{found.rows_in} rows ({kinds}): {len(found.conversations)} usable, {errors} errors, {warnings} warnings")
    return 3 if errors else 0


def summary(issues: list[Issue], shown: int = SHOWN) -> Iterator[str]:
    """Findings as lines, errors first, the first few of each kind with the number of the others."""
    kinds: dict[tuple[int, str], list[Issue]] = {}
    for issue in issues:
        kinds.setdefault((("error", "warning", "info").index(issue.severity), issue.code), []).append(issue)
    for (_, code), found in sorted(kinds.items(), key=lambda item: item[0][0]):
        for issue in found[:shown]:
            yield f"{issue.severity:8} {issue.line()}"
        if len(found) > shown:
            yield f"{'':8} and {len(found) - shown} more [{code}]"


def split(argv: list[str]) -> int:
    parser = Parser("data split", "Write PREFIX_train.jsonl, PREFIX_val.jsonl and PREFIX_test.jsonl.").with_json()
    parser.add_argument("dataset", help="file, folder, sample name or Hub data set")
    parser.add_argument("-o", "--output", required=True, metavar="PREFIX", help="where the files go: out/mydata")
    parser.add_argument("--columns", metavar="MAP", help="prompt=question,completion=answer")
    parser.add_argument("--valid", type=float, default=0.1, metavar="SHARE", help="share for validation [0.1]")
    parser.add_argument("--test", type=float, default=0.0, metavar="SHARE", help="share for testing [0]")
    parser.add_argument(
        "--method", choices=("hash", "threshold", "shuffle"), default="hash", help="as --split-method of train [hash]"
    )
    parser.add_argument("--group-by", metavar="FIELD", help="rows equal in this field stay together: metadata.tree_id")
    parser.add_argument("--seed", type=natural, default=42)
    options = parser.parse_args(argv)
    for share in (options.valid, options.test, options.valid + options.test):
        if not 0 <= share < 1:
            raise UsageError(
                f"a share of {share} leaves nothing to train on", fix="shares are from 0 up to, not including, 1"
            )
    from tunesmith import api
    from tunesmith.data.split import split as divide
    from tunesmith.data.write import as_row, write_jsonl

    rows = api.check(options.dataset, columns(options.columns)).require().conversations
    parts = divide(
        rows, options.valid, options.test, method=options.method, seed=options.seed, group_by=options.group_by
    )
    prefix = Path(options.output)
    if not prefix.name or options.output.endswith("/"):
        raise UsageError("not the beginning of file names", where=options.output, fix="e.g. --output out/mydata")
    targets = {
        side: prefix.with_name(f"{prefix.name}_{name}.jsonl")
        for side, name in (("train", "train"), ("valid", "val"), ("test", "test"))
        if parts[side]
    }
    for path in targets.values():
        if path.exists():
            raise UsageError("exists already", where=str(path), fix="choose another --output, or remove it")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for side, path in targets.items():
        write_jsonl(path, (as_row(row) for row in parts[side]))
    if options.json:
        show_json(
            {
                "files": {side: str(path) for side, path in targets.items()},
                "rows": {side: len(parts[side]) for side in targets},
            }
        )
    else:
        for side, path in targets.items():
            print(f"{path}  {len(parts[side])} rows")
    return 0


def preview(argv: list[str]) -> int:
    parser = Parser(
        "data preview", "Show rows as the model sees them; what is learnt is highlighted (or between ⟦ and ⟧)."
    ).with_json()
    parser.add_argument("dataset", help="file, folder, sample name or Hub data set")
    parser.add_argument("--columns", metavar="MAP", help="prompt=question,completion=answer")
    parser.add_argument("--model", default="starter", help="whose tokenizer and template [starter]")
    parser.add_argument(
        "--row",
        type=positive,
        action="append",
        metavar="N",
        help="show the N-th row (from 1); may be given several times",
    )
    parser.add_argument("--rows", type=positive, default=3, metavar="N", help="show the first N [3]")
    options = parser.parse_args(argv)
    from tunesmith import api
    from tunesmith.models import find
    from tunesmith.render import Renderer

    rows = api.check(options.dataset, columns(options.columns)).require().conversations
    wanted = options.row or range(1, min(options.rows, len(rows)) + 1)
    for number in wanted:
        if not 1 <= number <= len(rows):
            raise UsageError(f"no row {number}", where=options.dataset, fix=f"rows are 1 to {len(rows)}")
    renderer = Renderer(find(options.model))
    shown = [renderer.render(rows[n - 1]) for n in wanted]
    if options.json:
        show_json(
            [
                {
                    "where": r.source,
                    "text": r.text,
                    "ids": r.ids,
                    "mask": r.mask,
                    "tokens": [renderer.tokenizer.id_to_token(i) for i in r.ids],
                }
                for r in shown
            ]
        )
        return 0
    for r in shown:
        print(
            f"{r.source}: {len(r.ids)} tokens, {sum(r.mask[1:])} learnt\n{highlight(r, renderer, coloured(sys.stdout))}\n"
        )
    return 0


def highlight(row: Rendered, renderer: Renderer, colour: bool, limit: int | None = None) -> str:
    """The row's tokens as text, special tokens visible, the learnt part green (or between ⟦ and ⟧).

    With a `limit` about so many characters: of each part its beginning and end, of many turns the last.
    """
    on, off = ("\x1b[32m", "\x1b[0m") if colour else ("⟦", "⟧")
    parts = [
        (learnt, renderer.decode([token for token, _ in run], special=True).translate(_VISIBLE))
        for learnt, run in groupby(zip(row.ids, row.mask, strict=True), key=lambda pair: pair[1])
    ]
    if limit and sum(len(text) for _, text in parts) > limit:
        left_out = len(parts) > 4
        parts = parts[-4:]
        each = max(40, limit // len(parts))
        parts = [(learnt, _middle_out(text, each)) for learnt, text in parts]
        parts = [(0, "… ")] * left_out + parts
    out = "".join(f"{on}{text}{off}" if learnt else text for learnt, text in parts)
    return "\n".join(f"  | {line}" for line in out.rstrip("\n").split("\n"))


_VISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {
    127: 0x2421
}  # no row may steer a terminal


def _middle_out(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit * 2 // 3]} … {text[-limit // 3 :]}"
