"""A model's weights one at a time, as they lie on disk; an adapter's update becomes part of the weights it stands on.

Nothing is ever in memory but one tensor: a model of any size can be exported on the machine that trained it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig

from tunesmith.errors import ModelError
from tunesmith.local.adapters import PREFIX
from tunesmith.models import find, read_json, shapes, weight_files

MERGED = ("lora_A", "lora_B", "lora_magnitude_vector")  # all else in an adapter would be lost
EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
BUFFERS = ("*.attn.bias", "*.attn.masked_bias", "*.rotary_emb.inv_freq")  # old checkpoints keep what is computed anyway


def _tied(config: dict[str, Any]) -> bool:
    """Whether the head is the embedding; where config.json does not say so, as its class has it (Gemma and GPT-2: it is)."""
    said = config.get("tie_word_embeddings")
    if said is None and config.get("model_type") in CONFIG_MAPPING:
        said = getattr(AutoConfig.for_model(config["model_type"]), "tie_word_embeddings", False)
    return bool(said)


class Weights:
    """The tensors of a model folder by name, or those of an adapter's base with the adapter merged in.

    `shapes`: of each, as stored; a tied head (`tied`) is none. `files`: where each lies. `folder`: the one with config.json,
    an adapter's base.
    """

    def __init__(self, folder: Path) -> None:
        self._adapter = _Adapter(folder) if (folder / "adapter_config.json").exists() else None
        self.folder = self._adapter.base if self._adapter else folder
        self.config = read_json(self.folder / "config.json")
        self.tied = _tied(self.config)
        own = shapes(self.folder)
        unwanted = (*BUFFERS, "lm_head.weight") if self.tied and any(n.endswith(EMBEDDINGS) for n in own) else BUFFERS
        self.shapes = {n: tuple(s) for n, s in own.items() if not any(fnmatch(n, u) for u in unwanted)}
        self.files = {name: file for file in weight_files(self.folder) for name in _names(file)}
        if self._adapter:
            self._adapter.check(set(self.shapes))

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU: as stored, or in float32 where an adapter changes it."""
        with safe_open(
            self.files[name], "pt"
        ) as file:  # opened anew each time: mapped pages of a closed file count no more
            stored = file.get_tensor(name)
            return self._adapter.merged(name, stored) if self._adapter else stored.clone()

    def changed(self) -> set[str]:
        """Names of the tensors that an adapter changes."""
        return {name for name in self.shapes if self._adapter and self._adapter.changes(name)}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.read(name)) for name in self.shapes)


class _Adapter:
    """A LoRA folder (rank-stabilised and DoRA too), as peft writes it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config = read_json(folder / "adapter_config.json")
        if self._config.get("peft_type") != "LORA" or self._config.get("bias", "none") != "none":
            kind = f"{self._config.get('peft_type')}, bias {self._config.get('bias')}"
            raise ModelError(f"an adapter of this kind cannot be merged ({kind})", where=str(folder), fix="use LoRA")
        self.base = find(str(self._config["base_model_name_or_path"]))
        self._tensors = folder / "adapter_model.safetensors"
        self._keys = set(_names(self._tensors))

    def check(self, base: set[str]) -> None:
        """ModelError where a layer that the adapter stands on is not in its base."""
        other = sorted(key for key in self._keys if not key.removesuffix(".weight").endswith(MERGED))
        if other:
            raise ModelError(
                f"an adapter with other weights cannot be merged ({other[0]})",
                where=str(self._folder),
                fix="--format adapter",
            )
        modules = {key.removeprefix(PREFIX).rpartition(".lora_A.weight")[0] for key in self._keys} - {""}
        found = {self._module(name) for name in base} - {None}
        if missing := sorted(modules - found):
            raise ModelError(
                f"its layer {missing[0]} is not in the base", where=str(self._folder), fix="check the base model"
            )

    def changes(self, name: str) -> bool:
        return self._module(name) is not None

    def _module(self, name: str) -> str | None:
        """The adapter's name for the layer of a base's weight. Checkpoints of a bare trunk lack its prefix ("transformer.")."""
        layer = name.removesuffix(".weight")
        tries = (layer, f"model.{layer}", f"transformer.{layer}")
        return next((m for m in tries if f"{PREFIX}{m}.lora_A.weight" in self._keys), None)

    def merged(self, name: str, stored: Tensor) -> Tensor:
        """W + scale * B A in float32 (Hu et al. 2021); for DoRA each output's row at its learnt length (Liu et al. 2024)."""
        module = self._module(name)
        if module is None:
            return stored.clone()
        with safe_open(self._tensors, "pt") as file:
            down, up = (file.get_tensor(f"{PREFIX}{module}.lora_{part}.weight").float() for part in "AB")
            key = f"{PREFIX}{module}.lora_magnitude_vector"
            lengths = next((file.get_tensor(k).float() for k in (key, f"{key}.weight") if k in self._keys), None)
        turned = bool(self._config.get("fan_in_fan_out")) or stored.shape != (up.shape[0], down.shape[1])
        weight = (stored.t() if turned else stored).float().contiguous()  # [out, in], whatever GPT-2's Conv1D keeps
        weight = torch.addmm(weight, up, down, alpha=self._scale(module, down.shape[0]))
        if lengths is not None:
            weight *= (lengths / weight.norm(dim=1))[:, None]
        return weight.t().contiguous() if turned else weight

    def _scale(self, module: str, rank: int) -> float:
        alpha = _pattern(self._config.get("alpha_pattern"), module, self._config["lora_alpha"])
        return float(alpha) / (math.sqrt(rank) if self._config.get("use_rslora") else rank)


def _pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    return next((v for k, v in (patterns or {}).items() if module == k or module.endswith(f".{k}")), default)


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except Exception as error:
        raise ModelError(
            f"not a whole safetensors file: {error}", where=str(file), fix="fetch the model again"
        ) from None
