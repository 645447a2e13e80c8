"""tunesmith data convert | split: rows chosen, changed, mixed, divided and written."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.cli.options import Parser, columns, natural, positive, show_json
from tunesmith.errors import DataError, UsageError, counted

if TYPE_CHECKING:
    from tunesmith.conversation import Conversation
    from tunesmith.data.store import Conversations

SHOWN = 3  # leaks printed; --json has all
UNWRITABLE = "choose another --output, in a folder that this user may write"


def _choosing(parser: Parser) -> None:
    """Options that choose and change rows, the same for convert and split."""
    group = parser.add_argument_group("rows")
    group.add_argument("--columns", metavar="MAP", help="prompt=question,completion=answer")
    group.add_argument(
        "--where", metavar="TEST", help="keep rows for which it is true: 'metadata.augmented == true and turns > 1'"
    )
    group.add_argument("--max-emoji", type=natural, metavar="N", help="leave out rows with an answer of more emoji")
    group.add_argument(
        "--drop-codes",
        metavar="CODE,CODE",
        help="leave out rows that the evaluation of --run marks: contradicting, doubtful, never_learnt, forgotten, memorised",
    )
    group.add_argument("--run", metavar="RUN", help="the run whose evaluation --drop-codes reads")
    group.add_argument("--max-tokens", type=positive, metavar="N", help="leave out rows of more tokens (of --model)")
    group.add_argument("--model", default="starter", help="whose tokens --max-tokens counts [starter]")
    group.add_argument("--system", metavar="TEXT", help="a system message for every row")
    group.add_argument(
        "--system-how",
        choices=("replace", "add", "strip"),
        default="replace",
        help="replace the one that is there; add it only where there is none; strip all [replace]",
    )
    group.add_argument("--strip-metadata", action="store_true", help="leave out what is not part of the conversation")
    group.add_argument("--sample", type=float, metavar="N", help="keep N rows (under 1: this share), chosen by --seed")
    group.add_argument(
        "--weights", metavar="W,W", help="how often the rows of each data set are taken: 1,2.5; shuffles"
    )
    group.add_argument("--seed", type=natural, default=42, help="of --sample, --weights and splitting [42]")


def _chosen(options: argparse.Namespace) -> list[Conversation]:
    """The rows of the data sets as the options of `_choosing` ask for them; their metadata is left for grouping."""
    from tunesmith.data.check import load
    from tunesmith.data.convert import max_emoji, mix, sample, with_system
    from tunesmith.data.where import where

    if options.system_how == ("add" if options.system is None else "strip"):
        raise UsageError("--system and --system-how do not go together", fix="--system TEXT, or --system-how strip")
    if options.system is not None and not options.system.strip():
        raise UsageError("an empty system message", where="--system", fix="--system-how strip takes it away")
    tests = [where(options.where)] if options.where else []
    marked = _marked(options.drop_codes, options.run) if options.drop_codes or options.run else set()
    tests.append(lambda row: row.digest() not in marked)
    if options.max_emoji is not None:
        tests.append(max_emoji(options.max_emoji))
    sources, read, dropped = [], [], 0
    for name in options.dataset:
        rows = load(name, columns(options.columns), near_duplicates=False).require().conversations
        read.append(len(rows))
        dropped += sum(row.digest() in marked for row in rows) if marked else 0
        rows = [row for row in rows if all(test(row) for test in tests)]
        if options.system is not None or options.system_how == "strip":
            rows = [with_system(row, options.system, options.system_how) for row in rows]
        if options.max_tokens:
            from tunesmith.models import find
            from tunesmith.render import Renderer

            lengths = [len(r.ids) for r in Renderer(find(options.model)).render_all(rows)]
            rows = [row for row, length in zip(rows, lengths, strict=True) if length <= options.max_tokens]
        sources.append(rows)
    if options.weights:
        weights = _numbers(options.weights)
        if len(weights) != len(sources):
            raise UsageError(
                f"{len(weights)} weights for {len(sources)} data sets", where="--weights", fix="one number for each"
            )
        if not all(0 <= w < 1000 for w in weights):
            raise UsageError("a weight is from 0 up to 1000", where="--weights", fix="1: every row once")
        rows = mix(sources, weights, options.seed)
    else:
        rows = [row for source in sources for row in source]
    if options.sample is not None:
        if not 0 < options.sample < 2**31:
            raise UsageError(
                f"a sample of {options.sample}", where="--sample", fix="a number of rows, or a share under 1"
            )
        rows = sample(rows, options.sample, options.seed)
    if not rows:
        raise DataError(
            "no row is left",
            where=", ".join(options.dataset),
            fix="loosen --where, --max-emoji, --max-tokens or --drop-codes",
        )
    left_out = sum(read) - sum(map(len, sources))
    if marked and not dropped:
        print(
            f"warning: none of the {len(marked)} rows that {options.run} marks is here -- give the data set of that run",
            file=sys.stderr,
        )
    if left_out:
        print(f"{left_out} of {sum(read)} rows left out by the options", file=sys.stderr)
    return rows


def _marked(codes: str | None, run: str | None) -> set[str]:
    """The digests of the rows that a run's evaluation marks with one of the codes."""
    if not (codes and run):
        raise UsageError("--drop-codes and --run go together", fix="--drop-codes contradicting --run RUN")
    from tunesmith import api
    from tunesmith.errors import did_you_mean
    from tunesmith.evaluation.evaluate import kept
    from tunesmith.evaluation.rowreport import CODES

    wanted = {code.strip().replace("-", "_") for code in codes.split(",")}
    for code in sorted(wanted - set(CODES)):
        raise UsageError(
            f'no code "{code}"{did_you_mean(code, list(CODES))}', where="--drop-codes", fix=f"known: {', '.join(CODES)}"
        )
    result = kept(api.find_run(run))
    if result is None or result.training_rows is None:
        raise UsageError("no evaluation with a report on the rows", where=run, fix=f"tunesmith evaluate {run}")
    return {row.digest for row in result.training_rows.findings if wanted & set(row.codes)}


