"""Checkpoints: complete or absent, hashed, verified on load; no pickle.

    checkpoints/checkpoint-step-N/
      model files           what plain transformers (or peft) loads
      optimizer.safetensors Adam's moments and step counts by parameter name
      trainer.json          position, best so far, early-stopping state;  rng.safetensors  random generators
      MANIFEST.json         sha256 of every other file, written last

A checkpoint is built in a hidden folder, fsynced and renamed. best_model/, final_model/ and the run's
own folder hold hard links to the weights in checkpoints: loadable, and no weight is stored twice.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from tunesmith.data.write import publish as put
from tunesmith.data.write import sha256, sync_files, sync_folder, write_json
from tunesmith.errors import RunError
from tunesmith.local import model as models
from tunesmith.local.machine import accelerator
from tunesmith.local.world import ALONE, World, part_of, whole
from tunesmith.render import Renderer
from tunesmith.runs import RISE, Run

PREFIX = "checkpoint-step-"
TRAINER_FILES = ("optimizer.safetensors", "rng.safetensors", "trainer.json", "MANIFEST.json")


class Position(msgspec.Struct):
    """Where training stands: steps done, the best validation so far, validations since, tokens seen, seconds spent."""

    step: int = 0
    best_step: int = 0
    best_loss: float | None = None
    since_best: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    since_eval: float = 0.0  # sum of the training losses of the steps since the last validation,
    evaluated: int = 0  # which was after this step
    train_loss: float | None = None  # their mean up to the last validation, and up to the best one
    best_train_loss: float | None = None
    lowest: list[tuple[float, int]] = []  # validation loss and step of other checkpoints that are worth keeping
    worse: int = 0  # validations in a row over RISE times the best
    said: int = -1  # the best step that overfitting was last told of
    scaler: dict[str, float] | None = None  # of fp16
    halved: bool = False  # micro-batches, when memory ran out

    def seen(self, loss: float, improved: bool, most: int = 1) -> bool:
        """Take note of a validation; whether its step is among the `most` best, and so worth a checkpoint."""
        self.train_loss = self.since_eval / max(1, self.step - self.evaluated)
        self.since_eval, self.evaluated = 0.0, self.step
        if improved or self.best_loss is None:
            if self.best_loss is not None:
                self.lowest.append((self.best_loss, self.best_step))
            self.best_loss, self.best_step, self.since_best = loss, self.step, 0
            self.best_train_loss = self.train_loss
        else:
            self.lowest.append((loss, self.step))
            self.since_best += 1
        self.lowest = sorted(self.lowest)[: most - 1]
        self.worse = self.worse + 1 if loss > RISE * self.best_loss else 0
        return self.step in self.kept()

    def kept(self) -> set[int]:
        """Steps whose checkpoints stay for their validation loss."""
        return {self.best_step, *(step for _, step in self.lowest)}

    def overfits(self) -> bool:
        """Whether two validations in a row were clearly worse than the best while the training loss fell: true once for each
        best step. (A loss that stays level is no overfitting: there early stopping ends the run.)"""
        falls = (
            self.train_loss is not None and self.best_train_loss is not None and self.train_loss < self.best_train_loss
        )
        if self.worse < 2 or not falls or self.said == self.best_step:
            return False
        self.said = self.best_step
        return True


class State(msgspec.Struct, frozen=True):
    """What a checkpoint holds besides the position, by name: weights (None: as they stand in the model), optimizer, rng."""

    weights: dict[str, torch.Tensor] | None
    optimizer: dict[str, torch.Tensor]
    rng: dict[str, torch.Tensor]


def gather(model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> State:
    """The state of training in one piece; to be called in every process, of use in the first."""
    spread = any(isinstance(p, DTensor) for p in model.parameters())
    weights = _pieces(_weight_items(model), world) if spread else None
    return State(weights, _pieces(_optimizer_items(model, optimizer), world), _generators(world))


def _weight_items(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights and buffers by all their names: tied ones are the same tensor, by which `save_pretrained` knows them."""
    every = dict(model.named_parameters(remove_duplicate=False))
    yield from every.items()
    yield from ((name, tensor) for name, tensor in model.state_dict().items() if name not in every)


