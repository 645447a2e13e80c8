"""What is said of a model: model_info.json for programs, README.md (the model card, with the Hub's metadata) for people.

Written when training ends, again after an evaluation, and into every export, from the files of the run alone.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import msgspec

from tunesmith.costs import ADAPTERS
from tunesmith.data.write import write_bytes, write_json
from tunesmith.runs import Run

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
UNSAID = "not stated"
LOAD = {
    "peft": "from peft import AutoPeftModelForCausalLM as Model",
    "transformers": "from transformers import AutoModelForCausalLM as Model",
}


class Export(msgspec.Struct, frozen=True, kw_only=True):
    """What a card says of an export besides what the run says. `weights`: the folder or file in it that is loaded."""

    form: str
    quantize: str
    weights: str
    command: str
    runtime: str
    deployable: bool
    failed: list[str] = []
    license: str = ""
    data_license: str = ""


def write_card(
    run: Run, export: Export | None = None, folder: Path | None = None, exported: Path | None = None
) -> None:
    """Write both files, into the run or into the folder of one of its exports. `exported`: the model that it is of."""
    info = model_info(run)
    if exported:
        info |= {"fine_tuned_model": str(exported)}
    if export:
        info |= {"export": msgspec.to_builtins(export)}
    target = folder or run.path
    write_json(target / "model_info.json", info)
    write_bytes(target / "README.md", card(run, export).encode())


def write_plain(model: str, export: Export, folder: Path) -> None:
    """Both files for an export of a model that no run here has made: what it is, and no more."""
    write_json(folder / "model_info.json", {"base_model": model, "export": msgspec.to_builtins(export)})
    base = {"base_model": model} if HUB_NAME.fullmatch(model) else {}
    known = base | ({"license": export.license} if export.license else {}) | {"tags": ["tunesmith"]}
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in known.items()]
    passed = "passed" if export.deployable else "failed"
    said = f"{export.form} {export.quantize} of `{model}`. Certificate: {passed} ({export.runtime}); see `parity.json`."
    parts = [
        "\n".join(["---", *lines, "---"]),
        f"# {Path(model).name}",
        *_warning(export),
        said,
        f"```sh\n{export.command}\n```",
    ]
    write_bytes(folder / "README.md", ("\n\n".join(parts) + "\n").encode())


def model_info(run: Run) -> dict[str, Any]:
    """model_info.json: which model, of which base, from how many rows, when."""
    manifest, summary = run.manifest(), run.summary()
    rows = manifest["plan"]["rows"]
    done = run.last("done")
    return {
        "fine_tuned_model": str((run / "best_model").resolve()),
        "base_model": manifest["recipe"]["model"],
        "method": manifest["recipe"]["method"],
        "training_file": manifest["recipe"]["dataset"],
        "validation_file": manifest["recipe"].get("valid_dataset"),  # None: a share of the training file
        "job_id": run.path.resolve().name,
        "training_examples": rows["train"],
        "validation_examples": rows["valid"],
        "test_examples": rows["test"],
        "created_at": manifest["created"],
        "finished_at": _date(done["time"]) if done else None,
        "best_step": summary["best_step"],
        "best_valid_loss": summary["best_valid_loss"],
        "steps": summary["steps"],
        "trained_tokens": summary["tokens"],
        "data_hashes": manifest["data_hashes"],
        "lineage": [f"{each['model']} + {each['dataset']}" for each in run.lineage()],
    }


def card(run: Run, export: Export | None = None, repo: str = "") -> str:
    """The model card. What the run does not know is said to be unknown. `repo`: where on the Hub it will stand."""
    manifest, found = run.manifest(), _evaluation(run)
    parts = [
        _header(manifest, found, export),
        f"# {_title(manifest)}",
        *_warning(export),
        _facts(run, manifest, export),
    ]
    parts += _metrics(found) or ["Not evaluated: `tunesmith evaluate` tells whether it is better than its base."]
    parts += [_limits(manifest, found), _lineage(run), _use(manifest, export, repo)]
    return "\n\n".join(parts) + "\n"


def _header(manifest: dict[str, Any], found: dict[str, Any] | None, export: Export | None) -> str:
    """The Hub's metadata, in YAML: each value as JSON, which is YAML too."""
    recipe = manifest["recipe"]
    adapter = recipe["method"] in ADAPTERS and (export is None or export.form == "adapter")
    gguf = export is not None and export.form in ("gguf", "ollama")
    known: dict[str, Any] = {
        "license": export.license if export and export.license else None,
        "library_name": "peft" if adapter else "gguf" if gguf else "transformers",
        "pipeline_tag": "text-generation",
        "base_model": recipe["model"] if HUB_NAME.fullmatch(recipe["model"]) else None,  # the Hub refuses other names
        "base_model_relation": "adapter" if adapter else "quantized" if gguf else "finetune",
        "tags": ["tunesmith", recipe["method"], recipe["task"]],
    }
    if known["base_model"] is None:
        del known["base_model_relation"]
    if found:
        known["model-index"] = [_index(manifest, found)]
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in known.items() if value is not None]
    return "\n".join(["---", *lines, "---"])


