"""What an export's files say: the settings and every weight, beside those of the run's own model."""

from __future__ import annotations

import filecmp
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.errors import ModelError
from tunesmith.exporting import gguf_file, merged
from tunesmith.exporting.forms import SAID, facts
from tunesmith.exporting.parity import Check, limits
from tunesmith.exporting.vocabulary import vocabulary
from tunesmith.exporting.weights import EMBEDDINGS, Weights
from tunesmith.models import read_json
from tunesmith.render import TOKENIZER_FILES, Renderer, own_template

TOKENIZER = tuple(name for name in TOKENIZER_FILES if name not in ("generation_config.json", "chat_template.jinja"))
CONFIGURATION = ("config.json", "model.safetensors.index.json")
FREE = ("GGUF.", "general.", "quantize.")  # fields of a GGUF file by which nothing is computed
BLOCK = 64  # weights that share a scale in bitsandbytes' 4-bit types, which have 16 values each


# ---- a model folder


def folder_checks(folder: Path, weights: Weights, renderer: Renderer) -> Iterator[Check]:
    """The files of a merged export."""
    there = Weights(folder)
    kind = merged.TYPES["f16" if str(there.config.get("dtype")) == "float16" else "bf16"]
    wanted, generation = merged.configuration(weights, renderer, kind)
    yield from _said(folder, renderer, generation)
    text, own = gguf_file.text_config(there.config), gguf_file.text_config(weights.config)
    yield _rope_base(gguf_file.rope(text)["rope_theta"], gguf_file.rope(own)["rope_theta"])
    yield _settings(wanted, there.config)
    yield _tied_head(weights.tied, there.tied, _head(there))
    yield _weights(_merged_errors(there, weights, kind), f"as the run's own, rounded to {merged.SHORT[kind].lower()}")
    index = read_json(folder / "model.safetensors.index.json").get("weight_map")
    yield no_others(folder, *CONFIGURATION, *(index.values() if index else ["model.safetensors"]), *TOKENIZER_FILES)


def _said(folder: Path, renderer: Renderer, generation: dict[str, Any]) -> Iterator[Check]:
    """What a folder says besides its weights: template, stop tokens, generation, tokenizer."""
    yield _template(own_template(folder), renderer)
    found = read_json(folder / "generation_config.json")
    yield _stops(_as_list(found.get("eos_token_id")), renderer)
    wrong = sorted(k for k in {*found, *generation} if found.get(k) != generation.get(k))
    cause = f"generation_config.json has another {', '.join(wrong)}" if wrong else ""
    yield Check("generation", not wrong, cause or "sampling and limits as they were", "as it was", cause)
    changed = [n for n in TOKENIZER if not _same_file(renderer.folder / n, folder / n)]
    cause = f"{', '.join(changed)} is not the one of training" if changed else ""
    yield Check("tokenizer", not changed, cause or "every file the same", "every byte", cause)


def _same_file(a: Path, b: Path) -> bool:
    if not a.exists() or not b.exists():
        return a.exists() == b.exists()
    return filecmp.cmp(a, b, shallow=False)


def no_others(folder: Path, *names: str) -> Check:
    """Whether only what belongs to the export is there: a second weights file would be loaded too."""
    extra = sorted(p.name for p in folder.iterdir() if p.name not in (*names, *SAID))
    cause = f"{', '.join(extra)} does not belong to it" if extra else ""
    return Check("files", not extra, cause or "those of the export alone", "no others", cause)


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
    yield from _said(folder, renderer, read_json(renderer.folder / "generation_config.json"))
    yield _settings(read_json(own / "adapter_config.json"), read_json(folder / "adapter_config.json"))
    name = "adapter_model.safetensors"
    same = filecmp.cmp(own / name, folder / name, shallow=False)
    said, cause = ("every byte the same", "") if same else ("the files differ", f"{name} differs")
    yield Check("weights", same, said, "every byte", cause)
    yield no_others(folder, "adapter_config.json", name, *TOKENIZER_FILES)


# ---- a GGUF file


def gguf_checks(file: Path, weights: Weights, renderer: Renderer, quantize: str) -> Iterator[Check]:
    """The fields and tensors of a GGUF file."""
    import gguf

    try:
        reader = gguf.GGUFReader(file)
    except Exception as error:  # whatever its bytes make the library do
        raise ModelError(f"not a whole GGUF file: {error}", where=str(file), fix="export the model again") from None
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = gguf_file.text_config(weights.config)
    known = gguf_file.model_facts(config, weights.folder)
    wanted: dict[str, Any] = {"general.architecture": known["arch"]} | gguf_file.settings(config, known)
    tensors = {t.name: t for t in reader.tensors}
    yield _template(fields.get("tokenizer.chat_template"), renderer)
    stops = [fields.get(f"tokenizer.ggml.{n}_token_id") for n in ("eos", "eot", "eom")]
    yield _stops([s for s in stops if s is not None], renderer)
    size = next(s[0] for n, s in weights.shapes.items() if n.endswith(EMBEDDINGS))
    words = gguf_file.vocabulary_fields(vocabulary(renderer, size, facts()["pretokenizers"]))
    yield _vocabulary(words, fields)
    base = f"{known['arch']}.rope.freq_base"
    yield _rope_base(fields.get(base), wanted.get(base))
    others = {*words, "tokenizer.chat_template", *(k for k in fields if k.startswith(FREE))} - set(wanted)
    yield _settings(wanted, {k: v for k, v in fields.items() if k not in others})
    head = tensors.get("output.weight")
    same = (
        head is None or "token_embd.weight" in tensors and np.array_equal(head.data, tensors["token_embd.weight"].data)
    )
    yield _tied_head(weights.tied, weights.tied and same, same)
    errors = _gguf_errors(reader, weights, config, known, quantize)
    exact = quantize in facts()["quantisations"]
    yield _weights(
        errors, f"as the run's own gives it in {quantize}" if exact else f"near the run's own, by {quantize}"
    )


