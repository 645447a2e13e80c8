"""The plan of a training that a service does: rows, tokens as it counts them, steps, price. Nothing is asked of the service.

What `planning.prepare` is for this machine. The service has its own rules for "auto": what is said of epochs, steps and price
is an estimate by the published cookbook, until the job tells what it has resolved.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections import Counter
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from tunesmith.conversation import Conversation, Issue
from tunesmith.data.check import HOSTED_ROWS
from tunesmith.data.findings import finding
from tunesmith.data.persona import names, persona
from tunesmith.data.scan import Progress
from tunesmith.data.split import Splits
from tunesmith.data.spread import cores
from tunesmith.data.stats import Bill, batch_size, bill, epochs, hosted, hosted_model, openai_lengths, still_trained
from tunesmith.errors import DataError, UsageError
from tunesmith.models import ModelFacts
from tunesmith.planning import Plan, Prepared
from tunesmith.preparing import MOST_HELD_OUT, read_splits
from tunesmith.recipe import Recipe, fields

OPENAI = "https://api.openai.com/v1"
ACTS = {  # the settings that a service's training takes; all others mean something on this machine alone
    *(f.name for f in fields().values() if f.group in ("data", "openai", "output")),
    *("provider", "model", "task", "persona", "epochs", "batch_size", "seed"),
}
INSTEAD = {"learning_rate": "--learning-rate-multiplier is a factor on the service's own rate"}
MOST = {"epochs": 50, "batch_size": 256}


def prepare(recipe: Recipe, origin: dict[str, str], progress: Progress | None = None) -> Prepared:
    """Read, check, split and count. Raises UsageError for a setting that a service cannot act on, DataError for the data."""
    if recipe.api_key_file:
        recipe = msgspec.structs.replace(recipe, api_key_file=key_file(recipe.api_key_file))
    issues = list(_other_settings(recipe, origin))
    recipe, origin = _address(recipe, origin)
    recipe, origin, known = _model(recipe, origin)
    splits, found, formats, shares = read_splits(recipe, progress=progress)
    issues = found + issues
    for row in (row for rows in splits.values() for row in rows):
        if row.messages[0].role == "text":
            fix = "give rows with a question and an answer, or train on this machine"
            raise DataError("plain text has no turns, and a service learns answers", where=row.source, fix=fix)
    limit = known[1]["training_context"] if known else 0
    if recipe.max_length != "auto":
        if not known:
            message = f"nobody here knows how {recipe.model} counts tokens"
            raise UsageError(message, where="max_length", fix="leave it out")
        limit = min(limit, recipe.max_length)
    dropped, lengths = 0, {}
    if known:
        for side, rows in splits.items():
            counted = openai_lengths(list(rows), known[0], progress)
            keep, about = _over_long(recipe, list(rows), counted, limit, side)
            issues += about
            dropped += len(rows) - len(keep)
            splits[side], lengths[side] = [rows[i] for i in keep], [counted[i] for i in keep]
    rows = splits["train"]
    if len(rows) < HOSTED_ROWS:
        raise DataError(
            f"{len(rows)} rows to train on, of at least {HOSTED_ROWS} [too-few-rows]",
            where=str(recipe.dataset),
            fix="add rows, or hold none out: --valid-fraction 0 --test-fraction 0",
        )
    if 0 < len(splits["valid"]) < HOSTED_ROWS:
        message = (
            f"{len(splits['valid'])} validation rows are no file to a service, which wants {HOSTED_ROWS}: not sent"
        )
        issues.append(finding("few-rows", str(recipe.dataset), message, "hold out more: --valid-fraction"))
    recipe, origin = _resolve(recipe, origin, splits, shares)
    cost = _bill(recipe, lengths["train"]) if known else None
    return Prepared(
        _plan(recipe, origin, splits, lengths, limit, dropped, formats, issues, cost), splits, {}, _hashes(splits)
    )


def _other_settings(recipe: Recipe, origin: dict[str, str]) -> list[Issue]:
    """A warning for what a preset says to this machine alone; UsageError for what was asked for by name."""
    found = []
    for name in fields():
        if name in ACTS or origin[name] == "default" or origin[name].startswith("task "):
            continue
        fix = INSTEAD.get(name, "leave it out, or train on this machine: --provider huggingface")
        if origin[name].startswith("preset "):
            found.append(finding("idle-setting", origin[name], f"{name} has no effect: a service trains", fix))
        else:
            raise UsageError(f"{name} means nothing to a service", where=_place(name, origin), fix=fix)
    for name, most in MOST.items():
        value = getattr(recipe, name)
        if value != "auto" and not 1 <= value <= most:
            raise UsageError(
                f"{name} is {value}; services take 1 to {most}", where=_place(name, origin), fix="change it"
            )
    if recipe.suffix is not None and not re.fullmatch(r"[a-z0-9-]{1,64}", recipe.suffix):
        near = re.sub(r"[^a-z0-9]+", "-", recipe.suffix.lower())[:64].strip("-")
        raise UsageError(
            "suffix: 1 to 64 of a-z, 0-9 and -", where=_place("suffix", origin), fix=f"take {near or 'another'}"
        )
    return found


def _place(name: str, origin: dict[str, str]) -> str:
    return name if origin[name] == "flag" else origin[name]


def _address(recipe: Recipe, origin: dict[str, str]) -> tuple[Recipe, dict[str, str]]:
    """The service's address in full, and where it comes from: a forgotten variable must not send data elsewhere unseen."""
    url, place = effective(recipe.base_url, origin["base_url"])
    return msgspec.structs.replace(recipe, base_url=url), {**origin, "base_url": place}


