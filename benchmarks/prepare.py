"""Speed and memory of preparing data beside other trainers: from a JSONL file of chats to token ids and a loss mask on disk.

    python benchmarks/prepare.py [--rows 20000] [--repeat 3] [--ways ours,whole,tokenizers,datasets,trl,llamafactory]

ours          read, look at the structure, render, encode, mask, write
whole         all that `train` does before training: every check, near duplicates, a split free of leaks, then as ours
tokenizers    json.loads, a format string, the tokenizer's own batches on every core; no mask, nothing written
datasets      load_dataset and a batched map over the rendered texts
trl           SFTTrainer's own preparation (trl2: with two processes)
llamafactory  LLaMA-Factory's get_dataset (llamafactory2: with two processes)

Rows are chats of about 750 characters, put together from the starter's text. A peer runs under $BENCH_PYTHON_<PEER> where that
is set, else under this Python; one that cannot be imported is named and left out. Prints medians: rows a second, the ratio to
the fastest peer, and the most memory of all its processes together.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STARTER = ROOT / "src/tunesmith/assets/starter"
WAYS = ("ours", "whole", "tokenizers", "datasets", "trl", "trl2", "llamafactory", "llamafactory2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help="rows to use instead of generated ones")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(ONE[options.one.rstrip("2")](options.file, 2 if options.one.endswith("2") else None)))
        return
    ways = options.ways.split(",")
    seen: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        file = options.file or write_rows(Path(folder) / "chat.jsonl", options.rows)
        count = sum(1 for _ in file.open("rb"))
        for _ in range(options.repeat):
            for way in list(ways):
                found = run(way, file, Path(folder))
                if isinstance(found, str):
                    print(f"{way}: left out ({found})", flush=True)
                    ways.remove(way)
                else:
                    seen[way].append(found)
    medians = {
        way: [statistics.median(values) for values in zip(*runs, strict=True)] for way, runs in seen.items() if runs
    }
    best = max((count / m[0] for way, m in medians.items() if way not in ("ours", "whole", "tokenizers")), default=0.0)
    print(f"{count} rows; medians of {options.repeat}")
    for way, (seconds, peak) in medians.items():
        spread = [count / s for s, _ in seen[way]]
        against = f"{count / seconds / best:5.2f}x" if best else ""
        print(
            f"  {way:14} {count / seconds:7.0f} rows/s ({min(spread):.0f} to {max(spread):.0f}) {against}  {peak:6.0f} MB"
        )


def run(way: str, file: Path, folder: Path) -> tuple[float, float] | str:
    """(seconds, peak MB of the process and its children), or why it cannot run."""
    python = os.environ.get(f"BENCH_PYTHON_{way.rstrip('2').upper()}", sys.executable)
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        env = os.environ | {
            "HF_DATASETS_CACHE": cache,
            "XDG_CACHE_HOME": cache,
            "HF_HUB_OFFLINE": "1",
            "DISABLE_VERSION_CHECK": "1",
        }
        worker = subprocess.Popen(
            [python, __file__, "--one", way, "--file", str(file)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        peak = [0.0]
        watcher = threading.Thread(target=watch, args=(worker, peak), daemon=True)
        watcher.start()
        out, errors = worker.communicate()
        watcher.join()
    if worker.returncode:
        return errors.strip().splitlines()[-1]
    return json.loads(out.strip().splitlines()[-1]), peak[0]


def watch(worker: subprocess.Popen[str], peak: list[float]) -> None:
    """Keep the highest sum of the memory of a process and those it has started (each shared page counted once)."""
    while worker.poll() is None:
        total = 0
        for pid in family(worker.pid):
            try:
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                total += int(text.partition("\nPss:")[2].split()[0])
            except (OSError, IndexError):
                pass
        peak[0] = max(peak[0], total / 1024)
        time.sleep(0.1)


def family(pid: int) -> list[int]:
    found = [pid]
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = tasks.read_text().split()
        except OSError:
            continue
        for child in children:
            found += family(int(child))
    return found


def write_rows(path: Path, count: int) -> Path:
    rng = random.Random(0)
    read = [json.loads(line) for line in (ROOT / "tools/starter/talk.jsonl").open()]
    pairs = [(row["prompt"], row["completion"]) for row in read if "prompt" in row]
    with path.open("w", encoding="utf-8") as out:
        for _ in range(count):
            ask, answer = rng.choice(pairs)
            length = rng.randrange(300, 1000)
            while len(answer) < length:
                answer += "\n\n" + rng.choice(pairs)[1]
            said = [{"role": "user", "content": ask[:200]}, {"role": "assistant", "content": answer[:length].strip()}]
            out.write(json.dumps({"messages": said}, ensure_ascii=False) + "\n")
    return path


# ---- one way, in its own process; each returns seconds


def ours(file: Path, processes: int | None) -> float:
    from tunesmith.data.check import examine
    from tunesmith.models import STARTER as model
    from tunesmith.preparing import rendered
    from tunesmith.recipe import Recipe
    from tunesmith.render import Renderer

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        loaded = examine([str(file)], structure_only=True, store=Path(folder) / "rows.jsonl")
        rendered({"train": loaded.rows()}, Renderer(model), 2048, Recipe(over_long="truncate"), Path(folder))
        return time.perf_counter() - began


def whole(file: Path, processes: int | None) -> float:
    from tunesmith import api, backends

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        prepared = api.prepare(str(file), model="starter", over_long="truncate")
        backends.create_run(prepared, Path(folder) / "run")
        return time.perf_counter() - began


def tokenizers(file: Path, processes: int | None) -> float:
    from tokenizers import Tokenizer

    began = time.perf_counter()
    tokenizer = Tokenizer.from_file(str(STARTER / "tokenizer.json"))
    rows = (json.loads(line)["messages"] for line in file.open(encoding="utf-8"))
    texts = ("".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages) for messages in rows)
    while batch := list(islice(texts, 2048)):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            assert encoding.ids
    return time.perf_counter() - began


def datasets(file: Path, processes: int | None) -> float:
    from datasets import load_dataset
    from transformers import AutoTokenizer

    began = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(STARTER)
    rows = load_dataset("json", data_files=str(file), split="train")

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        def ids(texts: list[str]) -> list[list[int]]:
            found: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
            return found

        asks = [
            tokenizer.apply_chat_template(m[:-1], add_generation_prompt=True, tokenize=False) for m in batch["messages"]
        ]
        texts = ids([tokenizer.apply_chat_template(m, tokenize=False) for m in batch["messages"]])
        return {
            "input_ids": texts,
            "labels": [[-100] * len(a) + t[len(a) :] for a, t in zip(ids(asks), texts, strict=True)],
        }

    rows.map(encode, batched=True, num_proc=processes, remove_columns=["messages"])
    return time.perf_counter() - began


def small_model(folder: str) -> None:
    """A model whose weights do not matter, with the starter's tokenizer."""
    import shutil

    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(STARTER / name, Path(folder) / name)


