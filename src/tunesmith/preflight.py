"""What is looked at before a run besides the data's own checks: settings, lengths, and what the rendering leaves to learn."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from tunesmith.conversation import Conversation, Issue
from tunesmith.costs import ADAPTERS
from tunesmith.data.findings import finding
from tunesmith.data.stats import hosted_model, openai_lengths
from tunesmith.errors import UsageError
from tunesmith.models import facts, find
from tunesmith.recipe import Recipe, fields
from tunesmith.render import Rendered, Renderer


def idle_settings(recipe: Recipe, origin: dict[str, str], validated: bool = True) -> Iterator[Issue]:
    """A warning for each setting that was asked for and does nothing in this run. `validated`: there are validation rows."""
    lora = [name for name in fields() if name.startswith("lora_") or name in ("use_rslora", "use_dora")]
    idle = [
        (lora, recipe.method in ADAPTERS, f"the method is {recipe.method}", "add --lora"),
        (QUANTISED, recipe.method == "qlora", f"the method is {recipe.method}", "add --method qlora"),
        (["sharding"], recipe.nproc > 1 or launched(), "there is one process", "add --nproc"),
        (["warmup_ratio"], recipe.warmup_steps is None, "warmup_steps is set", EITHER),
        (["prefix_cache"], bool(recipe.freeze_ratio), "no layers are frozen", "add --freeze-ratio"),
        (["valid_fraction"], not (recipe.valid_dataset and recipe.valid_fraction), "valid_dataset is set", EITHER),
        (["test_fraction"], not (recipe.test_dataset and recipe.test_fraction), "test_dataset is set", EITHER),
        (["patience"], validated or not recipe.patience, NOT_VALIDATED, "add --valid-fraction"),
        (["save_best_limit", "min_gain"], validated, NOT_VALIDATED, "add --valid-fraction"),
        (["eval_steps"], validated or origin["save_steps"].startswith("auto"), NOT_VALIDATED, "add --valid-fraction"),
        (["suffix", "base_url", "api_key_file"], False, "this machine trains", "add --provider openai"),
    ]
    for names, acts, reason, fix in idle:
        for name in names:
            if not acts and origin[name] == "flag":
                yield finding("idle-setting", name, f"it has no effect: {reason}", fix)
            elif not acts and origin[name].endswith((".toml", ".json")):
                yield finding("idle-setting", origin[name], f"{name} has no effect: {reason}", fix)


def long_warmup(recipe: Recipe, origin: dict[str, str], steps: int) -> Iterator[Issue]:
    """A warning where the rate still rises at the last of `steps`: a number of steps meant for a longer run."""
    if recipe.warmup_steps is not None and recipe.warmup_steps >= steps:
        message = (
            f"warmup_steps {recipe.warmup_steps} takes all {steps} steps of the run: the rate never stays at its peak"
        )
        yield finding("long-warmup", origin["warmup_steps"], message, "a share instead: --warmup-ratio 0.1")


def launched() -> bool:
    """Whether a launcher (torchrun, or accelerate by way of it) has started several of us to train one run."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


EITHER = "leave one of the two out"
NOT_VALIDATED = "there are no validation rows"
QUANTISED = ("quant_type", "double_quant", "compute_dtype")


SILENT = "is the answer empty, or cut off, or does the chat template leave it out?"
GPUS = ("/dev/nvidiactl", "/dev/nvhost-ctrl", "/dev/dxg", "/dev/kfd")  # NVIDIA's, Jetson's, of WSL, AMD's