def _without_metadata(rows: Conversations, strip: bool) -> list[Conversation]:
    import msgspec

    return [msgspec.structs.replace(row, metadata={}) if strip else row for row in rows]


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"cannot read {text!r}", where="--weights", fix="numbers with commas: 1,2.5") from None


def convert(argv: list[str]) -> int:
    parser = Parser(
        "data convert",
        "Write data sets in another row format, choosing, changing and mixing rows. Nothing is lost unsaid.",
    ).with_json()
    parser.add_argument("dataset", nargs="+", help="files, folders, sample names or Hub data sets")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help=".jsonl, .json, .csv, .tsv or .parquet; .gz, .zst"
    )
    parser.add_argument(
        "--to",
        default="messages",
        metavar="FORMAT",
        help="row format: messages, sharegpt, prompt-completion … [messages]",
    )
    parser.add_argument("--lossy", action="store_true", help="write even what the format cannot hold whole")
    _choosing(parser)
    options = parser.parse_args(argv)
    from tunesmith.data.convert import FORMATS
    from tunesmith.data.write import refuse_unwritable, write_rows
    from tunesmith.errors import did_you_mean

    if options.to not in FORMATS:
        near = did_you_mean(options.to, list(FORMATS))
        raise UsageError(f'no format "{options.to}"{near}', where="--to", fix=f"known: {', '.join(FORMATS)}")
    target = Path(options.output)
    if target.exists():
        raise UsageError("exists already", where=str(target), fix="choose another --output, or remove it")
    refuse_unwritable(target, UNWRITABLE)
    rows = _without_metadata(_chosen(options), options.strip_metadata)
    written, losses = _as_rows(rows, options.to, options.lossy)
    if not written:
        reason = f"no row is left: {options.to} cannot hold {next(iter(losses))}"
        raise DataError(reason, where=", ".join(options.dataset), fix=_holding(rows[0]))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_rows(target, written)
    if options.json:
        show_json({"file": str(target), "rows": len(written), "left_out": len(rows) - len(written), "lost": losses})
    else:
        for what, count in losses.items():
            print(f"lost     {what}, in {counted(count, 'row')}", file=sys.stderr)
        if len(rows) > len(written):
            print(f"{len(rows) - len(written)} of {len(rows)} rows left out: nothing of them is left", file=sys.stderr)
        print(f"{target}  {counted(len(written), 'row')}")
    return 0


