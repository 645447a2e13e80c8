"""Parts of a model computed in fewer passes over memory, to the same numbers: norms, gates, rotations, low-rank adapters.

On a CPU these are bound by memory: as separate operations, norms and gates take a tenth of a step, and keep a third
of all that a step keeps for its backward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear, silu


def fuse(model: nn.Module, again: bool = True) -> dict[str, int]:
    """Give a model's norms, gates, rotary positions and adapters a fused pass: how many of each. Weights and names stay.

    `again`: gates keep less for the backward pass, for a hundredth of the time; of no use where layers are recomputed whole.
    A part is tried first, and left as it is where the result differs (Gemma's norms add one to their weight). Left as they
    are: adapters with dropout or DoRA, on 4-bit weights or on GPT-2's Conv1D. Only for weights in 32 bits: autocast does
    not reach into it.
    """
    count = {"norms": 0, "gates": 0, "rotations": 0, "adapters": 0}
    lora = sys.modules.get("peft.tuners.lora")  # there where there are adapters: to load it takes 1.4 s
    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            count["rotations"] += _rotate(module)
        if lora and isinstance(module, lora.Linear):
            if _plain(module):
                module.forward = partial(_adapted, module)
                count["adapters"] += 1
        elif type(module).__name__.endswith("RMSNorm"):
            count["norms"] += _take(module, _normed, getattr(module, "weight", None))
        elif hasattr(module, "gate_proj") and type(getattr(module, "act_fn", None)).__name__.startswith("SiLU"):
            base = getattr(module.gate_proj, "base_layer", module.gate_proj)
            count["gates"] += _take(module, partial(_gated, again=again), getattr(base, "in_features", None))
    return count


def _take(module: Any, forward: Callable[[Any, Tensor], Tensor], width: Any) -> bool:
    """Use `forward` for a module that maps [..., width] if it gives what the module's own does."""
    width = width.shape[-1] if isinstance(width, Tensor) else width
    if not width:
        return False
    weight = next(module.parameters())
    x = torch.linspace(-2, 3, 2 * width, device=weight.device).view(1, 2, width)
    was_training = module.training
    module.eval()  # adapters with dropout within: two results would differ
    with torch.no_grad():
        same = torch.allclose(forward(module, x), module(x), rtol=1e-5, atol=1e-6)
    module.train(was_training)
    if same:
        module.forward = partial(forward, module)
    return bool(same)


def _normed(module: Any, x: Tensor) -> Tensor:
    eps = getattr(module, "variance_epsilon", None) or module.eps
    result: Tensor = _RMSNorm.apply(x, module.weight, eps)
    return result


class _RMSNorm(torch.autograd.Function):
    """y = weight x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019). x [..., d], weight [d] -> y [..., d]. Keeps x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        rate = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rate)
        return (x * rate).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rate = ctx.saved_tensors
        d = x.shape[-1]
        both, each = (grad * x).view(-1, d), rate.view(-1)
        grad_weight = each @ both if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        along = (both @ weight).mul_(each**3).div_(-d).view(rate.shape)  # of x in its own gradient
        return torch.mul(grad, weight).mul_(rate).addcmul_(x, along), grad_weight, None


def _gated(module: Any, x: Tensor, again: bool = False) -> Tensor:
    """`again`: what enters the last product is computed once more for its backward pass instead of being kept."""
    gate, up = module.gate_proj(x), module.up_proj(x)
    inner: Tensor = _Gate.apply(gate, up)
    if not again or not torch.is_grad_enabled():
        result: Tensor = module.down_proj(inner)
        return result
    parts, where = (gate.detach(), up.detach()), inner.data_ptr()

    def pack(kept: Tensor) -> Tensor | torch.Size:
        return kept.shape if kept.data_ptr() == where else kept

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else silu(parts[0]).mul_(parts[1]).view(kept)

    with saved_tensors_hooks(pack, unpack):
        result = module.down_proj(inner)
    return result


class _Gate(torch.autograd.Function):
    """y = silu(gate) up (Shazeer 2020). All [..., inner]. silu(gate) is computed again instead of being kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), silu(gate).mul_(grad)


ROTATE = "apply_rotary_pos_emb"  # what transformers calls it in every model's file


def _rotate(attention: Any) -> bool:
    """Have an attention layer's own forward pass call `_rotated`, if that gives what the model's own function does."""
    own: Any = type(attention).forward
    code: Any = getattr(own, "__code__", None)
    usual = own.__globals__.get(ROTATE) if code and ROTATE in code.co_names else None
    if usual is None or not _rotates_alike(usual, next(attention.parameters()).device):
        return False
    names = own.__globals__ | {ROTATE: partial(_rotated, usual)}
    forward = FunctionType(code, names, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    attention.forward = MethodType(forward, attention)
    return True


def _rotates_alike(usual: Any, device: torch.device) -> bool:
    q, k, cos, sin = (torch.linspace(-1, b, 48, device=device) for b in (2, 3, 4, 5))
    parts = q.view(1, 2, 3, 8), k.view(1, 2, 3, 8), cos[:24].view(1, 3, 8), sin[:24].view(1, 3, 8)
    try:
        pairs = zip(usual(*parts), _rotated(usual, *parts), strict=True)
        return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)
    except (TypeError, ValueError, RuntimeError):  # other arguments, other shapes
        return False


def _rotated(usual: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    """q and k [batch, heads, tokens, d], cos and sin [batch, tokens, d]. By the model's own function where d or types differ."""
    if unsqueeze_dim != 1 or cos.shape[-1] != q.shape[-1] or not q.dtype == k.dtype == cos.dtype:
        return usual(q, k, cos, sin, unsqueeze_dim)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin)


class _Rotation(torch.autograd.Function):
    """Rotary positions (Su et al. 2021), x = (a, b) in halves: y = (a cos - b sin, b cos + a sin). x [..., d] -> y [..., d]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        return _turn(x, cos, -sin[..., :half], sin[..., half:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        half = grad.shape[-1] // 2
        return _turn(grad, cos, sin[..., half:], -sin[..., :half]), None, None


def _turn(x: Tensor, cos: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    """(a cos + b upper, b cos + a lower) of the halves a and b of x, written once."""
    half, y = x.shape[-1] // 2, torch.empty_like(x)
    a, b = x[..., :half], x[..., half:]
    torch.mul(a, cos[..., :half], out=y[..., :half]).addcmul_(b, upper)
    torch.mul(b, cos[..., half:], out=y[..., half:]).addcmul_(a, lower)
    return y


def _plain(layer: Any) -> bool:
    (name,) = layer.active_adapters if len(layer.active_adapters) == 1 else (None,)
    return (
        name is not None
        and type(layer.get_base_layer()) is nn.Linear
        and not layer.use_dora.get(name, False)
        and not isinstance(layer.lora_dropout[name], nn.Dropout)
        and layer.lora_A[name].bias is layer.lora_B[name].bias is None
    )


def _adapted(layer: Any, x: Tensor) -> Tensor:
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
        y = linear(flat, weight, bias).addmm_(low, b.t(), alpha=scale)
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
