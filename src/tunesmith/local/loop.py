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
from tunesmith.local import batches, checkpoint, methods, optim, prefix
from tunesmith.local import model as models
from tunesmith.local.card import write_card
from tunesmith.local.checkpoint import Position
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
    base = models.load(folder, merge=True, quantisation=methods.quantisation(recipe, models.device()))
    model = methods.apply(base, recipe)
    loss_module, slow = models.loss_module(model)
    if slow:
        run.append("warning", message=f"trains in {loss_module.mode} mode, not packed ({slow})")
    models.arrange(loss_module, recipe)
    model.train()
    device = next(model.parameters()).device
    sets = {side: load_tokens(run / "data", side, rows[side]) for side in ("train", "valid")}
    train_set, valid_set = sets.values()
    below = prefix.prepare(run, loss_module, recipe, sets)
    optimizer = optim.make(model, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.mixed_precision == "fp16")

    position = Position()
    start = checkpoint.latest(run, step)
    if start:
        position = checkpoint.restore(start, model, optimizer)
        run.append("resumed", step=position.step)
        if position.scaler:
            scaler.load_state_dict(position.scaler)
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
    most_rows, most_tokens = int(recipe.batch_size), int(recipe.micro_batch_tokens)

    def loss_of(side: str, chosen: list[int]) -> tuple[torch.Tensor, int]:
        """(sum of the losses, number of supervised tokens) of some rows of a set."""
        batch = batches.collate(sets[side], chosen, device)
        with torch.autocast(device.type, half_type(recipe), enabled=use_half(recipe, device)):
            return below.loss(side, chosen, batch) if below else loss_module(batch.ids, batch.mask, batch.segments)

    if len(valid_set) and position.step == 0:  # the base model's own loss: where the curve begins
        first = validate(model, valid_set, loss_of)
        run.append("eval", step=0, epoch=0.0, loss=first, best=False)
        tracker.scalars(0, {"valid/loss": first})

    while position.step < planned and not stopped_early:
        clock = time.perf_counter()
        _, chosen = batches.step_rows(len(train_set), recipe, position.step)
        supervised = train_set.supervised(chosen)
        rate = optim.learning_rate(recipe, position.step, planned)
        for group in optimizer.param_groups:
            group["lr"] = rate

        try:
            total, tokens = accumulate(train_set, chosen, supervised, (most_rows, most_tokens), loss_of, scaler)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not out_of_memory(error) or most_rows < int(recipe.batch_size) or len(chosen) == 1:
                raise
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            most_rows, most_tokens = max(1, most_rows // 2), most_tokens // 2
            run.append(
                "warning", message=f"out of memory: going on with {most_rows} rows at a time, to the same result"
            )
            continue
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm or math.inf).item()
        if not math.isfinite(total) or not (math.isfinite(norm) or scaler.is_enabled()):
            raise diverged(run, total / supervised, position.step + 1)
        scaler.step(optimizer)  # with fp16, not where a gradient has overflowed: the scale is lowered instead
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        position.step += 1
        position.tokens += tokens
        position.supervised_tokens += supervised
        position.since_eval += total / supervised
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
            loss_now = validate(model, valid_set, loss_of)
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
            position.seen(loss_now, improved)
            if position.overfits():
                run.append("overfitting", **overfitting(position, per_epoch))
            stopped_early = 0 < recipe.patience <= position.since_best
        else:
            improved = False

        asked = stop()
        due = time.monotonic() - saved_at > max(SAVE_SECONDS, saving / SAVE_SHARE)
        if improved or stopped_early or last or asked or due or position.step % int(recipe.save_steps) == 0:
            saved_at = time.monotonic()
            if not all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.requires_grad):
                raise diverged(run, math.nan, position.step)
            position.scaler = scaler.state_dict() or None
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


def accumulate(
    rows: Tokens,
    chosen: list[int],
    supervised: int,
    most: tuple[int, int],
    loss_of: Callable[[str, list[int]], tuple[torch.Tensor, int]],
    scaler: torch.amp.GradScaler,
) -> tuple[float, int]:
    """Add up the gradient of one step's mean loss; (sum of the losses, tokens). `most` rows and tokens at a time."""
    total, tokens = 0.0, 0
    for part in batches.in_parts(rows, chosen, *most):
        loss, _ = loss_of("train", part)
        scaler.scale(loss / supervised).backward()
        total, tokens = total + loss.item(), tokens + sum(map(rows.length, part))
    return total, tokens


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error is for want of memory: of a GPU, or of torch's CPU allocator, which has no type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def overfitting(position: Position, per_epoch: int) -> dict[str, object]:
    """What the event says: since when, and what to do."""
    epoch = round(position.best_step / per_epoch, 2)
    message = (
        f"no gain on the validation rows since step {position.best_step} (epoch {epoch}) while the training loss falls"
    )
    return {"step": position.step, "best_step": position.best_step, "best_epoch": epoch, "message": message}


@torch.no_grad()
def validate(
    model: torch.nn.Module, rows: Tokens, loss_of: Callable[[str, list[int]], tuple[torch.Tensor, int]]
) -> float:
    """Mean loss over all supervised tokens of the validation set, in nats. Holds no logits."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for group in batches.in_order(rows, EVAL_TOKENS):
        loss, n = loss_of("valid", group)
        total, count = total + loss.item(), count + n
    model.train(was_training)
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


def half_type(recipe: Recipe) -> torch.dtype:
    return torch.float16 if recipe.mixed_precision == "fp16" else torch.bfloat16


def use_half(recipe: Recipe, device: torch.device) -> bool:
    """Whether the model runs in 16 bits (its weights stay in 32)."""
    return recipe.mixed_precision in ("bf16", "fp16") or (recipe.mixed_precision == "auto" and device.type == "cuda")


def peak_memory_mb() -> int:
    """Most memory this process held, in MB (Linux counts it in KB, macOS in bytes); on a GPU, there."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated() / 2**20)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))
