"""tunesmith doctor."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from tunesmith.cli.options import Parser, show_json
from tunesmith.errors import TunesmithError

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "tokenizers",
    "safetensors",
    "tensorboard",
    "datasets",
    "msgspec",
    "numpy",
    "jinja2",
    "gguf",
    "xllamacpp",
    "openai",
)
# qlora; Hub data sets; exports to llama.cpp; training at a service
OPTIONAL = ("bitsandbytes", "datasets", "gguf", "xllamacpp", "openai")


def doctor(argv: list[str]) -> int:
    options = (
        Parser(
            "doctor",
            "What this machine has for training, and what is missing. Exit status 1 when training cannot work.",
        )
        .with_json()
        .parse_args(argv)
    )
    from importlib.metadata import PackageNotFoundError, version

    from tunesmith.data.spread import cores

    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    missing = [name for name, v in found.items() if v is None and name not in OPTIONAL]
    facts = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores(),
        "memory_gb": _memory_gb(),
        "disk_free_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        "gpu": _gpu() if found["torch"] else None,
        "starter": _starter(),
        "service_key": "in OPENAI_API_KEY" if os.environ.get("OPENAI_API_KEY") else None,
        "packages": found,
        "missing": missing,
    }
    if options.json:
        show_json(facts)
    else:
        from tunesmith.cli.progress import table

        print(
            table(
                [(k, v if v is not None else "none") for k, v in facts.items() if k not in ("packages", "missing")], ""
            )
        )
        print(table([(k, v or "missing") for k, v in found.items()]))
        print(
            "missing: " + ", ".join(missing) + " -- pip install 'tunesmith[local]'"
            if missing
            else "ready to train: tunesmith quickstart"
        )
    return 1 if missing else 0


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):  # Windows has no sysconf
        return None


def _gpu() -> str | None:
    try:
        import torch
    except (ImportError, OSError) as error:  # the diagnosis must survive what it diagnoses
        return f"torch does not load: {error}"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name(0)}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GB"
    return "Apple MPS" if torch.backends.mps.is_available() else None


def _starter() -> str:
    from tunesmith.models import STARTER, facts

    try:
        return f"{facts(STARTER).parameters / 1e6:.1f}M parameters, context {facts(STARTER).context}"
    except TunesmithError as error:
        return str(error)
