"""One optimizer step and one validation: what the training loop and the learning-rate search are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import msgspec
import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tunesmith.local import batches, optim
from tunesmith.local.loss import LossModule
from tunesmith.local.machine import accelerator
from tunesmith.local.methods import decoder_layers, precision
from tunesmith.local.prefix import Below
from tunesmith.local.world import ALONE, World, spread, whole
from tunesmith.recipe import Recipe
from tunesmith.tokens import Tokens


class Diverged(Exception):
    """The loss or the gradient is no number any more."""

    def __init__(self, value: float, what: str) -> None:
        self.value, self.what = value, what


class Stepped(msgspec.Struct, frozen=True):
    """Of one step: mean loss in nats a supervised token, tokens, supervised tokens, the gradient's norm before clipping; the
    share of supervised tokens that were the likeliest, where the recipe asks for it."""

    loss: float
    tokens: int
    supervised: int
    norm: float
    accuracy: float | None


class Judged(msgspec.Struct, frozen=True):
    """Of a validation: mean loss in nats a supervised token, and the accuracy as of Stepped."""

    loss: float
    accuracy: float | None


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
        self._below, self._world, self._warn = below, world, warn
        self.most_rows, self.most_tokens = int(recipe.batch_size), int(recipe.micro_batch_tokens)  # of a micro-batch
        self.halved = False
        self.seen: list[tuple[list[int], torch.Tensor]] = []  # rows of the last step, in this process, and their losses
        self._forward: Any = module
        self._spread = world.size > 1 and recipe.sharding == "fsdp2"
        if self._spread:
            spread(module, list(decoder_layers(self.model)[1]))
        elif world.size > 1:
            self._forward = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.device = next(self.model.parameters()).device
        self._half = precision(recipe, self.device)
        self.begin()

    def begin(self) -> None:
        """Take a new optimizer."""
        self.optimizer = optim.make(self.model, self.recipe)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self._half == torch.float16)

    def loss(self, side: str, rows: list[int], forward: Any = None) -> tuple[torch.Tensor, int]:
        """(sum of the losses, number of supervised tokens) of some rows of a set."""
        forward = forward or self.module
        batch = batches.collate(self.sets[side], rows, self.device)
        with torch.autocast(self.device.type, self._half, enabled=self._half is not None):
            if self._below:
                return self._below.loss(forward, side, rows, batch)
            result: tuple[torch.Tensor, int] = forward(batch.ids, batch.mask, batch.segments)
            return result

    def step(self, rows: list[int], rate: float) -> Stepped:
        """One optimizer step over some training rows. Raises Diverged before a weight is changed."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        supervised = self.sets["train"].supervised(rows)
        found = None
        try:
            found = self._backward(rows, supervised)
        except RuntimeError as error:
            if self.halved or not out_of_memory(error) or not self._can_halve(rows):
                raise
        if found is None:  # only now: the error's traceback held all that the failed pass had kept
            self.halve()
            found = self._backward(rows, supervised)
        total, tokens, hits = self._world.sum(*found, self._hits())
        self.scaler.unscale_(self.optimizer)
        clip = self.recipe.max_grad_norm or math.inf
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)).item()
        if not math.isfinite(total) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            raise Diverged(
                norm if math.isfinite(total) else total / supervised, "gradient" if math.isfinite(total) else "loss"
            )
        self.scaler.step(self.optimizer)  # with fp16, not where a gradient has overflowed: the scale is lowered instead
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return Stepped(total / supervised, int(tokens), supervised, norm, self._share(hits, supervised))

    def _count(self) -> None:
        """Begin to count the tokens that were the likeliest, where they are asked for."""
        self.module.hits = [] if self.recipe.token_accuracy else None

    @contextmanager
    def _counting(self, real: bool) -> Iterator[None]:
        """Count nothing of rows that only keep a process in step with the others."""
        kept, self.module.hits = self.module.hits, self.module.hits if real else None
        try:
            yield
        finally:
            self.module.hits = kept

    def _hits(self) -> int:
        return sum(int(count) for count in self.module.hits or ())

    def _share(self, hits: float, of: float) -> float | None:
        return hits / max(of, 1) if self.recipe.token_accuracy else None

    def _backward(self, rows: list[int], supervised: int) -> tuple[float, int]:
        """Add up the gradient of the step's mean loss; (sum of the losses, tokens) of this process's rows."""
        self._count()
        train = self.sets["train"]
        parts = self._alike([self._micro(mine) for mine in self._shares(rows)])
        share = supervised if self._spread else supervised / self._world.size  # DDP divides what it adds up
        total, tokens, self.seen = 0.0, 0, []
        for number, part in enumerate(parts, 1):
            together = self._spread or self._world.size == 1 or number == len(parts)
            with self._counting(bool(part)), nullcontext() if together else self._forward.no_sync():
                self.module.by_row = [] if part else None
                loss, _ = self.loss("train", part or rows[:1], self._forward)
                self.scaler.scale(loss * bool(part) / share).backward()
            if part:
                total, tokens = total + loss.item(), tokens + sum(map(train.length, part))
                self.seen += [(part, losses) for losses in self.module.by_row or ()]
        self.module.by_row = None
        return total, tokens

    def _micro(self, rows: list[int]) -> list[list[int]]:
        """The micro-batches of some training rows."""
        return list(batches.in_parts(self.sets["train"], rows, self.most_rows, self.most_tokens))

    def _can_halve(self, rows: list[int]) -> bool:
        """Whether smaller parts are possible; not among several processes, which wait in the middle of their sums."""
        return self._world.size == 1 and any(len(part) > 1 for part in self._micro(rows))

    def _shares(self, items: list[Any]) -> list[list[Any]]:
        return [self._world.share(items, rank) for rank in range(self._world.size)]

    def _alike(self, parts: list[list[list[int]]]) -> list[list[int]]:
        """This process's parts of those of each. With empty ones where it would take part in too few sums: at least one,
        and in as many as the others where weights are put together for each."""
        mine = parts[self._world.rank]
        count = max(map(len, parts)) if self._spread else max(1, len(mine))
        return mine + [[] for _ in range(count - len(mine))]

    def halve(self) -> None:
        """Go on with half a micro-batch at a time, to the same result (but for the rounding of sums)."""
        self.optimizer.zero_grad(set_to_none=True)
        if gpu := accelerator():
            gpu.empty_cache()
        self.most_rows, self.most_tokens, self.halved = max(1, self.most_rows // 2), self.most_tokens // 2, True
        self._warn(f"out of memory: going on with {self.most_rows} rows at a time, to the same result")

    @torch.no_grad()
    def validate(self) -> Judged:
        """Mean loss over all supervised tokens of the validation set. Holds the logits of a chunk at most, or of one
        conversation where the model's own head must be run."""
        was_training = self.model.training
        self.model.eval()
        self._count()
        total, count = 0.0, 0
        for group in self._alike(self._shares(list(batches.in_order(self.sets["valid"], self.most_tokens)))):
            if not group and not self._spread:
                continue
            with self._counting(bool(group)):
                loss, n = self.loss("valid", group or [0])
            if group:
                total, count = total + loss.item(), count + n
        self.model.train(was_training)
        if self._spread:
            self._forward.reshard()  # without a backward pass the outermost weights stay whole
        total, counted, hits = self._world.sum(total, count, self._hits())
        return Judged(total / max(counted, 1), self._share(hits, counted))

    def finite(self) -> bool:
        """Whether every trained weight is a number."""
        parts = [p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters() if p.requires_grad]
        return self._world.sum(*[sum(not bool(torch.isfinite(part).all()) for part in parts)]) == [0]


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error is for want of memory: of a GPU, or of torch's CPU or Apple allocator, which have no type of
    their own."""
    words = ("DefaultCPUAllocator", "MPS backend out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)
