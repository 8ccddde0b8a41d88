"""Grouped-query attention.

Shape suffixes: B batch, S sequence, D model dim, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from titanmoe.models.linear import Linear
from titanmoe.models.norm import RMSNorm
from titanmoe.models.spec import GroupedQuery, Temperature
from titanmoe.ops.attention import causal_attention
from titanmoe.ops.rope import apply_rope
from titanmoe.ops.sharding import local_tensor

Attend = Callable[..., Tensor]
"""As `causal_attention`."""
RopeTable = tuple[Tensor, Tensor]
"""cos and sin of every token's angles, each (B, S, 1, C)."""


class GroupedQueryAttention(nn.Module):
    """Attributes:
    sinks: (N,), or None; see `GroupedQuery.sinks`.
    attend: what combines the heads; replaced where a sequence, or the heads, are on several ranks.
    """

    def __init__(self, dim: int, spec: GroupedQuery, norm_eps: float) -> None:
        super().__init__()
        self.spec = spec
        self.norm_eps = norm_eps
        self.attend: Attend = causal_attention
        query_dim, key_dim = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = Linear(dim, query_dim, bias=spec.qkv_bias)
        self.k_proj = Linear(dim, key_dim, bias=spec.qkv_bias)
        self.v_proj = Linear(dim, key_dim, bias=spec.qkv_bias)
        self.o_proj = Linear(query_dim, dim, bias=spec.out_bias)
        self.q_norm = RMSNorm(spec.head_dim, norm_eps) if spec.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(spec.head_dim, norm_eps) if spec.qk_norm else nn.Identity()
        self.sinks = nn.Parameter(torch.empty(spec.num_heads)) if spec.sinks else None

    def forward(
        self, x_BSD: Tensor, table: RopeTable | None, cu_seqlens: Tensor | None, position_ids_BS: Tensor
    ) -> Tensor:
        spec = self.spec
        heads = (*x_BSD.shape[:2], -1, spec.head_dim)
        q_BSNH = self.q_norm(self.q_proj(x_BSD).view(heads))
        k_BSKH = self.k_norm(self.k_proj(x_BSD).view(heads))
        v_BSKH = self.v_proj(x_BSD).view(heads)
        if spec.rope is not None:
            assert table is not None
            q_BSNH, k_BSKH = (apply_rope(x, *table, spec.rope.interleaved) for x in (q_BSNH, k_BSKH))
        if spec.qk_l2_norm:
            q_BSNH, k_BSKH = (F.rms_norm(x.float(), x.shape[-1:], eps=self.norm_eps).to(x) for x in (q_BSNH, k_BSKH))
        if spec.temperature is not None:
            q_BSNH = (q_BSNH * _growth(spec.temperature, position_ids_BS)[..., None, None]).to(q_BSNH)
        sinks_N = None if self.sinks is None else local_tensor(self.sinks)
        o_BSNH = self.attend(q_BSNH, k_BSKH, v_BSKH, cu_seqlens, window=spec.window, sinks_N=sinks_N)
        return self.o_proj(o_BSNH.flatten(2))


def _growth(temperature: Temperature, position_ids_BS: Tensor) -> Tensor:
    lengths_BS = torch.floor((position_ids_BS.float() + 1.0) / temperature.length)
    return torch.log1p(lengths_BS) * temperature.scale + 1.0
