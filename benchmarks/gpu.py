"""Correctness, speed and memory on one NVIDIA GPU, in one call of under ten minutes: first that it is right, then how fast.

    python benchmarks/gpu.py [--budget 540] [--cases 1b-full,1b-lora,8b-lora,8b-qlora] [--peers trainer,trl] [--check-only]

Correctness: packed attention in 16 bits against the same conversations one by one in 32; losses of twenty steps against the
CPU's; a run killed in the middle and resumed; freezing with and without its cache; fp16 with its loss scale.
Speed: Llama shapes with random weights, bf16 autocast, rows packed to 4,096 tokens a step, AdamW; each contender in its own
process. Prints tokens a second, peak memory, and the share of the rate of an 8192-cubed bf16 product measured in the same
run; at the end the same as a Markdown table with date and hardware, and --out FILE.json writes it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STARTER = ROOT / "src/tunesmith/assets/starter"
TOKENS, ROW = 4096, 1024  # of a step; of a row
SHAPES = {  # vocabulary, hidden, layers, heads, key-value heads, inner
    "tiny": (8192, 256, 4, 4, 2, 704),
    "1b": (32000, 2048, 16, 32, 8, 8192),
    "8b": (32000, 4096, 32, 32, 8, 14336),
}
CASES = ("1b-full", "1b-lora", "8b-lora", "8b-qlora")
STEPS, WARM = 12, 4  # steps of each contender, of which the first are not counted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--budget", type=float, default=540, help="seconds after which no further case begins [540]")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--peers", default="trainer,trl")
    parser.add_argument("--check-only", action="store_true", help="correctness alone")
    parser.add_argument("--out", type=Path, help="write what was measured here, as JSON")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "WHO"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(*options.one)))
        return 0
    import torch

    if not torch.cuda.is_available():
        print("no CUDA GPU here", file=sys.stderr)
        return 2
    began = time.monotonic()
    hardware = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    wrong = [name for name, check in CHECKS.items() if not told(name, check)]
    rows: list[dict[str, Any]] = []
    rate = product_rate()
    print(f"8192-cubed bf16 product: {rate / 1e12:.0f} TFLOP/s on {hardware}", flush=True)
    for case in [] if options.check_only or wrong else options.cases.split(","):
        for who in ("tunesmith", *filter(None, options.peers.split(","))):
            if time.monotonic() - began > options.budget:
                print(f"{case} {who}: left out (no time)", flush=True)
                continue
            found = contender(case, who)
            if isinstance(found, str):
                print(f"{case} {who}: left out ({found})", flush=True)
                continue
            found |= {"case": case, "who": who, "share": work(case) * found["tokens_s"] / rate}
            rows.append(found)
            print(line(found), flush=True)
    print(table(rows, hardware))
    if options.out:
        options.out.write_text(json.dumps({"hardware": hardware, "rate": rate, "wrong": wrong, "rows": rows}, indent=1))
    return 1 if wrong else 0


def line(found: dict[str, Any]) -> str:
    return (
        f"{found['case']:9} {found['who']:10} {found['tokens_s']:8.0f} tokens/s {found['peak_gb']:6.1f} GB "
        f"{found['share']:4.0%} of the matrix rate, first loss {found['first']:.4f}"
    )


def table(rows: list[dict[str, Any]], hardware: str) -> str:
    head = f"\n{time.strftime('%Y-%m-%d')}, {hardware}\n\n| case | who | tokens/s | peak GB | of the matrix rate | first loss |\n"
    body = [
        f"| {r['case']} | {r['who']} | {r['tokens_s']:,.0f} | {r['peak_gb']:.1f} | {r['share']:.0%} | {r['first']:.4f} |"
        for r in rows
    ]
    return head + "|---|---|---|---|---|---|\n" + "\n".join(body)


def told(name: str, check: Any) -> bool:
    began = time.monotonic()
    try:
        said, fine = check(), True
    except Exception as error:
        said, fine = f"{type(error).__name__}: {error}", False
    print(f"{'right' if fine else 'WRONG'}  {name} ({time.monotonic() - began:.0f} s) {said or ''}", flush=True)
    return fine


def product_rate() -> float:
    """Floating-point operations a second of an 8192-cubed bf16 product: the median of twenty."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(23):
        torch.cuda.synchronize()
        began = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * 8192**3 / statistics.median(times[3:])


