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
import numpy as np

from tunesmith.conversation import Issue
from tunesmith.costs import ADAPTERS, freeze_ratio, memory_mb, planned_steps, steps_per_epoch, trainable
from tunesmith.data.scan import Progress
from tunesmith.data.split import Splits
from tunesmith.data.spread import cores
from tunesmith.data.stats import Bill
from tunesmith.errors import DataError, UsageError
from tunesmith.models import STARTER, ModelFacts, facts, find, linear_modules
from tunesmith.preflight import idle_settings, long_warmup, refuse_impossible
from tunesmith.preparing import MOST_HELD_OUT, Data, prepare_data
from tunesmith.recipe import FACTS, MOST_CORES, Recipe, need_dataset
from tunesmith.render import Renderer, chosen_template, own_template
from tunesmith.tokens import Tokens

WARMUP = 100  # steps


class Plan(msgspec.Struct, frozen=True):
    """What training would do and need.

    Of a model that a service trains, nothing but the length of its rows is known (`context`; 0: not even that), and tokens are
    counted as they are billed (`bill`), or not at all.
    """

    recipe: Recipe  # every setting, nothing `auto` left
    origin: dict[str, str]  # where each comes from: flag, config, a rule
    model: ModelFacts  # what is trained
    rows: dict[str, int]  # of each side: train, valid, test
    tokens: dict[str, int]  # of each side, as rendered
    supervised_tokens: dict[str, int]  # of each side, those that are learnt
    longest: int  # tokens of the longest row
    dropped: int  # rows left out for their length
    formats: dict[str, int]  # rows of each format
    steps_per_epoch: int  # optimizer steps
    steps: int  # in all, at most
    trainable_parameters: int  # by the method
    memory_mb: int  # peak, estimated, when the longest rows meet in a batch
    issues: list[Issue]  # warnings and notes about data and settings
    bill: Bill | None = None  # what a service would ask; None: trained here


class Prepared(msgspec.Struct, frozen=True):
    """A plan with the rows behind it, split, and rendered."""

    plan: Plan  # what `ts.plan` returns
    splits: Splits  # rows of each side: train, valid, test
    tokens: dict[str, Tokens]  # of each side, in the same order; none for a service
    hashes: dict[str, str]  # of each side's rows
    renderer: Renderer | None = None  # template and tokenizer; None for a service


def prepare(recipe: Recipe, origin: dict[str, str], progress: Progress | None = None) -> Prepared:
    """Read, check, split, render and count; raises the first thing that is wrong. Makes no run: what is written is the
    cache of a large data set."""
    refuse_impossible(recipe)
    folder = find(recipe.model)
    if folder != STARTER and Path(recipe.model).is_dir():  # a run must find its base from any working directory
        recipe = msgspec.structs.replace(recipe, model=str(folder.resolve()))
    model = facts(folder)
    _check_targets(recipe, folder)
    recipe, origin = _template(recipe, origin, folder)
    renderer = Renderer(folder, chosen_template(recipe.chat_template, folder))
    limit = model.context if recipe.max_length == "auto" else recipe.max_length
    if limit > model.context:
        raise DataError(
            f"max_length {limit} is over the model's context of {model.context}",
            where=recipe.model,
            fix=f"set --max-length {model.context} or less",
        )
    found = prepare_data(recipe, renderer, model, limit, progress)
    issues = list(found.facts.issues)
    if not len(found.rows["train"]):
        cut = recipe.over_long == "truncate"
        raise DataError(
            f"all rows are longer than {limit} tokens"
            + (", and cut there nothing of an answer is left" if cut else ""),
            where=need_dataset(recipe),
            fix="shorten them, or use a model with a longer context"
            + (" or a greater --max-length" if recipe.max_length != "auto" else ""),
        )
    stop = next((i for i in issues if i.severity == "error"), None)
    if stop:
        raise DataError(f"{stop.message} [{stop.code}]", where=stop.where, fix=stop.fix)
    recipe, origin = _resolve_auto(recipe, origin, model, limit, found)
    issues.extend(idle_settings(recipe, origin, validated=bool(len(found.rows["valid"]))))
    issues.extend(long_warmup(recipe, origin, planned_steps(len(found.rows["train"]), recipe)))
    return Prepared(_plan(recipe, origin, model, found, issues), found.rows, found.tokens, found.facts.hashes, renderer)


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


