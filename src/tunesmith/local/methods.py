"""What is trained: all weights, low-rank adapters (on 4-bit weights too), or only the layers above a frozen bottom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tunesmith.costs import ADAPTERS, frozen_layers
from tunesmith.errors import UsageError
from tunesmith.recipe import Recipe

LINEAR = (nn.Linear, Conv1D)  # GPT-2 writes its linear layers as Conv1D


def apply(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Mark what is trained, adding adapters where asked. Adapter weights depend on the seed alone."""
    stack, layers = decoder_layers(model)
    frozen = frozen_layers(recipe, len(layers))
    if recipe.method in ADAPTERS:
        return _lora(model, recipe, stack, frozen, len(layers))
    if frozen:
        model.requires_grad_(False)
        for layer in layers[frozen:]:
            layer.requires_grad_(True)
        for norm in norms_beside(model, layers):
            norm.requires_grad_(True)
        head = model.get_output_embeddings()
        if head.weight is not model.get_input_embeddings().weight:
            head.requires_grad_(True)
        # a tied head stays frozen: it is the embedding, which lies below the frozen layers
    return model


def quantisation(recipe: Recipe, where: torch.device) -> Any:
    """How to load the base for qlora: linear layers as 4-bit numbers in blocks of 64 (Dettmers et al. 2023); else None."""
    if recipe.method != "qlora":
        return None
    from transformers import BitsAndBytesConfig

    names = {"auto": half(where) or torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe.quant_type,
        bnb_4bit_use_double_quant=recipe.double_quant,
        bnb_4bit_compute_dtype=names[recipe.compute_dtype],
    )


def norms_beside(model: nn.Module, layers: nn.ModuleList) -> list[nn.Module]:
    """The modules next to the stack of layers whose weights are all vectors: the last norm. (Embeddings are matrices.)"""
    parent = next(m for m in model.modules() if any(child is layers for child in m.children()))
    beside = [child for child in parent.children() if child is not layers]
    return [m for m in beside if list(m.parameters()) and all(p.ndim == 1 for p in m.parameters())]


def _lora(model: nn.Module, recipe: Recipe, stack: str, frozen: int, layers: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets: str | list[str] = recipe.lora_targets
    if targets != "all-linear":
        targets = [t.strip() for t in recipe.lora_targets.split(",")]
        present = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, LINEAR)}
        unknown = [t for t in targets if t not in present]
        if unknown:
            raise UsageError(
                f'lora_targets: no linear layer "{unknown[0]}"',
                where="lora_targets",
                fix=f"this model has {', '.join(sorted(present))}",
            )
    assert recipe.lora_alpha != "auto"
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=targets,
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),
        bias="none",
        task_type="CAUSAL_LM",
    )
    if frozen:
        config.layers_to_transform, config.layers_pattern = list(range(frozen, layers)), stack
        if targets == "all-linear":
            top = decoder_layers(model)[1][0]
            config.target_modules = sorted(
                {n.rpartition(".")[2] for n, m in top.named_modules() if isinstance(m, LINEAR)}
            )
    torch.manual_seed(recipe.seed)
    adapted: Any = get_peft_model(model, config)
    if (
        not Path(recipe.model).exists() and recipe.model != "starter"
    ):  # a Hub name: the adapter loads wherever that does
        adapted.peft_config["default"].base_model_name_or_path = recipe.model
    return adapted


def precision(recipe: Recipe, device: torch.device) -> torch.dtype | None:
    """The type of 16 bits that the model runs in (weights that are trained stay in 32), None for 32.

    auto: on an NVIDIA GPU bf16, before Ampere, which only imitates that, fp16; elsewhere 32 bits.
    """
    if recipe.mixed_precision == "auto":
        return half(device)
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.mixed_precision)


def half(device: torch.device) -> torch.dtype | None:
    """The type of 16 bits that a device is good at."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of decoder layers, and its attribute's name ("layers", "h")."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name.rpartition(".")[2], module
    raise UsageError("this model's layers were not found", where=type(model).__name__, fix="use --freeze-ratio 0")