def work(case: str) -> float:
    """Floating-point operations for a token: 2 for each weight forward, 2 for the gradient of the input, 2 for that of the
    weight where it is trained; attention over half of the square of a row; the head where there is a label (everywhere)."""
    vocabulary, hidden, layers, heads, kv, inner = SHAPES[case.partition("-")[0]]
    linear = 2 * hidden * hidden + 2 * hidden * kv * (hidden // heads) + 3 * hidden * inner
    passes = 6 if case.endswith("full") else 4
    return layers * (passes * linear + 3 * 2 * ROW * hidden) + passes * vocabulary * hidden


def save_model(shape: str, folder: Path) -> Path:
    """A Llama with random weights and the starter's tokenizer."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / "config.json").exists():
        return folder
    vocabulary, hidden, layers, heads, kv, inner = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv, intermediate_size=inner, tie_word_embeddings=False, max_position_embeddings=4096,
            bos_token_id=None, eos_token_id=2, pad_token_id=0,
        ))  # fmt: skip
    model.to(torch.bfloat16 if shape == "8b" else torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(STARTER / name, folder / name)
    return folder


def write_data(path: Path, rows: int, characters: int) -> Path:
    """Chats from the starter's text whose answers have about so many characters."""
    rng = random.Random(0)
    read = [json.loads(text) for text in (ROOT / "tools/starter/talk.jsonl").read_text().splitlines()]
    pairs = [(row["prompt"], row["completion"]) for row in read if "prompt" in row]
    with path.open("w") as out:
        for _ in range(rows):
            ask, answer = rng.choice(pairs)
            while len(answer) < characters:
                answer += "\n\n" + rng.choice(pairs)[1]
            out.write(json.dumps({"prompt": ask, "completion": answer[:characters]}) + "\n")
    return path


# ---- correctness


def fitted(folder: Path, name: str, **settings: Any) -> Any:
    """A finished run of the tiny shape on this machine's device."""
    from tunesmith import api

    data = write_data(folder / "data.jsonl", 64, 300)
    model = save_model("tiny", folder / "tiny")
    defaults = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "output_dir": str(folder / name), "patience": 0}
    return api.train(data, model=str(model), **{**defaults, **settings})


