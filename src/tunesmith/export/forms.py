"""What can be asked of an export, and what GGUF files are known to hold: told before torch is loaded."""

from __future__ import annotations

import shutil
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from tunesmith.errors import UsageError, did_you_mean
from tunesmith.recipe import FACTS

FORMS = ("merged", "adapter", "gguf", "ollama", "vllm")
FOLDER_TYPES = ("bf16", "f16")
K_QUANTISER = "llama-quantize"
PARITY = "parity.json"


@cache
def facts() -> dict[str, Any]:
    """facts/gguf.toml."""
    with (FACTS / "gguf.toml").open("rb") as stream:
        return tomllib.load(stream)


def refuse_form(form: str, quantize: str | None, unmerged: bool) -> None:
    """UsageError for what cannot be asked for, before anything heavy is loaded."""
    if form not in FORMS:
        raise UsageError(
            f'no format "{form}"{did_you_mean(form, list(FORMS))}', where="--format", fix=f"one of {', '.join(FORMS)}"
        )
    if unmerged and form != "vllm":
        raise UsageError(
            "only vLLM serves an adapter beside its base", where="--unmerged", fix="--format vllm, or adapter"
        )
    if quantize and (form == "adapter" or unmerged):
        raise UsageError("an adapter is exported as it is", where="--quantize", fix="leave it out")
    if form in ("merged", "vllm") and quantize and quantize not in FOLDER_TYPES:
        fix = f"{' or '.join(FOLDER_TYPES)}; other types: --format gguf"
        raise UsageError(f'a model folder is not written as "{quantize}"', where="--quantize", fix=fix)
    if form in ("gguf", "ollama") and quantize and not is_k_quant(quantize):
        quantisation(quantize)


def refuse_target(target: Path) -> None:
    """UsageError unless the target is free."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        fix = "choose another -o, or delete it" if (target / PARITY).exists() else "choose another -o"
        raise UsageError("the output directory is not empty", where=str(target), fix=fix)


def quantisation(name: str) -> tuple[str, str, str]:
    """(type of large matrices, of embedding and head, of the file). UsageError for a name that is not known."""
    known = facts()["quantisations"]
    if name not in known:
        names = [*known, *facts()["k_quants"]]
        fix = f"one of {', '.join(known)}; with {K_QUANTISER} also {', '.join(facts()['k_quants'])}"
        raise UsageError(f'no quantisation "{name}"{did_you_mean(name, names)}', where="--quantize", fix=fix)
    large, outer, kind = known[name]
    return large, outer, kind


def is_k_quant(name: str) -> bool:
    """Whether a quantisation is one that only llama.cpp's own program makes. UsageError where that is not to be found."""
    if name in facts()["quantisations"] or name not in facts()["k_quants"]:
        return False
    if shutil.which(K_QUANTISER) is None:
        fix = (
            f"install llama.cpp, or --quantize {' or '.join(k for k in facts()['quantisations'] if k.startswith('q'))}"
        )
        raise UsageError(f"{name} is made by {K_QUANTISER}, which is not on the PATH", where="--quantize", fix=fix)
    return True
