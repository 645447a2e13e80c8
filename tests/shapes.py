"""Models for tests of exports: every shape that GGUF files are written of, with random weights, and pieces as SentencePiece's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from conftest import STARTER

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def shaped(name: str, folder: Path, pieces: bool = False, **changed: Any) -> Path:
    """A random model of a type, whose weights are large enough that a wrong path shows. `pieces`: with SentencePiece's
    vocabulary instead of the starter's."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    if not pieces:
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(STARTER / file, folder / file)
    size = pieces_tokenizer(folder) if pieces else 8192
    common = {"vocab_size": size, "bos_token_id": 1 if pieces else None, "eos_token_id": 2, "pad_token_id": 0}
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    if name == "gpt2":
        shape = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}
    if name in ("gemma", "gemma2", "qwen3"):
        shape["head_dim"] = 16
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**common, **shape, **changed})
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        vector = parameter.ndim == 1
        around = 1.0 if vector and not name.startswith("gemma") else 0.0  # Gemma keeps its norms as weight - 1
        torch.nn.init.normal_(parameter, mean=around, std=0.3 if vector else 0.15)
    model.save_pretrained(folder)
    return folder


def pieces_tokenizer(folder: Path) -> int:
    """A tokenizer as that of Llama 2, Mistral, Gemma and Phi-3: merges over ▁-marked pieces, bytes for the rest. Its size."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special + [f"<0x{i:02X}>" for i in range(256)], show_progress=False
    )
    rows = (STARTER.parent / "data" / "echo.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer.train_from_iterator([json.loads(row)["completion"] for row in rows], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    known = json.loads(tokenizer.to_str())
    known["added_tokens"] = [t for t in known["added_tokens"] if not t["content"].startswith("<0x")]
    (folder / "tokenizer.json").write_text(json.dumps(known, ensure_ascii=False), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return int(tokenizer.get_vocab_size())
