"""The frozen bottom of a model, run once: its output for a row never changes, so it is kept on disk and read back.

Without a cache the bottom is run in the same way, one conversation at a time and without gradient, so that the weights
after training are the same bytes with and without it. Files lie in $XDG_CACHE_HOME/tunesmith/prefix, named by a hash of
all that decides their content, and are used again by other runs.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from tunesmith.costs import frozen_layers
from tunesmith.data.write import begun, kept, tidy
from tunesmith.local import methods
from tunesmith.local.batches import Batch
from tunesmith.local.loss import LossModule
from tunesmith.local.world import ALONE, World
from tunesmith.recipe import Recipe
from tunesmith.runs import Run
from tunesmith.tokens import Tokens

FORM = 2  # of what is kept: to be raised with every change of the arithmetic of a forward pass
SHARE_OF_DISK = 0.5  # of the free space: a cache that would take more is not made


class Prefix:
    """Splits a decoder at its lowest layer that is trained. `bottom` maps ids to the hidden states that enter it."""

    def __init__(self, module: LossModule, recipe: Recipe) -> None:
        self.module, model = module, module.model
        name, layers = methods.decoder_layers(model)
        count = frozen_layers(recipe, len(layers))
        self._parent: Any = next(m for m in model.modules() if any(child is layers for child in m.children()))
        norms = [
            n for n, m in self._parent.named_children() if any(m is x for x in methods.norms_beside(model, layers))
        ]
        self.below, above = nn.ModuleList(layers[:count]), nn.ModuleList(layers[count:])
        self._lower = {name: self.below, **{n: nn.Identity() for n in norms}}
        self._upper = {name: above}

    @functools.cache  # noqa: B019 - there is one of it in a run
    def weights(self) -> Any:
        """A SHA-256 of the weights that `bottom` runs through."""
        digest = hashlib.sha256()
        for tensor in (self.module.model.get_input_embeddings().weight, *self.below.parameters()):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest

    @torch.no_grad()
    def bottom(self, ids: Tensor) -> Tensor:
        """Hidden states [tokens, d] of one conversation's ids [tokens] below the first trained layer."""
        with self._only(self._lower):
            return self.module.hidden(ids, [len(ids)])

    @contextmanager
    def above(self) -> Iterator[None]:
        """Within, the model consists of its upper layers: they take what `bottom` gives as embeddings."""
        with self._only(self._upper):
            yield

    @contextmanager
    def _only(self, modules: dict[str, nn.Module]) -> Iterator[None]:
        kept = {name: self._parent._modules[name] for name in modules}
        self._parent._modules.update(modules)
        try:
            yield
        finally:
            self._parent._modules.update(kept)


def split(module: LossModule, recipe: Recipe, world: World = ALONE) -> tuple[Prefix | None, str]:
    """A model's Prefix, or None and the reason why its bottom cannot be run by itself."""
    model = module.model
    _, layers = methods.decoder_layers(model)
    if not frozen_layers(recipe, len(layers)):
        return None, ""
    if module.mode != "packed":
        return None, f"the model runs in {module.mode} mode"
    if recipe.sharding != "none" and world.size > 1:
        return None, "the weights are spread over the processes"
    if recipe.neftune_alpha:
        return None, "NEFTune's noise enters below the frozen layers"
    prefix = Prefix(module, recipe)
    config: Any = model.config.get_text_config()
    if len(set(getattr(config, "layer_types", None) or ())) > 1:
        return None, "its layers are of several kinds, which go by their number"
    dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in prefix.below.modules())
    if dropout or getattr(config, "attention_dropout", None):
        return None, "the frozen layers have dropout, which is different in every epoch"
    where = next(model.parameters()).device
    ids = (torch.arange(9, device=where) * 7 + 3) % model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        whole = module.hidden(ids, [9])
        try:
            low = prefix.bottom(ids)
            with prefix.above():
                parts = module.hidden(ids, [9], low)
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            return None, f"its layers cannot be run apart: {str(error).splitlines()[0]}"
    if not torch.allclose(whole, parts, rtol=1e-4, atol=1e-5):
        return None, "its layers give another result when they are run apart"
    return prefix, ""


class Below:
    """The frozen bottom of a run: its output for each set of rows, and the loss of what stands above."""

    def __init__(self, prefix: Prefix, sets: dict[str, Rows]) -> None:
        self._prefix, self._sets = prefix, sets

    def loss(self, forward: Any, side: str, rows: list[int], batch: Batch) -> tuple[Tensor, int]:
        """As of LossModule.forward, by way of `forward`: the module itself, or what wraps it."""
        hidden = self._sets[side](rows, batch.ids.device)
        with self._prefix.above():
            result: tuple[Tensor, int] = forward(batch.ids, batch.mask, batch.segments, hidden)
            return result


def prepare(
    run: Run, module: LossModule, recipe: Recipe, sets: dict[str, Tokens], world: World = ALONE
) -> Below | None:
    """The frozen bottom of a run and what is cached of it, said in the run's log; None where the model is run whole."""
    prefix, reason = split(module, recipe, world)
    if prefix is None:
        if reason:
            run.append("warning", message=f"the frozen layers are run in every epoch: {reason}")
        return None
    opened = {}
    for side, tokens in sets.items():
        path, reason = cache_file(prefix, tokens, recipe)
        if path and not os.path.exists(path) and world.size > 1:
            path, reason = None, "each of several processes would see only some of the rows"
        if path and not os.path.exists(path):
            path, reason = _room(path, tokens, prefix)
        if reason:
            run.append("warning", message=f"the output of the frozen layers is not kept: {reason}")
        try:
            opened[side] = Rows(prefix, tokens, path)
        except (OSError, ValueError) as error:  # deleted or cut by others meanwhile
            run.append("warning", message=f"the output of the frozen layers is not kept: {error}")
            path, opened[side] = None, Rows(prefix, tokens, None)
        if path:
            found = opened[side].found
            run.append("prefix_cache", side=side, path=str(path), found=found, tokens=int(tokens.starts[-1]))
    return Below(prefix, opened)


