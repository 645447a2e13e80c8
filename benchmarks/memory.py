"""What `tunesmith plan` predicts beside what training then takes: peak memory and time, for twelve combinations.

    python benchmarks/memory.py [--only 20M]

Each run is as long as three steps of its longest rows; the worker's own peak is compared (on a GPU, its allocator's).
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from train import SHAPES, save_model, texts

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"method": "lora"},
    "qlora": {"method": "qlora"},
    "freeze": {"method": "freeze"},
    "full, recomputed": {"gradient_checkpointing": True},
}
COMBINATIONS = [  # shape, method, longest row in characters, rows a step
    ("starter", "full", 800, 4),
    ("starter", "lora", 3500, 8),
    ("20M", "full", 800, 4),
    ("20M", "full", 3500, 4),
    ("20M", "lora", 800, 8),
    ("20M", "lora", 3500, 4),
    ("20M", "qlora", 3500, 2),
    ("20M", "freeze", 3500, 4),
    ("20M", "full, recomputed", 3500, 8),
    ("gpt2", "full", 1500, 4),
    ("135M", "full", 1500, 2),
    ("135M", "lora", 3500, 2),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", help="a part of the name")
    options = parser.parse_args()
    from tunesmith import api

    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for shape, method, characters, rows in COMBINATIONS:
            name = f"{shape} {method}, rows of {characters} characters, {rows} a step"
            if options.only and options.only not in name:
                continue
            data = Path(folder) / "rows.jsonl"
            items = [{**row, "completion": row["completion"][:characters]} for row in texts(12 * rows)]
            data.write_text("".join(json.dumps(row) + "\n" for row in items))
            settings: dict[str, Any] = {
                "model": str(model(shape, Path(folder))),
                "batch_size": rows,
                "max_steps": 6,
                "epochs": 1,
                "valid_fraction": 0.05,
                "test_fraction": 0.0,
                **METHODS[method],
            }
            need, _ = api.estimate(api.prepare(str(data), **settings))
            run = api.train(str(data), output_dir=str(Path(folder) / f"run{random.random()}"), **settings)
            done = run.summary()
            memory, seconds = need.memory_mb / done["peak_memory_mb"], need.step_seconds / step_seconds(run)
            worst = max(worst, abs(memory - 1))
            print(
                f"{name:56} planned {need.memory_mb:5} MB, took {done['peak_memory_mb']:5} ({memory:4.2f}); "
                f"a step {need.step_seconds:6.2f} s, took {step_seconds(run):6.2f} ({seconds:4.2f})",
                flush=True,
            )
    print(f"furthest from the peak: {worst:.0%}")


def step_seconds(run: Any) -> float:
    """Mean seconds of a step after the first, which warms up."""
    steps = run.metrics("step")
    return float(sum(e["tokens"] / e["tokens_per_second"] for e in steps[1:]) / len(steps[1:]))


def model(shape: str, folder: Path) -> Path | str:
    if shape == "starter":
        return "starter"
    path = folder / shape
    if path.exists():
        return path
    if shape in SHAPES:
        save_model(shape, path)
        return path
    import shutil

    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=50257, n_embd=384, n_layer=6, n_head=6, n_positions=1024, bos_token_id=None, eos_token_id=2
        )
    ).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(Path(__file__).parent.parent / "src/tunesmith/assets/starter" / name, path / name)
    return path


if __name__ == "__main__":
    main()
