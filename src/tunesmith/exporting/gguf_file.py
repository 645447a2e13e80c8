"""A model as a GGUF file for llama.cpp, Ollama and LM Studio: what is in facts/gguf.toml, tensor after tensor."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.errors import ModelError, TunesmithError
from tunesmith.exporting.forms import K_QUANTISER, facts, quantisation
from tunesmith.exporting.vocabulary import Vocabulary, vocabulary
from tunesmith.exporting.weights import Weights
from tunesmith.render import Renderer

PART = 1 << 24  # numbers that are converted at a time
OLD_CONTEXT = "original_max_position_embeddings"


def write_gguf(
    weights: Weights, renderer: Renderer, path: Path, quantize: str, name: str, told: Callable[[int], object]
) -> None:
    """Write a model with its tokenizer and chat template. `told` hears of the bytes of each tensor that was written.

    Raises ModelError for a model that llama.cpp would compute otherwise, or whose numbers the type cannot hold.
    """
    import gguf

    config = text_config(weights.config)
    known = model_facts(config, weights.folder)
    large, outer, kind = quantisation(quantize)
    writer = gguf.GGUFWriter(path, known["arch"])
    try:
        places = targets(weights, config, known)
        tensors = {n: (t, kind_of(t, weights.shapes[n], large, outer)) for n, t in places.items()}
        writer.add_type("model")
        writer.add_name(_called(name, known, renderer))
        writer.add_file_type(gguf.LlamaFileType[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        embedding = next(n for n, (t, _) in tensors.items() if t == "token_embd.weight")
        words = vocabulary(renderer, weights.shapes[embedding][0], facts()["pretokenizers"])
        adders: dict[type, Any] = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        for key, value in (settings(config, known) | vocabulary_fields(words)).items():
            adders[type(value)](key, value)
        writer.add_chat_template(renderer.template)
        extra = {n: (t, "F32") for n, t in rope_factors(config).items()}
        for source, (target, dtype) in tensors.items():
            shape = _turned(known, source, weights.shapes[source])
            writer.add_tensor_info(
                target, shape, np.dtype(np.float32), _bytes(shape, dtype), gguf.GGMLQuantizationType[dtype]
            )
        for target, (values, dtype) in extra.items():
            writer.add_tensor_info(target, values.shape, values.dtype, values.nbytes, gguf.GGMLQuantizationType[dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for source, (_, dtype) in tensors.items():
            data = converted(arranged(weights.read(source), source, config, known), dtype, source)
            writer.write_tensor_data(data)
            told(data.nbytes)
        for values, _ in extra.values():
            writer.write_tensor_data(values)
    finally:
        writer.close()


def _called(name: str, known: dict[str, Any], renderer: Renderer) -> str:
    """The model's name. llama.cpp looks into it: one with phi3 in it has tokens that take the space after them, and fails
    where the vocabulary lacks them."""
    tokens = known.get("phi3_tokens", ())
    if tokens and all(renderer.tokenizer.token_to_id(token) is not None for token in tokens):
        return f"{name} (phi-3)"
    return re.sub("phi-?3", "phi_3", name, flags=re.IGNORECASE)


def model_facts(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What facts/gguf.toml says of a model. ModelError for one that llama.cpp does not know, or would compute otherwise."""
    kind = str(config.get("model_type"))
    known: dict[str, Any] | None = facts()["models"].get(kind)
    if known is None:
        raise ModelError(
            f"GGUF: no model of the type {kind}", where=str(folder), fix=f"known: {', '.join(facts()['models'])}"
        )
    activation = next(
        (config[k] for k in ("hidden_activation", "hidden_act", "activation_function") if config.get(k)), None
    )
    wrong = [f"activation {activation}"] if activation not in (None, known["activation"]) else []
    wrong += [
        f"{k} {config[k]}"
        for k, other in known.get("same", {}).items()
        if k in config and config[k] != config.get(other)
    ]
    wrong += _unknown_positions(config, known) if known.get("rotary", True) else []
    if wrong:
        raise ModelError(
            f"llama.cpp computes no {kind} with {', '.join(wrong)}", where=str(folder), fix="export --format merged"
        )
    return known