def effective(url: str | None, place: str = "--base-url") -> tuple[str, str]:
    """(address of the service, where it comes from): what was given, else the variable's, else OpenAI's own."""
    if url is None:
        said = os.environ.get("OPENAI_BASE_URL")
        url, place = (said, "auto: the variable OPENAI_BASE_URL") if said else (OPENAI, "auto: OpenAI's own")
    return address(url, place), place


def address(url: str, place: str = "--base-url") -> str:
    """A service's address, checked. Raises UsageError."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half a bracket
        known = False
    if not known:
        raise UsageError("no address of a service", where=place, fix="write it as https://host/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError("an address may hold no key", where=place, fix="give the key in OPENAI_API_KEY")
    return url.rstrip("/")


def key_file(path: str) -> str:
    """The path of a key's file as it is from any folder. Raises UsageError for a key in its place, without repeating it."""
    if re.match(r"t?sk-", path):
        fix = "write it into a file; and take it back: the command line is seen by all users of this machine"
        raise UsageError("a key was given, and a file's name is wanted", where="--api-key-file", fix=fix)
    return str(Path(path).expanduser().absolute())


def notes(recipe: Recipe, said: dict[str, Any], today: date | None = None) -> list[str]:
    """What should be known before a service is used. `said`: the model as the service describes it."""
    day, found = today or date.today(), []
    until = hosted()["jobs_until"]
    if recipe.base_url == OPENAI:
        left = (until - day).days
        found.append(
            f"the service takes no new jobs after {until} ({left} days)"
            if left > 0
            else f"the service has taken no new jobs since {until}; this machine does: --provider huggingface"
        )
    if ends := said.get("shutdown_date"):
        found.append(f"the service ends {recipe.model}, and what is tuned from it, on {ends}")
    elif recipe.base_url == OPENAI and said:
        found.append(f"the service names no day on which {recipe.model} ends")
    if urlsplit(str(recipe.base_url)).scheme == "http" and not local_address(str(recipe.base_url)):
        found.append("the address is http: rows and key can be read on the way")
    return found


def local_address(url: str) -> bool:
    """Whether a service is on this machine."""
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


def _model(recipe: Recipe, origin: dict[str, str]) -> tuple[Recipe, dict[str, str], tuple[str, dict[str, Any]] | None]:
    """The model by its full name, and what is known of it: None where another service has it."""
    ours, name = recipe.base_url == OPENAI, recipe.model
    if ours and origin["model"] == "default":
        raise UsageError("which model?", where="--model", fix=f"the service trains {still_trained()}")
    base = name.split(":")[1] if name.startswith("ft:") and name.count(":") > 2 else name
    known = hosted_model(base) if ours or base in hosted()["models"] else None
    if ours and known and known[1]["ends"] < date.today():  # said before a key is asked for
        raise UsageError(
            f"the service has ended this model on {known[1]['ends']}", where=name, fix=instead(recipe.dataset)
        )
    if known and base == name and known[0] != name:
        recipe, origin = msgspec.structs.replace(recipe, model=known[0]), {**origin, "model": f"auto: {name} in full"}
    return recipe, origin, known


