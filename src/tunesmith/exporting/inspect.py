"""What an export's files say: the settings and every weight, beside those of the run's own model."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import ModelError
from tunesmith.exporting import gguf_file, merged
from tunesmith.exporting.parity import Check, limits
from tunesmith.exporting.weights import EMBEDDINGS, Weights
from tunesmith.models import read_json
from tunesmith.render import Renderer, own_template

BLOCK = 64  # weights that share a scale in bitsandbytes' 4-bit types, which have 16 values each


# ---- a model folder


def folder_checks(folder: Path, weights: Weights, renderer: Renderer) -> Iterator[Check]:
    """The files of a merged export."""
    there = Weights(folder)
    config = there.config
    text = config.get("text_config", config)
    yield _template(own_template(folder), renderer)
    yield _stops(_as_list(read_json(folder / "generation_config.json").get("eos_token_id")), renderer)
    own = gguf_file.text_config(weights.config)
    yield _rope_base(gguf_file.rope(text).get("rope_theta"), gguf_file.rope(own).get("rope_theta"))
    ignored = {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "quantization_config", "use_cache"}
    yield _settings(
        {k: v for k, v in weights.config.items() if k not in ignored},
        {k: v for k, v in config.items() if k not in ignored},
    )
    yield _tied_head(weights, bool(config.get("tie_word_embeddings")), _head(there))
    kind = merged.TYPES["f16" if str(config.get("dtype")) == "float16" else "bf16"]
    yield _weights(_merged_errors(there, weights, kind), f"as the run's own, rounded to {kind}", 0.0)


def _merged_errors(there: Weights, weights: Weights, kind: torch.dtype) -> Iterator[tuple[str, float, str]]:
    """(tensor, its relative error, its defect) of every tensor that is not exactly the run's own rounded."""
    for name in weights.shapes:
        if name not in there.shapes:
            yield name, 1.0, "is missing"
            continue
        want, have = merged.rounded(weights.read(name), kind, name), there.read(name)
        if have.dtype != kind or not torch.equal(want, have):
            grid = on_a_grid(have)
            yield name, relative(want, have), "was merged into 4-bit weights" if grid else "differs"


