"""Training speed and memory beside other trainers: the same rows in the same order, the same work, one process each.

    python benchmarks/train.py [--shape 20M] [--method full] [--steps 4] [--repeat 3] [--peers trainer,trl]

Rows are real text (tools/starter) of 650 to 760 tokens in the mean, 1,024 at most, four fifths of it answers, which alone are
learnt; padding in file order would be a quarter of a batch. AdamW 1e-3 constant, no decay, clip 1.0, fp32, no
checkpointing. A peer runs under $BENCH_PYTHON_<PEER> where that is set, else under this Python; one that cannot be imported is
named and left out. Prints medians: tokens a second (without padding), the ratio to the fastest peer, peak memory and its
ratio to the smallest peer's, the share of the matrix-multiply rate measured in the same run, and the first loss, which must be
the same for all to four digits (but for :grouped and :packed, whose first batch is another).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import peers
from peers import FREEZE

ROOT = Path(__file__).parent.parent
SHAPES = {  # vocabulary, hidden, layers, heads, key-value heads, inner
    "20M": (50257, 288, 6, 6, 6, 768),
    "135M": (49152, 576, 30, 9, 3, 1536),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="20M")
    parser.add_argument("--method", choices=("full", "lora", "freeze"), default="full")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=1, help="passes over the rows of --steps steps [1]")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--peers",
        default="trainer,trl,llamafactory,torchtune",
        help="of these; trainer:grouped and trl:grouped sort rows by length; trl:packed, "
        "llamafactory:packed and torchtune:packed fill rows of 1,024 tokens; tunesmith:uncached runs frozen layers each epoch",
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "tunesmith_bench_train")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options)))
        return
    make_fixture(options)
    names = ["tunesmith", *filter(None, options.peers.split(","))]
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    rates = []
    for _ in range(options.repeat):
        rates.append(matrix_rate())
        for name in names:
            python = os.environ.get(f"BENCH_PYTHON_{name.partition(':')[0].upper()}", sys.executable)
            done = subprocess.run(
                [python, __file__, *sys.argv[1:], "--one", name],
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
            )
            if done.returncode:
                print(f"{name}: left out ({done.stderr.strip().splitlines()[-1]})", flush=True)
                names = [n for n in names if n != name]
                continue
            seen[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    rate = statistics.median(rates)
    print(
        f"{options.shape} {options.method}, {options.steps} steps of {options.batch} rows, {options.epochs} epochs; "
        f"2048-cubed product {rate / 1e9:.0f} GFLOP/s; medians of {options.repeat}"
    )
    medians = {n: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for n, runs in seen.items() if runs}
    best = max((m["tokens_s"] for n, m in medians.items() if not n.startswith("tunesmith")), default=0.0)
    least = min((m["peak_mb"] for n, m in medians.items() if not n.startswith("tunesmith")), default=0.0)
    for name, m in medians.items():
        low, high = min(r["tokens_s"] for r in seen[name]), max(r["tokens_s"] for r in seen[name])
        share = work(options, m) / m["seconds"] / rate
        against = f"{m['tokens_s'] / best:5.2f}x" if best else ""
        memory = f"{m['peak_mb'] / least:4.2f}x" if least else ""
        later = f", epochs after the first {m['later']:.0f} tokens/s" if "later" in m else ""
        print(
            f"  {name:18} {m['tokens_s']:7.0f} tokens/s ({low:.0f} to {high:.0f}) {against}  {m['peak_mb']:6.0f} MB {memory}  "
            f"{share:4.0%} of the matrix rate  first loss {m['first']:.4f}, last {m['last']:.4f}{later}"
        )


def work(options: argparse.Namespace, m: dict[str, Any]) -> float:
    """Floating-point operations that must be done: 2 for each weight and token forward, 2 for the gradient of the input where
    something below is trained, 2 for that of the weight where it is trained; attention over half of the square."""
    vocabulary, h, layers, heads, kv, inner = SHAPES[options.shape]
    d = h // heads
    linear = 2 * h * h + 2 * h * kv * d + 3 * h * inner
    attention = 2 * m["tokens"] / m["rows"] * h
    head = 2 * vocabulary * h * m["supervised"]
    tokens = m["tokens"]
    if options.method == "full":
        return tokens * layers * (6 * linear + 3 * attention) + 3 * head
    if options.method == "lora":
        adapters = 16 * (4 * h + 2 * (h + kv * d) + 3 * (h + inner))
        return tokens * layers * (4 * linear + 6 * adapters + 3 * attention) + 2 * head
    top = layers - int(FREEZE * layers)
    return tokens * (layers * (2 * linear + attention) + top * (4 * linear + 2 * attention)) + 2 * head


def matrix_rate() -> float:
    """Floating-point operations a second of a 2048-cubed fp32 product: the best of ten."""
    code = (
        "import torch,time;a,b=torch.randn(2048,2048),torch.randn(2048,2048);t=[]\n"
        "for _ in range(10):\n s=time.perf_counter();a@b;t.append(time.perf_counter()-s)\nprint(2*2048**3/min(t))"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def make_fixture(options: argparse.Namespace) -> None:
    """The model, a run directory of ours laid out, and the rows in the order in which it will see them."""
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / options.shape
    if not (model / "config.json").exists():
        save_model(options.shape, model)
    data = folder / "texts.jsonl"
    if not data.exists():
        data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in texts(256)))
    from tunesmith import api
    from tunesmith.local import batches
    from tunesmith.recipe import Recipe

    rows = options.steps * options.batch
    (folder / "few.jsonl").write_text("".join(data.read_text().splitlines(True)[:rows]))
    prepared = api.prepare(str(folder / "few.jsonl"), model=str(model), **ours(options))
    train = prepared.splits["train"]
    order = [
        r
        for step in range(options.steps * options.epochs)
        for r in batches.step_rows(len(train), prepared.plan.recipe, step)
    ]
    assert isinstance(prepared.plan.recipe, Recipe) and prepared.plan.steps == options.steps * options.epochs
    with (folder / "ordered.jsonl").open("w") as out:
        for r in order:
            ids, mask = prepared.tokens["train"].row(r)
            said = [{"role": m.role, "content": m.content} for m in train[r].messages]
            out.write(json.dumps({"ids": ids, "mask": [bool(m) for m in mask], "messages": said}) + "\n")


def ours(options: argparse.Namespace) -> dict[str, Any]:
    method = {"lora": {"method": "lora", "lora_alpha": 32}, "freeze": {"freeze_ratio": FREEZE}}.get(options.method, {})
    return {
        "epochs": options.epochs, "batch_size": options.batch, "learning_rate": 1e-3, "lr_scheduler": "constant",
        "warmup_ratio": 0.0, "weight_decay": 0.0, "valid_fraction": 0.0, "test_fraction": 0.0, "threads": os.cpu_count() or 2,
        "prefix_cache": options.one != "tunesmith:uncached", **method,
    }  # fmt: skip


def save_model(shape: str, folder: Path) -> None:
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary, hidden, layers, heads, kv, inner = SHAPES[shape]
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, intermediate_size=inner, tie_word_embeddings=True, max_position_embeddings=2048,
        bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )).save_pretrained(folder)  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(ROOT / "src/tunesmith/assets/starter" / name, folder / name)


def texts(count: int) -> list[dict[str, str]]:
    """Questions about a passage, and answers of several joined texts: two in five as long as fits, the others of any length."""
    rng = random.Random(0)
    read = [json.loads(line) for line in (ROOT / "tools/starter/talk.jsonl").open()]
    pairs = [(row["prompt"], row["completion"]) for row in read if "prompt" in row]

    def text(begin: str, characters: int) -> str:
        while len(begin) < characters:
            begin += "\n\n" + rng.choice(pairs)[1]
        return begin[:characters].strip()

    rows = []
    for _ in range(count):
        whole = 3900 if rng.random() < 0.4 else rng.randrange(1000, 3200)  # characters, of 3.8 to a token
        asking = int(whole * rng.uniform(0.05, 0.3))
        ask, answer = rng.choice(pairs)
        rows.append({"prompt": text(ask, asking), "completion": text(answer, whole - asking)})
    return rows


# ---- one contender, in its own process


def run_one(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(os.cpu_count() or 2)
    rows = [json.loads(line) for line in (options.folder / "ordered.jsonl").open()]
    counts = {
        "rows": len(rows),
        "tokens": sum(len(r["ids"]) for r in rows),
        "supervised": sum(sum(r["mask"][1:]) for r in rows),
    }
    found = run_ours(options) if options.one.startswith("tunesmith") else peers.run(options.one, options, rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {**counts, **found, "peak_mb": peak, "tokens_s": counts["tokens"] / found["seconds"]}


def run_ours(options: argparse.Namespace) -> dict[str, Any]:
    from tunesmith import api
    from tunesmith.local.backend import lay_out
    from tunesmith.local.loop import train
    from tunesmith.local.machine import tune

    tune()  # as a worker does
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        prepared = api.prepare(
            str(options.folder / "few.jsonl"), model=str(options.folder / options.shape), **ours(options)
        )
        run = lay_out(prepared, Path(folder) / "run")
        train(run, lambda: False)
        steps = run.metrics("step")
        found = {"seconds": steps[-1]["seconds"], "first": steps[0]["loss"], "last": steps[-1]["loss"]}
        if options.epochs > 1:
            before, after = steps[options.steps - 1], steps[-1]
            tokens = after["total_tokens"] - before["total_tokens"]
            found["later"] = tokens / (after["seconds"] - before["seconds"])
        return found


if __name__ == "__main__":
    main()
