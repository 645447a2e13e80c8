"""Tunesmith: from a JSONL file to a fine-tuned language model that you can prove is better.

    import tunesmith as ts
    run = ts.train(dataset="echo", model="starter")     # a Run: the directory of everything about it
    print(ts.evaluate(run).verdict)                     # better, worse, or cannot tell

Names are imported when first used; `import tunesmith` itself loads nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.api import check, evaluate, load, lr_find, plan, prepare, rescue, resume, train
    from tunesmith.conversation import Conversation, Issue, Message
    from tunesmith.data.split import split
    from tunesmith.errors import (
        DataError,
        Interrupted,
        ModelError,
        RunError,
        ServiceError,
        TunesmithError,
        UsageError,
    )
    from tunesmith.exporting.forms import export
    from tunesmith.exporting.push import push
    from tunesmith.recipe import Recipe
    from tunesmith.runs import Run

_PLACES = {
    "check": "api",
    "evaluate": "api",
    "export": "exporting.forms",
    "load": "api",
    "lr_find": "api",
    "plan": "api",
    "prepare": "api",
    "rescue": "api",
    "resume": "api",
    "train": "api",
    "Conversation": "conversation",
    "Issue": "conversation",
    "Message": "conversation",
    "split": "data.split",
    "push": "exporting.push",
    "Recipe": "recipe",
    "Run": "runs",
    "DataError": "errors",
    "Interrupted": "errors",
    "ModelError": "errors",
    "RunError": "errors",
    "ServiceError": "errors",
    "TunesmithError": "errors",
    "UsageError": "errors",
}
__all__ = [
    "Conversation",
    "DataError",
    "Interrupted",
    "Issue",
    "Message",
    "ModelError",
    "Recipe",
    "Run",
    "RunError",
    "ServiceError",
    "TunesmithError",
    "UsageError",
    "check",
    "evaluate",
    "export",
    "load",
    "lr_find",
    "plan",
    "prepare",
    "push",
    "rescue",
    "resume",
    "split",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("tunesmith")
    if name not in _PLACES:
        raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")
    value = getattr(import_module(f"tunesmith.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
