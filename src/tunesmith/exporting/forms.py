"""What can be asked of an export, told before torch is loaded; and `ts.export`, which asks it."""

from __future__ import annotations

import os
import shutil
import tomllib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.data.scan import Progress
from tunesmith.errors import UsageError, did_you_mean
from tunesmith.local import loading
from tunesmith.models import find
from tunesmith.recipe import FACTS
from tunesmith.runs import refuse_removed

if TYPE_CHECKING:
    from tunesmith.exporting.export import Exported
    from tunesmith.exporting.parity import Certificate

FORMS = ("merged", "adapter", "gguf", "ollama", "vllm")
FOLDER_TYPES = ("bf16", "f16")
GGUF_PACKAGES = ("gguf", "xllamacpp")
K_QUANTISER = "llama-quantize"
PARITY = "parity.json"
PROMPTS = 16  # held-out ones that both models answer
REFUSED = "NOT-DEPLOYABLE.txt"
SAID = (PARITY, REFUSED, "README.md", "model_info.json")  # what is written about an export, with paths in it


def export(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    form: str = "merged",
    quantize: str | None = None,
    *,
    unmerged: bool = False,
    prompts: int = PROMPTS,
    license: str = "",
    data_license: str = "",
    on_progress: Progress = lambda *_: None,
) -> Exported:
    """Write a run's best model (or a checkpoint, or any model) for another program into a new folder, and certify it.

    `form`: merged, adapter, gguf, ollama or vllm. `quantize`: bf16 or f16 of a model folder; a type of facts/gguf.toml, or a
    k-quant, of a GGUF file [f16]. `unmerged`: of vllm, the adapter beside its base. `prompts`: how many held-out prompts both
    models answer. `license`, `data_license`: for the card.
    The export is there even where a check has failed: `certificate.deployable` tells, and so do the files in it.
    Raises UsageError for what cannot be asked for, ModelError for a model that the form cannot hold.
    """
    refuse_form(form, quantize, unmerged)
    refuse_target(Path(output).expanduser().resolve())
    refuse_removed(model)
    find(str(model))
    with loading():
        from tunesmith.exporting.export import export as made

    return made(
        str(model),
        Path(output),
        form,
        quantize,
        unmerged=unmerged,
        prompts=prompts,
        license=license,
        data_license=data_license,
        on_progress=on_progress,
    )


def parity(
    folder: str | os.PathLike[str],
    against: str | None = None,
    prompts: int = PROMPTS,
    on_progress: Progress = lambda *_: None,
) -> Certificate:
    """Certify an export again, against the model that it was made from or `against` another; refuses before torch is loaded."""
    refuse_no_export(Path(folder))
    with loading():
        from tunesmith.exporting.export import recheck

    return recheck(Path(folder), against, prompts, on_progress)


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
    needed = {"torch": "local"} | (dict.fromkeys(GGUF_PACKAGES, "gguf") if form in ("gguf", "ollama") else {})
    for package, extra in needed.items():
        if find_spec(package) is None:
            raise UsageError(f"{form} needs {package}", where="--format", fix=f"pip install 'tunesmith[{extra}]'")
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
    if file := next((each for each in (target, *target.parents) if each.exists() and not each.is_dir()), None):
        raise UsageError("is a file", where=str(file), fix="choose another -o")
    if target.exists() and any(target.iterdir()):
        fix = "choose another -o, or delete it" if (target / PARITY).exists() else "choose another -o"
        raise UsageError("the output directory is not empty", where=str(target), fix=fix)


def refuse_no_export(folder: Path) -> None:
    """UsageError unless `tunesmith export` made the folder."""
    if not (folder / PARITY).is_file():
        raise UsageError("not an export (no parity.json)", where=str(folder), fix="tunesmith export makes one")


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
