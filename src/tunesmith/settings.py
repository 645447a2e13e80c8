"""A Recipe from what was given: defaults, the task's, a file's or preset's, flags.

Each value's origin is kept: "default", "task chat", "preset quick_test", "config.json", "flag", or "auto: <rule>".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tunesmith.errors import UsageError, did_you_mean
from tunesmith.recipe import FACTS, SAFE, SWITCHES, Field, Recipe, canonical, fields

PLACES = ("dataset", "valid_dataset", "test_dataset", "model", "chat_template", "api_key_file")  # may be paths
EVALUATED = (("task", "persona"), ("task", "compression"))  # what a model is measured for, and not trained for


def resolve(flags: dict[str, Any], config: str | None = None) -> tuple[Recipe, dict[str, str]]:
    """Defaults, then the task's, the preset's or file's, then flags: (Recipe, origin of each value).

    `flags` values may be strings. Raises UsageError naming the key and where it stood.
    """
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}

    def lay(layer: dict[str, Any], name: str) -> None:
        for key, value in layer.items():
            if key in SWITCHES:
                if value and layer.get(SWITCHES[key][0], SWITCHES[key][1]) != SWITCHES[key][1]:
                    raise UsageError(
                        f"{key} contradicts {SWITCHES[key][0]} {layer[SWITCHES[key][0]]}",
                        where=key if name == "flag" else name,
                        fix="give one of the two",
                    )
                key, value = SWITCHES[key][0], SWITCHES[key][1] if value else "full"
            field = canonical(key)
            if field is None:
                raise unknown(key, "a keyword" if name == "flag" else name)
            values[field], origin[field] = _typed(field, value, field if name == "flag" else name), name

    layers = [(_sections(_load_config(config), _config_name(config)), _config_name(config))] if config else []
    layers.append((flags, "flag"))
    task = next((layer["task"] for layer, _ in reversed(layers) if "task" in layer), "chat")
    if isinstance(task, str) and (FACTS / "tasks" / f"{task}.toml").exists():
        lay(_read_toml(FACTS / "tasks" / f"{task}.toml"), f"task {task}")
    for layer, name in layers:
        lay(layer, name)
    recipe = Recipe(**values)
    if sum(0.1 if share == "auto" else share for share in (recipe.valid_fraction, recipe.test_fraction)) >= 1:
        raise UsageError(
            "valid_fraction + test_fraction leave nothing to train on",
            where="valid_fraction",
            fix="make their sum less than 1",
        )
    return recipe, {name: origin.get(name, "default") for name in fields()}


def unknown(key: str, place: str) -> UsageError:
    """The error for a name that is no setting: what another trainer's is called here, or the nearest one."""
    if fix := elsewhere().get(key.lstrip("-").replace("-", "_")):
        return UsageError(f"{key} is another trainer's setting", where=place, fix=fix)
    known = [*fields(), *(a for f in fields().values() for a in f.aliases)]
    fix = "docs/settings.md lists them all" if place == "a keyword" else "tunesmith train --help lists them all"
    return UsageError(f'unknown setting "{key}"{did_you_mean(key, known)}', where=place, fix=fix)


@functools.cache
def elsewhere() -> dict[str, str]:
    """Settings of other trainers that have no namesake here, each with what to do instead."""
    return {name: fix for name, fix in _read_toml(FACTS / "elsewhere.toml").items() if isinstance(fix, str)}


def called_here(value: Any, choices: Sequence[object]) -> str | None:
    """Which of the choices another trainer's word for a value means."""
    known: dict[str, str] = _read_toml(FACTS / "elsewhere.toml")["values"]
    found = known.get(str(value).removeprefix("torch."))
    return found if found in choices else None


def changes(
    recipe: Recipe,
    flags: dict[str, Any],
    config: str | None = None,
    alike: Callable[[Recipe, str, Any], bool] = lambda *_: False,
) -> dict[str, Any]:
    """Settings that flags and a file give and that differ from a run's. Raises UsageError for one that is not SAFE.
    `alike`: whether another word for a setting means the run's."""
    given, origin = resolve(flags, config)
    found = {}
    for name in fields():
        value, now = getattr(given, name), getattr(recipe, name)
        asked = origin[name] not in ("default", f"task {given.task}") and name not in ("output_dir", "runs_dir")
        paths = {Path(p).expanduser().resolve() for p in (value, now) if p} if name in PLACES else ()
        same = value in (now, "auto") or len(paths) == 1  # one place, however it is spelt
        if not asked or same or alike(recipe, name, value):
            continue
        if name not in SAFE:
            raise UsageError(
                f"{name} {value!r} is not the run's {now!r}: another result than that of the run would come out",
                where="--resume",
                fix=f"start a new run; what may be changed: {', '.join(SAFE)}",
            )
        found[name] = value
    return found


