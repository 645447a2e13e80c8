"""Training and generation on this machine: with `exporting`, all that knows torch."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunesmith.recipe import Recipe

ENVIRONMENT = {  # what libraries read when they are loaded, unless the user has said otherwise
    # torch's threads meet after each of thousands of products a step, and spin for the last one, which takes the processor from
    # it where other work runs on the same cores. With 10,000 turns (0.1 ms) before they sleep, 66 steps of the starter beside
    # two busy processes take 49 s instead of 110 and more; alone 0 to 3 % more
    "GOMP_SPINCOUNT": "10000",
    "PYTORCH_ENABLE_MPS_FALLBACK": "1",  # an operation that Apple's GPU lacks is done on the CPU
}


@contextmanager
def loading() -> Iterator[None]:
    """Around the first import of what needs torch.

    Torch and its kin make over a million objects that stay. Python's search for garbage goes through them again and again while
    they are made, and once more when the process ends: 1.9 of 5.2 s of processor time. Here it waits, and passes over them later.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def load(recipe: Recipe) -> None:
    """Import all that a process which trains by this recipe will have."""
    from tunesmith.costs import ADAPTERS

    with loading():
        import_module("tunesmith.local.loop")
        if recipe.method in ADAPTERS:
            import_module("peft")
        if "8bit" in recipe.optimizer or recipe.method == "qlora":
            import_module("bitsandbytes")