def _pieces(items: Iterable[tuple[str, torch.Tensor]], world: World) -> dict[str, torch.Tensor]:
    """Tensors by name, each put together from all processes, kept on the CPU of the first."""
    found: dict[str, torch.Tensor] = {}
    names: dict[int, tuple[str, torch.Tensor]] = {}  # the tensor too: while it lives no other has its id
    for name, tensor in items:
        first, _ = names.setdefault(id(tensor), (name, tensor))
        if first == name:
            piece = whole(tensor).detach()
        if world.rank == 0:
            found[name] = found[first] if first != name else piece.cpu().contiguous()
    return found


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of those that share memory, as the tables of 8-bit optimizers do: safetensors takes none that do."""
    first: dict[int, str] = {}
    own = {name: first.setdefault(tensor.data_ptr(), name) == name for name, tensor in tensors.items()}
    return {name: tensor if own[name] else tensor.clone() for name, tensor in tensors.items()}


def save(run: Run, model: nn.Module, renderer: Renderer, state: State, position: Position) -> Path:
    """Write checkpoint-step-N; returns its folder."""
    final = run / "checkpoints" / f"{PREFIX}{position.step}"
    building = run / "checkpoints" / f".{final.name}.tmp"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        models.save(model, building, state.weights)
        renderer.save(building)
        save_file(_apart(state.optimizer), building / "optimizer.safetensors")
        save_file(state.rng, building / "rng.safetensors")
        write_json(building / "trainer.json", position)
        write_json(building / "MANIFEST.json", {p.name: sha256(p) for p in sorted(building.iterdir())})
        mode = 0o666 & ~_umask()
        for file in building.iterdir():
            file.chmod(mode)  # safetensors makes its files readable for their owner alone
        if final.exists():  # of an earlier try at this step
            shutil.rmtree(final)
        put(building, final)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return final


def _umask() -> int:
    """The process's file mode mask; reading it is possible only by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _optimizer_items(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """Adam's state by parameter name, e.g. "exp_avg/model.norm.weight"."""
    names = {id(p): name for name, p in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            yield f"{key}/{names[id(parameter)]}", value if isinstance(value, torch.Tensor) else torch.tensor(value)


def _generators(world: World) -> dict[str, torch.Tensor]:
    """The state of every generator that training draws from: torch's, on the CPU and the GPU of each process."""
    states = {f"cpu{i}": state for i, state in enumerate(world.gather(torch.get_rng_state()))}
    if gpu := accelerator():
        states |= {f"gpu{i}": state for i, state in enumerate(world.gather(gpu.get_rng_state()))}
    return states


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World = ALONE) -> Position:
    """Put weights, optimizer and random generators back as they were; returns the position."""
    _load_weights(folder, model)
    parameters = dict(model.named_parameters())
    tensors = load_file(folder / "optimizer.safetensors")
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        parameter = parameters[name]
        if value.dtype == torch.int64:  # bitsandbytes counts its steps in a plain int
            optimizer.state[parameter][kind] = int(value)
        elif kind == "step":
            place = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
            optimizer.state[parameter][kind] = value.to(place)
        else:
            optimizer.state[parameter][kind] = part_of(value, parameter)
    rng = load_file(folder / "rng.safetensors")
    if f"cpu{world.rank}" in rng:  # not where there were fewer processes
        torch.set_rng_state(rng[f"cpu{world.rank}"])
    gpu = accelerator()
    if gpu and f"gpu{world.rank}" in rng:
        gpu.set_rng_state(rng[f"gpu{world.rank}"])
    return msgspec.json.decode((folder / "trainer.json").read_bytes(), type=Position)


@torch.no_grad()
def _load_weights(folder: Path, model: nn.Module) -> None:
    if any(isinstance(p, DTensor) for p in model.parameters()):
        _load_parts(folder, model)
        return
    if hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        return
    saved: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        saved |= load_file(file)
    missing, unexpected = model.load_state_dict(saved, strict=False)
    tied = {n for n, _ in model.named_parameters(remove_duplicate=False)} - {n for n, _ in model.named_parameters()}
    if set(missing) - tied or unexpected:
        raise RunError("the checkpoint's weights are not this model's", where=str(folder), fix="train again")