def trl(file: Path, processes: int | None) -> float:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        small_model(folder)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        pairs = Path(folder) / "pairs.jsonl"
        with pairs.open("w") as out:
            for line in file.open():
                said = json.loads(line)["messages"]
                out.write(json.dumps({"prompt": said[:1], "completion": said[1:]}) + "\n")
        began = time.perf_counter()
        rows = load_dataset("json", data_files=str(pairs), split="train")
        config = SFTConfig(
            output_dir=folder, use_cpu=True, bf16=False, report_to="none", max_length=2048, dataset_num_proc=processes
        )
        SFTTrainer(model=model, processing_class=tokenizer, train_dataset=rows, args=config)
        return time.perf_counter() - began


def llamafactory(file: Path, processes: int | None) -> float:
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.data.formatter import StringFormatter
    from llamafactory.data.template import register_template
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    register_template(
        name="starter",
        format_user=StringFormatter(slots=["<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n"]),
        format_assistant=StringFormatter(slots=["{{content}}<|im_end|>\n"]),
    )
    with tempfile.TemporaryDirectory() as folder:
        small_model(folder)
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
        about = {"file_name": str(file), "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
        (Path(folder) / "dataset_info.json").write_text(json.dumps({"rows": about}))
        model, data, training, *_ = get_train_args(
            dict(
                model_name_or_path=folder, stage="sft", do_train=True, finetuning_type="full", dataset_dir=folder,
                dataset="rows", template="starter", cutoff_len=2048, output_dir=f"{folder}/out", use_cpu=True,
                report_to="none", bf16=False, overwrite_cache=True, preprocessing_num_workers=processes,
            )
        )  # fmt: skip
        loaded = load_tokenizer(model)
        began = time.perf_counter()
        template = get_template_and_fix_tokenizer(loaded["tokenizer"], data)
        get_dataset(template, model, data, training, stage="sft", **loaded)
        return time.perf_counter() - began


ONE = {f.__name__: f for f in (ours, whole, tokenizers, datasets, trl, llamafactory)}

if __name__ == "__main__":
    main()
