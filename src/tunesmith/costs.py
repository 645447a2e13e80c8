"""What a recipe needs: trainable weights (counted from the shapes of the model's own weights) and memory."""

from __future__ import annotations

import math
from pathlib import Path

from tunesmith.models import ModelFacts, shapes
from tunesmith.recipe import Recipe

ADAPTERS = ("lora", "qlora")  # the methods that leave the base as it is
LIBRARIES = 450e6  # bytes that torch, transformers and peft take by themselves (CPU build, measured)


def frozen_layers(recipe: Recipe, layers: int) -> int:
    """How many layers, from the bottom, stay as they are."""
    return math.floor(freeze_ratio(recipe) * layers)


def freeze_ratio(recipe: Recipe) -> float:
    """The share of frozen layers; where it is "auto", 0.7 for the method freeze and 0 for the others."""
    return recipe.freeze_ratio if recipe.freeze_ratio != "auto" else 0.7 if recipe.method == "freeze" else 0.0


def layer_of(name: str) -> int | None:
    """The layer a weight belongs to ("model.layers.3.mlp.up_proj.weight" -> 3), None for those beside the stack."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def trainable(recipe: Recipe, model: ModelFacts) -> int:
    """How many weights change: those of the adapters, or those of all layers above the frozen ones."""
    frozen = frozen_layers(recipe, model.layers)
    weights = shapes(Path(model.folder))
    if recipe.method in ADAPTERS:
        targets = {t.strip() for t in recipe.lora_targets.split(",")}
        count = 0
        for name, shape in weights.items():
            layer, module = layer_of(name), name.split(".")[-2]
            linear = name.endswith(".weight") and len(shape) == 2 and layer is not None and layer >= frozen
            if linear and (recipe.lora_targets == "all-linear" or module in targets):
                count += recipe.lora_rank * sum(shape) + (shape[0] if recipe.use_dora else 0)
        return count
    if not frozen:
        return model.parameters
    return sum(
        math.prod(shape)
        for name, shape in weights.items()
        if (layer := layer_of(name)) is not None
        and layer >= frozen
        or layer is None
        and (len(shape) == 1 or "lm_head" in name)
    )


def memory_mb(recipe: Recipe, model: ModelFacts, trained: int, tokens: int) -> int:
    """Peak in MB for batches of `tokens`: weights, gradients and Adam's moments of what is trained, activations kept for
    the backward pass, one chunk of logits, and the libraries."""
    embedding = model.vocabulary * model.hidden
    frozen = model.parameters if recipe.method in ADAPTERS else 0
    quantised = max(0, model.parameters - embedding) if recipe.method == "qlora" else 0
    moments = 8 if recipe.optimizer == "adamw" else 2
    weights = 4 * (max(frozen, model.parameters) - quantised) + 0.55 * quantised
    if recipe.method in ADAPTERS:
        weights += 4 * trained
    per_token = 4 * model.hidden * (2 if recipe.gradient_checkpointing else 30) * model.layers
    logits = 2 * 4 * 512 * model.vocabulary
    return round((weights + (4 + moments) * trained + per_token * tokens + logits + LIBRARIES) / 1e6)
