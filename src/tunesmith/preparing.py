"""The data of a run: read, checked, split and rendered. A large one is kept on disk, and used again by its hash.

A data set of over LARGE bytes never stands in memory whole: its rows and their tokens lie in files under
$XDG_CACHE_HOME/tunesmith/data, in a folder named by a hash of all that decides their content.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tunesmith.conversation import Conversation, Issue
from tunesmith.data.check import HOSTED_ROWS, Loaded, load
from tunesmith.data.findings import finding
from tunesmith.data.persona import names, persona
from tunesmith.data.read import files
from tunesmith.data.scan import Progress, size
from tunesmith.data.split import Splits, near_leaks, prompt_key, split
from tunesmith.data.spread import cores, spread
from tunesmith.data.store import Chosen, Store, pick
from tunesmith.data.write import begun, kept, sync_folder, tidy, write_json
from tunesmith.errors import DataError, RunError, TunesmithError, UsageError
from tunesmith.models import ModelFacts
from tunesmith.preflight import Seen
from tunesmith.recipe import Recipe, need_dataset
from tunesmith.render import TOKENIZER_FILES, Renderer
from tunesmith.tokens import Flat, Tokens, Writer, flatten, load_tokens

LARGE = 32 << 20  # bytes of a data set that is kept on disk instead of in memory
PART = 1024  # rows rendered at a time
DECIDE = (
    *("dataset", "valid_dataset", "test_dataset", "columns", "task", "provider"),
    *("valid_fraction", "test_fraction", "split_method", "seed", "group_by", "over_long"),
)
# Rows: steps are compared on the same 500, so that little of their spread is left; a verdict wants a narrow interval
MOST_HELD_OUT = {"valid_fraction": 500, "test_fraction": 2000}
FORM = 1  # of what is kept: to be raised with every change of the rules by which rows are checked, split or rendered


class Facts(msgspec.Struct, frozen=True):
    """What was found out: `hashes` of what each side's rows say; `dropped`: over-long rows left out; `persona`: of
    `data.persona`; `shares`: what was held out, by the setting's name."""

    hashes: dict[str, str]
    issues: list[Issue]
    formats: dict[str, int]
    dropped: int
    persona: tuple[str, int]
    shares: dict[str, float]


class Data(msgspec.Struct, frozen=True):
    """Rows and tokens of each side, in the same order."""

    rows: Splits
    tokens: dict[str, Tokens]
    facts: Facts


class Kept(msgspec.Struct, frozen=True):
    """What is kept of a Data besides its arrays; `stores`: of each side, the name of the file its rows are in."""

    facts: Facts
    stores: dict[str, str]


def prepare_data(
    recipe: Recipe, renderer: Renderer, model: ModelFacts, limit: int, progress: Progress | None = None
) -> Data:
    """The data of a run with rows of `limit` tokens at most. Raises DataError where it cannot be used at all."""
    listed = [(name, files(name)) for name in _datasets(recipe)]
    if any(paths is None for _, paths in listed) or size(listed) < LARGE:
        return _made(recipe, renderer, model, limit, None, progress)
    folder = kept("data") / _key([path for _, paths in listed for path in paths or ()], recipe, renderer, model, limit)
    if (folder / "facts.json").exists():
        try:
            os.utime(folder)
            return _opened(folder)
        except (OSError, ValueError, RunError, msgspec.DecodeError):  # damaged: made anew
            shutil.rmtree(folder)
    tidy(folder.parent)
    building = begun(folder)
    try:
        building.mkdir(parents=True)
    except OSError as error:
        what = f"so large a data set is prepared on disk: {error.strerror}"
        fix = "set XDG_CACHE_HOME to a folder that may be written"
        raise TunesmithError(what, where=str(folder.parent), fix=fix) from None
    try:
        made = _made(recipe, renderer, model, limit, building, progress)
        if any(issue.severity == "error" for issue in made.facts.issues) or not len(made.rows["train"]):
            return made  # and nothing is kept: the files stay open until it is gone
        _save(made, building)
        if not folder.exists():
            building.replace(folder)
            sync_folder(folder.parent)
        return _opened(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _datasets(recipe: Recipe) -> list[str]:
    return [name for name in (need_dataset(recipe), recipe.valid_dataset, recipe.test_dataset) if name]


# ---- kept on disk


def _key(paths: list[Path], recipe: Recipe, renderer: Renderer, model: ModelFacts, limit: int) -> str:
    """Hash of all that decides what is kept: the files' bytes and names, the settings, the tokenizer with its template, and
    the vocabulary that ids were checked against."""
    said = [FORM, MOST_HELD_OUT, *(getattr(recipe, name) for name in DECIDE)]
    digest = hashlib.sha256(repr((version("tunesmith"), version("tokenizers"), limit, model.vocabulary, said)).encode())
    for name in TOKENIZER_FILES:
        if (renderer.folder / name).exists():
            digest.update((renderer.folder / name).read_bytes())
    digest.update(renderer.template.encode())
    for path in paths:
        digest.update(str(path).encode())
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:32]