def refuse_impossible(recipe: Recipe) -> None:
    """UsageError for what this machine cannot do, before anything is read."""
    if sys.platform == "win32":
        raise UsageError("training needs Linux or macOS", where="Windows", fix="run it in WSL 2, which is a Linux")
    if recipe.learning_rate_multiplier != "auto":
        message = "a multiplier is of a service's own rate, which nobody knows here"
        raise UsageError(message, where="learning_rate_multiplier", fix="--learning-rate is the rate itself")
    for name, value in (("method", recipe.method), ("optimizer", recipe.optimizer)):
        if (value == "qlora" or "8bit" in value) and find_spec("bitsandbytes") is None:
            raise UsageError(f"{name} {value} needs bitsandbytes", where=name, fix="pip install 'tunesmith[local]'")
    if recipe.track != "none" and find_spec(recipe.track) is None:
        package = {"mlflow": "mlflow-skinny"}.get(recipe.track, recipe.track)
        raise UsageError(f"track {recipe.track} needs {package}", where="track", fix=f"pip install {package}")
    if recipe.sharding != "none" and (recipe.method == "qlora" or "8bit" in recipe.optimizer):
        what = "qlora" if recipe.method == "qlora" else recipe.optimizer
        raise UsageError(f"{what} cannot be spread over processes", where="sharding", fix="leave --sharding out")
    if sys.platform == "darwin" and (recipe.method == "qlora" or "8bit" in recipe.optimizer):
        raise UsageError("4-bit weights and 8-bit optimizers are not for Apple's GPU", where="method", fix="use lora")
    if recipe.mixed_precision == "fp16" and not any(Path(device).exists() for device in GPUS):
        raise UsageError("fp16 needs a GPU, and none is here", where="mixed_precision", fix="use bf16, or no")