def same(recipe: Recipe, name: str, value: Any) -> bool:
    """Whether a setting that is given again is the one of a run, which keeps addresses and names of models in full."""
    if name == "base_url":
        return effective(value)[0] == recipe.base_url
    if name == "model" and (recipe.base_url == OPENAI or value in hosted()["models"]):
        with suppress(UsageError):  # no such model is another one
            return (hosted_model(value) or ("",))[0] == recipe.model
    return False


def instead(dataset: str | None) -> str:
    """What to do where a service has ended a model."""
    words = shlex.join(["tunesmith", "train", "--dataset", str(dataset), "--provider", "huggingface"])
    return f"train on this machine: {words}"


def _over_long(
    recipe: Recipe, rows: list[Conversation], lengths: list[int], limit: int, side: str
) -> tuple[list[int], list[Issue]]:
    """Numbers of the rows that are kept, and findings. Raises DataError unless the recipe says what to do."""
    long = [i for i, length in enumerate(lengths) if length > limit]
    everything = range(len(rows))
    if not long:
        return list(everything), []
    worst = max(long, key=lambda i: lengths[i])
    message = f"{len(long)} of {len(rows)} {side} rows are over {limit} tokens (the longest: {lengths[worst]})"
    if recipe.over_long == "error":
        fix = "shorten them, or --over-long drop (or truncate)"
        raise DataError(f"{message}; the answer would be cut [over-long]", where=rows[worst].source, fix=fix)
    if recipe.over_long == "truncate":
        return list(everything), [finding("cut", rows[worst].source, f"{message}; the service cuts their ends")]
    left = set(long)
    return [i for i in everything if i not in left], [finding("cut", rows[worst].source, f"{message}; left out")]


def _resolve(
    recipe: Recipe, origin: dict[str, str], splits: Splits, shares: dict[str, float]
) -> tuple[Recipe, dict[str, str]]:
    """Numbers for what "auto" means here; the hyperparameters stay "auto", to be resolved by the service."""
    train = splits["train"]
    name, count = persona(Counter(name for row in train for name in names(row.answer())), len(train))
    values: dict[str, tuple[Any, str]] = {
        **{key: (share, f"a tenth, {MOST_HELD_OUT[key]:,} rows at most") for key, share in shares.items()},
        "valid_fraction": (
            shares["valid_fraction"],
            f"a tenth, {HOSTED_ROWS} rows at least, {MOST_HELD_OUT['valid_fraction']:,} at most",
        ),
        "num_workers": (cores(), "every core"),
        "persona": (name, f"named in {count} answers" if count else "no name found in the answers"),
    }
    new = {key: value for key, (value, _) in values.items() if getattr(recipe, key) == "auto"}
    return msgspec.structs.replace(recipe, **new), {**origin, **{key: f"auto: {values[key][1]}" for key in new}}


def _bill(recipe: Recipe, lengths: list[int]) -> Bill:
    model = recipe.model.split(":")[1] if recipe.model.startswith("ft:") else recipe.model
    n, batch = estimated(recipe, len(lengths))
    return bill(lengths, model, n=n, batch=batch)


def _plan(
    recipe: Recipe,
    origin: dict[str, str],
    splits: Splits,
    lengths: dict[str, list[int]],
    limit: int,
    dropped: int,
    formats: dict[str, int],
    issues: list[Issue],
    cost: Bill | None,
) -> Plan:
    count = len(splits["train"])
    n, batch = estimated(recipe, count)
    per_epoch = -(-count // batch)
    return Plan(
        recipe,
        origin,
        ModelFacts("", "hosted", parameters=0, layers=0, hidden=0, vocabulary=0, context=limit),
        {side: len(rows) for side, rows in splits.items()},
        tokens={side: sum(found) for side, found in lengths.items()},
        supervised_tokens={},
        longest=max((max(found, default=0) for found in lengths.values()), default=0),
        dropped=dropped,
        formats=formats,
        steps_per_epoch=per_epoch,
        steps=per_epoch * n,
        trainable_parameters=0,
        memory_mb=0,
        issues=issues,
        bill=cost,
    )


def estimated(recipe: Recipe, rows: int) -> tuple[int, int]:
    """Epochs and batch size, by the cookbook's rules where they are left to the service."""
    n = epochs(rows) if recipe.epochs == "auto" else recipe.epochs
    return n, batch_size(rows) if recipe.batch_size == "auto" else recipe.batch_size


def _hashes(splits: Splits) -> dict[str, str]:
    """Of what each side's rows say, in their order."""
    return {
        side: hashlib.sha256(b"".join(bytes.fromhex(row.digest()) for row in rows)).hexdigest()
        for side, rows in splits.items()
    }