# ---- auto


def _alpha(recipe: Recipe) -> tuple[int, str]:
    """A scale of 2 at every rank; where rsLoRA divides by the root of the rank, of 2 at rank 16 and less above."""
    return (8, "rsLoRA: a scale of 2 at rank 16") if recipe.use_rslora else (2 * recipe.lora_rank, "twice the rank")


def _threads(recipe: Recipe) -> tuple[int, str]:
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdigit() and int(said):
        return min(int(said), MOST_CORES), "OMP_NUM_THREADS"
    return max(
        1, cores() // recipe.nproc
    ), "every core" if recipe.nproc == 1 else f"every core, for {recipe.nproc} processes"


def _step(rule: dict[str, Any], size: int) -> Any:
    return next(s["value"] for s in rule["steps"] if size <= s["up_to"])


def _rules() -> dict[str, Any]:
    with (FACTS / "auto.toml").open("rb") as stream:
        return tomllib.load(stream)


def _template(recipe: Recipe, origin: dict[str, str], folder: Path) -> tuple[Recipe, dict[str, str]]:
    """The chat template's name for "auto"; a file's path as it is from any working directory."""
    name, why = recipe.chat_template, origin["chat_template"]
    if name == "auto":
        rule = _rules()["chat_template"]
        own = own_template(folder) is not None
        name, why = (
            ("model", "auto: its own") if own else (rule[recipe.task], f"auto: task {recipe.task}: {rule['reason']}")
        )
    elif Path(name).suffix:
        name = str(Path(name).expanduser().resolve())
    return msgspec.structs.replace(recipe, chat_template=name), {**origin, "chat_template": why}


def _resolve_auto(
    recipe: Recipe, origin: dict[str, str], model: ModelFacts, limit: int, data: Data
) -> tuple[Recipe, dict[str, str]]:
    """Numbers for every "auto", each with the rule as its origin (facts/auto.toml)."""
    rules = _rules()
    rate = rules["learning_rate"]["lora" if recipe.method in ADAPTERS else "full"]
    rows, (name, count) = len(data.rows["train"]), data.facts.persona
    values: dict[str, tuple[Any, str]] = {
        **{
            name: (share, f"a tenth, {MOST_HELD_OUT[name]:,} rows at most") for name, share in data.facts.shares.items()
        },
        "max_length": (limit, "the model's context"),
        "num_workers": (cores(), "every core"),
        "threads": _threads(recipe),
        "persona": (name, f"named in {count} answers" if count else "no name found in the answers"),
        "lora_alpha": _alpha(recipe),
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
    if recipe.warmup_ratio == "auto":
        steps = min(per_epoch * new.get("epochs", recipe.epochs), recipe.max_steps or math.inf)
        new["warmup_ratio"] = min(0.1, math.floor(1e6 * WARMUP / steps) / 1e6)
        values["warmup_ratio"] = (None, f"a tenth of the steps, {WARMUP} at most: Adam's moments are settled by then")
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
    data: Data,
    issues: list[Issue],
) -> Plan:
    assert isinstance(recipe.batch_size, int)
    budget = int(recipe.micro_batch_tokens)
    rows = {side: len(part) for side, part in data.rows.items()}
    lengths = np.sort(data.tokens["train"].lengths())
    longest = max(int(part.lengths().max()) for part in data.tokens.values() if len(part))
    trained = trainable(recipe, model)
    return Plan(
        recipe,
        origin,
        model,
        rows,
        tokens={side: len(part.ids) for side, part in data.tokens.items()},
        supervised_tokens={side: part.all_supervised() for side, part in data.tokens.items()},
        longest=longest,
        dropped=data.facts.dropped,
        formats=data.facts.formats,
        steps_per_epoch=steps_per_epoch(rows["train"], recipe),
        steps=planned_steps(rows["train"], recipe),
        trainable_parameters=trained,
        memory_mb=memory_mb(
            recipe, model, trained, min(int(lengths[-recipe.batch_size :].sum()), max(budget, longest))
        ),
        issues=issues,
    )