def _load_parts(folder: Path, model: nn.Module) -> None:
    """Weights that are spread over the processes: each takes its part of every one that was saved."""
    saved: dict[str, torch.Tensor] = {}
    for file in sorted([*folder.glob("model*.safetensors"), *folder.glob("adapter_model.safetensors")]):
        saved |= load_file(file)
    for name, parameter in model.named_parameters():
        value = saved.get(name, saved.get(name.replace(".default.", ".")))  # peft saves without its adapter's name
        if value is not None:
            parameter.copy_(part_of(value, parameter))
        elif parameter.requires_grad:
            raise RunError(f"the checkpoint has no {name}", where=str(folder), fix="train again")


def latest(run: Run, step: int | None = None) -> Path | None:
    """The newest whole checkpoint; a damaged one is named in the log and passed over.

    With `step` that step's; RunError where it is damaged or not there.
    """
    for folder in reversed(existing(run)):
        if step is not None and number(folder) != step:
            continue
        problem = damage(folder)
        if problem is None:
            return folder
        if step is not None:
            raise RunError(f"damaged: {problem}", where=str(folder), fix=f"--resume {run:q} takes the newest whole one")
        first = folder == existing(run)[0]
        then = "and none is before it: training begins anew" if first else "using the one before"
        run.append("warning", message=f"{folder.name} is damaged ({problem}); {then}")
    if step is not None:
        raise RunError(
            f"no checkpoint of step {step}", where=str(run), fix=f"--resume {run:q} takes the newest whole one"
        )
    return None


def set_aside(run: Run, step: int) -> None:
    """Training goes on from `step`, as if what came later had never been: whole checkpoints are deleted, damaged ones renamed."""
    for folder in existing(run):
        if number(folder) <= step:
            continue
        if damage(folder):
            shutil.rmtree(folder.with_name(f"damaged-{folder.name}"), ignore_errors=True)
            folder.rename(folder.with_name(f"damaged-{folder.name}"))
        else:
            run.append("warning", message=f"{folder.name} is deleted: training goes on from step {step}")
            shutil.rmtree(folder)


def existing(run: Run) -> list[Path]:
    """Checkpoint folders, oldest first."""
    found = (run / "checkpoints").glob(f"{PREFIX}*")
    return sorted((p for p in found if p.name.removeprefix(PREFIX).isdecimal()), key=number)


def number(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.removeprefix(PREFIX))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None when every hash is right."""
    try:
        manifest = msgspec.json.decode((folder / "MANIFEST.json").read_bytes(), type=dict[str, str])
        wrong = next((name for name, digest in manifest.items() if sha256(folder / name) != digest), None)
    except (OSError, msgspec.DecodeError) as error:
        return str(error)
    return f"{wrong} has changed" if wrong else None


def prune(run: Run, keep_last: int, kept: set[int], every: int = 1) -> None:
    """Delete all checkpoints but the newest, the last N of those made `every` so many steps, and those of some steps."""
    found = existing(run)
    regular = [folder for folder in found if number(folder) % every == 0][-keep_last:]
    for folder in found[:-1]:
        if folder not in regular and number(folder) not in kept:
            shutil.rmtree(folder)


def publish(checkpoint: Path, target: Path) -> None:
    """Make `target` a model folder like the checkpoint, weights as hard links; a run's own folder keeps the rest it has."""
    is_run = (target / "run.json").exists()
    building = target / ".publish.tmp" if is_run else target.with_name(f".{target.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    for file in checkpoint.iterdir():
        if file.name not in TRAINER_FILES:
            _place(file, building / file.name)
    if is_run:
        sync_files(building)
        for file in building.iterdir():
            file.replace(target / file.name)
        shutil.rmtree(building)  # not empty after a resume: renaming onto a link of the same file does nothing
        sync_folder(target)
        return
    if target.exists():
        shutil.rmtree(target)
    put(building, target)


def _place(source: Path, target: Path) -> None:
    """Weights as a link; small files as a copy, so that editing one leaves the checkpoint whole."""
    try:
        if source.suffix == ".safetensors":
            os.link(source, target)
            return
    except OSError:  # another file system, or one without links
        pass
    shutil.copy2(source, target)
