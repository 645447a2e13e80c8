"""What a recipe needs: trainable weights (counted from the shapes of the model's own weights), memory, disk and time.

Memory and time come from a probe, which measures one and two layers on this machine (`tunesmith.local.probe`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from tunesmith.models import ModelFacts, shapes
from tunesmith.recipe import Recipe

ADAPTERS = ("lora", "qlora")  # the methods that leave the base as it is
LIBRARIES = 450e6  # bytes that torch, transformers and peft take by themselves (CPU build, measured)


def steps_per_epoch(rows: int, recipe: Recipe) -> int:
    """Optimizer steps of one pass over so many rows, the last of which takes what is left."""
    return -(-rows // (int(recipe.batch_size) * recipe.gradient_accumulation_steps))


def planned_steps(rows: int, recipe: Recipe) -> int:
    """Optimizer steps of a run that is not stopped early."""
    steps = steps_per_epoch(rows, recipe) * int(recipe.epochs)
    return min(steps, recipe.max_steps or steps)


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
        and (len(shape) == 1 or "lm_head" in name or "embed_out" in name)
    )


def memory_mb(recipe: Recipe, model: ModelFacts, trained: int, tokens: int) -> int:
    """Peak in MB for batches of `tokens`: weights, gradients and Adam's moments of what is trained, activations kept for
    the backward pass, one chunk of logits, and the libraries."""
    embedding = model.vocabulary * model.hidden
    quantised = max(0, model.parameters - embedding) if recipe.method == "qlora" else 0
    moments = 8 if recipe.optimizer == "adamw" else 2
    weights = 4 * (model.parameters - quantised) + 0.55 * quantised
    if recipe.method in ADAPTERS:
        weights += 4 * trained
    per_token = 4 * model.hidden * (2 if recipe.gradient_checkpointing else 30) * model.layers
    logits = 2 * 4 * 512 * model.vocabulary
    return round((weights + (4 + moments) * trained + per_token * tokens + logits + LIBRARIES) / 1e6)


class Question(msgspec.Struct, frozen=True):
    """What a probe is asked: the model's folder, the recipe, lengths of the training rows in tokens, the share of tokens
    that is learnt, and the number of steps."""

    folder: str
    recipe: Recipe
    lengths: list[int]
    supervised: float
    steps: int


class Answer(msgspec.Struct, frozen=True):
    """What a probe measured. Seconds and saved bytes are for a token; `layer`: of one more layer, `rest`: of all beside the
    layers. The head stands for a vocabulary that is `head_scale` times smaller than the model's."""

    libraries: float  # bytes in memory before a model is loaded
    available: float  # bytes that are free for this process, on the GPU where there is one
    tokens_at_most: int  # in a micro-batch of this run
    layer_seconds: float  # forward and backward
    layer_forward_seconds: float
    layer_bytes: float  # of its weights
    layer_saved_bytes: float  # kept by the forward pass for the backward pass
    rest_seconds: float
    rest_forward_seconds: float
    rest_saved_bytes: float
    head_scale: float
    head_seconds: float  # within rest_seconds
    head_forward_seconds: float
    optimizer_seconds: float  # for a trained weight


class Estimate(msgspec.Struct, frozen=True):
    """Peak memory and disk in MB, seconds of the whole run and of a step, and what is free of memory and disk."""

    memory_mb: int
    available_mb: int
    disk_mb: int
    seconds: float
    step_seconds: float


