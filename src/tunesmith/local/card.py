"""What a finished run says about its model: model_info.json for programs, README.md (the model card) for people."""

from __future__ import annotations

import time
from typing import Any

from tunesmith.costs import ADAPTERS
from tunesmith.data.write import write_bytes, write_json
from tunesmith.runs import Run


def write_card(run: Run) -> None:
    """Write both files from the manifest and the event log."""
    manifest, summary = run.manifest(), run.summary()
    rows = manifest["plan"]["rows"]
    write_json(
        run / "model_info.json",
        {
            "fine_tuned_model": str((run / "best_model").resolve()),
            "base_model": manifest["recipe"]["model"],
            "method": manifest["recipe"]["method"],
            "training_file": manifest["recipe"]["dataset"],
            "job_id": run.path.name,
            "training_examples": rows["train"],
            "validation_examples": rows["valid"],
            "test_examples": rows["test"],
            "created_at": manifest["created"],
            "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "best_step": summary["best_step"],
            "best_valid_loss": summary["best_valid_loss"],
            "steps": summary["steps"],
            "trained_tokens": summary["tokens"],
        },
    )
    write_bytes(run / "README.md", _card(manifest, summary).encode())


def _card(manifest: dict[str, Any], summary: dict[str, Any]) -> str:
    recipe, rows = manifest["recipe"], manifest["plan"]["rows"]
    loss = (
        f"{summary['best_valid_loss']:.4f} (nats per token, step {summary['best_step']})"
        if summary["best_valid_loss"] is not None
        else "not measured: no validation rows"
    )
    load = (
        "from peft import AutoPeftModelForCausalLM as Model"
        if recipe["method"] in ADAPTERS
        else "from transformers import AutoModelForCausalLM as Model"
    )
    return f"""---
base_model: {recipe["model"]}
library_name: {"peft" if recipe["method"] in ADAPTERS else "transformers"}
tags: [tunesmith, {recipe["method"]}, {recipe["task"]}]
---

# {recipe["model"]} fine-tuned on {recipe["dataset"]}

| | |
|---|---|
| method | {recipe["method"]}, {summary["steps"]} steps, learning rate {recipe["learning_rate"]}, seed {recipe["seed"]} |
| data | {rows["train"]} training rows, {rows["valid"]} validation, {rows["test"]} test |
| best validation loss | {loss} |

```python
{load}
model = Model.from_pretrained("best_model")
```

`tunesmith evaluate` writes the verdict against the base model into `report.html`.
Every setting, and where it came from, is in `run.json`.
"""
