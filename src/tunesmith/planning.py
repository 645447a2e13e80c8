"""What a recipe will do, before anything is loaded or written: rows, tokens, steps, memory, findings.

`prepare` walks the whole data road (read, check, split, render) and stops with DataError on anything
that would spoil the run. Its Prepared goes to a backend; its Plan is what `tunesmith plan` shows.
"""

from __future__ import annotations

import math
import os
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from tunesmith.conversation import Conversation, Issue
from tunesmith.costs import ADAPTERS, freeze_ratio, memory_mb, steps_per_epoch, trainable
from tunesmith.data.check import load
from tunesmith.data.findings import finding
from tunesmith.data.persona import persona
from tunesmith.data.split import Splits, leaks, prompt_key, split
from tunesmith.data.spread import cores
from tunesmith.errors import DataError, UsageError
from tunesmith.models import STARTER, ModelFacts, facts, find, linear_modules
from tunesmith.preflight import fit, has_calls, idle_settings, refuse_impossible, token_issues, tool_calls_lost
from tunesmith.recipe import FACTS, Recipe, need_dataset
from tunesmith.render import Rendered, Renderer


class Plan(msgspec.Struct, frozen=True):
    """Counts are of rows and tokens as rendered; `memory_mb` estimates the peak when the longest rows meet in a batch."""

    recipe: Recipe
    origin: dict[str, str]
    model: ModelFacts
    rows: dict[str, int]
    tokens: dict[str, int]
    supervised_tokens: dict[str, int]
    longest: int
    dropped: int
    formats: dict[str, int]
    steps_per_epoch: int
    steps: int
    trainable_parameters: int
    memory_mb: int
    issues: list[Issue]


class Prepared(msgspec.Struct, frozen=True):
    """A plan with the rows behind it, split, and rendered in the same order."""

    plan: Plan
    splits: Splits
    rendered: dict[str, list[Rendered]]


def prepare(recipe: Recipe, origin: dict[str, str]) -> Prepared:
    """Read, check, split, render and count. Writes nothing; raises the first thing that is wrong."""
    refuse_impossible(recipe)
    folder = find(recipe.model)
    if folder != STARTER and Path(recipe.model).is_dir():  # a run must find its base from any working directory
        recipe = msgspec.structs.replace(recipe, model=str(folder.resolve()))
    model = facts(folder)
    _check_targets(recipe, folder)
    splits, issues, formats = _splits(recipe)
    if recipe.num_workers != "auto":
        os.environ["RAYON_NUM_THREADS"] = str(recipe.num_workers)  # read by tokenizers when its pool starts
    renderer = Renderer(folder)
    limit = model.context if recipe.max_length == "auto" else recipe.max_length
    if limit > model.context:
        raise DataError(
            f"max_length {limit} is over the model's context of {model.context}",
            where=recipe.model,
            fix=f"set --max-length {model.context} or less",
        )
    rendered, kept, dropped = {}, {}, 0
    for side, rows in splits.items():
        whole = list(renderer.render_all(rows))
        fits, found = fit(whole, limit, recipe.over_long, side)
        issues.extend(found)
        rendered[side] = [r for r in fits if r]
        kept[side] = [row for row, r in zip(rows, fits, strict=True) if r]
        dropped += len(rows) - len(kept[side])
    if not rendered["train"]:
        cut = recipe.over_long == "truncate"
        raise DataError(
            f"all rows are longer than {limit} tokens"
            + (", and cut there nothing of an answer is left" if cut else ""),
            where=need_dataset(recipe),
            fix="shorten them, or use a model with a longer context"
            + (" or a greater --max-length" if recipe.max_length != "auto" else ""),
        )
    issues.extend(token_issues(rendered["train"], renderer, model))
    both = zip(kept["train"], rendered["train"], strict=True)
    lost = next((issue for row, r in both if has_calls(row) and (issue := tool_calls_lost(row, r))), None)
    issues.extend([lost] if lost else [])
    stop = next((i for i in issues if i.severity == "error"), None)
    if stop:
        raise DataError(f"{stop.message} [{stop.code}]", where=stop.where, fix=stop.fix)
    recipe, origin = _resolve_auto(recipe, origin, model, len(kept["train"]), limit, kept)
    issues.extend(idle_settings(recipe, origin))
    return Prepared(_plan(recipe, origin, model, rendered, dropped, formats, issues), kept, rendered)