def check_packed() -> str:
    import torch

    from tunesmith.local import attention

    torch.manual_seed(0)
    segments = [700, 1, 33, 290]
    worst = 0.0
    for heads, kv, dim in ((8, 8, 64), (8, 2, 128)):
        q = torch.randn(1, heads, sum(segments), dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        k, v = (
            torch.randn(1, kv, sum(segments), dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(2)
        )
        module: Any = torch.nn.Module()
        grad = torch.randn(1, sum(segments), heads, dim, device="cuda")
        found, _ = attention.packed(module, q, k, v, None, segments=segments)
        got = [found.float(), *torch.autograd.grad(found, (q, k, v), grad.to(found.dtype))]
        under_autocast, _ = attention.packed(module, q.float(), k.float(), v, None, segments=segments)
        assert torch.equal(under_autocast, found), "rotary positions keep flash attention from being used"
        wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
        want, _ = attention.packed(module, *wide, None, segments=segments)
        expected = [want, *torch.autograd.grad(want, wide, grad)]
        for a, b in zip(got, expected, strict=True):
            worst = max(worst, float((a.float() - b).norm() / b.norm()))
    assert worst < 0.01, f"off by {worst:.3f}"
    return f"relative error {worst:.1e}"


def check_like_cpu() -> str:
    """fp32 on the GPU and on the CPU; the same again in bf16, less strictly."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        losses = {}
        for kind in ("no", "bf16"):
            run = fitted(folder, kind, mixed_precision=kind, max_steps=20)
            losses[kind] = [event["loss"] for event in run.metrics("step")]
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); import gpu, json; from pathlib import Path\n"
            "run = gpu.fitted(Path(sys.argv[2]), 'cpu', max_steps=20)\n"
            "print(json.dumps([e['loss'] for e in run.metrics('step')]))"
        )
        env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent), name],
            env=env,
            capture_output=True,
            text=True,
            check=True,
        )
        losses["cpu"] = json.loads(done.stdout.strip().splitlines()[-1])
    off = {
        kind: max(abs(a - b) / b for a, b in zip(losses[kind], losses["cpu"], strict=True)) for kind in ("no", "bf16")
    }
    assert off["no"] < 2e-3 and off["bf16"] < 3e-2, off
    return f"off by {off['no']:.1e} in fp32, {off['bf16']:.1e} in bf16"


def check_resume() -> str:
    import hashlib

    from tunesmith import api
    from tunesmith.errors import Interrupted
    from tunesmith.local.backend import lay_out
    from tunesmith.local.loop import train

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, model = write_data(folder / "data.jsonl", 64, 300), save_model("tiny", folder / "tiny")
        for method in ("full", "lora"):
            hashes = []
            for stops in ((), (7,), (1, 12)):
                settings = {
                    "method": method,
                    "mixed_precision": "bf16",
                    "epochs": 2,
                    "batch_size": 4,
                    "lora_dropout": 0.1,
                }
                prepared = api.prepare(data, model=str(model), **settings)
                run = lay_out(prepared, folder / f"{method}-{len(stops)}")
                for at in (*stops, None):
                    seen = iter(range(1, 1000))
                    with contextlib.suppress(Interrupted):
                        train(run, lambda seen=seen, at=at: next(seen) == at)  # type: ignore[misc]
                files = sorted((run / "final_model").glob("*.safetensors"))
                hashes.append(hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:8])
            assert len(set(hashes)) == 1, (method, hashes)
    return "stopped once, twice, or not: the same bytes, full and lora with dropout"


def check_frozen() -> str:
    with tempfile.TemporaryDirectory() as name:
        runs = [
            fitted(Path(name), str(cache), freeze_ratio=0.5, prefix_cache=cache, mixed_precision="bf16")
            for cache in (True, False)
        ]
        one, two = ([event["loss"] for event in run.metrics("step")] for run in runs)
    off = max(abs(a - b) / b for a, b in zip(one, two, strict=True))
    assert off < 1e-2, off
    return f"with and without the cache off by {off:.1e}"


def check_half() -> str:
    with tempfile.TemporaryDirectory() as name:
        run = fitted(Path(name), "fp16", mixed_precision="fp16")
        losses = [event["loss"] for event in run.metrics("step")]
    assert losses[-1] < losses[0] - 0.5, losses[::8]
    return f"loss {losses[0]:.2f} to {losses[-1]:.2f}"


def check_qlora() -> str:
    with tempfile.TemporaryDirectory() as name:
        run = fitted(Path(name), "qlora", method="qlora", mixed_precision="bf16", learning_rate=5e-3)
        losses = [event["loss"] for event in run.metrics("step")]
    assert losses[-1] < losses[0] - 0.3, losses[::8]
    return f"loss {losses[0]:.2f} to {losses[-1]:.2f}"


CHECKS = {
    "packed attention in 16 bits": check_packed,
    "losses as on the CPU": check_like_cpu,
    "the same bytes again": check_resume,
    "frozen layers": check_frozen,
    "fp16": check_half,
    "qlora": check_qlora,
}


# ---- speed: one contender in its own process


def contender(case: str, who: str) -> dict[str, Any] | str:
    done = subprocess.run(
        [sys.executable, __file__, "--one", case, who], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def one(case: str, who: str) -> dict[str, Any]:
    import torch

    folder = Path(tempfile.gettempdir()) / "tunesmith_bench_gpu"
    folder.mkdir(exist_ok=True)
    shape, _, method = case.partition("-")
    model = save_model(shape, folder / shape)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    steps, first = (ours if who == "tunesmith" else peer)(model, method, who)
    rows_a_step = TOKENS // ROW
    return {
        "tokens_s": rows_a_step * ROW / statistics.median(steps[WARM:]),
        "peak_gb": torch.cuda.max_memory_allocated() / 2**30,
        "first": first,
    }


def numbers(vocabulary: int) -> Any:
    """Rows of ROW random ids, all but the first half of a hundred learnt."""
    import numpy as np

    return np.random.default_rng(0).integers(3, vocabulary, (STEPS * TOKENS // ROW, ROW)).astype(np.int32)


def ours(model: Path, method: str, who: str) -> tuple[list[float], float]:
    import numpy as np
    import torch

    from tunesmith.local import model as models
    from tunesmith.local.step import Engine
    from tunesmith.recipe import Recipe
    from tunesmith.tokens import Tokens

    recipe = Recipe(
        method=method, batch_size=TOKENS // ROW, learning_rate=1e-4, mixed_precision="bf16", micro_batch_tokens=TOKENS,
        lora_rank=16, lora_alpha=32, lora_dropout=0.0, gradient_checkpointing=model.name == "8b", weight_decay=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    module, slow = models.for_training(recipe, ROW, model)
    assert not slow, slow
    ids = numbers(int(module.model.config.vocab_size))
    rows = Tokens(ids.ravel(), np.ones(ids.size, np.bool_), np.arange(0, ids.size + 1, ROW))
    engine, times, first = Engine(module, recipe, {"train": rows, "valid": rows}), [], 0.0
    for step in range(STEPS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        done = engine.step(list(range(step * TOKENS // ROW, (step + 1) * TOKENS // ROW)), 1e-4)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        first = first or done.loss
    return times, first


def peer(model: Path, method: str, who: str) -> tuple[list[float], float]:
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    large = model.name == "8b"
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16 if large else torch.float32, device_map={"": 0}, attn_implementation="sdpa",
        **({"quantization_config": quantised} if method == "qlora" else {}),
    )  # fmt: skip
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    if method == "qlora":
        base = prepare_model_for_kbit_training(base)
    ids = numbers(base.config.vocab_size).tolist()
    losses: list[float] = []
    clock: list[float] = []

    class Spy(transformers.TrainerCallback):  # type: ignore[misc]
        def _now(self) -> None:
            torch.cuda.synchronize()
            clock.append(time.perf_counter())

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self._now()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self._now()

        def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    with tempfile.TemporaryDirectory() as out:
        arguments = dict(
            output_dir=out, max_steps=STEPS, per_device_train_batch_size=TOKENS // ROW, report_to="none", save_strategy="no",
            logging_steps=1, learning_rate=1e-4, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, bf16=True,
            gradient_checkpointing=large, disable_tqdm=True, train_sampling_strategy="sequential", optim="adamw_torch_fused",
        )  # fmt: skip
        if who == "trl":
            from trl import SFTConfig, SFTTrainer

            SFTTrainer(
                model=base, args=SFTConfig(**arguments, max_length=ROW, packing=False), callbacks=[Spy()],
                train_dataset=Dataset.from_list([{"input_ids": row} for row in ids]),
                processing_class=AutoTokenizer.from_pretrained(model), peft_config=None if method == "full" else config,
            ).train()  # fmt: skip
        else:
            if method != "full":
                base.enable_input_require_grads()
                base = get_peft_model(base, config)
            transformers.Trainer(
                model=base, args=transformers.TrainingArguments(**arguments), callbacks=[Spy()],
                train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in ids]),
            ).train()  # fmt: skip
    return [b - a for a, b in pairwise(clock)], losses[0]


if __name__ == "__main__":
    sys.exit(main())