def _as_rows(rows: list[Conversation], form: str, lossy: bool) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """(what a format can hold of the rows, in how many of them each thing is lost). DataError for a loss unless `lossy`."""
    from tunesmith.data.convert import to_row

    written, losses = [], Counter[str]()
    for conversation in rows:
        row, lost = to_row(conversation, form)
        losses.update(lost)
        if lost and not lossy:
            fix = _holding(conversation) + (", or --lossy to leave it out" if row else "")
            raise DataError(f"{form} cannot hold {lost[0]}", where=conversation.source, fix=fix)
        if row:
            written.append(row)
    return written, losses


def _holding(row: Conversation) -> str:
    return "--to text" if row.messages[0].role == "text" else "--to messages"


def split(argv: list[str]) -> int:
    parser = Parser(
        "data split",
        "Write PREFIX_train.jsonl, PREFIX_val.jsonl and PREFIX_test.jsonl; what is alike stays on one side.",
    ).with_json()
    parser.add_argument("dataset", nargs="+", help="files, folders, sample names or Hub data sets")
    parser.add_argument("-o", "--output", required=True, metavar="PREFIX", help="where the files go: out/mydata")
    parser.add_argument("--valid", type=float, default=0.1, metavar="SHARE", help="share for validation [0.1]")
    parser.add_argument("--test", type=float, default=0.0, metavar="SHARE", help="share for testing [0]")
    parser.add_argument(
        "--method", choices=("hash", "threshold", "shuffle"), default="hash", help="as --split-method of train [hash]"
    )
    parser.add_argument("--group-by", metavar="FIELD", help="rows equal in this field stay together: metadata.tree_id")
    _choosing(parser)
    options = parser.parse_args(argv)
    both = options.valid + options.test
    for place, share in (("--valid", options.valid), ("--test", options.test), ("--valid and --test", both)):
        if not 0 <= share < 1:
            fix = "shares are from 0 up to, not including, 1"
            raise UsageError(f"a share of {share:g} leaves nothing to train on", where=place, fix=fix)
    from tunesmith.data.split import leaks
    from tunesmith.data.split import split as divide
    from tunesmith.data.write import as_row, refuse_unwritable, write_jsonl

    prefix = Path(options.output)
    if not prefix.name or options.output.endswith("/"):
        raise UsageError("not the beginning of file names", where=options.output, fix="e.g. --output out/mydata")
    refuse_unwritable(prefix.parent, UNWRITABLE)
    parts = divide(
        _chosen(options),
        options.valid,
        options.test,
        method=options.method,
        seed=options.seed,
        group_by=options.group_by,
    )
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
        write_jsonl(path, (as_row(row) for row in _without_metadata(parts[side], options.strip_metadata)))
    leaked = leaks(parts)
    if options.json:
        show_json(
            {
                "files": {side: str(path) for side, path in targets.items()},
                "rows": {side: len(parts[side]) for side in targets},
                "leaks": [leak.line() for leak in leaked],
            }
        )
    else:
        for side, path in targets.items():
            print(f"{path}  {len(parts[side])} rows")
        for leak in leaked[:SHOWN]:
            print(f"warning  {leak.line()}", file=sys.stderr)
        if len(leaked) > SHOWN:
            print(f"{'':8} and {len(leaked) - SHOWN} more", file=sys.stderr)
    return 0
