"""Evaluating 100 held-out rows with answers of 64 tokens: beside one `model.generate` after the other, in one run.

    python benchmarks/evaluate.py [--rows 100] [--tokens 64] [--repeat 3]

Both sides load the starter, score the rows' references (per-token loss) and answer every prompt greedily; as many answers run to
their 64 tokens on either side, since no stop token is heeded. The floor: the products of all tokens at the machine's matrix rate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARED = Path(__file__).parent.parent.parent / "shared" / "data" / "gsm8k_test.jsonl"


def rows(path: Path, count: int) -> Path:
    """gsm8k's questions as a data set."""
    if not SHARED.exists():
        sys.exit(
            f"{SHARED}: no such file -- put gsm8k's test rows there, a JSON object with question and answer a line"
        )
    found = [json.loads(line) for line in SHARED.read_text().splitlines()[:count]]
    path.write_text("".join(json.dumps({"prompt": r["question"], "completion": r["answer"]}) + "\n" for r in found))
    return path


def ours(dataset: Path, tokens: int) -> dict[str, float]:
    """The package's own way: what `tunesmith evaluate` asks of one model."""
    from tunesmith import api
    from tunesmith.evaluation.observe import prompt_of
    from tunesmith.local.generate import Chat
    from tunesmith.local.score import Scorer

    held = api.load(dataset)
    began = time.perf_counter()
    chat = Chat("starter")
    loaded = time.perf_counter()
    losses = Scorer(chat.renderer, chat.decoder.model)(held)
    scored = time.perf_counter()
    chat.renderer.stop_ids = []
    said = chat.said([prompt_of(row) for row in held], tokens)
    return figures(
        began, loaded, scored, sum(s.loss for s in losses), sum(s.tokens for s in losses), [n for *_, n in said]
    )


def plain(dataset: Path, tokens: int) -> dict[str, float]:
    """One row after the other with plain transformers, as the guides' evaluation scripts do."""
    import torch
    from transformers import AutoModelForCausalLM

    from tunesmith import api
    from tunesmith.models import find
    from tunesmith.render import Renderer

    held, renderer = api.load(dataset), Renderer(find("starter"))
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(find("starter"), dtype=torch.float32).eval()
    loaded, loss, count, lengths = time.perf_counter(), 0.0, 0, []
    with torch.inference_mode():
        for row in held:
            r = renderer.render(row)
            logp = model(torch.tensor([r.ids])).logits[0].log_softmax(1)
            at = [i for i in range(1, len(r.ids)) if r.mask[i]]
            loss -= float(sum(logp[i - 1, r.ids[i]] for i in at))
            count += len(at)
        scored = time.perf_counter()
        for row in held:
            ids = torch.tensor([renderer.prompt_ids(row.prompt())])
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            )
            lengths.append(out.shape[1] - ids.shape[1])
    return figures(began, loaded, scored, loss, count, lengths)


def figures(
    began: float, loaded: float, scored: float, loss: float, count: int, lengths: list[int]
) -> dict[str, float]:
    now = time.perf_counter()
    return {
        "load": loaded - began,
        "score": scored - loaded,
        "answer": now - scored,
        "all": now - began,
        "loss": loss / count,
        "tokens": sum(lengths),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--dataset", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps({"ours": ours, "plain": plain}[options.side](Path(options.dataset), options.tokens)))
        return
    found: dict[str, list[dict[str, float]]] = {"plain": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        dataset = rows(Path(folder) / "rows.jsonl", options.rows)
        for _ in range(options.repeat):
            for side in found:  # in turn, so that a slow minute meets both
                command = [
                    sys.executable,
                    __file__,
                    "--side",
                    side,
                    "--dataset",
                    str(dataset),
                    "--tokens",
                    str(options.tokens),
                ]
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
    middle = {s: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for s, runs in found.items()}
    print(f"{options.rows} rows, answers of {options.tokens} tokens, medians of {options.repeat}, seconds")
    for side, values in middle.items():
        print(f"  {side:6}" + "".join(f"  {k} {v:.3f}" for k, v in values.items()))
    print(
        "  ratio " + "".join(f"  {k} {middle['plain'][k] / middle['ours'][k]:.2f}x" for k in ("score", "answer", "all"))
    )


if __name__ == "__main__":
    main()
