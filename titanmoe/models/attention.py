"""Grouped-query attention.

Shape suffixes: B batch, S sequence, D model dim, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from titanmoe.models.norm import RMSNorm
from titanmoe.models.spec import GroupedQuery
from titanmoe.ops.attention import causal_attention
from titanmoe.ops.rope import apply_rope


class GroupedQueryAttention(nn.Module):
    def __init__(self, dim: int, spec: GroupedQuery, norm_eps: float) -> None:
        super().__init__()
        self.spec = spec
        query_dim, key_dim = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = nn.Linear(dim, query_dim, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(dim, key_dim, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(dim, key_dim, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(query_dim, dim, bias=spec.out_bias)
        self.q_norm = RMSNorm(spec.head_dim, norm_eps) if spec.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(spec.head_dim, norm_eps) if spec.qk_norm else nn.Identity()

    def forward(self, x_BSD: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        heads = (*x_BSD.shape[:2], -1, self.spec.head_dim)
        q_BSNH = self.q_norm(self.q_proj(x_BSD).view(heads))
        k_BSKH = self.k_norm(self.k_proj(x_BSD).view(heads))
        v_BSKH = self.v_proj(x_BSD).view(heads)
        o_BSNH = causal_attention(apply_rope(q_BSNH, cos, sin), apply_rope(k_BSKH, cos, sin), v_BSKH, cu_seqlens)
        return self.o_proj(o_BSNH.flatten(2))
