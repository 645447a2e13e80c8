"""Low-rank adapters of several fine-tunes on one base model: each token gets the adapter of the answer that it belongs to."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tunesmith.errors import ModelError
from tunesmith.models import read_json

PREFIX = "base_model.model."  # what peft puts before the names of the base's modules


class Adapters:
    """Adapters by name. `where`: for each that is to act in the next forward pass, its tokens' places in the row, [n] int64."""

    def __init__(self, model: Any) -> None:
        self._modules = dict(model.named_modules())
        self._outer = [model.get_input_embeddings(), model.get_output_embeddings()]
        self._weights: dict[
            str, dict[str, tuple[Tensor, Tensor]]
        ] = {}  # name -> module -> (A [r, in], scale * B [out, r])
        self._hooks: dict[str, Any] = {}
        self.where: dict[str, Tensor] = {}

    def load(self, name: str, folder: Path) -> None:
        """Take an adapter folder in. Raises ModelError for one that is more than low-rank products on linear layers."""
        config = read_json(folder / "adapter_config.json")
        more = [key for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern") if config.get(key)]
        if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or more:
            raise ModelError(
                f"cannot share its base with others ({', '.join(more) or config.get('peft_type')})",
                where=str(folder),
                fix="it is loaded with a base of its own",
            )
        rank = config["r"]
        scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        saved = load_file(folder / "adapter_model.safetensors")
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for key, down in saved.items():
            module, kind, _ = key.removeprefix(PREFIX).rpartition(".lora_A.weight")
            if not kind:
                continue
            if module not in self._modules:
                raise ModelError(
                    f"its layer {module} is not in the base", where=str(folder), fix="check the base model"
                )
            if any(self._modules[module] is outer for outer in self._outer):  # they see other rows than the layers
                raise ModelError(
                    f"cannot share its base with others ({module})",
                    where=str(folder),
                    fix="it is loaded with a base of its own",
                )
            weight = self._modules[module].weight
            kept = weight.dtype if weight.dtype.is_floating_point else torch.float32
            up = saved[f"{PREFIX}{module}.lora_B.weight"] * scale
            found[module] = (down.to(weight.device, kept), up.to(weight.device, kept))
        if 2 * len(found) != len(saved):
            raise ModelError("holds other weights too", where=str(folder), fix="it is loaded with a base of its own")
        self._weights[name] = found
        for module in found:
            if module not in self._hooks:
                self._hooks[module] = self._modules[module].register_forward_hook(partial(self._add, module))

    def unload(self, name: str) -> None:
        """Forget an adapter, and the hooks that none needs any more."""
        self._weights.pop(name, None)
        for module in set(self._hooks).difference(*self._weights.values()):
            self._hooks.pop(module).remove()

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def _add(self, key: str, module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        rows, flat = given[0].reshape(-1, given[0].shape[-1]), out.view(-1, out.shape[-1])
        for name, at in self.where.items():
            if pair := self._weights[name].get(key):
                flat.index_add_(0, at, ((rows[at].to(pair[0].dtype) @ pair[0].t()) @ pair[1].t()).to(flat.dtype))
        return out