def _index(manifest: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Results as the Hub lists them."""
    metrics = [{"type": m["metric"], "value": m["tuned"]} for m in found["metrics"]]
    task, data = {"type": "text-generation"}, {"type": "custom", "name": Path(found["dataset"]).name}
    return {"name": _title(manifest), "results": [{"task": task, "dataset": data, "metrics": metrics}]}


def _title(manifest: dict[str, Any]) -> str:
    model, data = (Path(manifest["recipe"][key]).name for key in ("model", "dataset"))
    return f"{model} fine-tuned on {data}"


def _warning(export: Export | None) -> list[str]:
    if export is None or export.deployable:
        return []
    return [
        f"> **Not deployable.** It is not shown to be the model that was trained: {'; '.join(export.failed)}. See `parity.json`."
    ]


def _facts(run: Run, manifest: dict[str, Any], export: Export | None) -> str:
    recipe, plan, summary = manifest["recipe"], manifest["plan"], run.summary()
    rows, best = plan["rows"], summary["best_valid_loss"]
    rank = f", rank {recipe['lora_rank']}, alpha {recipe['lora_alpha']}" if recipe["method"] in ADAPTERS else ""
    loss = (
        "not measured: no validation rows"
        if best is None
        else f"{best:.4f} nats per token, at step {summary['best_step']}"
    )
    hashes = ", ".join(f"{side} `{str(digest)[:16]}`" for side, digest in manifest["data_hashes"].items() if digest)
    steps = f"{summary['steps']} steps, learning rate {recipe['learning_rate']}, batch {recipe['batch_size']}"
    table = [
        ("base model", recipe["model"]),
        ("method", f"{recipe['method']}{rank}"),
        ("training", f"{steps}, seed {recipe['seed']}"),
        (
            "data",
            f"{recipe['dataset']}: {rows['train']} training rows, {rows['valid']} validation, {rows['test']} test",
        ),
        ("data, SHA-256", hashes or UNSAID),
        ("licence of the data", (export and export.data_license) or UNSAID),
        ("licence of the model", (export and export.license) or f"{UNSAID}; that of the base model applies"),
        (
            "tokens",
            f"{summary['tokens']} in training, {plan['supervised_tokens'].get('train', 0)} of an epoch are learnt",
        ),
        ("lowest validation loss", loss),
    ]
    if export:
        verdict = "passed" if export.deployable else f"failed: {'; '.join(export.failed)}"
        table += [
            ("form", f"{export.form} {export.quantize}"),
            ("certificate", f"{verdict} ({export.runtime}); `parity.json`"),
        ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in table)])


def _metrics(found: dict[str, Any] | None) -> list[str]:
    if not found:
        return []
    lines = ["| metric | base | tuned | difference, 95 % interval | verdict |", "|---|---|---|---|---|"]
    for m in found["metrics"]:
        interval = "" if m["low"] is None else f" ({m['low']:+.4f} to {m['high']:+.4f})"
        lines.append(
            f"| {_cell(m['metric'])} | {m['base']:.4f} | {m['tuned']:.4f} | {m['difference']:+.4f}{interval} | {m['verdict']} |"
        )
    said = (
        f"**{found['verdict']}** than its base, on {found['rows']} held-out rows."
        if found["verdict"] != "cannot tell"
        else (f"Whether it is better than its base **cannot be told** from {found['rows']} held-out rows.")
    )
    return ["## Evaluation", said, "\n".join(lines)]


def _limits(manifest: dict[str, Any], found: dict[str, Any] | None) -> str:
    """What is known to be wrong, and what nobody has looked at."""
    known = [f"- {d['name']}: {d['evidence']}." for d in (found or {}).get("diagnoses", [])]
    known += [f"- Not measured: {found['unavailable']}."] if found and found["unavailable"] else []
    known += [
        f"- It was tuned on {manifest['plan']['rows']['train']} rows; of what they do not show it knows what its base knew.",
        "- Nobody has examined it for harmful or untrue answers.",
    ]
    return "\n".join(["## Limits", "", *known])


def _lineage(run: Run) -> str:
    lines = [
        f"{i}. `{each['model']}` + {_cell(each['dataset'])} ({each['method']}) → `{Path(each['run']).name}`"
        for i, each in enumerate(reversed(run.lineage()), 1)
    ]
    return "\n".join(["## Lineage", "", *lines])


def _use(manifest: dict[str, Any], export: Export | None, repo: str) -> str:
    if export and export.form in ("gguf", "ollama", "vllm"):
        return f"## Use\n\n```sh\n{export.command}\n```"
    adapter = manifest["recipe"]["method"] in ADAPTERS and (export is None or export.form == "adapter")
    load = LOAD["peft" if adapter else "transformers"]
    where = repo or ("best_model" if export is None else ".")
    text = f'## Use\n\n```python\n{load}\n\nmodel = Model.from_pretrained("{where}")\n```'
    if export or repo:
        return text
    return (
        f"{text}\n\n`tunesmith evaluate` writes the verdict against the base model into `report.html`.\n"
        "Every setting, and where it came from, is in `run.json`."
    )


def _evaluation(run: Run) -> dict[str, Any] | None:
    """The run's own evaluation, where there is one."""
    try:
        found: dict[str, Any] = msgspec.json.decode((run / "evaluation" / "result.json").read_bytes())
    except (OSError, msgspec.DecodeError):
        return None
    return found


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))
