"""Train in this process, for tests: what a worker does, without the worker."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tunesmith import api
from tunesmith.layout import create
from tunesmith.local.backend import lay_out
from tunesmith.local.loop import train
from tunesmith.recipe import Recipe
from tunesmith.runs import Run


def fit(path: Path, dataset: Path | str, model: Path | str, **settings: Any) -> Run:
    """A finished run. Small and quick unless told otherwise."""
    defaults = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "threads": 1}
    prepared = api.prepare(str(dataset), model=str(model), **{**defaults, **settings})
    run = lay_out(prepared, path)
    train(run, lambda: False)
    return run


def made(path: Path, model: Path | str = "starter", provider: str = "huggingface") -> Run:
    """A run as its record tells it, without a model."""
    recipe = Recipe(model=str(model), dataset="rows.jsonl", method="lora")
    known = {"provider": provider, "recipe": recipe, "plan": {"steps": 2}, "created": "", "origin": {}, "versions": {}}
    with create(path, {**known, "data_hashes": {"train": "a1" * 32}}) as run:
        pass
    run.append("eval", step=2, loss=0.5, best=True)
    return run


def losses(run: Run) -> list[float]:
    return [e["loss"] for e in run.metrics("step")]


def weights(folder: Path) -> str:
    """Hash of the weight files' bytes."""
    files = sorted(folder.glob("*.safetensors"))
    assert files, folder
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def architecture(name: str, folder: Path, **changed: Any) -> Path:
    """A tiny model of another kind, whose random weights are large enough that a wrong path shows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    common = dict(vocab_size=300, bos_token_id=None, eos_token_id=2, pad_token_id=0)
    shapes = {
        "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=128),
        "opt": dict(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32),
        "gpt_neox": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
        "gemma2": dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=16,
        ),
        "cohere": dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, logit_scale=0.5
        ),
    }
    llama_like = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **{**common, **shapes.get(name, llama_like), **changed})
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder)
    return folder