def _check_targets(recipe: Recipe, folder: Path) -> None:
    if recipe.method not in ADAPTERS:
        return
    if (folder / "adapter_config.json").exists():
        raise UsageError(
            "the model is an adapter, and an adapter cannot stand on another",
            where=recipe.model,
            fix="use --method full",
        )
    if recipe.lora_targets == "all-linear":
        return
    modules = linear_modules(folder)
    for target in recipe.lora_targets.split(","):
        if target.strip() not in modules:
            raise UsageError(
                f'lora_targets: no layer "{target.strip()}"',
                where=recipe.model,
                fix=f"it has {', '.join(sorted(modules))}",
            )


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


def _splits(recipe: Recipe) -> tuple[Splits, list[Issue], dict[str, int]]:
    _refuse_parts(need_dataset(recipe))
    how = {"task": recipe.task, "provider": recipe.provider}
    loaded = load(need_dataset(recipe), recipe.columns, **how).require()
    issues, apart = list(loaded.issues), {}
    for side, name in (("valid", recipe.valid_dataset), ("test", recipe.test_dataset)):
        if name:
            part = load(name, recipe.columns, **how).require()
            apart[side] = part.conversations
            issues.extend(part.issues)
    splits = split(
        loaded.conversations,
        0 if "valid" in apart else recipe.valid_fraction,
        0 if "test" in apart else recipe.test_fraction,
        method=recipe.split_method,
        seed=recipe.seed,
        group_by=recipe.group_by,
    )
    trained, seen = ({key(row) for row in splits["train"]} for key in (prompt_key, Conversation.digest))
    for side, rows in apart.items():
        splits[side] = rows
        same = [row for row in rows if row.digest() in seen]
        if same:
            message = f"{len(same)} rows of the {side} set are training rows"
            raise DataError(f"{message} [leak]", where=same[0].source, fix="remove them from one of the two")
        both = [row for row in rows if prompt_key(row) in trained]
        if both:
            issues.append(
                finding(
                    "leak",
                    both[0].source,
                    f"{len(both)} rows of the {side} set ask what a training row asks",
                    "remove them from one of the two",
                )
            )
    if apart and set(map(prompt_key, splits["valid"])) & (tested := set(map(prompt_key, splits["test"]))):
        both = [row for row in splits["valid"] if prompt_key(row) in tested]
        raise DataError(
            f"{len(both)} validation rows ask what a test row asks: the best step would be chosen on the test [leak]",
            where=both[0].source,
            fix="remove them from one of the two",
        )
    near = [leak for leak in leaks(splits) if "alike" in leak.message]
    if near:
        message = f"{len(near)} rows are nearly the same on two sides: {near[0].message}"
        issues.append(msgspec.structs.replace(near[0], message=message))
    return splits, issues, loaded.formats


# ---- auto


def _threads(recipe: Recipe) -> tuple[int, str]:
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdigit() and int(said):
        return int(said), "OMP_NUM_THREADS"
    return max(
        1, cores() // recipe.nproc
    ), "every core" if recipe.nproc == 1 else f"every core, for {recipe.nproc} processes"


def _step(rule: dict[str, Any], size: int) -> Any:
    return next(s["value"] for s in rule["steps"] if size <= s["up_to"])