def _save(data: Data, folder: Path) -> None:
    stores = {}
    for side, rows in data.rows.items():
        store = rows.store if isinstance(rows, Chosen) else rows
        assert isinstance(store, Store)
        stores[side] = store.path.name
        np.save(folder / f"{store.path.name}.starts.npy", store.starts)
        np.save(folder / f"{side}.rows.npy", rows.rows if isinstance(rows, Chosen) else np.arange(len(store)))
    write_json(folder / "facts.json", Kept(data.facts, stores))


def _opened(folder: Path) -> Data:
    kept = msgspec.json.decode((folder / "facts.json").read_bytes(), type=Kept)
    rows: Splits = {}
    tokens = {}
    for side, name in kept.stores.items():
        store = Store(folder / name, np.load(folder / f"{name}.starts.npy"))
        rows[side] = Chosen(store, np.load(folder / f"{side}.rows.npy"))
        tokens[side] = load_tokens(folder, side, len(rows[side]))
    return Data(rows, tokens, kept.facts)


# ---- made


def _made(
    recipe: Recipe, renderer: Renderer, model: ModelFacts, limit: int, folder: Path | None, progress: Progress | None
) -> Data:
    """The whole road. With `folder`, rows and tokens lie there instead of in memory."""
    splits, issues, formats, shares = read_splits(recipe, folder, progress)
    give_back()
    sides = rendered(splits, renderer, limit, recipe, folder, progress)
    kept: Splits = {}
    for side, rows in splits.items():
        found = sides[side]
        issues += found.seen.lengths(side)
        kept[side] = rows if len(found.numbers) == len(rows) else pick(rows, found.numbers)
    if len(kept["train"]):
        issues += sides["train"].seen.training(model.vocabulary)
    dropped = sum(map(len, splits.values())) - sum(map(len, kept.values()))
    tokens = {side: found.tokens for side, found in sides.items()}
    hashes = {side: found.hash for side, found in sides.items()}
    named = persona(sides["train"].names, len(kept["train"]))
    return Data(kept, tokens, Facts(hashes, issues, formats, dropped, named, shares))


def give_back() -> None:
    """Let the system have what was freed: the C library would keep 400 MB after a million rows, 200 after an export."""
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(AttributeError):  # musl
            ctypes.CDLL(None).malloc_trim(0)


class Side(msgspec.Struct):
    """What was seen when a side's rows were rendered, the numbers of those that are kept, what their answers call the speaker,
    their tokens, and a hash of what they say, in their order."""

    seen: Seen
    numbers: array[int]
    names: Counter[str]
    tokens: Tokens
    hash: str = ""


def rendered(
    splits: Splits,
    renderer: Renderer,
    limit: int,
    recipe: Recipe,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Side]:
    """Every side's rows as tokens, by `num_workers` processes."""

    def begin() -> Seen:
        return Seen(limit, recipe.over_long, renderer.stop_ids)

    def one(part: tuple[str, int]) -> tuple[str, Seen, array[int], Counter[str], Flat, bytes]:
        side, start = part
        rows = splits[side]
        seen, numbers = begin(), range(start, min(start + PART, len(rows)))
        mine = [rows[i] for i in numbers]
        taken = [seen.take(row, r) for row, r in zip(mine, renderer.render_all(mine), strict=True)]
        called = Counter(name for row, r in zip(mine, taken, strict=True) if r for name in names(row.answer()))
        kept = array("q", (i for i, r in zip(numbers, taken, strict=True) if r))
        said = b"".join(bytes.fromhex(row.digest()) for row, r in zip(mine, taken, strict=True) if r)
        return side, seen, kept, called, Flat.of(r for r in taken if r), said

    parts = [(side, start) for side, rows in splits.items() for start in range(0, len(rows), PART)]
    processes = cores() if recipe.num_workers == "auto" else recipe.num_workers
    found = {side: Side(begin(), array("q"), Counter(), flatten([])) for side in splits}
    writers = {side: Writer(folder, side) for side in splits}
    hashes = {side: hashlib.sha256() for side in splits}
    total = sum(map(len, splits.values()))
    # The first part is rendered here: the processes begin with the words that it has taught the renderer
    for side, seen, numbers, called, flat, said in spread(
        one, parts, min(processes, len(parts)), lambda part: part == parts[0]
    ):
        found[side].seen.add(seen)
        found[side].numbers += numbers
        found[side].names += called
        writers[side].add(flat)
        hashes[side].update(said)
        if progress:
            done = sum(side.seen.rows for side in found.values())
            progress(done, done / total, "rendering")
    for side, writer in writers.items():
        found[side].tokens, found[side].hash = writer.close(), hashes[side].hexdigest()
    return found


