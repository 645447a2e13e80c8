"""What the rank of adapters costs and gives: the starter on a sample set, rank by rank, beside all weights.

    python benchmarks/lora_ranks.py [--dataset echo] [--epochs 3] [--seed 42] [--ways r2,r16,full,DoRA]

Each run is judged on the same test rows, a fifth of the set. Told are trained weights, bytes of the model on disk, the worker's
peak in MB, the loss, its change from the base's with the 95 % interval of `evaluate`, and the difference from rank 16.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith import api
from tunesmith.evaluation.stats import compare

WAYS: dict[str, dict[str, Any]] = {
    **{f"r{rank}": {"method": "lora", "lora_rank": rank} for rank in (2, 4, 8, 16, 32, 64)},
    "r64 at 2e-3": {"method": "lora", "lora_rank": 64, "learning_rate": 2e-3},
    "full": {"method": "full"},
    "DoRA": {"method": "lora", "use_dora": True},
    "QLoRA": {"method": "qlora"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="echo")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--ways", default=",".join(WAYS))
    how = parser.parse_args()
    losses: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in sorted(how.ways.split(","), key=lambda name: name != "r16"):  # the others are compared with it
            place = str(Path(folder) / name.replace(" ", "-"))
            both = {"epochs": how.epochs, "seed": how.seed, "test_fraction": 0.2, "output_dir": place}
            trained = api.plan(how.dataset, **both, **WAYS[name]).trainable_parameters
            run = api.train(how.dataset, **both, **WAYS[name])
            # Rows that are named: no row report is made, which takes longer than the training
            loss = api.evaluate(run, dataset=str(run / "data/test.jsonl"), rows=0, samples=0).metrics[0]
            told = next((run / "evaluation").glob("**/rows.jsonl")).read_text(encoding="utf-8")
            rows = [json.loads(line)["tuned"] for line in told.splitlines()]
            losses[name] = np.array([[row["loss"], row["tokens"]] for row in rows])
            size = next((run / "best_model").glob("*model*.safetensors")).stat().st_size
            memory, pair = run.summary()["peak_memory_mb"], ""
            if "r16" in losses and name != "r16":
                c = compare(loss.metric, losses["r16"], losses[name], True)
                pair = f"{c.difference:+.3f} ({c.low:+.3f} to {c.high:+.3f}) {c.verdict}"
            change = f"{loss.difference:+.2f} ({loss.low:+.2f} to {loss.high:+.2f})"
            print(
                f"| {name} | {trained:,} | {size:,} | {memory:,} | {loss.tuned:.3f} | {change} | {pair} |", flush=True
            )


if __name__ == "__main__":
    main()