def _resolve_auto(
    recipe: Recipe, origin: dict[str, str], model: ModelFacts, rows: int, limit: int, kept: Splits
) -> tuple[Recipe, dict[str, str]]:
    """Numbers for every "auto", each with the rule as its origin (facts/auto.toml)."""
    with (FACTS / "auto.toml").open("rb") as stream:
        rules = tomllib.load(stream)
    rate = rules["learning_rate"]["lora" if recipe.method in ADAPTERS else "full"]
    name, count = persona(kept["train"])
    values: dict[str, tuple[Any, str]] = {
        "max_length": (limit, "the model's context"),
        "num_workers": (cores(), "every core"),
        "threads": _threads(recipe),
        "persona": (name, f"named in {count} answers" if count else "no name found in the answers"),
        "lora_alpha": (2 * recipe.lora_rank, "twice the rank"),
        "freeze_ratio": (freeze_ratio(recipe), f"method {recipe.method}"),
        "micro_batch_tokens": (8192, "activations of so many tokens fit where the model does"),
        "learning_rate": (
            _step(rate, model.parameters),
            f"{recipe.method}, {model.parameters / 1e6:.1f}M parameters: {rate['reason']}",
        ),
        "epochs": (_step(rules["epochs"], rows), f"{rows} rows: {rules['epochs']['reason']}"),
        "batch_size": (_step(rules["batch_size"], rows), f"{rows} rows: {rules['batch_size']['reason']}"),
    }
    new = {k: v for k, (v, _) in values.items() if getattr(recipe, k) == "auto"}
    batch = new.get("batch_size", recipe.batch_size)
    per_epoch = math.ceil(rows / (batch * recipe.gradient_accumulation_steps))
    if recipe.eval_steps == "auto":
        new["eval_steps"], values["eval_steps"] = per_epoch, (per_epoch, "once an epoch")
    if recipe.save_steps == "auto":
        steps = new.get("eval_steps", recipe.eval_steps)
        new["save_steps"], values["save_steps"] = steps, (steps, "at each validation")
    return msgspec.structs.replace(recipe, **new), {**origin, **{k: f"auto: {values[k][1]}" for k in new}}


# ---- cost


def _plan(
    recipe: Recipe,
    origin: dict[str, str],
    model: ModelFacts,
    rendered: dict[str, list[Rendered]],
    dropped: int,
    formats: dict[str, int],
    issues: list[Issue],
) -> Plan:
    assert isinstance(recipe.batch_size, int) and isinstance(recipe.epochs, int)
    budget = int(recipe.micro_batch_tokens)
    rows = {side: len(part) for side, part in rendered.items()}
    per_epoch = steps_per_epoch(rows["train"], recipe)
    steps = per_epoch * recipe.epochs
    lengths = sorted(len(r.ids) for r in rendered["train"])
    longest = max(len(r.ids) for part in rendered.values() for r in part)
    trained = trainable(recipe, model)
    return Plan(
        recipe,
        origin,
        model,
        rows,
        tokens={s: sum(len(r.ids) for r in p) for s, p in rendered.items()},
        supervised_tokens={s: sum(sum(r.mask[1:]) for r in p) for s, p in rendered.items()},
        longest=longest,
        dropped=dropped,
        formats=formats,
        steps_per_epoch=per_epoch,
        steps=min(steps, recipe.max_steps or steps),
        trainable_parameters=trained,
        memory_mb=memory_mb(recipe, model, trained, min(sum(lengths[-recipe.batch_size :]), max(budget, longest))),
        issues=issues,
    )


def output_path(recipe: Recipe) -> Path:
    """Where the run goes: exactly --output-dir, else RUNS_DIR/TASK_DATASET, with -2, -3 … when that is taken."""
    if recipe.output_dir:
        return Path(recipe.output_dir).expanduser()
    name = Path(need_dataset(recipe).rstrip("/")).name.split(".")[0]
    base = Path(recipe.runs_dir).expanduser() / f"{recipe.task}_{name}"
    path, number = base, 2
    while path.exists() and any(path.iterdir()):
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path
