"""Low-rank adapters computed in place: x W' + s (x A') B' without the passes over memory that separate modules take."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn


def fuse(model: nn.Module) -> int:
    """Give adapters on plain linear layers a forward pass of one step; how many. The weights and their names stay.

    Left as they are: those with dropout or DoRA, on 4-bit weights or on GPT-2's Conv1D. Only for weights in 32 bits:
    autocast does not reach into it.
    """
    count = 0
    for layer in model.modules():
        if isinstance(layer, LoraLinear) and _plain(layer):
            layer.forward = partial(_forward, layer)
            count += 1
    return count


def _plain(layer: Any) -> bool:
    (name,) = layer.active_adapters if len(layer.active_adapters) == 1 else (None,)
    return (
        name is not None
        and type(layer.get_base_layer()) is nn.Linear
        and not layer.use_dora.get(name, False)
        and not isinstance(layer.lora_dropout[name], nn.Dropout)
        and layer.lora_A[name].bias is layer.lora_B[name].bias is None
    )


def _forward(layer: Any, x: Tensor) -> Tensor:
    base, name = layer.get_base_layer(), layer.active_adapters[0]
    a, b, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    result: Tensor = _LowRank.apply(x, base.weight, base.bias, a, b, scale)
    return result


class _LowRank(torch.autograd.Function):
    """y = x W' + bias + scale (x A') B'. x [..., in], W [out, in] frozen, A [rank, in], B [out, rank] -> y [..., out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ a.t()
        y = nn.functional.linear(flat, weight, bias).addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(flat, weight, a, b, low)
        ctx.scale = scale
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, a, b, low = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        grad_low = (g @ b).mul_(ctx.scale)
        grad_x = (g @ weight).addmm_(grad_low, a).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_low.t() @ flat, (g.t() @ low).mul_(ctx.scale), None
