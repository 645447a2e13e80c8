"""tunesmith rescue."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.cli.options import Parser, show_json
from tunesmith.errors import TunesmithError, UsageError

if TYPE_CHECKING:
    from tunesmith.remote.rescue import Rescued
    from tunesmith.runs import Run


def rescue(argv: list[str]) -> int:
    parser = Parser(
        "rescue",
        "Bring everything an account holds at a service here: files, and each job with its events, checkpoints and results as "
        "a run. Done again, it goes on where it was stopped; exit status 1 where something could not be had. With --retrain, "
        "one of its models is trained again on this machine, from the same rows, and compared with the hosted one while that "
        "still answers.",
    ).with_json()
    parser.add_argument("--base-url", metavar="URL", help="the service; default: OPENAI_BASE_URL, else OpenAI's own")
    parser.add_argument("--api-key-file", metavar="FILE", help="file with its key, instead of OPENAI_API_KEY")
    parser.add_argument("--output-dir", metavar="DIR", default="rescued", help="where everything goes [rescued]")
    parser.add_argument("--retrain", metavar="MODEL", help="a tuned model (ft:…) or job of the account")
    parser.add_argument("--model", help="base model on this machine, for --retrain [starter]")
    parser.add_argument(
        "--test-dataset", metavar="FILE", help="rows to compare on, where the job had no validation file"
    )
    parser.add_argument("--config", metavar="FILE|PRESET", help="further settings of the training, for --retrain")
    options = parser.parse_args(argv)
    for name in ("model", "test_dataset", "config"):
        if getattr(options, name) is not None and not options.retrain:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} is for --retrain", where=flag, fix="name the model: --retrain ft:…")
    from tunesmith import api

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    folder = Path(options.output_dir).expanduser()
    result: dict[str, Any] = {"rescued": None}
    code = 0
    try:
        found = api.rescue(folder, options.base_url, options.api_key_file, say)
    except TunesmithError as error:
        if not options.retrain or not _is_here(folder, options.retrain):
            raise
        print(f"warning: nothing new was fetched: {error}", file=sys.stderr)
    else:
        result["rescued"], code = found, 1 if found.missing else 0
        if not options.json:
            _tell(found)
    if options.retrain:
        result |= _retrain(options, folder)
    if options.json:
        show_json(result)
    return code


def _tell(found: Rescued) -> None:
    states = ", ".join(f"{list(found.jobs.values()).count(s)} {s}" for s in sorted(set(found.jobs.values())))
    print(f"{found.files} files ({found.bytes / 1e6:.1f} MB, {found.fetched} of them new)")
    print(f"{len(found.jobs)} jobs{f': {states}' if states else ''}")
    for model in found.models:
        print(f"  {model}")
    for line in found.missing:
        print(f"could not be had: {line}")
    print(found.folder)


def _is_here(folder: Path, name: str) -> bool:
    """Whether a tuned model, or job, was rescued before."""
    from tunesmith.remote.rescue import find

    try:
        return bool(find(folder, name))
    except UsageError:
        return False


def _retrain(options: Any, folder: Path) -> dict[str, Any]:
    """Train again here and compare; what came out."""
    from tunesmith import api
    from tunesmith.cli.evaluate import show
    from tunesmith.cli.progress import Bar, Progress
    from tunesmith.data.write import safe_name
    from tunesmith.models import find as model_folder
    from tunesmith.remote.rescue import as_local, find

    hosted: Run = find(folder, options.retrain)
    base = options.model or "starter"
    model_folder(base)  # a wrong name is said before anything else
    settings = as_local(hosted, base, options.test_dataset)
    output = folder / f"retrained-{safe_name(hosted.path.name)}-on-{safe_name(Path(base).name)}"
    progress = Progress()
    try:
        if (output / "run.json").exists():  # it was begun before
            run = api.resume(output, progress)
        else:
            run = api.train(config=options.config, on_event=progress, output_dir=str(output), **settings)
    finally:
        progress.close()
    if not options.json:
        print(run)
    model = str(hosted.last("done").get("model") or options.retrain)
    if "test_dataset" not in settings:
        why = "the job had no validation file: give rows that neither has seen with --test-dataset FILE"
        print(f"not compared: {why}", file=sys.stderr)
        return {"run": str(run), "compared": None}
    try:
        with Bar() as bar:
            result = api.evaluate(
                run,
                against=model,
                base_url=options.base_url,
                api_key_file=options.api_key_file,
                on_progress=bar,
            )
    except TunesmithError as error:
        print(f"not compared: {error}", file=sys.stderr)
        return {"run": str(run), "compared": None}
    if not options.json:
        print(f"\nthe hosted {model} (base) against {run} (tuned)")
        show(result)
    return {"run": str(run), "compared": result}
