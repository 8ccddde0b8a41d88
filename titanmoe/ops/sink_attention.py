"""Attention with a sink: a learned logit per head that takes its share of the softmax and has no value.

The one place that calls the flash kernels behind `scaled_dot_product_attention` by their own names, since only these
give the log-sum-exp. Checked against torch 2.11 and 2.13.

With l the log-sum-exp of a query's scores and s the sink, the output is the plain one times sigmoid(l - s), and every
probability is exp(score - logaddexp(l, s)). The kernels' backward computes its probabilities from the log-sum-exp, and
takes what softmax subtracts from the output; given logaddexp(l, s) and the output with the sink, it yields the
gradients of attention with a sink. Nothing but the gradient of s itself is left to compute.

Shape suffixes: B batch, N heads, S queries, T keys, H head dim; M all tokens of a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


def sink_attention(
    q_BNSH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, sinks_N: Tensor, scale: float, mask_ST: Tensor | None
) -> Tensor:
    """softmax([scores, sink])'s part over the keys, times v.

    Args:
        mask_ST: added to the scores; None means causal, with S = T.
    """
    if q_BNSH.device.type == "cpu":
        return _OnCPU.apply(q_BNSH, k_BNTH, v_BNTH, sinks_N, scale, mask_ST)
    scores_BNST = (q_BNSH @ k_BNTH.transpose(-2, -1)).float() * scale
    if mask_ST is None:
        size = scores_BNST.shape[-2:]
        mask_ST = torch.full(size, float("-inf"), device=scores_BNST.device).triu(1)
    scores_BNST = scores_BNST + mask_ST
    sinks = sinks_N.float()[:, None, None].expand(*scores_BNST.shape[:-1], 1)
    shares = torch.cat((scores_BNST, sinks), dim=-1).softmax(dim=-1)[..., :-1]
    return shares.to(v_BNTH.dtype) @ v_BNTH


def sink_attention_varlen(
    q_MNH: Tensor,
    k_MNH: Tensor,
    v_MNH: Tensor,
    sinks_N: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """The same over packed documents on an accelerator, in half precision; each token sees `window` tokens."""
    return _OnAccelerator.apply(q_MNH, k_MNH, v_MNH, sinks_N, cu_seqlens, max_length, scale, window)


def _add_sink(o: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp with the sink; `sinks` broadcasts against `lse`, which is `o` without its last dim."""
    sinks = sinks.float()
    return o * torch.sigmoid(lse - sinks)[..., None].to(o.dtype), torch.logaddexp(lse, sinks)


def _sink_gradient(do: Tensor, o: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """d loss / d sink for every query: its probability times (0 - what softmax subtracts)."""
    return -torch.exp(sinks.float() - lse) * (do.float() * o.float()).sum(dim=-1)


class _OnCPU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks_N: Tensor, scale: float, mask_ST: Tensor | None
    ) -> Tensor:
        o, lse_BNS = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask_ST is None, attn_mask=mask_ST, scale=scale
        )
        o, lse_BNS = _add_sink(o, lse_BNS, sinks_N[:, None])
        ctx.save_for_backward(q, k, v, o, lse_BNS, sinks_N, mask_ST)
        ctx.scale = scale
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse_BNS, sinks_N, mask_ST = ctx.saved_tensors
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse_BNS, 0.0, mask_ST is None, attn_mask=mask_ST, scale=ctx.scale
        )
        dsinks_BNS = _sink_gradient(do, o, lse_BNS, sinks_N[:, None])
        return dq, dk, dv, dsinks_BNS.sum(dim=(0, 2)).to(sinks_N.dtype), None, None


class _OnAccelerator(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks_N: Tensor,
        cu_seqlens: Tensor,
        max_length: int,
        scale: float,
        window: int | None,
    ) -> Tensor:
        left = -1 if window is None else window - 1
        ctx.lengths = (cu_seqlens, cu_seqlens, max_length, max_length, 0.0, True)
        ctx.options = {"scale": scale, "window_size_left": left, "window_size_right": 0}
        o, lse_NM, rng_state, unused, _ = _aten._flash_attention_forward(q, k, v, *ctx.lengths, False, **ctx.options)
        o, lse_MN = _add_sink(o, lse_NM.t(), sinks_N)
        ctx.save_for_backward(q, k, v, o, lse_MN.t().contiguous(), sinks_N, rng_state, unused)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse_NM, sinks_N, rng_state, unused = ctx.saved_tensors
        dq, dk, dv = _aten._flash_attention_backward(
            do.contiguous(), q, k, v, o, lse_NM, *ctx.lengths, rng_state, unused, **ctx.options
        )
        dsinks_MN = _sink_gradient(do, o, lse_NM.t(), sinks_N)
        return dq, dk, dv, dsinks_MN.sum(dim=0).to(sinks_N.dtype), None, None, None, None
