"""The engine's arithmetic, against plain references."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import rows, write
from training import architecture, fit, losses, weights
from tunesmith import tokens as tokens_file
from tunesmith.local import batches, methods
from tunesmith.local import model as models
from tunesmith.local.loss import CHUNK, LossModule, chunked_cross_entropy, supervised, token_scores
from tunesmith.local.optim import learning_rate, make
from tunesmith.recipe import Recipe
from tunesmith.render import Rendered
from tunesmith.runs import Run


@pytest.mark.parametrize("count", [1, 7, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("bias", [False, True])
def test_chunked_cross_entropy_equals_the_plain_one_in_float64(count: int, bias: bool) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(count, 16), torch.randn(50, 16)
    b, targets = (torch.randn(50) if bias else None), torch.randint(0, 50, (count,))
    ours = [t.clone().requires_grad_() for t in (hidden, weight)] + (
        [b.clone().requires_grad_()] if b is not None else [None]
    )
    theirs = [t.double().requires_grad_() for t in (hidden, weight)] + (
        [b.double().requires_grad_()] if b is not None else [None]
    )
    loss = chunked_cross_entropy(*ours, targets)
    (loss / count * 3).backward()
    want = nn.functional.cross_entropy(nn.functional.linear(*theirs), targets, reduction="sum")
    (want / count * 3).backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    for mine, other in zip(ours, theirs, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-4, atol=1e-6)
    scores, right, sure = token_scores(hidden, weight, b, targets)
    torch.testing.assert_close(sure.double(), nn.functional.linear(*theirs).softmax(1).amax(1), rtol=1e-4, atol=1e-6)
    assert scores.sum().item() == pytest.approx(want.item(), rel=1e-5)
    assert torch.equal(right, nn.functional.linear(*theirs).argmax(1) == targets)


def test_a_target_far_below_the_likeliest_keeps_its_whole_loss() -> None:
    hidden, weight = torch.tensor([[100.0, 0.0]], requires_grad=True), torch.tensor([[1.0, 0.0], [-1.0, 0.5]])
    loss = chunked_cross_entropy(hidden, weight, None, torch.tensor([1]))
    loss.backward()
    assert loss.item() == 200.0
    torch.testing.assert_close(hidden.grad, weight[:1] - weight[1:])


def test_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(9, 8)
    chunked_cross_entropy(hidden, weight, None, torch.arange(5)).backward()
    assert hidden.grad is not None and weight.grad is None


def test_supervised_positions_stay_inside_their_conversation() -> None:
    mask = torch.tensor([1, 0, 1, 1, 1, 0, 1], dtype=torch.bool)
    assert supervised(mask, [3, 4]).tolist() == [
        1,
        3,
        5,
    ]  # position 2 would predict the next conversation's first token


@pytest.fixture(scope="module")
def three(tiny: Path) -> tuple[nn.Module, torch.Tensor, torch.Tensor, list[int]]:
    model = models.load(tiny)
    torch.manual_seed(1)
    return model, torch.randint(0, 8192, (60,)), torch.rand(60) > 0.3, [10, 1, 34, 15]


def gradients(module: LossModule, *batch: object) -> dict[str, torch.Tensor]:
    module.model.zero_grad()
    loss, count = module(*batch)
    (loss / count).backward()
    return {n: p.grad.clone() for n, p in module.model.named_parameters()} | {"loss": loss.detach() / count}


def test_packed_equals_one_by_one_equals_the_models_own_loss(
    three: tuple[nn.Module, torch.Tensor, torch.Tensor, list[int]],
) -> None:
    model, *batch = three
    assert models.loss_module(model)[0].mode == "packed"
    packed, single, own = (gradients(LossModule(model, mode), *batch) for mode in ("packed", "single", "logits"))
    assert len(packed) > 10
    for name in packed:
        torch.testing.assert_close(packed[name], own[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(single[name], own[name], rtol=1e-4, atol=1e-6)


def test_labels_of_transformers_give_the_same_loss(
    three: tuple[nn.Module, torch.Tensor, torch.Tensor, list[int]],
) -> None:
    model, ids, mask, segments = three
    total, count = 0.0, 0
    for i, m in zip(ids.split(segments), mask.split(segments), strict=True):
        labels = torch.where(m, i, -100)
        n = int((labels[1:] != -100).sum())
        if n:
            total, count = total + model(input_ids=i[None], labels=labels[None]).loss.item() * n, count + n
    loss, n = LossModule(model)(ids, mask, segments)
    assert (loss.item() / n, n) == (pytest.approx(total / count, rel=1e-5), count)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("gpt2", "packed"),
        ("opt", "packed"),
        ("gpt_neox", "packed"),
        ("qwen2", "packed"),
        ("qwen3", "packed"),
        ("mistral", "packed"),
        ("phi3", "packed"),
        ("gemma2", "logits"),
        ("cohere", "logits"),
    ],
)
def test_each_architecture_trains_on_its_own_loss(name: str, mode: str, tmp_path: Path) -> None:
    model = models.load(architecture(name, tmp_path))
    module, _ = models.loss_module(model)
    assert module.mode == mode
    torch.manual_seed(1)
    batch = torch.randint(3, 300, (60,)), torch.rand(60) > 0.3, [20, 25, 15]
    model.eval()
    mine, own = gradients(module, *batch), gradients(LossModule(model, "logits"), *batch)
    for key in own:
        torch.testing.assert_close(mine[key], own[key], rtol=2e-3, atol=1e-5)


def test_a_class_looked_up_by_its_attention_has_its_own(tmp_path: Path) -> None:
    module, slow = models.loss_module(models.load(architecture("falcon", tmp_path)))
    assert module.mode == "single" and "its attention cannot be packed" in slow


@pytest.mark.parametrize(("longest", "mode"), [(16, "packed"), (17, "single"), (None, "single")])
def test_a_window_matters_where_a_row_is_over_it(longest: int | None, mode: str, tmp_path: Path) -> None:
    folder = architecture("mistral", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 16}))
    module, _ = models.loss_module(models.load(folder, longest=longest))
    assert module.mode == mode
    torch.manual_seed(1)
    ids, mask = torch.randint(3, 300, (30,)), torch.ones(30, dtype=torch.bool)
    whole = LossModule(models.load(folder), "logits")
    with torch.no_grad():
        assert float(module(ids, mask, [16, 14])[0]) == pytest.approx(float(whole(ids, mask, [16, 14])[0]), rel=1e-4)


def test_batches_are_a_pure_function_of_their_arguments() -> None:
    recipe = Recipe(batch_size=3, gradient_accumulation_steps=2)
    steps = [batches.step_rows(20, recipe, s) for s in range(8)]
    assert [batches.step_rows(20, recipe, s) for s in (6, 0, 3)] == [steps[6], steps[0], steps[3]]
    for epoch in (0, 1):
        assert sorted(r for chosen in steps[4 * epoch : 4 * epoch + 4] for r in chosen) == list(range(20))
    assert [len(chosen) for chosen in steps[:4]] == [6, 6, 6, 2]
    assert steps[0] != steps[4]  # each epoch has an order of its own


def test_validation_groups_hold_every_row_once() -> None:
    tokens = tokens_file.flatten(Rendered([1] * n, [1] * n, "") for n in (5, 100, 3, 8, 20))
    groups = list(batches.in_order(tokens, 30))
    assert sorted(r for g in groups for r in g) == [0, 1, 2, 3, 4]
    assert all(len(g) == 1 or sum(tokens.length(r) for r in g) <= 30 for g in groups)


def test_collate_and_memory_mapped_tokens(tmp_path: Path) -> None:
    flat = tokens_file.flatten([Rendered([1, 2], [0, 1], ""), Rendered([3, 4, 5], [1, 0, 1], "")])
    tokens_file.save_tokens(flat, tmp_path, "train")
    tokens = tokens_file.load_tokens(tmp_path, "train", 2)
    assert tokens.row(1) == flat.row(1) == ([3, 4, 5], [1, 0, 1]) and tokens.all_supervised() == 2
    assert isinstance(tokens.ids, np.memmap) and len(tokens) == 2 and tokens.supervised([0, 1]) == 2
    batch = batches.collate(tokens, [1, 0], torch.device("cpu"))
    assert (batch.ids.tolist(), batch.mask.tolist(), batch.segments) == (
        [3, 4, 5, 1, 2],
        [True, False, True, False, True],
        [3, 2],
    )
    assert len(tokens_file.load_tokens(tmp_path, "valid", 0)) == 0


def test_learning_rate_shapes() -> None:
    def rates(**settings: object) -> list[float]:
        recipe = Recipe(learning_rate=1.0, **settings)
        return [round(learning_rate(recipe, s, 10), 4) for s in range(10)]

    assert rates(warmup_ratio=0.2, lr_scheduler="linear") == [
        0.5,
        1.0,
        1.0,
        0.875,
        0.75,
        0.625,
        0.5,
        0.375,
        0.25,
        0.125,
    ]
    assert rates(warmup_steps=0, lr_scheduler="constant") == [1.0] * 10
    cosine = rates(warmup_steps=0)
    assert cosine[0] == 1.0 and cosine[5] == 0.5 and cosine == sorted(cosine, reverse=True)


def test_weight_decay_spares_norms(tiny: Path) -> None:
    model = models.load(tiny)
    decayed, spared = make(model, Recipe(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in spared["params"]} == {1}


def test_accumulation_equals_one_large_batch(tiny: Path, tmp_path: Path, data: Path) -> None:
    one = fit(tmp_path / "one", data, tiny, batch_size=8, epochs=2)
    many = fit(tmp_path / "many", data, tiny, batch_size=1, gradient_accumulation_steps=8, epochs=2)
    assert len(losses(one)) == 12
    assert losses(many) == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.parametrize(
    "method", [{}, {"method": "lora"}, {"freeze_ratio": 0.5}, {"method": "lora", "freeze_ratio": 0.5}], ids=str
)
def test_fifty_steps_equal_a_plain_reference(method: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    """AdamW in float64 on the model's own loss (with peft's own adapters), one conversation at a time, nothing cached."""
    data = write(tmp_path / "d.jsonl", rows(110))
    run = fit(
        tmp_path / "run",
        data,
        tiny,
        epochs=3,
        max_steps=50,
        batch_size=4,
        warmup_steps=5,
        weight_decay=0.1,
        max_grad_norm=0.5,
        patience=0,
        **{"lora_dropout": 0.0, **method},
    )
    recipe, tokens = run.recipe(), tokens_file.load_tokens(run / "data", "train", 88)
    model = methods.apply(models.load(tiny), recipe).double().train()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if (p.ndim >= 2) == matrix], "weight_decay": 0.1 * matrix}
        for matrix in (True, False)
    ]
    optimizer, reference = torch.optim.AdamW(groups), []
    for step in range(50):
        chosen = batches.step_rows(len(tokens), recipe, step)
        total = torch.zeros((), dtype=torch.float64)
        for r in chosen:
            span = slice(tokens.starts[r], tokens.starts[r + 1])
            ids, mask = torch.tensor(tokens.ids[span].astype(int)), torch.tensor(tokens.mask[span])
            total = total + nn.functional.cross_entropy(
                model(input_ids=ids[None]).logits[0, :-1][mask[1:]], ids[1:][mask[1:]], reduction="sum"
            )
        mean = total / tokens.supervised(chosen)
        mean.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, 50)
        optimizer.step()
        optimizer.zero_grad()
        reference.append(mean.item())
    assert losses(run) == pytest.approx(reference, rel=1e-5)
    assert len(reference) == 50 and reference[-1] < reference[0] - 0.01


def test_same_recipe_same_bytes_and_the_seed_matters(tiny: Path, tmp_path: Path, data: Path) -> None:
    a, b, c = (fit(tmp_path / name, data, tiny, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert weights(a / "final_model") == weights(b / "final_model") != weights(c / "final_model")


def test_overfitting_stops_early_and_keeps_the_best(tiny: Path, tmp_path: Path) -> None:
    data = write(
        tmp_path / "d.jsonl",
        [{"prompt": f"q{i}", "completion": f"{i * 7919 % 1000} {i * 104729 % 1000}"} for i in range(30)],
    )
    run = fit(tmp_path / "run", data, tiny, epochs=40, patience=2, learning_rate=1e-2)
    summary, evals = run.summary(), run.metrics("eval")
    assert summary["stopped_early"] and summary["steps"] < summary["planned_steps"]
    assert summary["best_step"] == min(evals, key=lambda e: e["loss"])["step"] < summary["steps"]
    assert weights(run / "best_model") != weights(run / "final_model")


def test_divergence_is_an_error_not_a_model(tiny: Path, tmp_path: Path, data: Path) -> None:
    from tunesmith.errors import TunesmithError

    with pytest.raises(TunesmithError, match="became nan"):
        fit(tmp_path / "run", data, tiny, learning_rate=1e30, warmup_steps=0)
    shutil.copytree(tiny, tmp_path / "nan")
    saved = load_file(tiny / "model.safetensors")
    save_file(
        {k: torch.full_like(v, torch.nan) for k, v in saved.items()},
        tmp_path / "nan" / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(TunesmithError, match="the base model's validation loss is nan -- its weights are damaged"):
        fit(tmp_path / "other", data, tmp_path / "nan")
    assert not Run(tmp_path / "other").metrics("eval")


@pytest.mark.parametrize(("rate", "warned"), [(1e-3, False), (1.0, True)])
def test_a_run_that_never_beats_its_base_says_so(
    rate: float, warned: bool, tiny: Path, tmp_path: Path, data: Path
) -> None:
    run = fit(tmp_path / "run", data, tiny, learning_rate=rate, warmup_steps=0)
    said = [event["message"] for event in run.events() if event["type"] == "warning"]
    assert ["best_model is no better than the base" in words for words in said] == [True] * warned
