"""The training loop. Read it top to bottom: everything that happens in a run is here, in order.

Loss of a step = sum over the supervised tokens of all its conversations / their number, whatever the
micro-batches. Given the same data, recipe, thread count and machine, the weights are the same bytes,
also when training was killed and resumed in between.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable

import torch

from tunesmith.errors import Interrupted, TunesmithError
from tunesmith.local import batches, checkpoint, methods
from tunesmith.local import model as models
from tunesmith.local.card import write_card
from tunesmith.local.checkpoint import Position
from tunesmith.local.loss import LossModule
from tunesmith.local.tokens import Tokens, load_tokens
from tunesmith.local.tracking import Tracker
from tunesmith.models import find
from tunesmith.recipe import Recipe
from tunesmith.render import Renderer
from tunesmith.runs import Run

EVAL_TOKENS = (
    8192  # tokens scored at a time in validation; logits exist only chunk by chunk, so this bounds activations
)
SAVE_SECONDS, SAVE_SHARE = 60, 0.03  # a kill costs a minute at most, unless saving would then take over 3 % of the time


def train(run: Run, stop: Callable[[], bool], step: int | None = None) -> None:
    """Train a run to its end from wherever it stands, or from its checkpoint of `step`. `stop()` is asked after every step.

    Raises Interrupted after a checkpoint when asked to stop; TunesmithError when training cannot go on.
    """
    run.append("state", state="preparing")
    recipe, plan = run.recipe(), run.manifest()["plan"]
    planned, rows = plan["steps"], plan["rows"]
    torch.set_num_threads(int(recipe.threads))
    torch.manual_seed(recipe.seed)

    folder = find(recipe.model)
    renderer = Renderer(folder)
    model = methods.apply(models.load(folder, merge=True), recipe)
    loss_module, slow = models.loss_module(model)
    if slow:
        run.append("warning", message=f"trains in {loss_module.mode} mode, not packed ({slow})")
    if recipe.gradient_checkpointing:
        models.causal(model).activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    device = next(model.parameters()).device
    train_set, valid_set = (load_tokens(run / "data", side, rows[side]) for side in ("train", "valid"))
    optimizer = make_optimizer(model, recipe)

    position = Position()
    start = checkpoint.latest(run, step)
    if start:
        position = checkpoint.restore(start, model, optimizer)
        run.append("resumed", step=position.step)
    tracker = Tracker(run / "logs", position.step)
    run.append(
        "state",
        state="running",
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        parameters=sum(p.numel() for p in model.parameters()),
        device=str(device),
        mode=loss_module.mode,
    )
    began, before = time.perf_counter(), position.seconds
    per_epoch = steps_per_epoch(len(train_set), recipe)
    stopped_early = 0 < recipe.patience <= position.since_best
    saved_at, saving = time.monotonic(), 0.0

    if len(valid_set) and position.step == 0:  # the base model's own loss: where the curve begins
        base = validate(loss_module, valid_set)
        run.append("eval", step=0, epoch=0.0, loss=base, best=False)
        tracker.scalars(0, {"valid/loss": base})

    while position.step < planned and not stopped_early:
        clock = time.perf_counter()
        _, micro_batches = batches.step_rows(len(train_set), recipe, position.step)
        supervised = sum(train_set.supervised(micro_batch) for micro_batch in micro_batches)
        rate = learning_rate(recipe, position.step, planned)
        for group in optimizer.param_groups:
            group["lr"] = rate

        total, tokens = 0.0, 0
        for micro_batch in micro_batches:
            batch = batches.collate(train_set, micro_batch, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(recipe, device)):
                loss, _ = loss_module(batch.ids, batch.mask, batch.segments)
            (loss / supervised).backward()
            total, tokens = total + loss.item(), tokens + len(batch.ids)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm or math.inf).item()
        if not math.isfinite(total) or not math.isfinite(norm):
            raise diverged(run, total / supervised, position.step + 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        position.step += 1
        position.tokens += tokens
        position.supervised_tokens += supervised
        position.seconds = before + time.perf_counter() - began
        took = time.perf_counter() - clock
        seen = {"loss": total / supervised, "lr": rate, "grad_norm": norm, "tokens_per_second": tokens / took}
        run.append(
            "step",
            step=position.step,
            epoch=round(position.step / per_epoch, 4),
            tokens=tokens,
            total_tokens=position.tokens,
            total_supervised_tokens=position.supervised_tokens,
            seconds=position.seconds,
            memory_mb=peak_memory_mb(),
            **seen,
        )
        tracker.scalars(position.step, {f"train/{k}": v for k, v in seen.items()})

        last = position.step == planned
        if len(valid_set) and (position.step % int(recipe.eval_steps) == 0 or last):
            loss_now = validate(loss_module, valid_set)
            if not math.isfinite(loss_now):
                raise diverged(run, loss_now, position.step)
            improved = position.best_loss is None or loss_now < position.best_loss - recipe.min_gain
            run.append(
                "eval",
                step=position.step,
                epoch=round(position.step / per_epoch, 4),
                loss=loss_now,
                best=improved,
            )
            tracker.scalars(position.step, {"valid/loss": loss_now})
            if improved:
                position.best_loss, position.best_step, position.since_best = loss_now, position.step, 0
            else:
                position.since_best += 1
            stopped_early = 0 < recipe.patience <= position.since_best
        else:
            improved = False

        asked = stop()
        due = time.monotonic() - saved_at > max(SAVE_SECONDS, saving / SAVE_SHARE)
        if improved or stopped_early or last or asked or due or position.step % int(recipe.save_steps) == 0:
            saved_at = time.monotonic()
            if not all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.requires_grad):
                raise diverged(run, math.nan, position.step)
            saved = checkpoint.save(run, model, renderer, optimizer, position)
            run.append("checkpoint", step=position.step, path=saved.name)
            checkpoint.prune(run, recipe.save_total_limit, position.best_step)
            saving, saved_at = time.monotonic() - saved_at, time.monotonic()
        if asked and not last:
            tracker.close()
            run.append("state", state="paused")
            raise Interrupted(
                f"stopped at step {position.step} of {planned}, after a checkpoint",
                where=str(run),
                fix=f"go on with: tunesmith train --resume {run}",
            )

    if not len(valid_set):
        position.best_step = position.step
    publish(run, position)
    tracker.close()
    run.append(
        "done",
        step=position.step,
        best_step=position.best_step,
        stopped_early=stopped_early and position.step < planned,
        seconds=position.seconds,
        tokens_per_second=position.tokens / max(position.seconds, 1e-9),
        peak_memory_mb=peak_memory_mb(),
    )
    write_card(run)
    run.append("state", state="succeeded")


def diverged(run: Run, loss: float, step: int) -> TunesmithError:
    return TunesmithError(
        f"the loss became {loss} at step {step}",
        where=str(run),
        fix="lower --learning-rate; the last checkpoint is from before",
    )


def make_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW on what is trained; decay on matrices only (norms and biases are scales, not weights)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=1.0, fused=True
    )  # the loop sets the rate before each step


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The rate of step `step` (from 0): linear warm-up, then cosine or linear to zero at `steps`, or constant."""
    peak = float(recipe.learning_rate)
    warmup = recipe.warmup_steps if recipe.warmup_steps is not None else math.ceil(recipe.warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    shapes = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return peak * shapes[recipe.lr_scheduler]


@torch.no_grad()
def validate(loss_module: LossModule, rows: Tokens) -> float:
    """Mean loss over all supervised tokens of a set, in nats. Holds no logits."""
    was_training = loss_module.model.training
    loss_module.model.eval()
    device = next(loss_module.model.parameters()).device
    total, count = 0.0, 0
    for group in batches.in_order(rows, EVAL_TOKENS):
        batch = batches.collate(rows, group, device)
        loss, n = loss_module(batch.ids, batch.mask, batch.segments)
        total, count = total + loss.item(), count + n
    loss_module.model.train(was_training)
    return total / max(count, 1)


def publish(run: Run, position: Position) -> None:
    """final_model/ (last step), best_model/ (lowest validation loss), and the best one as the run's own folder."""
    folders = {p.name: p for p in checkpoint.existing(run)}
    final = folders[f"{checkpoint.PREFIX}{position.step}"]
    best = folders.get(f"{checkpoint.PREFIX}{position.best_step}", final)
    for source, target in ((final, run / "final_model"), (best, run / "best_model"), (best, run.path)):
        checkpoint.publish(source, target)


def steps_per_epoch(rows: int, recipe: Recipe) -> int:
    return -(-rows // (int(recipe.batch_size) * recipe.gradient_accumulation_steps))


def use_bf16(recipe: Recipe, device: torch.device) -> bool:
    return recipe.mixed_precision == "bf16" or (recipe.mixed_precision == "auto" and device.type == "cuda")


def peak_memory_mb() -> int:
    """Most memory this process held, in MB (Linux counts it in KB, macOS in bytes); on a GPU, there."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated() / 2**20)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))
