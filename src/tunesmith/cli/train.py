"""tunesmith train, tunesmith plan."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from typing import TYPE_CHECKING, Any

from tunesmith.cli.options import Parser, add_settings, coloured, confirm, settings, show_json
from tunesmith.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunesmith.costs import Estimate
    from tunesmith.planning import Plan, Prepared


def train(argv: list[str]) -> int:
    parser = Parser("train", "Fine-tune a model on a data set; the run's directory is printed at the end.").with_json()
    parser.add_argument(
        "--resume", metavar="RUN", help="go on with a run that was stopped or killed, or from its checkpoint-step-N"
    )
    parser.add_argument(
        "--prepare-only", action="store_true", help="check, split and write the data to --output-dir; do not train"
    )
    parser.add_argument(
        "--until",
        choices=("files", "job"),
        default="end",
        help="stop when a service has the files, or the job; --resume goes on, runs watch follows",
    )
    parser.add_argument("--yes", action="store_true", help="do not ask before a service, which may cost money, is used")
    add_settings(parser)
    options = parser.parse_args(argv)
    from tunesmith import api
    from tunesmith.cli.progress import Bar, Progress

    given, before = settings(options), ""
    progress, bar = Progress(), Bar()

    def ready(prepared: Prepared) -> None:
        bar.close()
        if prepared.plan.recipe.provider == "openai":
            agreed(prepared, options.yes)
        else:
            preflight(prepared)

    for name in ("SIGTERM", "SIGHUP"):  # as Ctrl-C, a checkpoint first; nohup has the second ignored, Windows none
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        if options.resume is not None:
            if options.prepare_only:
                raise UsageError(
                    "--resume goes on with a run that is prepared", where="--prepare-only", fix="leave it out"
                )
            before = api.state_of(options.resume)
            run = api.resume(options.resume, progress, config=options.config, until=options.until, **given)
        elif options.prepare_only:
            with bar:
                prepared = api.prepare(config=options.config, on_progress=bar, **given)
            return _write_prepared(prepared, options.json)
        else:
            how = {"on_prepared": ready, "on_event": progress, "on_progress": bar, "until": options.until}
            run = api.train(config=options.config, **how, **given)
    finally:
        bar.close()
        progress.close()
    if run.silent:  # one of several processes: the first speaks for all
        return 0
    if options.json:
        show_json(run.summary())
    else:
        print(run)
        if before == "succeeded" and not progress.seen:
            print("it had finished already", file=sys.stderr)
        name = shlex.quote(str(run))
        after = {"files": f"train --resume {name}", "job": f"runs watch {name}", "end": f"evaluate {name}"}
        fake = run.manifest()["provider"] == "fake"
        print("a dry run: nothing was learnt" if fake else f"next: tunesmith {after[options.until]}", file=sys.stderr)
    return 0


def _write_prepared(prepared: Prepared, as_json: bool) -> int:
    from pathlib import Path

    from tunesmith.data.write import as_row, write_jsonl
    from tunesmith.layout import output_path

    folder = output_path(prepared.plan.recipe)
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for side, rows in prepared.splits.items():
        if len(rows):
            files.append(folder / f"{side}.jsonl")
            write_jsonl(files[-1], (as_row(row) for row in rows))
    if as_json:
        show_json({"files": [str(f) for f in files], "plan": prepared.plan})
    else:
        if prepared.plan.recipe.provider == "openai":
            print("\n".join(offer(prepared.plan, {})))
        else:
            describe(prepared.plan)
        print("\n".join(map(str, files)))
    return 0


def plan(argv: list[str]) -> int:
    parser = Parser("plan", "Show what `train` with the same options would do and need. No run is made.").with_json()
    parser.add_argument(
        "--no-probe",
        action="store_true",
        help="no estimate of memory and time, which takes some seconds; a service is not asked about its model",
    )
    add_settings(parser)
    options: argparse.Namespace = parser.parse_args(argv)
    from importlib.util import find_spec

    import msgspec

    from tunesmith import api
    from tunesmith.cli.progress import Bar

    with Bar() as bar:
        prepared = api.prepare(config=options.config, on_progress=bar, **settings(options))
    local = prepared.plan.recipe.provider == "huggingface" and find_spec("torch") is not None
    here = local and not options.no_probe
    need, ways = api.estimate(prepared) if here else (None, [])
    said = asked(prepared) if prepared.plan.recipe.provider == "openai" and not options.no_probe else {}
    if options.json:
        found = msgspec.to_builtins(prepared.plan)
        show_json(found | {"estimate": need, "ways_to_fit": [words for words, _ in ways], "service": said})
        return 0
    if prepared.plan.recipe.provider == "openai":
        print("\n".join(offer(prepared.plan, said)))
    else:
        describe(prepared.plan, need, ways)
    print("\nsettings")
    from tunesmith.cli.progress import table
    from tunesmith.hosted import ACTS
    from tunesmith.recipe import fields

    shown = ACTS if prepared.plan.recipe.provider == "openai" else fields()
    rows = [
        (name, getattr(prepared.plan.recipe, name), prepared.plan.origin[name]) for name in fields() if name in shown
    ]
    print(table([r for r in rows if r[2] != "default" or r[1] not in (None, {})]))
    return 0


def describe(plan: Plan, need: Estimate | None = None, ways: Sequence[tuple[str, int]] = ()) -> None:
    """The plan in a few lines on stdout."""
    from tunesmith.cli.data import summary
    from tunesmith.cli.progress import clock

    rows, tokens = plan.rows, plan.tokens
    print(
        f"data     {rows['train']} train, {rows['valid']} valid, {rows['test']} test rows; {tokens['train']} tokens to train on, "
        f"{plan.supervised_tokens['train']} of them learnt; longest row {plan.longest}"
    )
    print(
        f"model    {plan.recipe.model}: {plan.model.architecture}, {plan.model.parameters / 1e6:.1f}M parameters, "
        f"context {plan.model.context}"
    )
    print(f"method   {plan.recipe.method}: about {plan.trainable_parameters / 1e6:.2f}M trainable")
    print(f"steps    {plan.steps} ({plan.steps_per_epoch} an epoch, {plan.recipe.epochs} epochs at most)")
    if need is None:
        print(f"memory   {plan.memory_mb} MB at most (not compared with what is free here: that takes the probe)")
    else:
        fits = need.memory_mb < need.available_mb
        print(
            f"memory   about {need.memory_mb} MB of {need.available_mb} MB that are free{'' if fits else ': TOO MUCH'}"
        )
        for words, memory in ways:
            print(f"           fits with {words}: about {memory} MB")
        if not fits and not ways:
            print("           nothing makes this model fit here: take a smaller one")
        print(f"time     {clock(need.seconds)} at most on this machine ({need.step_seconds:.2f} s a step)")
        print(f"disk     {need.disk_mb} MB at most")
    for line in summary(plan.issues):
        print(line)


def asked(prepared: Prepared) -> dict[str, Any]:
    """What a service says of the model; where it cannot be asked, a warning, for a plan needs no network."""
    from tunesmith import api
    from tunesmith.errors import TunesmithError

    try:
        return api.quote(prepared)
    except UsageError:
        raise
    except TunesmithError as error:
        print(f"warning: the service could not be asked: {error}", file=sys.stderr)
        return {}


def offer(plan: Plan, said: dict[str, Any]) -> list[str]:
    """What a service would do and cost, line by line. `said`: the model as the service describes it."""
    from tunesmith.cli.data import summary
    from tunesmith.data.check import HOSTED_ROWS
    from tunesmith.hosted import OPENAI, notes

    rows, recipe, bill = plan.rows, plan.recipe, plan.bill
    sent = rows["valid"] if rows["valid"] >= HOSTED_ROWS else 0
    counted = f"; {plan.tokens['train']} tokens to train on, longest row {plan.longest}" if plan.tokens else ""
    lines = [
        f"service  {recipe.base_url} ({plan.origin['base_url']})",
        f"data     {rows['train']} train and {sent} valid rows are sent, {rows['test']} test rows stay here{counted}",
        f"model    {recipe.model}" + (f": rows of {plan.model.context} tokens at most" if plan.model.context else ""),
        f"job      epochs {recipe.epochs}, batch size {recipe.batch_size}, learning rate multiplier "
        f"{recipe.learning_rate_multiplier} (auto: the service's choice); about {plan.steps} steps",
    ]
    if bill and bill.cost is not None:
        whose = "" if recipe.base_url == OPENAI else " if this were OpenAI's own service"
        price = f"about ${bill.cost:.2f}{whose}: {bill.billed_tokens} tokens at ${bill.price:g} a million"
        lines += [f"price    {price} ({bill.epochs} epochs); {bill.note}"]
    else:
        lines += [f"price    not known here{f': {bill.note}' if bill else ''}"]
    lines += [f"note     {note}" for note in notes(recipe, said)]
    return [*lines, *summary(plan.issues)]


def agreed(prepared: Prepared, yes: bool) -> None:
    """Show the offer and have it agreed to. Raises UsageError where nobody can be asked, Interrupted for a no."""
    from tunesmith import api
    from tunesmith.errors import Interrupted

    print("\n".join(offer(prepared.plan, api.quote(prepared))), file=sys.stderr)
    if not (yes or confirm("send the files and start the job?", "a service may cost money", "train")):
        raise Interrupted("nothing was sent", where="train", fix="look at it again: tunesmith plan")


def preflight(prepared: Prepared) -> None:
    """Before step 1, on stderr: what will be trained on, and one row with its learnt part marked."""
    from tunesmith.cli.data import highlight, summary

    plan = prepared.plan
    print(
        f"{plan.rows['train']} rows, {plan.supervised_tokens['train']} of {plan.tokens['train']} tokens are learnt; "
        f"{plan.steps} steps; {plan.memory_mb} MB at most; held out: {plan.rows['valid']} valid, {plan.rows['test']} test"
        + ("" if plan.rows["valid"] else " (no validation: no early stopping, and the last step is taken)"),
        file=sys.stderr,
    )
    for line in summary(plan.issues, 1):
        print(line, file=sys.stderr)
    if plan.issues:
        print(f"all findings: tunesmith data check {plan.recipe.dataset}", file=sys.stderr)
    from tunesmith.render import Rendered

    assert prepared.renderer
    source = prepared.splits["train"][0].source
    shown = Rendered(*prepared.tokens["train"].row(0), "")
    print(
        f"for example {source}:\n{highlight(shown, prepared.renderer, coloured(sys.stderr), limit=600)}",
        file=sys.stderr,
    )