def _unknown_positions(config: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """Settings of rotary positions that a GGUF file cannot hold."""
    turns = rope(config)
    kind = turns.pop("rope_type")
    taken: list[str] | None = facts()["scaling"].get(kind)
    if taken is None:
        return [f"rope scaling {kind}"]
    part = turns.pop("partial_rotary_factor")
    usual = facts()["scaling_defaults"]
    other = {k: v for k, v in turns.items() if k not in (*taken, "rope_theta") and v != usual.get(k)}
    wrong = [f"{kind} positions with {k} {v}" for k, v in other.items()]
    return wrong + ([f"partial_rotary_factor {part}"] if part != 1 and not known.get("partial") else [])


def requantise(source: Path, target: Path, name: str) -> None:
    """Have llama.cpp's own program make a k-quant of a 16-bit file."""
    done = subprocess.run([K_QUANTISER, source, target, name.upper()], capture_output=True, text=True)
    if done.returncode or not target.exists():
        said = (done.stderr or done.stdout).strip().splitlines()
        reason = f"{K_QUANTISER} failed: {said[-1] if said else done.returncode}"
        raise TunesmithError(reason, where=str(source), fix="--quantize q8_0 is made without that program")


def settings(config: dict[str, Any], known: dict[str, Any]) -> dict[str, int | float | str]:
    """The shape of a model, its norms and its positions, under GGUF's names."""
    found: dict[str, Any] = {}
    for key, sources in facts()["fields"].items():
        value = _first(config, sources)
        if key == "feed_forward_length":
            value = value or 4 * config["n_embd"]  # GPT-2 says nothing where it is so
        if value is not None:
            found[key] = value
    if known.get("windows"):
        found["attention.sliding_window"] = config["sliding_window"]
    found["context_length"] = min(found["context_length"], *_ends(config, known))
    if known.get("rotary", True):
        found |= _positions(config)
    return {f"{known['arch']}.{key}": value for key, value in found.items()}


def _ends(config: dict[str, Any], known: dict[str, Any]) -> list[int]:
    """Tokens after which llama.cpp would compute otherwise: a sliding window that it lacks, the second list of long positions."""
    window = (
        config.get("sliding_window") if config.get("use_sliding_window", True) and not known.get("windows") else None
    )
    turns = rope(config)
    old = turns.get(OLD_CONTEXT) or config.get(OLD_CONTEXT) if turns["rope_type"] == "longrope" else None
    return [int(end) for end in (window, old) if end] or [sys.maxsize]


def _positions(config: dict[str, Any]) -> dict[str, int | float | str]:
    turns = rope(config)
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    count = int(head * turns["partial_rotary_factor"])
    found: dict[str, int | float | str] = {"rope.dimension_count": count, "rope.freq_base": float(turns["rope_theta"])}
    kind, old = turns["rope_type"], int(turns.get(OLD_CONTEXT) or config.get(OLD_CONTEXT) or 0)
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(turns["factor"])}
    if kind in ("yarn", "longrope"):
        found["rope.scaling.original_context_length"] = old
    if kind == "longrope":
        scale = config["max_position_embeddings"] / old
        found["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(old)) if scale > 1 else 1.0
    return found


def rope_factors(config: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """By what each frequency is divided, where positions are scaled by frequency (Llama 3's rule; Phi's two lists)."""
    turns = rope(config)
    if turns["rope_type"] == "longrope":
        lists = {"long": turns["long_factor"], "short": turns["short_factor"]}
        return {f"rope_factors_{which}.weight": np.array(values, np.float32) for which, values in lists.items()}
    if turns["rope_type"] != "llama3":
        return {}
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    wave = 2 * math.pi * turns["rope_theta"] ** (np.arange(0, head, 2) / head)  # tokens of a whole turn
    low, high, factor = turns["low_freq_factor"], turns["high_freq_factor"], turns["factor"]
    share = np.clip(
        (turns[OLD_CONTEXT] / wave - low) / (high - low), 0, 1
    )  # 1: many turns within the old context, as it was
    return {"rope_freqs.weight": (1 / ((1 - share) / factor + share)).astype(np.float32)}


# ---- tensors


def targets(weights: Weights, config: dict[str, Any], known: dict[str, Any]) -> dict[str, str]:
    """GGUF's name for each tensor. ModelError where it has none."""
    import gguf

    layers = int(_first(config, facts()["fields"]["block_count"]))
    names = gguf.get_tensor_name_map(_architecture(known["arch"]), layers)
    return {source: _name(names, source, weights) for source in weights.shapes}


def _architecture(name: str) -> Any:
    import gguf

    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _name(names: Any, source: str, weights: Weights) -> str:
    tries = (source, f"model.{source}", f"transformer.{source}")
    found = next((n for t in tries if (n := names.get_name(t, (".weight", ".bias")))), None)
    if found is None:
        raise ModelError(
            f"GGUF has no place for the weight {source}", where=str(weights.folder), fix="export --format merged"
        )
    return str(found)


def kind_of(target: str, shape: tuple[int, ...], large: str, outer: str) -> str:
    """32 bits for vectors and learnt positions, as llama.cpp computes with them; matrices whose rows are no blocks, 16."""
    if len(shape) == 1 or target == "position_embd.weight":
        return "F32"
    wanted = outer if target in ("token_embd.weight", "output.weight") else large
    return wanted if wanted in ("F32", "F16", "BF16") or shape[-1] % 32 == 0 and shape[0] % 32 == 0 else "F16"


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]]
    return int(math.prod(shape) // block * size)


def _turned(known: dict[str, Any], name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if _layer(name) in known.get("transpose", []) else shape


def _layer(name: str) -> str:
    return name.split(".")[-2]


def arranged(tensor: Tensor, name: str, config: dict[str, Any], known: dict[str, Any]) -> Tensor:
    """A tensor as llama.cpp keeps it."""
    layer = _layer(name)
    if layer in known.get("transpose", []) and tensor.ndim == 2:
        tensor = tensor.t().contiguous()
    if layer in known.get("permute", []):
        key = "num_attention_heads" if layer == "q_proj" else "num_key_value_heads"
        heads = config.get(key) or config["num_attention_heads"]
        shape = tensor.shape
        tensor = tensor.view(heads, 2, shape[0] // heads // 2, -1).transpose(1, 2).reshape(shape)
    if any(layer.endswith(norm) for norm in known.get("plus_one", [])):
        tensor = tensor.float() + 1
    return tensor


def converted(tensor: Tensor, dtype: str, name: str) -> np.ndarray[Any, Any]:
    """A tensor's bytes in a GGUF type, part by part. ModelError where a number is too large for it, or none."""
    rows = tensor.view(1, -1) if tensor.ndim == 1 else tensor
    step = max(1, PART // rows.shape[1])
    out: np.ndarray[Any, Any] | None = None
    for start in range(0, rows.shape[0], step):
        part = _part(rows[start : start + step], dtype, name)
        # One array from the first part on: all parts and their sum together were twice the largest tensor
        out = np.empty((rows.shape[0], *part.shape[1:]), part.dtype) if out is None else out
        out[start : start + step] = part
    assert out is not None
    return out


def _part(part: Tensor, dtype: str, name: str) -> Any:
    import gguf

    if not bool(torch.isfinite(part).all()) or dtype == "F16" and float(part.abs().max()) > 65504:
        raise ModelError(f"{name}: numbers that {dtype} cannot hold", fix="export with --quantize bf16")
    if dtype == "F16":
        return part.to(torch.float16).numpy()
    if dtype == "BF16":
        return part.to(torch.bfloat16).view(torch.uint8).numpy()
    return gguf.quants.quantize(part.float().numpy(), gguf.GGMLQuantizationType[dtype])


# ---- configuration


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    return dict(config.get("text_config", config))


def rope(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of rotary positions, whichever way a configuration writes them."""
    old = config.get("rope_scaling") or {}
    turns = config.get("rope_parameters") or {**old, "rope_type": old.get("rope_type", old.get("type", "default"))}
    base = {
        "rope_theta": config.get("rope_theta") or 10000.0,
        "partial_rotary_factor": config.get("partial_rotary_factor") or 1,
    }
    return {"rope_type": "default", **base, **{k: v for k, v in turns.items() if v is not None}}


def _first(config: dict[str, Any], names: list[str]) -> Any:
    return next((config[n] for n in names if config.get(n) is not None), None)


def vocabulary_fields(words: Vocabulary) -> dict[str, Any]:
    """A vocabulary under GGUF's names."""
    ends = dict(zip(("eos", "eot", "eom"), words.eos, strict=False))
    ids = {"bos": words.bos, "unknown": words.unknown, **ends, "padding": words.pad}
    found: dict[str, Any] = {f"{name}_token_id": number for name, number in ids.items() if number is not None}
    found |= {"model": words.model, "pre": words.pre, "tokens": words.tokens, "token_type": words.types}
    found |= {"add_bos_token": words.add_bos}
    found |= {"merges": words.merges} if words.merges else {}
    found |= {"scores": words.scores, "add_space_prefix": words.space_prefix} if words.scores else {}
    return {f"tokenizer.ggml.{name}": value for name, value in found.items()}
