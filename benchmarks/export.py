"""What an export takes: memory of all its processes together beside the size of the model in 16 bits, and time.

    python benchmarks/export.py                 # a random model of Llama 3.2 1B's shape, with an adapter: merged, gguf, q8_0
    python benchmarks/export.py --layers 4 --prompts 4

The peak is the largest sum of what the command and its children hold (resident: pages of files that they map count too, and
what two of them share counts twice), looked at every 20 ms.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tunesmith.models import STARTER

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    hidden, inner, narrow = SHAPE["hidden_size"], SHAPE["intermediate_size"], 8 * 64
    found = {"model.embed_tokens.weight": (SHAPE["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for i in range(layers):
        at = f"model.layers.{i}"
        found |= {f"{at}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        found |= {f"{at}.self_attn.{n}_proj.weight": (hidden, hidden) for n in "qo"}
        found |= {f"{at}.self_attn.{n}_proj.weight": (narrow, hidden) for n in "kv"}
        found |= {f"{at}.mlp.{n}_proj.weight": (inner, hidden) for n in ("gate", "up")}
        found[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
    return found


def write_model(folder: Path, layers: int) -> int:
    """A random model, written tensor after tensor; its bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": layers}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(STARTER / name, folder / name)
    header, place = {}, 0
    for name, shape in shapes(layers).items():
        end = place + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    torch.manual_seed(0)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes(layers).values():
            weight = torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.03
            stream.write(memoryview(weight.bfloat16().view(torch.uint8).numpy().reshape(-1)))
    return place


def write_adapter(folder: Path, base: Path, layers: int) -> None:
    """An adapter of rank 16 on all linear layers, as peft writes it."""
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {}
    for name, shape in shapes(layers).items():
        if name.endswith("proj.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(16, shape[1]) * 0.01
            tensors[f"{module}.lora_B.weight"] = torch.randn(shape[0], 16) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 16,
        "lora_alpha": 32,
        "base_model_name_or_path": str(base),
        "task_type": "CAUSAL_LM",
    }
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": modules}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(STARTER / name, folder / name)


def held(process: int) -> int:
    """Bytes that a process and all its descendants hold now; what two of them share counts twice."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    own = next((int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS:")), 0)
    return 1024 * own + sum(held(int(child)) for child in children)


def measure(command: list[str]) -> tuple[int, float, dict[str, object]]:
    """(peak bytes, seconds, what the command said)."""
    began, peak = time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out)
        while process.poll() is None:
            peak = max(peak, held(process.pid))
            time.sleep(0.02)
        out.seek(0)
        return peak, time.monotonic() - began, json.loads(out.read())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--only", default="merged,f16,q8_0", help="which exports")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = Path(folder) / "base", Path(folder) / "adapter"
        size = write_model(base, options.layers)
        write_adapter(adapter, base, options.layers)
        print(f"model: {size / 2:,.0f} numbers, {size / 1e6:,.0f} MB in 16 bits")
        for kind in options.only.split(","):
            out = Path(folder) / kind
            form = ["--format", "merged"] if kind == "merged" else ["--format", "gguf", "--quantize", kind]
            command = [sys.executable, "-m", "tunesmith", "export", str(adapter), *form, "-o", str(out), "--json"]
            peak, seconds, said = measure([*command, "--prompts", str(options.prompts)])
            passed = said["certificate"]["deployable"]  # type: ignore[index]
            print(
                f"{kind:8} peak {peak / 1e6:7,.0f} MB = {peak / size:.2f} of it   {seconds:5.0f} s   certificate {passed}"
            )
            for check in said["certificate"]["checks"]:  # type: ignore[index]
                if not check["passed"]:
                    print(f"         {check['name']}: {check['found']}")
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
