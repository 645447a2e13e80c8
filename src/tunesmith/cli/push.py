"""tunesmith push."""

from __future__ import annotations

import sys
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from tunesmith.cli.options import Parser, confirm, show_json
from tunesmith.errors import Interrupted

if TYPE_CHECKING:
    from tunesmith.exporting.push import Parcel


def push(argv: list[str]) -> int:
    parser = Parser(
        "push",
        "Send an export, or a run's best model with its card, to the Hugging Face Hub: one commit, to a private repository. The "
        "data, the optimizer, checkpoints and logs stay here. Weights of an earlier push that are not this model's are deleted.",
    ).with_json()
    parser.add_argument("source", help="the folder that tunesmith export has made, or a run")
    parser.add_argument("repo", help="user/name at the Hub; made where it is not there")
    parser.add_argument("--dry-run", action="store_true", help="show what would be sent; needs no token and no network")
    parser.add_argument("--public", action="store_true", help="for everybody to see")
    parser.add_argument(
        "--with-data", action="store_true", help="the run's train, valid and test rows too, under data/"
    )
    parser.add_argument(
        "--with-evaluation",
        action="store_true",
        help="evaluation/result.json and report.html too; they show rows, so only --with-data",
    )
    parser.add_argument("--force", action="store_true", help="also an export whose certificate has failed")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument(
        "--token-file", metavar="FILE", help="where the token is [HF_TOKEN, else that of hf auth login]"
    )
    options = parser.parse_args(argv)
    from tunesmith.exporting.push import gather, send

    parcel = gather(
        options.source,
        options.repo,
        public=options.public,
        with_data=options.with_data,
        with_evaluation=options.with_evaluation,
        force=options.force,
    )
    if options.dry_run:
        show_json(_told(parcel)) if options.json else print(_table(parcel))
        return 0
    if not options.yes:
        print(_table(parcel), file=sys.stderr)
        if not confirm(f"send these to {parcel.repo}?", "what is sent is out of your hands", parcel.repo):
            raise Interrupted("nothing was sent", where=parcel.repo, fix="look at it again: --dry-run")
    if not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    done = send(parcel, options.token_file)
    if options.json:
        show_json(done)
    else:
        print(f"{done.url}  {len(done.files)} files, {done.bytes / 1e6:,.1f} MB, {_seen_by(parcel)}")
        for name in done.deleted:
            print(f"deleted there: {name}")
    return 0


def _told(parcel: Parcel) -> dict[str, Any]:
    return {
        "repo": parcel.repo,
        "private": parcel.private,
        "files": [{"name": file.name, "bytes": file.size} for file in parcel.files],
        "left_out": parcel.left_out,
        "metadata": parcel.metadata,
    }


def _table(parcel: Parcel) -> str:
    from tunesmith.cli.progress import table

    lines = [f"{parcel.repo}, {_seen_by(parcel)}: {len(parcel.files)} files, {parcel.size() / 1e6:,.1f} MB"]
    lines += [table([(file.name, f"{file.size:,}") for file in parcel.files])]
    lines += [f"stays here: {', '.join(parcel.left_out)}"] if parcel.left_out else []
    metadata = [(key, shorten(str(value), 100, placeholder=" …")) for key, value in parcel.metadata.items()]
    return "\n".join([*lines, "the card's metadata", table(metadata)])


def _seen_by(parcel: Parcel) -> str:
    return "private" if parcel.private else "public"
