"""Fused norms, gates, rotations and adapters: the same numbers as the modules' own, and left alone where they would not be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from training import architecture
from tunesmith.local import methods
from tunesmith.local import model as models
from tunesmith.local.fused import fuse
from tunesmith.recipe import Recipe


def adapted(tiny: Path, **settings: Any) -> torch.nn.Module:
    """With adapters that do something: peft starts the second matrix at zero."""
    model = methods.apply(models.load(tiny), Recipe(method="lora", lora_rank=4, lora_alpha=8, **settings))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


def gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    out = model(input_ids=torch.arange(24).view(2, 12) * 7, labels=torch.arange(24).view(2, 12))
    out.loss.backward()
    return out.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_targets": "q_proj,v_proj"}])
def test_the_same_logits_and_gradients(tiny: Path, settings: dict[str, Any]) -> None:
    want, wanted = gradients(adapted(tiny, **settings))
    model = adapted(tiny, **settings)
    assert fuse(model) == {
        "norms": 5, "gates": 2, "rotations": 2, "adapters": 4 if "lora_targets" in settings else 14,
    }  # fmt: skip
    got, found = gradients(model)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert found.keys() == wanted.keys() and found
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("again", [False, True])
def test_norms_and_gates(tiny: Path, again: bool) -> None:
    """In training of all weights; what `again` computes once more is not kept: a gated layer's inner product."""
    want, wanted = gradients(models.load(tiny))
    model = models.load(tiny)
    assert fuse(model, again) == {"norms": 5, "gates": 2, "rotations": 2, "adapters": 0}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        got, found = gradients(model)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert found.keys() == wanted.keys() and found
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-6)
    assert list(kept.values()).count(24 * 64) == (4 if again else 6)  # gate and up of two layers, and their product


OTHERS = {  # norms, gates, rotations
    "gemma2": (0, 0, 2), "qwen2": (5, 2, 2), "qwen3": (9, 2, 2), "mistral": (5, 2, 2), "phi3": (5, 0, 2), "gpt2": (0, 0, 0),
    "gpt_neox": (0, 0, 2), "cohere": (0, 2, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name: str, tmp_path: Path) -> None:
    """Gemma's norms are called the same and are not: they add one to their weight. Cohere turns neighbours, not halves."""
    folder = architecture(name, tmp_path)
    want, wanted = gradients(models.load(folder))
    model = models.load(folder)
    norms, gates, rotations = OTHERS[name]
    assert fuse(model) == {"norms": norms, "gates": gates, "rotations": rotations, "adapters": 0}
    got, found = gradients(model)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert found.keys() == wanted.keys() and found
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-3, atol=1e-4)


def test_what_is_left_alone(tiny: Path, tmp_path: Path) -> None:
    assert fuse(adapted(tiny, lora_dropout=0.1))["adapters"] == 0  # the dropout stands between
    assert fuse(adapted(tiny, use_dora=True))["adapters"] == 0
    assert (
        fuse(adapted(architecture("gpt2", tmp_path)))["adapters"] == 0
    )  # Conv1D keeps its weights the other way round
    biased = architecture("opt", tmp_path / "opt")  # linear layers with biases are taken
    want, _ = gradients(adapted(biased))
    model = adapted(biased)
    assert fuse(model)["adapters"] > 0
    torch.testing.assert_close(gradients(model)[0], want, rtol=1e-4, atol=1e-4)