def _typed(name: str, value: Any, place: str) -> Any:
    field = fields()[name]
    if name == "columns" and isinstance(value, str):
        pairs = [pair.partition("=") for pair in value.split(",")]
        if not all(key.strip() and sep and column.strip() for key, sep, column in pairs):
            raise UsageError(
                f'cannot read columns "{value}"', where=place, fix="write prompt=question,completion=answer"
            )
        value = {key.strip(): column.strip() for key, _, column in pairs}
    if name == "lora_targets" and isinstance(value, list):  # as LoraConfig has them
        value = ",".join(map(str, value))
    try:
        value = msgspec.convert(value, field.type, strict=not isinstance(value, str))
        beyond = value == math.inf or isinstance(value, int) and value >= 2**63  # numbers of neither JSON nor torch
        if value == "" or beyond:
            raise msgspec.ValidationError
    except msgspec.ValidationError:
        fix = f"that is a task of tunesmith evaluate: --task {value}" if (name, value) in EVALUATED else field.help
        if here := called_here(value, field.choices()):
            fix = f"here it is {here}; {field.help}"
        near = "" if here else did_you_mean(str(value), list(field.choices()))
        said = f"is {value!r}{near}; expected {expected(field)}"
        raise UsageError(said if place == name else f"{name} {said}", where=place, fix=fix) from None
    return value


def expected(field: Field) -> str:
    """A setting's type and range in words: "a whole number over 0, or auto"."""
    if field.choices():
        return f"one of {', '.join(map(str, field.choices()))}"
    words = "true or false" if field.type is bool else "some text"
    if number := field.number():
        kind, limits = number
        words = "a whole number" if kind is int else "a number"
        words += " over 0" if limits.gt == 0 else f" from {limits.ge} up"
        words += f", {limits.le} at most" if limits.le is not None else ""
        words += f" to {limits.lt} (less than that)" if limits.lt is not None else ""
    or_auto = ", or auto" if "auto" in str(field.type) else ""
    return f"{words}{or_auto}"


def _config_name(config: str) -> str:
    return config if Path(config).is_file() else f"preset {config}"


def _load_config(config: str) -> dict[str, Any]:
    """A TOML or JSON file, or the name of a preset."""
    path = Path(config)
    if not path.is_file():
        presets = {preset.stem: preset for preset in sorted((FACTS / "presets").glob("*.toml"))}
        if config not in presets:
            what = "not a file" if path.exists() else f"no such file or preset{did_you_mean(config, list(presets))}"
            raise UsageError(what, where=config, fix=f"name a .toml or .json file, or a preset: {', '.join(presets)}")
        return _read_toml(presets[config])
    try:
        data = _read_json(path) if path.suffix == ".json" else _read_toml(path)
    except OSError as error:
        fix = "name a file that this user may read"
        raise UsageError(f"cannot be read: {error.strerror}", where=config, fix=fix) from None
    except ValueError as error:  # no JSON, or no text at all
        raise UsageError(f"cannot be read: {error}", where=config, fix="write a JSON object (.json) or TOML") from None
    if not isinstance(data, dict):
        raise UsageError("holds no object", where=config, fix='write {"dataset": "data.jsonl", "epochs": 3}')
    return data


def _sections(config: dict[str, Any], place: str) -> dict[str, Any]:
    """Settings may stand at the top or under their group's name ([training])."""
    groups = {field.group for field in fields().values()}  # [method] is a group where `method = "lora"` is a setting
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and key not in groups and canonical(key) is None:
            raise UsageError(
                f"no group of settings [{key}]{did_you_mean(key, sorted(groups))}",
                where=place,
                fix=f"groups: {', '.join(sorted(groups))}",
            )
        flat |= value if key in groups and isinstance(value, dict) else {key: value}
    return flat


def _read_json(path: Path) -> Any:
    import json  # not on the way to help

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = next((name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i])), None)
        if twice is not None:
            raise UsageError(f"{twice} stands there twice", where=str(path), fix="leave one of the two out")
        return dict(pairs)

    return json.loads(path.read_bytes(), object_pairs_hook=once)


def _read_toml(path: Path) -> dict[str, Any]:
    import tomllib  # 3 ms: not on the way to help

    with path.open("rb") as stream:
        try:
            return tomllib.load(stream)
        except tomllib.TOMLDecodeError as error:
            data = path.suffix in (".jsonl", ".csv", ".tsv")
            fix = f"rows are named by --dataset {path}" if data else "strings need quotes; see toml.io"
            raise UsageError(f"not TOML: {error}", where=str(path), fix=fix) from None
