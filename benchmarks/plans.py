"""What `tunesmith plan` says of well-known model shapes on this machine, by method: trained weights and peak memory.

    python benchmarks/plans.py [--dataset echo] [--only Qwen] [--no-probe]

A model is its configuration, the head of a weights file and the starter's tokenizer: a plan reads no weights. Its rows have
therefore the starter's tokens, some more than the model's own. Beside: what weights, gradients and Adam's moments alone take
on a GPU, by arithmetic (trained weights 18 bytes, with their copy of 16 bits; others 2, in 4-bit layers 0.55).
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

from tunesmith import api
from tunesmith.costs import layer_of
from tunesmith.models import STARTER, shapes

LAYOUT = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
SHAPES: dict[
    str, tuple[str, tuple[int, ...], bool, int]
] = {  # type, sizes by LAYOUT, tied head, parameters by its publisher
    "SmolLM2-135M": ("llama", (576, 30, 9, 3, 1536, 49152), True, 134_515_008),
    "Qwen2.5-0.5B": ("qwen2", (896, 24, 14, 2, 4864, 151936), True, 494_032_768),
    "Llama-3.2-1B": ("llama", (2048, 16, 32, 8, 8192, 128256), True, 1_235_814_400),
    "Qwen2.5-1.5B": ("qwen2", (1536, 28, 12, 2, 8960, 151936), True, 1_543_714_304),
    "Llama-3.2-3B": ("llama", (3072, 28, 24, 8, 8192, 128256), True, 3_212_749_824),
    "Qwen2.5-7B": ("qwen2", (3584, 28, 28, 4, 18944, 152064), False, 7_615_616_512),
}


def model(name: str, folder: Path) -> Path:
    """A folder that a plan can read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, sizes, tied, published = SHAPES[name]
    config: Any = AutoConfig.for_model(kind, **dict(zip(LAYOUT, sizes, strict=True)), tie_word_embeddings=tied)
    config.head_dim = sizes[0] // sizes[2]
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config).state_dict()
    config.architectures = [f"{kind.title()}ForCausalLM"]
    config.save_pretrained(folder)
    head, at = {}, 0
    for key, tensor in weights.items():
        if not (tied and key == "lm_head.weight"):
            head[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + 2 * tensor.numel()]}
            at += 2 * tensor.numel()
    assert at == 2 * published, (name, at / 2)
    written = json.dumps(head).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(written)) + written)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(STARTER / file, folder / file)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="echo")
    parser.add_argument("--only", default="", help="a part of the name")
    parser.add_argument("--no-probe", action="store_true", help="the arithmetic alone")
    how = parser.parse_args()
    with tempfile.TemporaryDirectory() as above:
        for name in (each for each in SHAPES if how.only in each):
            folder = model(name, Path(above) / name)
            sizes = {key: s[0] * (s[1] if len(s) > 1 else 1) for key, s in shapes(folder).items()}
            layers = sum(n for key, n in sizes.items() if layer_of(key) is not None)
            every = sum(sizes.values())
            for method in ("full", "lora", "qlora"):
                prepared = api.prepare(how.dataset, model=str(folder), method=method)
                here = "" if how.no_probe else f"{api.estimate(prepared)[0].memory_mb / 1e3:.1f}"
                trained = prepared.plan.trainable_parameters
                base = {"full": 0.0, "lora": 2.0 * every, "qlora": 2.0 * (every - layers) + 0.55 * layers}[method]
                there = (base + 18 * trained) / 1e9
                print(f"| {name} | {method} | {trained / 1e6:,.1f}M | {here} | {there:.1f} |", flush=True)


if __name__ == "__main__":
    main()
