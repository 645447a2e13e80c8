"""Settings: layers, origins, errors; presets and tasks; what "auto" becomes."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import msgspec
import pytest

from conftest import ROOT
from tunesmith.errors import UsageError
from tunesmith.recipe import FACTS, Recipe, canonical, fields
from tunesmith.settings import resolve


def test_layers_and_origins(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text('task = "domain"\nepochs = 4\n[training]\nlearning_rate = 1e-4\n')
    recipe, origin = resolve({"epochs": "7"}, str(config))
    assert (recipe.epochs, recipe.learning_rate, recipe.persona, recipe.warmup_ratio, recipe.batch_size) == (
        7,
        1e-4,
        "none",
        0.15,
        "auto",
    )
    assert {k: origin[k] for k in ("epochs", "learning_rate", "persona", "batch_size")} == {
        "epochs": "flag",
        "learning_rate": str(config),
        "persona": "task domain",
        "batch_size": "default",
    }


def test_json_config_of_the_first_guide(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "dataset": "training_dataset.jsonl",
                "provider": "huggingface",
                "model": "gpt2",
                "output_dir": "./echo-finetuned",
                "epochs": 3,
                "batch_size": 4,
                "learning_rate": 5e-5,
            }
        )
    )
    recipe, _ = resolve({}, str(config))
    assert (recipe.model, recipe.epochs, recipe.batch_size, recipe.learning_rate, recipe.output_dir) == (
        "gpt2",
        3,
        4,
        5e-5,
        "./echo-finetuned",
    )


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("--base-model", "model"),
        ("--num-epochs", "epochs"),
        ("--per-device-train-batch-size", "batch_size"),
        ("num_epochs", "epochs"),
        ("n_epochs", "epochs"),
        ("--lr-scheduler-type", "lr_scheduler"),
        ("--nonsense", None),
    ],
)
def test_aliases(alias: str, name: str | None) -> None:
    assert canonical(alias) == name


def test_lora_switch_and_columns() -> None:
    recipe, _ = resolve({"lora": True, "columns": "prompt=q, completion=a"})
    assert recipe.method == "lora" and recipe.columns == {"prompt": "q", "completion": "a"}
    assert resolve({"columns": {"prompt": "q"}})[0].columns == {"prompt": "q"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"epoks": 1}, 'did you mean "epochs"'),
        ({"epochs": 0}, "a whole number over 0, or auto"),
        ({"epochs": "three"}, "epochs: is 'three'"),
        ({"task": "chta"}, "one of chat, code"),
        ({"valid_fraction": 1.0}, "to 1 (less than that)"),
        ({"lora_rank": 0}, "a whole number over 0"),
        ({"seed": "x"}, "a whole number from 0 up"),
        ({"seed": 2**63}, "a whole number"),
        ({"warmup_steps": -5}, "a whole number"),
        ({"max_grad_norm": "inf"}, "a number from 0 up"),
        ({"min_gain": float("nan")}, "a number from 0 up"),
        ({"dataset": ""}, "some text"),
        ({"lora": True, "method": "full"}, "contradicts"),
        ({"columns": "prompt"}, "cannot read columns"),
        ({"learning_rate": "-1"}, "a number over 0, or auto"),
        ({"valid_fraction": 0.5, "test_fraction": 0.5}, "leave nothing"),
        ({"lora_dropout": 1}, "to 1 (less"),
        ({"gradient_checkpointing": "maybe"}, "true or false"),
    ],
)
def test_bad_setting(flags: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(flags)
    assert words in str(caught.value) and caught.value.fix


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("c.json", "{", "cannot be read"),
        ("c.toml", "a = ", "not TOML"),
        ("c.json", "[]", "holds no object"),
        ("c.json", '{"epochs": 1, "seed": 2, "epochs": 3}', "epochs stands there twice -- leave one of the two out"),
        ("c.jsonl", '{"prompt": "a", "completion": "b"}', "-- rows are named by --dataset "),
        ("c.toml", "epoks = 3", 'did you mean "epochs"'),
        ("c.toml", 'epochs = "3x"', "epochs is '3x'"),
    ],
)
def test_bad_config(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError) as caught:
        resolve({}, str(tmp_path / name))
    assert words in str(caught.value) and caught.value.where == str(tmp_path / name)


def test_unknown_preset_suggests() -> None:
    with pytest.raises(UsageError, match='did you mean "quick_test"'):
        resolve({}, "quick-tset")


def test_presets_and_tasks_change_something() -> None:
    default = resolve({})[0]
    presets, tasks = sorted((FACTS / "presets").glob("*.toml")), sorted((FACTS / "tasks").glob("*.toml"))
    assert [p.stem for p in presets] == [
        "aggressive",
        "conservative",
        "high_quality",
        "low_resource",
        "production",
        "quick_test",
    ]
    assert [t.stem for t in tasks] == ["code", "domain", "instruct"]
    for preset in presets:
        recipe, origin = resolve({}, preset.stem)
        assert set(tomllib.loads(preset.read_text())) == {k for k, o in origin.items() if o == f"preset {preset.stem}"}
        assert recipe != default
        for key, value in tomllib.loads(preset.read_text()).items():  # none says what is so without it
            assert getattr(default, key) != value, (preset.stem, key)
    for task in tasks:
        assert resolve({"task": task.stem})[0] != msgspec.structs.replace(default, task=task.stem)


def test_every_setting_is_read_somewhere() -> None:
    source = "\n".join(
        p.read_text() for p in (ROOT / "src" / "tunesmith").rglob("*.py") if p.name not in ("recipe.py",)
    )
    assert len(fields()) == len(Recipe.__struct_fields__) >= 40
    unread = [name for name in fields() if f"recipe.{name}" not in source and f"recipe().{name}" not in source]
    assert not unread


def test_schema_is_derived() -> None:
    schema = msgspec.json.schema(Recipe)["$defs"]["Recipe"]
    assert set(schema["properties"]) == set(fields())
    assert schema["properties"]["lora_rank"]["exclusiveMinimum"] == 0
    assert schema["properties"]["epochs"]["anyOf"][0]["exclusiveMinimum"] == 0  # of the number beside "auto"
    assert all(p.get("description") for p in schema["properties"].values())
