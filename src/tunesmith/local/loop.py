"""The training loop. Read it top to bottom: everything that happens in a run is here, in order.

Given the same data, recipe, thread count, number of processes and machine, the weights are the same bytes,
also when training was killed and resumed in between.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tunesmith.card import write_card
from tunesmith.costs import steps_per_epoch
from tunesmith.errors import Interrupted, TunesmithError
from tunesmith.local import batches, checkpoint, ledger, optim, prefix
from tunesmith.local import model as models
from tunesmith.local.checkpoint import Position
from tunesmith.local.machine import peak_memory_mb
from tunesmith.local.step import Diverged, Engine, Judged, Stepped
from tunesmith.local.tracking import Tracker
from tunesmith.local.world import join
from tunesmith.models import find
from tunesmith.render import Renderer
from tunesmith.runs import Run
from tunesmith.tokens import load_tokens

SAVE_SECONDS, SAVE_SHARE = 60, 0.03  # a kill costs a minute at most, unless saving would then take over 3 % of the time


def train(run: Run, stop: Callable[[], bool], step: int | None = None) -> None:
    """Train a run to its end from wherever it stands, or from its checkpoint of `step`. `stop()` is asked after every step.

    Where a launcher has started several processes, each calls this; the first writes what there is to write.

    Raises Interrupted after a checkpoint when asked to stop; TunesmithError when training cannot go on.
    """
    world = join()
    run = Run(run, silent=world.rank > 0)
    run.append("state", state="preparing")
    recipe, plan = run.recipe(), run.manifest()["plan"]
    planned, rows = plan["steps"], plan["rows"]
    torch.set_num_threads(int(recipe.threads))
    torch.manual_seed(recipe.seed)

    folder = find(recipe.model)
    renderer = Renderer(folder, run.template())
    loss_module, slow = models.for_training(recipe, plan["longest"])
    model = loss_module.model
    if slow:
        run.append("warning", message=f"trains in {loss_module.mode} mode, not packed ({slow})")
    if world.rank:  # dropout differs between the processes; the weights do not
        torch.manual_seed(recipe.seed + world.rank)
    sets = {side: load_tokens(run / "data", side, rows[side]) for side in ("train", "valid")}
    train_set, valid_set = sets.values()
    below = prefix.prepare(run, loss_module, recipe, sets, world)
    engine = Engine(loss_module, recipe, sets, below, world, lambda message: run.append("warning", message=message))

    per_epoch = steps_per_epoch(len(train_set), recipe)
    position = Position()
    if world.rank == 0:
        ledger.lay_out(run, len(train_set), -(-planned // per_epoch))
    start = world.first(str(checkpoint.latest(run, step) or "") if world.rank == 0 else "")
    if start:
        position = checkpoint.restore(Path(start), model, engine.optimizer, world)
        if position.scaler:
            engine.scaler.load_state_dict(position.scaler)
        if position.halved:
            engine.halve()
    if start or run.metrics("step"):
        run.append("resumed", step=position.step)
    if world.rank == 0:
        checkpoint.set_aside(run, position.step)
    tracker, book = Tracker(run, recipe, position.step), ledger.Ledger(run, per_epoch)
    run.append(
        "state",
        state="running",
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        parameters=sum(p.numel() for p in model.parameters()),
        device=str(engine.device),
        mode=loss_module.mode,
        processes=world.size,
    )
    began, before = time.perf_counter(), position.seconds
    stopped_early = 0 < recipe.patience <= position.since_best
    saved_at, saving = time.monotonic(), 0.0

    if len(valid_set) and position.step == 0:  # the base model's own loss: where the curve begins
        first = engine.validate()
        if not math.isfinite(first.loss):
            fix = "its weights are damaged, or too large for 16 bits: --mixed-precision no"
            raise TunesmithError(f"the base model's validation loss is {first.loss}", where=str(run), fix=fix)
        run.append("eval", step=0, epoch=0.0, best=False, **known(first))
        tracker.scalars(0, {"valid/loss": first.loss})

    while position.step < planned and not stopped_early:
        clock = time.perf_counter()
        rate = optim.learning_rate(recipe, position.step, planned)
        try:
            done = engine.step(batches.step_rows(len(train_set), recipe, position.step), rate)
        except Diverged as error:
            raise diverged(run, error.value, position.step + 1, error.what) from None

        book.write(position.step, engine.seen)
        position.step += 1
        position.tokens += done.tokens
        position.supervised_tokens += done.supervised
        position.since_eval += done.loss
        position.seconds = before + time.perf_counter() - began
        took = time.perf_counter() - clock
        seen = known(done, "loss", "accuracy") | {
            "lr": rate,
            "grad_norm": done.norm,
            "tokens_per_second": done.tokens / took,
        }
        run.append(
            "step",
            step=position.step,
            epoch=round(position.step / per_epoch, 4),
            tokens=done.tokens,
            total_tokens=position.tokens,
            total_supervised_tokens=position.supervised_tokens,
            seconds=position.seconds,
            memory_mb=peak_memory_mb(),
            **seen,
        )
        tracker.scalars(position.step, {f"train/{k}": v for k, v in seen.items()})

        last = position.step == planned
        if len(valid_set) and (position.step % int(recipe.eval_steps) == 0 or last):
            judged = engine.validate()
            loss_now = judged.loss
            if not math.isfinite(loss_now):
                raise diverged(run, loss_now, position.step)
            improved = position.best_loss is None or loss_now < position.best_loss - recipe.min_gain
            run.append(
                "eval",
                step=position.step,
                epoch=round(position.step / per_epoch, 4),
                best=improved,
                **known(judged),
            )
            tracker.scalars(position.step, {"valid/loss": loss_now})
            worth_keeping = position.seen(loss_now, improved, recipe.save_best_limit)
            if position.overfits():
                run.append("overfitting", **overfitting(position, per_epoch))
            stopped_early = 0 < recipe.patience <= position.since_best
        else:
            worth_keeping = False

        over = time.monotonic() - saved_at > max(SAVE_SECONDS, saving / SAVE_SHARE)
        asked, due = (count > 0 for count in world.sum(stop(), world.rank == 0 and over))
        if worth_keeping or stopped_early or last or asked or due or position.step % int(recipe.save_steps) == 0:
            saved_at = time.monotonic()
            if not engine.finite():
                raise diverged(run, math.nan, position.step, "weights")
            position.scaler, position.halved = engine.scaler.state_dict() or None, engine.halved
            state = checkpoint.gather(model, engine.optimizer, world)
            if world.rank == 0:
                saved = checkpoint.save(run, model, renderer, state, position)
                regular = last or position.step % int(recipe.save_steps) == 0
                run.append("checkpoint", step=position.step, path=saved.name, regular=regular)
                checkpoint.prune(run, recipe.save_total_limit, position.kept(), int(recipe.save_steps))
            saving, saved_at = time.monotonic() - saved_at, time.monotonic()
        if asked and not last:
            tracker.close(False)
            run.append("state", state="paused")
            raise Interrupted(
                f"stopped at step {position.step} of {planned}, after a checkpoint",
                where=str(run),
                fix=f"go on with: tunesmith train --resume {run:q}",
            )

    if not len(valid_set):
        position.best_step = position.step
    tracker.close(True)
    if world.rank == 0:
        publish(run, position)
    run.append(
        "done",
        step=position.step,
        best_step=position.best_step,
        stopped_early=stopped_early and position.step < planned,
        seconds=position.seconds,
        tokens_per_second=position.tokens / max(position.seconds, 1e-9),
        peak_memory_mb=peak_memory_mb(),
    )
    if world.rank == 0:
        write_card(run)
    run.append("state", state="succeeded")


def known(figures: Stepped | Judged, *names: str) -> dict[str, float]:
    """Some figures of a step or a validation by name (all of them where none is named), without those that were not asked for."""
    found = {name: getattr(figures, name) for name in names or figures.__struct_fields__}
    return {name: value for name, value in found.items() if value is not None}


def diverged(run: Run, value: float, step: int, what: str = "loss") -> TunesmithError:
    return TunesmithError(
        f"the {what} became {value} at step {step}",
        where=str(run),
        fix="lower --learning-rate; the last checkpoint is from before",
    )


def overfitting(position: Position, per_epoch: int) -> dict[str, object]:
    """What the event says: since when, and what to do."""
    epoch = round(position.best_step / per_epoch, 2)
    message = f"the validation loss rises since step {position.best_step} (epoch {epoch}) while the training loss falls"
    return {"step": position.step, "best_step": position.best_step, "best_epoch": epoch, "message": message}


def publish(run: Run, position: Position) -> None:
    """final_model/ (last step), best_model/ (lowest validation loss), and the best one as the run's own folder."""
    final, best = (run / "checkpoints" / f"{checkpoint.PREFIX}{step}" for step in (position.step, position.best_step))
    problem = checkpoint.damage(best)
    if problem:
        run.append("warning", message=f"best_model is the last one: {best.name} is damaged ({problem})")
        best = final
    before = next((e["loss"] for e in run.metrics("eval") if e["step"] == 0), math.inf)
    if position.best_loss is not None and position.best_loss >= before:
        lowest = f"no validation loss (lowest {position.best_loss:.4f}) came under the base model's {before:.4f}"
        run.append("warning", message=f"{lowest}: best_model is no better than the base; try tunesmith lr-find")
    for source, target in ((final, run / "final_model"), (best, run / "best_model"), (best, run.path)):
        checkpoint.publish(source, target)
