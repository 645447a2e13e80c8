"""One optimizer step and one validation: what the training loop and the learning-rate search are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import msgspec
import torch
from torch.nn.parallel import DistributedDataParallel

from tunesmith.local import batches, optim
from tunesmith.local.loss import LossModule
from tunesmith.local.prefix import Below
from tunesmith.local.tokens import Tokens
from tunesmith.local.world import ALONE, World
from tunesmith.recipe import Recipe


class Diverged(Exception):
    """The loss or the gradient is no number any more."""

    def __init__(self, loss: float) -> None:
        self.loss = loss


class Stepped(msgspec.Struct, frozen=True):
    """Of one step: mean loss in nats a supervised token, tokens, supervised tokens, the gradient's norm before clipping."""

    loss: float
    tokens: int
    supervised: int
    norm: float


class Engine:
    """A model in training: `step` changes it, `validate` judges it.

    A step's loss is the sum over the supervised tokens of all its conversations / their number, whatever the
    micro-batches and the processes that share them.
    """

    def __init__(
        self,
        module: LossModule,
        recipe: Recipe,
        sets: dict[str, Tokens],
        below: Below | None = None,
        world: World = ALONE,
        warn: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.module, self.model, self.recipe, self.sets = module, module.model, recipe, sets
        self.device = next(self.model.parameters()).device
        self._below, self._world, self._warn = below, world, warn
        self._most = (int(recipe.batch_size), int(recipe.micro_batch_tokens))  # rows and tokens of a micro-batch
        self._forward: Any = module
        if world.size > 1:
            self._forward = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.begin()

    def begin(self) -> None:
        """Take a new optimizer."""
        self.optimizer = optim.make(self.model, self.recipe)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.recipe.mixed_precision == "fp16")

    def loss(self, side: str, rows: list[int], forward: Any = None) -> tuple[torch.Tensor, int]:
        """(sum of the losses, number of supervised tokens) of some rows of a set."""
        forward = forward or self.module
        batch = batches.collate(self.sets[side], rows, self.device)
        with torch.autocast(self.device.type, half_type(self.recipe), enabled=use_half(self.recipe, self.device)):
            if self._below:
                return self._below.loss(forward, side, rows, batch)
            result: tuple[torch.Tensor, int] = forward(batch.ids, batch.mask, batch.segments)
            return result

    def step(self, rows: list[int], rate: float) -> Stepped:
        """One optimizer step over some training rows. Raises Diverged before a weight is changed."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        supervised = self.sets["train"].supervised(rows)
        try:
            found = self._backward(rows, supervised)
        except RuntimeError as error:
            if not out_of_memory(error) or self._most[0] < int(self.recipe.batch_size) or len(rows) == 1:
                raise
            if self._world.size > 1:  # the others wait in the middle of their sums
                raise
            self._halve()
            found = self._backward(rows, supervised)
        total, tokens = self._world.sum(*found)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm or math.inf).item()
        if not math.isfinite(total) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            raise Diverged(total / supervised)
        self.scaler.step(self.optimizer)  # with fp16, not where a gradient has overflowed: the scale is lowered instead
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return Stepped(total / supervised, int(tokens), supervised, norm)

    def _backward(self, rows: list[int], supervised: int) -> tuple[float, int]:
        """Add up the gradient of the step's mean loss; (sum of the losses, tokens) of this process's rows."""
        train, mine = self.sets["train"], self._world.share(rows)
        parts = list(batches.in_parts(train, mine or rows[:1], *self._most))
        total, tokens = 0.0, 0
        for number, part in enumerate(parts, 1):
            last = number == len(parts) or self._world.size == 1
            with nullcontext() if last else self._forward.no_sync():
                loss, _ = self.loss("train", part, self._forward)
                # the gradients of several processes are averaged; one without a row takes part with nothing
                self.scaler.scale(loss * bool(mine) / (supervised / self._world.size)).backward()
            if mine:
                total, tokens = total + loss.item(), tokens + sum(map(train.length, part))
        return total, tokens

    def _halve(self) -> None:
        """Go on with half a micro-batch at a time, to the same result."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._most = (max(1, self._most[0] // 2), self._most[1] // 2)
        self._warn(f"out of memory: going on with {self._most[0]} rows at a time, to the same result")

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over all supervised tokens of the validation set, in nats. Holds no logits."""
        was_training = self.model.training
        self.model.eval()
        total, count = 0.0, 0
        for group in self._world.share(list(batches.in_order(self.sets["valid"]))):
            loss, n = self.loss("valid", group)
            total, count = total + loss.item(), count + n
        self.model.train(was_training)
        total, counted = self._world.sum(total, count)
        return total / max(counted, 1)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error is for want of memory: of a GPU, or of torch's CPU allocator, which has no type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def half_type(recipe: Recipe) -> torch.dtype:
    return torch.float16 if recipe.mixed_precision == "fp16" else torch.bfloat16


def use_half(recipe: Recipe, device: torch.device) -> bool:
    """Whether the model runs in 16 bits (its weights stay in 32)."""
    return recipe.mixed_precision in ("bf16", "fp16") or (recipe.mixed_precision == "auto" and device.type == "cuda")
