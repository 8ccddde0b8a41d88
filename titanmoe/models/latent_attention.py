"""Multi-head latent attention.

Shape suffixes: B batch, S sequence, D model dim, N heads, R rank of the keys' and values' latent, P channels without
position, C with, V of values; H = P + C.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from titanmoe.models.attention import Attend, RopeTable
from titanmoe.models.linear import Linear
from titanmoe.models.norm import RMSNorm
from titanmoe.models.rope import latent_logit_factor
from titanmoe.models.spec import Latent
from titanmoe.ops.attention import causal_attention
from titanmoe.ops.rope import apply_rope


class LatentAttention(nn.Module):
    """DeepSeek-V2's attention (arXiv 2405.04434), with keys and values built from the latent, as training wants it.

    Attributes:
        q_proj: queries without a latent of their own (`q_lora_rank` None); else q_a_proj, q_a_norm and q_b_proj.
        attend: see `GroupedQueryAttention`.
        kv_a_proj: the latent of keys and values, and the part of the key that all heads share.
    """

    def __init__(self, dim: int, spec: Latent) -> None:
        super().__init__()
        self.spec = spec
        self.attend: Attend = causal_attention
        self.softmax_scale = spec.qk_head_dim**-0.5 * latent_logit_factor(spec.rope)
        query_dim, rank = spec.num_heads * spec.qk_head_dim, spec.q_lora_rank
        if rank is None:
            self.q_proj = Linear(dim, query_dim, bias=False)
        else:
            self.q_a_proj = Linear(dim, rank, bias=spec.bias)
            self.q_a_norm = RMSNorm(rank, spec.norm_eps)
            self.q_b_proj = Linear(rank, query_dim, bias=False)
        self.kv_a_proj = Linear(dim, spec.kv_lora_rank + spec.rope.dim, bias=spec.bias)
        self.kv_a_norm = RMSNorm(spec.kv_lora_rank, spec.norm_eps)
        key_value_dim = spec.num_heads * (spec.qk_nope_head_dim + spec.v_head_dim)
        self.kv_b_proj = Linear(spec.kv_lora_rank, key_value_dim, bias=False)
        self.o_proj = Linear(spec.num_heads * spec.v_head_dim, dim, bias=spec.bias)

    def forward(
        self, x_BSD: Tensor, table: RopeTable | None, cu_seqlens: Tensor | None, position_ids_BS: Tensor
    ) -> Tensor:
        spec, rotated = self.spec, self.spec.rope.dim
        assert table is not None
        if spec.q_lora_rank is None:
            queries = self.q_proj(x_BSD)
        else:
            queries = self.q_b_proj(self.q_a_norm(self.q_a_proj(x_BSD)))
        q_BSNH = queries.unflatten(2, (-1, spec.qk_head_dim))
        q_BSNP, q_BSNC = q_BSNH.split((spec.qk_nope_head_dim, rotated), dim=-1)
        latent_BSR, k_BSC = self.kv_a_proj(x_BSD).split((spec.kv_lora_rank, rotated), dim=-1)
        key_values = self.kv_b_proj(self.kv_a_norm(latent_BSR))
        key_values = key_values.unflatten(2, (-1, spec.qk_nope_head_dim + spec.v_head_dim))
        k_BSNP, v_BSNV = key_values.split((spec.qk_nope_head_dim, spec.v_head_dim), dim=-1)
        q_BSNC, k_BS1C = (apply_rope(x, *table, spec.rope.interleaved) for x in (q_BSNC, k_BSC[:, :, None]))
        q_BSNH = torch.cat((q_BSNP, q_BSNC), dim=-1)
        k_BSNH = torch.cat((k_BSNP, k_BS1C.expand(-1, -1, k_BSNP.shape[2], -1)), dim=-1)
        o_BSNV = self.attend(q_BSNH, k_BSNH, v_BSNV, cu_seqlens, scale=self.softmax_scale)
        return self.o_proj(o_BSNV.flatten(2))