def _vocabulary(wanted: dict[str, Any], fields: dict[str, Any]) -> Check:
    """Every token with its text, type, merges or scores: an id alone says nothing."""
    wrong = [name.rpartition(".")[2] for name, value in wanted.items() if not _near(fields.get(name), value)]
    found = f"{len(wanted['tokenizer.ggml.tokens'])} tokens as in training"
    cause = f"the vocabulary is not the one of training: {', '.join(wrong)}" if wrong else ""
    return Check("vocabulary", not wrong, cause or found, "every token", cause)


def _gguf_errors(
    reader: Any, weights: Weights, config: dict[str, Any], known: dict[str, Any], quantize: str
) -> Iterator[tuple[str, float, str]]:
    """Tensors that are not what the run's own give: byte for byte, or within its limit in a type that we do not make."""
    import gguf

    kinds = facts()["quantisations"].get(quantize)
    tensors, pages = {t.name: t for t in reader.tensors}, reader.data.base
    for source, target in gguf_file.targets(weights, config, known).items():
        if target not in tensors:
            yield target, 1.0, "is missing"
            continue
        pages.madvise(mmap.MADV_DONTNEED)  # of the tensors before it, which would count until the file is closed
        there, want = tensors[target], gguf_file.arranged(weights.read(source), source, config, known)
        if kinds:
            kind = gguf_file.kind_of(target, tuple(want.shape), kinds[0], kinds[1])
            bytes_there, bytes_wanted = there.data.view(np.uint8).reshape(-1), gguf_file.converted(want, kind, target)
            if there.tensor_type.name == kind and np.array_equal(bytes_there, bytes_wanted.view(np.uint8).reshape(-1)):
                continue
        have = torch.from_numpy(gguf.quants.dequantize(there.data, there.tensor_type).copy())
        error = relative(want.reshape(have.shape) if want.numel() == have.numel() else want, have)
        if kinds or not error <= limits(quantize)["weights"]:
            yield target, error, "differs"
    extra = gguf_file.rope_factors(config)
    for name, values in extra.items():
        if name not in tensors or not np.array_equal(tensors[name].data, values):
            yield name, 1.0, "differs" if name in tensors else "is missing"
    theirs = set(tensors) - {*gguf_file.targets(weights, config, known).values(), *extra}
    for name in theirs - {"output.weight" if weights.tied else ""}:  # of a tied head the check above has told
        yield name, 1.0, "does not belong to it"


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
    missing, more = ([f"{renderer.tokenizer.id_to_token(i)} ({i})" for i in some] for some in _apart(wanted, there))
    found = f"answers end at {', '.join(renderer.tokenizer.id_to_token(i) or str(i) for i in there) or 'nothing'}"
    cause = f"a stop token of training is not among them: {', '.join(missing)}" if missing else ""
    cause = cause or (f"answers would end at {', '.join(more)} too" if more else "")
    return Check("stop tokens", not cause, found, "those of training", cause)


def _apart(a: list[int], b: list[int]) -> tuple[list[int], list[int]]:
    """What only the first has, and what only the second."""
    return [i for i in a if i not in b], [i for i in b if i not in a]


def _rope_base(there: Any, wanted: Any) -> Check:
    if wanted is None:
        return Check("rope base", there is None, "the model has none" if there is None else str(there))
    same = there is not None and abs(float(there) - float(wanted)) <= 1e-6 * float(wanted)
    cause = "" if same else "a wrong rope base: the model takes every token to stand elsewhere"
    return Check("rope base", same, str(there), str(wanted), cause)


def _settings(wanted: dict[str, Any], there: dict[str, Any]) -> Check:
    wrong = [f"{k} is {there.get(k)}, not {v}" for k, v in wanted.items() if not _near(there.get(k), v)]
    wrong += [f"{k} does not belong to it" for k in there if k not in wanted]
    found = f"{max(0, len(wanted) - len(wrong))} of {len(wanted)} are those of the run's own model"
    return Check("settings", not wrong, found, "all", "; ".join(wrong[:3]))


def _near(a: Any, b: Any) -> bool:
    if isinstance(b, list) and b and isinstance(b[0], float):
        return isinstance(a, list) and np.allclose(a, b, rtol=1e-6)
    if isinstance(a, float) and isinstance(b, int | float):
        return abs(a - b) <= 1e-6 * max(abs(b), 1e-30)
    return bool(a == b)


def _tied_head(tied: bool, tied_there: bool, same: bool) -> Check:
    if not tied:
        cause = "a head of its own is tied: it must not be the embedding" if tied_there else ""
        return Check(
            "head", not cause, "is the embedding" if cause else "a head of its own", "a head of its own", cause
        )
    ok = tied_there and same
    cause = "" if ok else "a tied head is not tied: the head must be the embedding"
    return Check("head", ok, "is the embedding" if ok else "is not the embedding", "is the embedding", cause)


def _head(there: Weights) -> bool:
    """Whether a head that stands in the files is the embedding."""
    embedding = next((n for n in there.files if n.endswith(EMBEDDINGS)), "")
    heads = "lm_head.weight" in there.files
    return not heads or bool(embedding) and torch.equal(there.read("lm_head.weight"), there.read(embedding))


def _weights(errors: Iterator[tuple[str, float, str]], wanted: str) -> Check:
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
