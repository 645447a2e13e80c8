"""What a plan predicts: memory and time from the probe, what would make a run fit, and what is written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from conftest import Result
from tunesmith import api, costs
from tunesmith.costs import Answer, Question
from tunesmith.local import backend
from tunesmith.models import facts
from tunesmith.recipe import Recipe

ANSWER = Answer(
    libraries=400e6,
    available=8e9,
    tokens_at_most=2000,
    layer_seconds=10e-6,
    layer_forward_seconds=3e-6,
    layer_bytes=4e6,
    layer_saved_bytes=20e3,
    rest_seconds=50e-6,
    rest_forward_seconds=20e-6,
    rest_saved_bytes=1e3,
    head_scale=1.0,
    head_seconds=40e-6,
    head_forward_seconds=15e-6,
    optimizer_seconds=1e-8,
)


def question(tiny: Path, **settings: Any) -> Question:
    common: dict[str, Any] = {
        "model": str(tiny), "batch_size": 4, "micro_batch_tokens": 8192, "learning_rate": 1e-3, "threads": 1,
        "lora_alpha": 8, "eval_steps": 10, "epochs": 2,
    }  # fmt: skip
    return Question(str(tiny), Recipe(**{**common, **settings}), [500] * 40, 0.8, 20)


def test_memory_follows_what_is_asked(tiny: Path) -> None:
    """By hand for the simplest case; then each lever in its direction."""
    model = facts(tiny)

    def peak(**settings: Any) -> float:
        asked = question(tiny, **settings)
        return costs.peak(asked.recipe, model, costs.trainable(asked.recipe, model), 1000, ANSWER)

    rest, head = 4 * (model.parameters - 2 * 9280), 4 * 8192 * 32
    assert model.parameters == 8192 * 32 + 32 + 2 * 9280
    kept = 2 * 20e3
    forward = (kept + 1e3) * 2000 + head + 4 * 512 * 8192
    passing = (20e3 + 0.25 * kept) * 2000 + 60e6
    assert peak() == pytest.approx(400e6 + rest + 2 * 4e6 + 8 * model.parameters + forward + passing)
    assert peak(method="lora") < peak() and peak(optimizer="adamw_8bit") < peak()
    assert peak(gradient_checkpointing=True) < peak() and peak(method="freeze", freeze_ratio=0.5) < peak()


def test_time_adds_up(tiny: Path) -> None:
    """20 steps of 4 rows of 500 tokens are two epochs; validation of 1,000 tokens at the start, at steps 10 and 20."""
    found = costs.estimate(question(tiny), facts(tiny), 1000, ANSWER)
    training, judging = 2 * 40 * 500 * (50e-6 + 2 * 10e-6), 3 * 1000 * (20e-6 + 2 * 3e-6)
    updating = 20 * facts(tiny).parameters * 1e-8
    assert found.seconds == pytest.approx(training + judging + updating)
    assert found.step_seconds == pytest.approx((training + updating) / 20)
    slower = costs.estimate(question(tiny, gradient_checkpointing=True), facts(tiny), 1000, ANSWER)
    shared = costs.estimate(question(tiny, nproc=2), facts(tiny), 1000, ANSWER)
    cached = costs.estimate(question(tiny, freeze_ratio=0.5), facts(tiny), 0, ANSWER)
    again = costs.estimate(question(tiny, freeze_ratio=0.5, prefix_cache=False), facts(tiny), 0, ANSWER)
    assert slower.seconds > found.seconds > shared.seconds and again.seconds > cached.seconds


def test_what_would_make_it_fit(tiny: Path) -> None:
    """The mildest change first; nothing where nothing helps."""
    asked, model = question(tiny), facts(tiny)
    needs = costs.estimate(asked, model, 0, ANSWER).memory_mb
    small = msgspec.structs.replace(ANSWER, available=(needs - 20) * 1e6)
    ways = costs.ways_to_fit(asked, model, 0, small)
    assert ways and ways[0][0].startswith("--micro-batch-tokens 500") and all(mb < needs - 20 for _, mb in ways)
    assert costs.ways_to_fit(asked, model, 0, msgspec.structs.replace(ANSWER, available=100e6)) == []
    full = costs.ways_to_fit(asked, model, 0, small, lambda recipe: recipe.method == "full")
    assert full == [way for way in ways if "lora" not in way[0]] != ways
    assert all("--micro-batch-tokens" in words for words, _ in ways)  # each line is all that it takes
    assert api.possible(asked.recipe) and not api.possible(
        msgspec.structs.replace(asked.recipe, method="qlora", sharding="fsdp2")
    )


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_probe_measures_what_it_says(method: str, tiny: Path, data: Path) -> None:
    """Saved bytes of a layer: by hand for this Llama (hidden 32, inner 64, half as many key and value heads)."""
    from tunesmith.local.probe import answer

    prepared = api.prepare(str(data), model=str(tiny), method=method, lora_rank=4)
    plan = prepared.plan
    lengths = prepared.tokens["train"].lengths().tolist()
    found = answer(Question(plan.model.folder, plan.recipe, lengths, 0.5, plan.steps))
    by_hand = 4 * (7 * 32 + 2 * 16 + 2 * 64)  # norms, queries, keys, values, attention, the gated inner layer
    assert 0.75 * by_hand < found.layer_saved_bytes < 1.6 * by_hand
    batch = int(plan.recipe.batch_size)
    assert max(lengths) <= found.tokens_at_most <= sum(sorted(lengths)[-batch:])
    assert found.layer_seconds >= 0 and found.layer_forward_seconds >= 0  # too small here to be told from noise
    assert found.layer_seconds + found.rest_seconds > 0 and found.head_seconds > 0 and found.libraries > 50e6
    whole = 4 * 9280  # bytes of a layer in fp32
    assert found.layer_bytes < whole / 2 if method == "qlora" else found.layer_bytes >= whole


def test_the_probe_ends_with_whoever_asked() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    with subprocess.Popen(
        [sys.executable, "-c", backend.PROBE, str(gone.pid)], stdin=subprocess.PIPE
    ) as probe:  # its question never comes
        assert probe.wait(60) == 1


def test_the_command(tiny: Path, data: Path, cli: Callable[..., Result]) -> None:
    plan = cli("plan", "--dataset", data, "--model", tiny, "--json").json()
    assert 100 < plan["estimate"]["memory_mb"] < 2000 and plan["ways_to_fit"] == []
    assert 0 < plan["estimate"]["step_seconds"] < 5 and plan["estimate"]["disk_mb"] >= 1
    said = cli("plan", "--dataset", data, "--model", tiny).out
    assert "MB that are free" in said and "s a step)" in said and "disk     " in said
    quick = cli("plan", "--dataset", data, "--model", tiny, "--no-probe").out
    assert "MB at most" in quick and "time  " not in quick
