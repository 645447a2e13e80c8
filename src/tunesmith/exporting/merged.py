"""A model folder in 16 bits that plain transformers and vLLM load: weights in shards, tokenizer, template, stop tokens."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tunesmith.data.write import write_json
from tunesmith.errors import ModelError
from tunesmith.exporting.weights import Weights
from tunesmith.models import read_json
from tunesmith.render import Renderer

TYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
SHORT = {torch.bfloat16: "BF16", torch.float16: "F16"}  # safetensors' names
SHARD = 5_000_000_000  # bytes of a file, as the Hub recommends


def dtype(weights: Weights, quantize: str | None) -> torch.dtype:
    """The 16 bits of an export: as asked for, else those of the stored weights, bf16 for 32-bit ones (fp16 overflows)."""
    if quantize:
        return TYPES[quantize]
    stored = str(weights.config.get("dtype") or weights.config.get("torch_dtype"))
    return torch.float16 if stored == "float16" else torch.bfloat16


def write_merged(
    weights: Weights,
    renderer: Renderer,
    folder: Path,
    kind: torch.dtype,
    told: Callable[[int], object],
    shard: int = SHARD,
) -> None:
    """Write a model folder. `told` hears of the bytes of each tensor that was written.

    Raises ModelError where a number is too large for 16 bits.
    """
    parts = _shards(weights.shapes, shard)
    names = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    names = names if len(parts) > 1 else ["model.safetensors"]
    for name, part in zip(names, parts, strict=True):
        _write_shard(weights, part, folder / name, kind, told)
    if len(parts) > 1:
        where = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": size(weights)}, "weight_map": where}
        )
    _write_configuration(weights, renderer, folder, kind)


def size(weights: Weights) -> int:
    """Bytes of all tensors in 16 bits."""
    return sum(2 * _count(shape) for shape in weights.shapes.values())


def _write_configuration(weights: Weights, renderer: Renderer, folder: Path, kind: torch.dtype) -> None:
    renderer.save(folder)
    for name, value in zip(
        ("config.json", "generation_config.json"), configuration(weights, renderer, kind), strict=True
    ):
        write_json(folder / name, value)


def configuration(weights: Weights, renderer: Renderer, kind: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json in the type of the weights, and generation_config.json that stops where training's answers ended."""
    left_out = ("quantization_config", "torch_dtype", "_name_or_path")
    config = {k: v for k, v in weights.config.items() if k not in left_out}
    turns = config.get("rope_parameters") or {}
    if "rope_theta" in turns:  # where programs look that know transformers 4 only: they would take 10,000
        config = {"rope_theta": turns["rope_theta"]} | config
    stops = renderer.stop_ids
    kept = {k: v for k, v in read_json(weights.folder / "generation_config.json").items() if v is not None}
    end = {"eos_token_id": stops[0] if len(stops) == 1 else stops, "pad_token_id": renderer.pad_id}
    return config | {"dtype": str(kind).removeprefix("torch.")}, kept | end


def _shards(shapes: dict[str, tuple[int, ...]], most: int) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    room = most
    for name, shape in shapes.items():
        need = 2 * _count(shape)
        if need > room and parts[-1]:
            parts.append([])
            room = most
        parts[-1].append(name)
        room -= need
    return parts


def _write_shard(
    weights: Weights, names: list[str], path: Path, kind: torch.dtype, told: Callable[[int], object]
) -> None:
    """A safetensors file, tensor after tensor: 8 bytes of length, a JSON header, the data.

    The library's own writer needs all tensors at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name in names:
        end = place + 2 * _count(weights.shapes[name])
        header[name] = {"dtype": SHORT[kind], "shape": weights.shapes[name], "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            data = rounded(weights.read(name), kind, name)
            stream.write(memoryview(data.contiguous().view(torch.uint8).numpy().reshape(-1)))
            told(data.nbytes)


def rounded(tensor: torch.Tensor, kind: torch.dtype, name: str) -> torch.Tensor:
    """A tensor in 16 bits. ModelError where it held a number that they cannot hold, or none."""
    data = tensor.to(kind)
    if not bool(torch.isfinite(data).all()):
        raise ModelError(f"{name}: numbers that {SHORT[kind]} cannot hold", fix="export with --quantize bf16")
    return data


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
