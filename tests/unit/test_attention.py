"""Packed attention: each conversation by itself, and on a GPU (here: its stand-in) all of them in one call."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tunesmith.local import attention


def stand_in(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int,
    *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
) -> torch.Tensor:  # fmt: skip
    """What torch's varlen_attn documents, written plainly: [tokens, heads, dim], int32 bounds, window (-1, 0) causal."""
    assert (
        window_size == (-1, 0)
        and cu_q.dtype == torch.int32
        and cu_q is cu_k
        and enable_gqa == (q.shape[1] != k.shape[1])
    )
    bounds = cu_q.tolist()
    assert bounds[0] == 0 and bounds[-1] == len(q) and max_q == max_k == max(b - a for a, b in pairwise(bounds))
    parts = [
        scaled_dot_product_attention(
            *(x[a:b].transpose(0, 1) for x in (q, k, v)), is_causal=True, scale=scale, enable_gqa=enable_gqa
        )
        for a, b in pairwise(bounds)
    ]
    return torch.cat(parts, 1).transpose(0, 1)


def test_what_rotary_positions_have_widened_is_narrowed_again() -> None:
    """Flash attention takes 16 bits alone: under autocast query and key come in 32."""
    q, k, v = (torch.randn(1, 4, 20, 8).bfloat16() for _ in range(3))
    module = cast(Any, SimpleNamespace(is_causal=True))
    want, _ = attention.packed(module, q, k, v, None, segments=[7, 13])
    got, _ = attention.packed(module, q.float(), k.float(), v, None, segments=[7, 13])
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_one_call_equals_one_for_each(kv_heads: int, scaling: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 4, 20, 8)
    k, v = torch.randn(1, kv_heads, 20, 8), torch.randn(1, kv_heads, 20, 8)
    module = cast(Any, SimpleNamespace(is_causal=True))
    want, _ = attention.packed(module, q, k, v, None, scaling=scaling, segments=[7, 1, 12])
    monkeypatch.setattr(attention, "varlen_attn", stand_in)
    got = attention._varlen(q, k, v, (7, 1, 12), scaling)
    assert got.shape == want.shape == (1, 20, 4, 8)
    torch.testing.assert_close(got, want)