def _refuse_parts(dataset: str) -> None:
    """UsageError for a folder that holds a split already: read as one data set, its parts would be mixed again."""
    folder = Path(dataset)
    files = {p.name.split(".")[0].rpartition("_")[2]: p for p in sorted(folder.glob("*.*"))} if folder.is_dir() else {}
    held = [files[side] for side in ("valid", "val", "validation", "test") if side in files]
    if "train" in files and held:
        flag = "--test-dataset" if "test" in held[0].name else "--valid-dataset"
        raise UsageError(
            "this folder holds train and held-out files, which training would mix",
            where=dataset,
            fix=f"--dataset {files['train']} {flag} {held[0]}",
        )


def read_splits(
    recipe: Recipe, folder: Path | None = None, progress: Progress | None = None
) -> tuple[Splits, list[Issue], dict[str, int], dict[str, float]]:
    """The rows of each side (on disk in `folder`, where one is given); findings, formats, and the shares held out."""
    _refuse_parts(need_dataset(recipe))
    how: dict[str, Any] = {"task": recipe.task, "provider": recipe.provider, "progress": progress, "rewritten": True}
    if recipe.num_workers != "auto":
        how["processes"] = recipe.num_workers

    def read(dataset: str, name: str) -> Loaded:
        store = folder / f"{name}.jsonl" if folder else None
        return load(dataset, recipe.columns, store=store, **how).require()

    loaded = read(need_dataset(recipe), "all")
    issues = list(loaded.issues)
    give_back()
    apart: Splits = {}
    for side, name in (("valid", recipe.valid_dataset), ("test", recipe.test_dataset)):
        if name:
            part = read(name, side)
            apart[side] = part.rows()
            issues.extend(part.issues)
    if progress:
        progress(loaded.usable, 0.0, "splitting")
    shares = held_out(recipe, loaded.usable)
    splits = split(
        loaded.rows(),
        0 if "valid" in apart else shares["valid_fraction"],
        0 if "test" in apart else shares["test_fraction"],
        method=recipe.split_method,
        seed=recipe.seed,
        group_by=recipe.group_by,
    )
    if apart:
        issues.extend(_shared(splits, apart))
        splits.update(apart)
    give_back()
    if near := near_leaks(splits):
        message = f"{len(near)} rows are nearly the same on two sides: {near[0].message}"
        issues.append(msgspec.structs.replace(near[0], message=message))
    return splits, issues, loaded.formats, shares


def held_out(recipe: Recipe, rows: int) -> dict[str, float]:
    """The shares held out; auto: a tenth, of many rows MOST_HELD_OUT. Where rows must not change sides: a tenth of any."""
    shares = {"valid_fraction": recipe.valid_fraction, "test_fraction": recipe.test_fraction}
    found = {name: 0.1 if share == "auto" else share for name, share in shares.items()}
    for name, most in MOST_HELD_OUT.items():
        if shares[name] == "auto" and recipe.split_method != "threshold":
            found[name] = min(0.1, math.floor(1e6 * most / max(rows, 1)) / 1e6)
    if (
        recipe.provider == "openai" and recipe.valid_fraction == "auto"
    ):  # a tenth of few rows would be no file to a service
        found["valid_fraction"] = max(
            found["valid_fraction"], min(0.25, math.ceil(1e6 * HOSTED_ROWS / max(rows, 1)) / 1e6)
        )
    return found


def _shared(splits: Splits, apart: Splits) -> Iterator[Issue]:
    """What held-out files have in common with the training rows, and with each other."""
    trained, seen = ({key(row) for row in splits["train"]} for key in (prompt_key, Conversation.digest))
    for side, rows in apart.items():
        same = [row for row in rows if row.digest() in seen]
        if same:
            message = f"{len(same)} rows of the {side} set are training rows"
            raise DataError(f"{message} [leak]", where=same[0].source, fix="remove them from one of the two")
        both = [row for row in rows if prompt_key(row) in trained]
        if both:
            message = f"{len(both)} rows of the {side} set ask what a training row asks"
            yield finding("leak", both[0].source, message, "remove them from one of the two")
    held = {**splits, **apart}
    tested = set(map(prompt_key, held["test"]))
    both = [row for row in held["valid"] if prompt_key(row) in tested]
    if both:
        raise DataError(
            f"{len(both)} validation rows ask what a test row asks: the best step would be chosen on the test [leak]",
            where=both[0].source,
            fix="remove them from one of the two",
        )