def on_a_grid(tensor: Tensor) -> bool:
    """Whether each block of 64 numbers has no more than 16 values: what 4-bit weights look like in 16 bits."""
    flat = tensor.float().reshape(-1)
    if tensor.ndim < 2 or len(flat) < BLOCK * 16:
        return False
    blocks = flat[: len(flat) // BLOCK * BLOCK].view(-1, BLOCK)[:256].sort(1).values
    return bool(((blocks.diff(dim=1) != 0).sum(1) < 16).float().mean() > 0.95)


def relative(want: Tensor, have: Tensor) -> float:
    """Root mean square of the difference over that of the wanted."""
    if want.shape != have.shape:
        return float("inf")
    wanted = want.float()
    return float((have.float() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def adapter_checks(folder: Path, own: Path, renderer: Renderer) -> Iterator[Check]:
    """The files of an adapter that is exported as it is."""
    yield _template(own_template(folder), renderer)
    yield _stops(_as_list(read_json(folder / "generation_config.json").get("eos_token_id")), renderer)
    yield _settings(read_json(own / "adapter_config.json"), read_json(folder / "adapter_config.json"))
    name = "adapter_model.safetensors"
    same = filecmp.cmp(own / name, folder / name, shallow=False)
    yield Check(
        "weights",
        same,
        "every byte the same" if same else "the files differ",
        "every byte",
        "" if same else f"{name} differs",
    )


# ---- a GGUF file


def gguf_checks(file: Path, weights: Weights, renderer: Renderer, quantize: str) -> Iterator[Check]:
    """The fields and tensors of a GGUF file."""
    import gguf

    try:
        reader = gguf.GGUFReader(file)
    except Exception as error:  # whatever its bytes make the library do
        raise ModelError(f"not a whole GGUF file: {error}", where=str(file)) from None
    fields = {name: field.contents() for name, field in reader.fields.items() if name != "tokenizer.ggml.tokens"}
    config = gguf_file.text_config(weights.config)
    known = gguf_file.model_facts(config, weights.folder)
    wanted = gguf_file.settings(config, known)
    yield _template(fields.get("tokenizer.chat_template"), renderer)
    stops = [fields.get(f"tokenizer.ggml.{n}_token_id") for n in ("eos", "eot", "eom")]
    yield _stops([s for s in stops if s is not None], renderer)
    base = f"{known['arch']}.rope.freq_base"
    yield _rope_base(fields.get(base), wanted.get(base))
    yield _settings(wanted, {k: fields.get(k) for k in wanted})
    tensors = {t.name: t for t in reader.tensors}
    tied = bool(weights.config.get("tie_word_embeddings"))
    head = tensors.get("output.weight")
    same = head is None or bool((head.data == tensors["token_embd.weight"].data).all())
    yield _tied_head(weights, tied and head is None or tied and same, same)
    limit = limits(quantize)["weights"]
    yield _weights(_gguf_errors(tensors, weights, config, known, limit), f"within {limit:.1%} of the run's own", limit)


def _gguf_errors(
    tensors: dict[str, Any], weights: Weights, config: dict[str, Any], known: dict[str, Any], limit: float
) -> Iterator[tuple[str, float, str]]:
    import gguf

    for source, target in gguf_file.targets(weights, config, known).items():
        if target not in tensors:
            yield target, 1.0, "is missing"
            continue
        have = torch.from_numpy(gguf.quants.dequantize(tensors[target].data, tensors[target].tensor_type).copy())
        want = gguf_file.arranged(weights.read(source), source, config, known)
        error = relative(want.reshape(have.shape) if want.numel() == have.numel() else want, have)
        if error > limit:
            yield target, error, "differs"


# ---- one check each


def _template(there: str | None, renderer: Renderer) -> Check:
    if there == renderer.template:
        return Check("chat template", True, f"{len(there.encode())} bytes, all the same", "every byte")
    at = next(
        (i for i, (a, b) in enumerate(zip(there or "", renderer.template, strict=False)) if a != b), len(there or "")
    )
    found = f"differs from character {at} on" if there else "there is none"
    return Check("chat template", False, found, "every byte", "the chat template is not the one of training")


def _stops(there: list[int], renderer: Renderer) -> Check:
    wanted = renderer.stop_ids
    missing = [f"{renderer.tokenizer.id_to_token(i)} ({i})" for i in wanted if i not in there]
    found = f"answers end at {', '.join(renderer.tokenizer.id_to_token(i) or str(i) for i in there) or 'nothing'}"
    cause = f"a stop token of training is not among them: {', '.join(missing)}" if missing else ""
    return Check("stop tokens", not missing, found, "those of training", cause)


def _rope_base(there: Any, wanted: Any) -> Check:
    if wanted is None:
        return Check("rope base", there is None, "the model has none" if there is None else str(there))
    same = there is not None and abs(float(there) - float(wanted)) <= 1e-6 * float(wanted)
    cause = "" if same else "a wrong rope base: the model takes every token to stand elsewhere"
    return Check("rope base", same, str(there), str(wanted), cause)


def _settings(wanted: dict[str, Any], there: dict[str, Any]) -> Check:
    wrong = [f"{k} is {there.get(k)}, not {v}" for k, v in wanted.items() if not _near(there.get(k), v)]
    found = f"{len(wanted) - len(wrong)} of {len(wanted)} are those of the run's own model"
    return Check("settings", not wrong, found, "all", "; ".join(wrong[:3]))


def _near(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, int | float):
        return abs(a - b) <= 1e-6 * max(abs(b), 1e-30)
    return bool(a == b)


def _tied_head(weights: Weights, tied_there: bool, same: bool) -> Check:
    tied = bool(weights.config.get("tie_word_embeddings"))
    if not tied:
        return Check(
            "head", not tied_there, "a head of its own" if not tied_there else "is the embedding", "a head of its own"
        )
    ok = tied_there and same
    cause = "" if ok else "a tied head is not tied: the head must be the embedding"
    return Check("head", ok, "is the embedding" if ok else "is not the embedding", "is the embedding", cause)


def _head(there: Weights) -> bool:
    """Whether a head that stands in the files is the embedding."""
    embedding = next(n for n in there.files if n.endswith(EMBEDDINGS))
    return "lm_head.weight" not in there.files or torch.equal(there.read("lm_head.weight"), there.read(embedding))


def _weights(errors: Iterator[tuple[str, float, str]], wanted: str, limit: float) -> Check:
    wrong = list(errors)
    if not wrong:
        return Check("weights", True, f"every tensor {wanted}", wanted)
    name, error, what = max(wrong, key=lambda each: each[1])
    grid = next((w for w in wrong if "4-bit" in w[2]), None)
    name, error, what = grid or (name, error, what)
    found = f"{len(wrong)} tensors are not, first {name} (off by {error:.2%})"
    return Check("weights", False, found, wanted, f"{name} {what}")


def _as_list(stops: Any) -> list[int]:
    return [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
