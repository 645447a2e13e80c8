"""Packed attention: many conversations in one row of tokens, each attending only to itself.

The linear layers see all tokens at once, without padding; attention runs once per conversation, and on a GPU in 16 bits once
for all of them.
Registered with transformers as an attention implementation; the segments' lengths come to it through
the model's keyword arguments. Without them (in generation) it is plain scaled-dot-product attention.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

NAME = "tunesmith_packed"


@torch.compiler.disable  # a Python list of lengths: each new one would be compiled anew
def packed(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: list[int] | None = None,
    sliding_window: int | None = None,
    cached: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, tokens, dim], key and value [1, kv_heads, tokens, dim] -> [1, tokens, heads, dim].

    `segments`: lengths of the conversations in order; they add up to `tokens`. `cached`: the Decoder that writes answers.
    """
    if cached is not None:
        if sliding_window or kwargs.get("softcap"):
            raise NotImplementedError("packed attention has no sliding window and no soft cap")
        return cached.attend(module.layer_idx, query, key, value, scaling), None
    if segments is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    if query.dtype != value.dtype:  # rotary positions are of 32 bits, and under autocast they have widened these two
        query, key = query.to(value.dtype), key.to(value.dtype)
    if (sliding_window and max(segments) > sliding_window) or kwargs.get("softcap"):
        raise NotImplementedError("packed attention has no sliding window and no soft cap")
    if query.is_cuda and query.element_size() == 2 and not dropout and _flash(query.device.index):
        return _varlen(query, key, value, tuple(segments), scaling), None
    grouped = query.shape[1] != key.shape[1]
    # split, not slices: its backward is one concatenation, while each slice would fill a zero tensor of all tokens
    parts = [
        scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped)
        for q, k, v in zip(query.split(segments, 2), key.split(segments, 2), value.split(segments, 2), strict=True)
    ]
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1), None


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: tuple[int, ...], scaling: float | None
) -> torch.Tensor:
    """All conversations in one call of flash attention; shapes as of `packed`."""
    ends, longest = _ends(segments, query.device), max(segments)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [tokens, heads, dim]
    grouped = q.shape[1] != k.shape[1]
    out = varlen_attn(
        q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=grouped
    )  # (-1, 0): causal
    return out[None]


@functools.lru_cache(maxsize=4)
def _ends(segments: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Where conversations begin and end, [conversations + 1] int32: made once for all layers of a batch."""
    return torch.tensor((0, *segments), device=device).cumsum(0, dtype=torch.int32)


@functools.cache
def _flash(device: int) -> bool:
    """Whether a GPU has flash attention: from compute capability 8.0 (Ampere) on."""
    return bool(torch.cuda.get_device_capability(device) >= (8, 0))


def _mask(*args: Any, **kwargs: Any) -> Any:
    """No mask while packed (no cache, one row); the SDPA mask otherwise."""
    if kwargs.get("attention_mask") is None and kwargs.get("q_length", 0) == kwargs.get("kv_length", 1):
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)


AttentionInterface.register(NAME, packed)
AttentionMaskInterface.register(NAME, _mask)