def _room(path: Path, tokens: Tokens, prefix: Prefix) -> tuple[Path | None, str]:
    """Take the disk that a cache will need, now: a mapped file that finds none later ends the process. The path, or why not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tidy(path.parent)
        with begun(path).open("wb") as stream:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(stream.fileno(), 0, _bytes(tokens, prefix))
            stream.truncate(_bytes(tokens, prefix))
    except OSError as error:
        with suppress(OSError):
            begun(path).unlink(missing_ok=True)
        return None, f"{error.strerror} ({path.parent})"
    return path, ""


def _bytes(tokens: Tokens, prefix: Prefix) -> int:
    return 4 * int(prefix.module.model.config.get_text_config().hidden_size) * int(tokens.starts[-1])


class Rows:
    """What the bottom gives for each row of a set, computed when first asked for and then read from a memory-mapped file.

    `path` None: nothing is kept, and every call computes. `found`: another run has kept it.
    """

    def __init__(self, prefix: Prefix, tokens: Tokens, path: Path | None) -> None:
        self._prefix, self._tokens, self._path = prefix, tokens, path
        self._missing = len(tokens)
        self._have: NDArray[np.bool_] = np.zeros(len(tokens), np.bool_)
        self._file: NDArray[np.float32] | None = None
        self._building: Path | None = None
        self.found = path is not None and path.exists()
        if path is None:
            return
        size = (int(tokens.starts[-1]), int(prefix.module.model.config.get_text_config().hidden_size))
        if self.found:
            self._file = np.memmap(path, np.float32, "r", shape=size)
            self._have[:], self._missing = True, 0
            with suppress(OSError):  # another user's: its time of last use is theirs to keep
                os.utime(path)
        else:
            self._building = begun(path)
            self._abandon = weakref.finalize(self, self._building.unlink, missing_ok=True)
            self._file = np.memmap(self._building, np.float32, "r+", shape=size)

    def __call__(self, rows: list[int], device: torch.device) -> Tensor:
        """Hidden states [tokens, d] fp32 of rows that stand one after the other."""
        return torch.cat([self._row(row, device) for row in rows])

    def _row(self, row: int, device: torch.device) -> Tensor:
        span = slice(int(self._tokens.starts[row]), int(self._tokens.starts[row + 1]))
        if self._file is not None and self._have[row]:
            return torch.from_numpy(np.array(self._file[span])).to(device)
        hidden = self._prefix.bottom(torch.from_numpy(self._tokens.ids[span].astype(np.int64)).to(device)).float()
        if self._file is not None:
            self._file[span] = hidden.cpu().numpy()
            self._have[row] = True
            self._missing -= 1
            if not self._missing:
                self._complete()
        return hidden

    def _complete(self) -> None:
        """All rows are there: the file gets its name, for this run and for others."""
        assert isinstance(self._file, np.memmap) and self._building and self._path
        self._file.flush()
        with suppress(FileNotFoundError):  # deleted by others: what is mapped stays, for this run alone
            with self._building.open("rb") as stream:
                os.fsync(stream.fileno())
            self._building.replace(self._path)
        self._abandon.detach()
        self._building = None


def cache_file(prefix: Prefix, tokens: Tokens, recipe: Recipe) -> tuple[Path | None, str]:
    """Where the bottom's output for these rows is kept, or None and why it is not."""
    if not recipe.prefix_cache or not len(tokens):
        return None, ""
    need = _bytes(tokens, prefix)
    folder = kept("prefix")
    path = folder / f"{_key(prefix, tokens, recipe)}.f32"
    if os.path.exists(path):  # Path.exists raises where a parent may not be searched
        if path.stat().st_size == need:
            return path, ""
        try:
            path.unlink()
        except OSError as error:
            return None, f"it is damaged: {error.strerror} ({path})"
    existing = next(p for p in (folder, *folder.parents) if os.path.exists(p))
    free = shutil.disk_usage(existing).free
    if need > SHARE_OF_DISK * free:
        return None, f"{need / 1e9:.1f} GB would be over half of the {free / 1e9:.1f} GB that are free"
    return path, ""


def _key(prefix: Prefix, tokens: Tokens, recipe: Recipe) -> str:
    """Hash of all that decides the bottom's output: rows, frozen weights, arithmetic."""
    model = prefix.module.model
    weight = model.get_input_embeddings().weight
    config = {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}
    said = (
        *(FORM, torch.__version__, transformers.__version__, config, len(prefix.below)),
        *(str(weight.device), methods.precision(recipe, weight.device), recipe.threads, recipe.method),
        *(recipe.quant_type, recipe.double_quant, recipe.compute_dtype),
        *(recipe.torch_compile, recipe.gradient_checkpointing),  # either decides which parts are fused
    )
    digest: Any = prefix.weights().copy()
    digest.update(repr(said).encode())
    for array in (tokens.ids, tokens.starts):
        digest.update(np.ascontiguousarray(array).tobytes())
    return str(digest.hexdigest()[:32])