def estimate(question: Question, model: ModelFacts, valid_tokens: int, found: Answer) -> Estimate:
    """Memory, disk and time of a run that is not stopped early."""
    recipe = question.recipe
    trained, frozen = trainable(recipe, model), frozen_layers(recipe, model.layers)
    top = model.layers - frozen
    rest = found.rest_seconds + (found.head_scale - 1) * found.head_seconds
    again = found.layer_forward_seconds if recipe.gradient_checkpointing else 0.0
    token = rest + top * (found.layer_seconds + again)
    once = frozen * found.layer_forward_seconds
    epochs, tokens = question.steps / steps_per_epoch(len(question.lengths), recipe), sum(question.lengths)
    training = epochs * tokens * token + (min(1.0, epochs) if recipe.prefix_cache else epochs) * tokens * once
    updating = question.steps * trained * found.optimizer_seconds
    forward = found.rest_forward_seconds + (found.head_scale - 1) * found.head_forward_seconds
    looks = 1 + -(-question.steps // int(recipe.eval_steps)) if valid_tokens else 0
    judging = looks * valid_tokens * (forward + model.layers * found.layer_forward_seconds)
    seconds = (training + judging) / recipe.nproc + updating
    return Estimate(
        round(peak(recipe, model, trained, valid_tokens, found) / 1e6),
        round(found.available / 1e6),
        round(disk(recipe, model, trained, tokens + valid_tokens) / 1e6),
        seconds,
        (training / recipe.nproc + updating) / question.steps,
    )


def peak(recipe: Recipe, model: ModelFacts, trained: int, valid_tokens: int, found: Answer) -> float:
    """Bytes held at the worst moment: when the forward pass of the largest micro-batch ends, or when all gradients stand."""
    in_layers = sum(math.prod(s) for n, s in shapes(Path(model.folder)).items() if layer_of(n) is not None)
    weights = 4 * (model.parameters - in_layers) + model.layers * found.layer_bytes
    top = model.layers - frozen_layers(recipe, model.layers)
    moments = (8 if recipe.optimizer == "adamw" else 2) * trained
    head = 4 * model.vocabulary * model.hidden if trained == model.parameters else 0
    kept = found.layer_saved_bytes * (1 if recipe.gradient_checkpointing else top)
    kept += 4 * model.hidden * top if recipe.gradient_checkpointing else 0
    forward = (kept + found.rest_saved_bytes) * found.tokens_at_most + head + 4 * 512 * model.vocabulary
    backward = 4 * trained + head
    # Gradients on their way, and what lies between blocks that are freed and taken again: fitted to benchmarks/memory.py
    share = 0.85 if recipe.method == "qlora" else 0.25
    # A layer that is recomputed stands beside its gradients, which are as large, and its gates keep their products
    layer = (min(3.5, 1 + top / 2) if recipe.gradient_checkpointing else 1.0) * found.layer_saved_bytes
    passing = (layer + share * kept) * found.tokens_at_most + 60e6
    validating = found.layer_saved_bytes * min(int(recipe.micro_batch_tokens), valid_tokens)
    return found.libraries + weights + moments + max(forward, backward, validating) + passing


def disk(recipe: Recipe, model: ModelFacts, trained: int, tokens: int) -> float:
    """Bytes of a run's directory: checkpoints (weights, or adapters, and the optimizer's state), and rows and their tokens;
    and of the cache of what frozen layers give."""
    weights = 4 * (trained if recipe.method in ADAPTERS else model.parameters)
    kept = recipe.save_total_limit + recipe.save_best_limit
    cached = 4 * model.hidden * tokens if recipe.prefix_cache and frozen_layers(recipe, model.layers) else 0
    return kept * (weights + (8 if recipe.optimizer == "adamw" else 2) * trained) + 10 * tokens + cached


def ways_to_fit(
    question: Question,
    model: ModelFacts,
    valid_tokens: int,
    found: Answer,
    possible: Callable[[Recipe], bool] = lambda _: True,
) -> list[tuple[str, int]]:
    """Changes of a recipe that does not fit, each with the memory it would need in MB: those that are `possible` here and
    fit, the mildest first."""
    recipe = question.recipe
    longest = max(question.lengths)
    fewer, recomputed = {"micro_batch_tokens": longest}, {"gradient_checkpointing": True}
    steps: list[tuple[str, dict[str, Any], int]] = [  # each with all that it takes
        ("(the same result)", fewer, min(longest, found.tokens_at_most)),
        ("--gradient-checkpointing (the same result, a third slower)", fewer | recomputed, longest),
        ("--gradient-checkpointing --optimizer adamw_8bit", fewer | recomputed | {"optimizer": "adamw_8bit"}, longest),
        ("--gradient-checkpointing --lora", fewer | recomputed | {"method": "lora"}, longest),
        ("--gradient-checkpointing --method qlora", fewer | recomputed | {"method": "qlora"}, longest),
    ]
    result = []
    for words, changes, tokens in steps:
        other = msgspec.structs.replace(recipe, **changes)
        smaller = msgspec.structs.replace(found, tokens_at_most=tokens)
        if other.method == "qlora" and recipe.method != "qlora":
            smaller = msgspec.structs.replace(smaller, layer_bytes=0.14 * found.layer_bytes)  # 4.5 bits of 32
        need = round(peak(other, model, trainable(other, model), valid_tokens, smaller) / 1e6)
        if need * 1e6 < found.available and possible(other):
            result.append((f"--micro-batch-tokens {longest} {words}", need))
    return result
