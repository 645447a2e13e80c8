"""The optimizer and its rate: AdamW, in 32 or 8 bits, and the schedules."""

from __future__ import annotations

import math
from typing import Any

import torch

from tunesmith.recipe import Recipe


def make(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) on what is trained; decay on matrices only (norms and biases are scales, not
    weights). The 8-bit ones keep both moments in blocks of one byte a weight (Dettmers et al. 2022); paged, they are
    swapped out where a GPU is full. The loop sets the rate before each step.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    settings: dict[str, Any] = {
        "lr": 1.0,
        "betas": (recipe.adam_beta1, recipe.adam_beta2),
        "eps": recipe.adam_epsilon,
    }
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **settings)
    from bitsandbytes import optim as eight

    paged = recipe.optimizer.startswith("paged") and trained[0].device.type == "cuda"
    made: torch.optim.Optimizer = (eight.PagedAdamW8bit if paged else eight.AdamW8bit)(groups, **settings)
    return made


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The rate of step `step` (from 0): linear warm-up, then cosine or linear to zero at `steps`, or constant."""
    peak = float(recipe.learning_rate)
    warmup = recipe.warmup_steps if recipe.warmup_steps is not None else math.ceil(float(recipe.warmup_ratio) * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    shapes = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return peak * shapes[recipe.lr_scheduler]
