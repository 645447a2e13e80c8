"""What is looked at before a run besides the data's own checks: settings, lengths, and what the rendering leaves to learn."""

from __future__ import annotations

import os
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
from tunesmith.models import ModelFacts, facts, find
from tunesmith.recipe import Recipe, fields
from tunesmith.render import Rendered, Renderer


def idle_settings(recipe: Recipe, origin: dict[str, str]) -> Iterator[Issue]:
    """A warning for each setting that was asked for and does nothing in this run."""
    lora = [name for name in fields() if name.startswith("lora_") or name in ("use_rslora", "use_dora")]
    idle = [
        (lora, recipe.method in ADAPTERS, f"the method is {recipe.method}", "add --lora"),
        (QUANTISED, recipe.method == "qlora", f"the method is {recipe.method}", "add --method qlora"),
        (["sharding"], recipe.nproc > 1 or launched(), "there is one process", "add --nproc"),
        (["warmup_ratio"], recipe.warmup_steps is None, "warmup_steps is set", "leave one of the two out"),
        (["prefix_cache"], bool(recipe.freeze_ratio), "no layers are frozen", "add --freeze-ratio"),
    ]
    for names, acts, reason, fix in idle:
        for name in names:
            if not acts and (origin[name] == "flag" or origin[name].endswith((".toml", ".json"))):
                yield finding("idle-setting", origin[name], f"{name} has no effect: {reason}", fix)


def launched() -> bool:
    """Whether a launcher (torchrun, or accelerate by way of it) has started several of us to train one run."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


QUANTISED = ("quant_type", "double_quant", "compute_dtype")


def refuse_impossible(recipe: Recipe) -> None:
    """UsageError for what this machine cannot do, before anything is read."""
    for name, value in (("method", recipe.method), ("optimizer", recipe.optimizer)):
        if (value == "qlora" or "8bit" in value) and find_spec("bitsandbytes") is None:
            raise UsageError(f"{name} {value} needs bitsandbytes", where=name, fix="pip install 'tunesmith[local]'")
    if recipe.track != "none" and find_spec(recipe.track) is None:
        package = {"mlflow": "mlflow-skinny"}.get(recipe.track, recipe.track)
        raise UsageError(f"track {recipe.track} needs {package}", where="track", fix=f"pip install {package}")
    if recipe.sharding != "none" and (recipe.method == "qlora" or "8bit" in recipe.optimizer):
        what = "qlora" if recipe.method == "qlora" else recipe.optimizer
        raise UsageError(f"{what} cannot be spread over processes", where="sharding", fix="leave --sharding out")
    if recipe.mixed_precision == "fp16" and not Path("/dev/nvidiactl").exists():
        raise UsageError("fp16 needs an NVIDIA GPU, and none is here", where="mixed_precision", fix="use bf16, or no")


def fit(rows: list[Rendered], limit: int, policy: str, side: str) -> tuple[list[Rendered | None], list[Issue]]:
    """Rows within the limit; over-long ones as the policy says: None (dropped), cut, or kept with an error."""
    long = [r for r in rows if len(r.ids) > limit]
    if not long:
        return list(rows), []
    worst = max(long, key=lambda r: len(r.ids))
    message = f"{len(long)} of {len(rows)} {side} rows are over {limit} tokens (the longest: {len(worst.ids)})"
    if policy == "error":
        if len(long) == len(rows):
            message = f"all rows are over-long: {message}"
        return list(rows), [
            finding(
                "over-long",
                worst.source,
                f"{message}; the answer would be cut",
                "shorten them, or --over-long drop (or truncate)",
            )
        ]
    if policy == "drop":
        kept: list[Rendered | None] = [r if len(r.ids) <= limit else None for r in rows]
        return kept, [finding("cut", worst.source, f"{message}; left out")]
    cut = [msgspec.structs.replace(r, ids=r.ids[:limit], mask=r.mask[:limit]) for r in rows]
    kept = [r if any(r.mask[1:]) else None for r in cut]
    empty = f"; {kept.count(None)} of them keep nothing of the answer and are left out" if None in kept else ""
    return kept, [finding("cut", worst.source, f"{message}; their ends are cut{empty}")]


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


def token_issues(rows: list[Rendered], renderer: Renderer, model: ModelFacts) -> list[Issue]:
    """The preflight: what makes a healthy-looking loss curve worthless."""
    issues = []
    silent = [r for r in rows if not any(r.mask[1:])]
    if silent:
        issues.append(
            finding(
                "no-supervised-token",
                silent[0].source,
                f"{len(silent)} rows have no token to learn",
                "is the answer empty, or cut off?",
            )
        )
    top = max(max(r.ids, default=0) for r in rows)
    if top >= model.vocabulary:
        issues.append(
            finding(
                "id-out-of-range",
                rows[0].source,
                f"token id {top} is outside the model's vocabulary of {model.vocabulary}",
                "the tokenizer is not this model's",
            )
        )
    stops = set(renderer.stop_ids)
    endless = [r for r in rows if not any(m and i in stops for i, m in zip(r.ids, r.mask, strict=True))]
    if endless:
        issues.append(
            finding(
                "no-end-of-turn",
                endless[0].source,
                f"{len(endless)} of {len(rows)} rows never teach the model to stop",
                "end the answer with the EOS token in the chat template",
            )
        )
    return issues
