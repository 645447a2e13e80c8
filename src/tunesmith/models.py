"""Base models by name: where the files lie and what they say, read without loading a framework."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from tunesmith.errors import ModelError, did_you_mean

STARTER = Path(__file__).parent / "assets" / "starter"
_WANTED = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt"]  # never pickled weights


class ModelFacts(msgspec.Struct, frozen=True):
    """What config.json and the safetensors headers say."""

    folder: str  # of its files
    architecture: str  # class of transformers
    parameters: int  # all of them
    layers: int  # blocks
    hidden: int  # width, in units
    vocabulary: int  # tokens
    context: int  # tokens; 0: not known


def find(name: str, *also: str) -> Path:
    """The folder of a model: the starter, a local folder (a run too), or a Hub snapshot.

    Raises ModelError naming what was tried; names that the caller would `also` take are suggested.
    """
    path = Path(name).expanduser()
    if name == "starter":  # a folder of that name is ./starter
        return STARTER
    if path.is_dir():
        if not (path / "config.json").exists() and not (path / "adapter_config.json").exists():
            raise ModelError(
                "the folder holds no model (no config.json)",
                where=name,
                fix="name the folder that has config.json in it",
            )
        return path
    if name.startswith((".", "~", "/")) or name.count("/") > 1 or path.exists():
        raise ModelError("no such model folder", where=name, fix="check the path, or use --model starter")
    return _snapshot(name, also)


def _snapshot(name: str, also: Sequence[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise ModelError("Hub models need huggingface_hub", where=name, fix="pip install 'tunesmith[local]'") from None
    disable_progress_bars()
    try:
        return Path(snapshot_download(name, local_files_only=True, allow_patterns=_WANTED))
    except Exception:  # not in the cache: whatever the client says, a download is next
        pass
    known = ["starter", *also]
    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED, etag_timeout=5))
    except Exception:
        raise ModelError(
            f"neither a folder here, nor in the cache, nor to be had from the Hub{did_you_mean(name, known)}",
            where=name,
            fix=f"check the name, fetch it where there is a network (hf download {name}), or use --model starter",
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} when the file is absent."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelError(f"not JSON: {error}", where=str(path), fix="is the file whole?") from None
    if not isinstance(found, dict):
        raise ModelError(
            f"{path.name} is no object in braces", where=str(path), fix="is it the file that it should be?"
        )
    return found


def facts(folder: Path) -> ModelFacts:
    """Size and shape of a model. For an adapter folder, those of its base."""
    if not (folder / "config.json").exists():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        return facts(find(str(base)))
    config = read_json(folder / "config.json")
    text = config.get("text_config", config)

    def number(*keys: str) -> int:
        return next((int(text[k]) for k in keys if text.get(k)), 0)

    return ModelFacts(
        folder=str(folder),
        architecture=(config.get("architectures") or [config.get("model_type", "?")])[0],
        parameters=_parameters(folder),
        layers=number("num_hidden_layers", "n_layer"),
        hidden=number("hidden_size", "n_embd"),
        vocabulary=number("vocab_size"),
        context=number("max_position_embeddings", "n_positions", "n_ctx") or 1024,
    )


def shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of all weights by name, from the headers alone (safetensors: 8 bytes of length, then JSON)."""
    if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        return shapes(find(str(read_json(folder / "adapter_config.json").get("base_model_name_or_path"))))
    files = weight_files(folder)
    if not files:
        raise ModelError(
            "no safetensors weights",
            where=str(folder),
            fix="convert the weights to safetensors; pickled ones are never loaded",
        )
    found: dict[str, list[int]] = {}
    for file in files:
        with file.open("rb") as stream:
            try:
                (size,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(min(size, 100_000_000)))  # 100 MB is the format's own limit
                found |= {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
            except (struct.error, ValueError, TypeError, KeyError):
                raise ModelError("not a whole safetensors file", where=str(file), fix="fetch the model again") from None
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model, as transformers finds them: those of the index, or one of the usual name. A checkpoint has
    others beside it, of the optimizer."""
    index, one = read_json(folder / "model.safetensors.index.json").get("weight_map"), folder / "model.safetensors"
    if index:
        return [folder / name for name in sorted({Path(str(name)).name for name in index.values()})]
    return [one] if one.exists() else sorted(folder.glob("*.safetensors"))


def _parameters(folder: Path) -> int:
    return sum(math.prod(shape) for shape in shapes(folder).values())


def linear_modules(folder: Path) -> set[str]:
    """Names of the linear layers in a model's blocks ("q_proj"): what an adapter can stand on."""
    return {
        name.split(".")[-2]
        for name, shape in shapes(folder).items()
        if name.endswith(".weight") and len(shape) == 2 and any(part.isdigit() for part in name.split("."))
    }