class Seen(msgspec.Struct):
    """What rendering some rows of a side has shown, added up: `lengths` and `training` say what of it matters.

    First places are the earliest of what was counted. `limit` in tokens; `policy` as of the recipe's over_long.
    """

    limit: int
    policy: str
    stops: list[int]
    rows: int = 0
    long: int = 0
    longest: tuple[int, str] = (0, "")
    emptied: int = 0  # cut, with nothing left of the answer
    kept: int = 0
    first: str = ""
    silent: tuple[int, str] = (0, "")  # no token to learn
    endless: tuple[int, str] = (0, "")  # no end of an answer
    top: int = 0  # highest token id
    lost: Issue | None = None  # the first tool call that the template leaves out

    def take(self, row: Conversation, rendered: Rendered) -> Rendered | None:
        """The row as it will be trained on; None where it is left out."""
        self.rows += 1
        length = len(rendered.ids)
        if length > self.limit:
            self.long += 1
            if length > self.longest[0]:
                self.longest = (length, rendered.source)
            if self.policy == "drop":
                return None
            if self.policy == "truncate":
                ids, mask = rendered.ids[: self.limit], rendered.mask[: self.limit]
                if not any(mask[1:]):
                    self.emptied += 1
                    return None
                rendered = msgspec.structs.replace(rendered, ids=ids, mask=mask)
        self.kept += 1
        self.first = self.first or rendered.source
        if 1 not in rendered.mask[1:]:
            self.silent = (self.silent[0] + 1, self.silent[1] or rendered.source)
        if not stops(rendered, self.stops):
            self.endless = (self.endless[0] + 1, self.endless[1] or rendered.source)
        self.top = max(self.top, max(rendered.ids, default=0))
        if self.lost is None and has_calls(row):
            self.lost = tool_calls_lost(row, rendered)
        return rendered

    def add(self, later: Seen) -> None:
        """What was seen of the rows that follow."""
        for name in ("rows", "long", "emptied", "kept"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.longest = max(self.longest, later.longest, key=lambda found: found[0])
        self.silent = (self.silent[0] + later.silent[0], self.silent[1] or later.silent[1])
        self.endless = (self.endless[0] + later.endless[0], self.endless[1] or later.endless[1])
        self.first, self.top = self.first or later.first, max(self.top, later.top)
        self.lost = self.lost or later.lost

    def lengths(self, side: str) -> list[Issue]:
        """Whether rows were too long."""
        if not self.long:
            return []
        length, where = self.longest
        message = f"{self.long} of {self.rows} {side} rows are over {self.limit} tokens (the longest: {length})"
        if self.policy == "error":
            if self.long == self.rows:
                message = f"all {side} rows are over-long: {message}"
            fix = "shorten them, or --over-long drop (or truncate)"
            return [finding("over-long", where, f"{message}; the answer would be cut", fix)]
        if self.policy == "drop":
            return [finding("cut", where, f"{message}; left out")]
        empty = f"; {self.emptied} of them keep nothing of the answer and are left out" if self.emptied else ""
        return [finding("cut", where, f"{message}; their ends are cut{empty}")]

    def training(self, vocabulary: int) -> list[Issue]:
        """The preflight of the training side: what makes a healthy-looking loss curve worthless."""
        issues = []
        if self.silent[0]:
            message = f"{self.silent[0]} rows have no token to learn"
            issues.append(finding("no-supervised-token", self.silent[1], message, SILENT))
        if self.top >= vocabulary:
            message = f"token id {self.top} is outside the model's vocabulary of {vocabulary}"
            issues.append(finding("id-out-of-range", self.first, message, "the tokenizer is not this model's"))
        if self.endless[0]:
            message = f"{self.endless[0]} of {self.kept} rows never teach the model to stop"
            fix = "end the answer with the EOS token in the chat template"
            found = finding("no-end-of-turn", self.endless[1], message, fix)
            every = self.endless[0] == self.kept and not self.long  # a row whose end is cut off has none
            issues.append(msgspec.structs.replace(found, severity="error") if every else found)
        return issues + ([self.lost] if self.lost else [])


def stops(rendered: Rendered, ends: list[int]) -> bool:
    """Whether a row teaches the model to stop: an end of a turn is learnt. Mostly it is the last token that is."""
    ids, mask = rendered.ids, rendered.mask
    if 1 in mask and ids[len(mask) - 1 - mask[::-1].index(1)] in ends:
        return True
    return any(m and i in ends for i, m in zip(ids, mask, strict=True))


def over_long(model: str) -> Callable[[Conversation], list[Issue]]:
    """A check of single rows against a model's context. A row is tokenised only where its bytes could be too many tokens.

    For a model of the hosted service, against the length it trains on.
    """
    hosted = hosted_model(model)
    if hosted:
        return _over_long_hosted(*hosted)
    folder = find(model)
    renderer, limit = Renderer(folder), facts(folder).context

    def check(row: Conversation) -> list[Issue]:
        if surely_under(row, limit - 500):  # a template adds more than that only with tools
            return []
        rendered = renderer.render(row)
        length = len(rendered.ids)
        if length <= limit:
            lost = tool_calls_lost(row, rendered) if has_calls(row) else None
            return [lost] if lost else []
        message = f"{length} tokens, {length - limit} more than the model's context: the answer would be cut"
        return [finding("over-long", row.source, message, "shorten it")]

    return check


def _over_long_hosted(name: str, known: dict[str, Any]) -> Callable[[Conversation], list[Issue]]:
    limit = known["training_context"]

    def check(row: Conversation) -> list[Issue]:
        if surely_under(row, limit):
            return []
        length = openai_lengths([row], name)[0]
        if length <= limit:
            return []
        return [finding("over-long", row.source, f"{length} tokens; {name} trains on the first {limit}", "shorten it")]

    return check


def surely_under(row: Conversation, limit: int) -> bool:
    """Whether a row must be under so many tokens: none is shorter than a byte, and a template adds some 10 a turn."""
    return (
        not row.tools
        and not has_calls(row)
        and sum(len(m.content) * (1 if m.content.isascii() else 4) + 20 for m in row.messages) < limit
    )


def has_calls(row: Conversation) -> bool:
    return any(m.tool_calls for m in row.messages)


def tool_calls_lost(row: Conversation, rendered: Rendered) -> Issue | None:
    """An error where a tool call's name is not in what the model sees: its template leaves calls out."""
    names = [str((call.get("function") or {}).get("name")) for m in row.messages for call in m.tool_calls or ()]
    missing = next((name for name in names if name not in rendered.text), None)
    if missing is None:
        return None
    message = f'the model\'s chat template leaves out the call of "{missing}": an empty answer would be learnt'
    return finding("tool-calls-lost", row.source, message, "use a model whose template has tools")
