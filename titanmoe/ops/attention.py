"""Causal attention over whole sequences or over the documents packed into them, with windows and sinks.

Shape suffixes: B batch, S sequence, N query heads, K key/value heads, H head dim, V value head dim, L a document's
length, W window, C chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from titanmoe.ops.sink_attention import sink_attention, sink_attention_varlen


def causal_attention(
    q_BSNH: Tensor,
    k_BSKH: Tensor,
    v_BSKV: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v, where a token sees itself and what came before it in its document.

    Args:
        q_BSNH, k_BSKH, v_BSKV: N is a multiple of K; query head n reads key head n // (N / K).
        cu_seqlens: int32, where documents begin in the flattened B * S tokens: 0, ..., B * S. The start of every row
            must be among them. None means one document per row.
        scale: 1 / sqrt(H) if None.
        window: a token sees only itself and the `window` - 1 tokens before it.
        sinks_N: a logit per query head that takes part in the softmax and has no value.

    Returns:
        o_BSNV. FLOPs: 2 B S N (H + V) times the mean number of keys that a token sees: S / 2 for one document per row,
        about W with a window.
    """
    scale = q_BSNH.shape[-1] ** -0.5 if scale is None else scale
    value_dim = v_BSKV.shape[-1]
    q_BSNH, k_BSKH, v_BSKV = _equal_head_dims(q_BSNH, k_BSKH, v_BSKV)
    if sinks_N is not None:
        # The kernels that are called by name know only equal numbers of heads.
        repeats = q_BSNH.shape[2] // k_BSKH.shape[2]
        k_BSKH, v_BSKV = (tensor.repeat_interleave(repeats, dim=2) for tensor in (k_BSKH, v_BSKV))
    is_plain = cu_seqlens is None and window is None and sinks_N is None
    if not is_plain and _has_varlen_kernel(q_BSNH):
        o_BSNV = _varlen(q_BSNH, k_BSKH, v_BSKV, cu_seqlens, scale, window, sinks_N)
    elif cu_seqlens is None:
        o_BSNV = _documents(q_BSNH, k_BSKH, v_BSKV, scale, window, sinks_N)
    else:
        o_BSNV = _each_document(q_BSNH, k_BSKH, v_BSKV, cu_seqlens, scale, window, sinks_N)
    return o_BSNV[..., :value_dim]


# Never compiled, or there would be another graph for every number and length of documents. The name is private in torch
# 2.11 to 2.13: `torch.compiler.disable` would import the whole compiler here.
@torch._disable_dynamo
def _each_document(
    q_BSNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    sinks_N: Tensor | None,
) -> Tensor:
    """One product per document: on CPU this is 4 times faster than a mask over the whole sequence."""
    flat = [tensor.flatten(0, 1)[None] for tensor in (q_BSNH, k_BSKH, v_BSKH)]
    lengths = cu_seqlens.diff().tolist()
    documents = zip(*(tensor.split(lengths, dim=1) for tensor in flat), strict=True)
    outputs = [_documents(q, k, v, scale, window, sinks_N) for q, k, v in documents]
    return torch.cat(outputs, dim=1).view_as(q_BSNH)


def chunk_documents(
    cu_seqlens: Tensor | None, chunk: int, batch: int, seq_len: int, device: torch.device
) -> Tensor | None:
    """Cut documents (rows, if `cu_seqlens` is None) into chunks of `chunk` tokens; the last of each may be shorter.

    Attention within chunks is then attention within documents. Waits for the device once.
    """
    if chunk >= seq_len:
        return cu_seqlens
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, batch * seq_len + 1, seq_len, dtype=torch.int32, device=device)
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    num_chunks = (lengths + chunk - 1) // chunk
    before = num_chunks.cumsum(0) - num_chunks
    first_chunk = torch.repeat_interleave(before, num_chunks)
    index = torch.arange(first_chunk.shape[0], device=cu_seqlens.device)
    begin = torch.repeat_interleave(starts, num_chunks, output_size=index.shape[0]) + (index - first_chunk) * chunk
    return torch.cat((begin, cu_seqlens[-1:])).to(torch.int32)


def _equal_head_dims(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero channels where values have fewer than queries and keys, or more: the kernels want equal numbers."""
    missing = q.shape[-1] - v.shape[-1]
    if missing > 0:
        return q, k, F.pad(v, (0, missing))
    return (q, k, v) if missing == 0 else (F.pad(q, (0, -missing)), F.pad(k, (0, -missing)), v)


def _documents(
    q_BLNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, scale: float, window: int | None, sinks_N: Tensor | None
) -> Tensor:
    """Attention over documents of one length."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q_BLNH, k_BLKH, v_BLKH))
    if window is None or window >= q.shape[2]:
        o = _product(q, k, v, scale, sinks_N)
    else:
        o = _windows(q, k, v, scale, window, sinks_N)
    return o.transpose(1, 2)


def _windows(
    q_BNLH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, scale: float, window: int, sinks_N: Tensor | None
) -> Tensor:
    """Blocks of W queries, each against the W keys before it and its own: linear in L, and public products only."""
    length = q_BNLH.shape[2]
    # Rows that fill the last block see real keys, and are cut off below; real rows do not see theirs, which follow.
    q, k, v = (F.pad(tensor, (0, 0, 0, -length % window)) for tensor in (q_BNLH, k_BKLH, v_BKLH))
    first = _product(q[:, :, :window], k[:, :, :window], v[:, :, :window], scale, sinks_N)
    q, k, v = (tensor.unflatten(2, (-1, window)).transpose(1, 2) for tensor in (q, k, v))
    k, v = (torch.cat((tensor[:, :-1], tensor[:, 1:]), dim=3).flatten(0, 1) for tensor in (k, v))
    row, column = torch.arange(window, device=q.device)[:, None], torch.arange(2 * window, device=q.device)
    is_seen = (column > row) & (column <= row + window)
    mask_WX = torch.zeros(is_seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~is_seen, float("-inf"))
    others = _product(q[:, 1:].flatten(0, 1), k, v, scale, sinks_N, mask_WX)
    others = others.unflatten(0, (q_BNLH.shape[0], -1)).transpose(1, 2).flatten(2, 3)
    return torch.cat((first, others), dim=2)[:, :, :length]


def _product(
    q: Tensor, k: Tensor, v: Tensor, scale: float, sinks_N: Tensor | None, mask: Tensor | None = None
) -> Tensor:
    """Causal without a mask; heads before positions."""
    if sinks_N is not None:
        return sink_attention(q, k, v, sinks_N, scale, mask)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _has_varlen_kernel(q: Tensor) -> bool:
    is_half = q.dtype in (torch.bfloat16, torch.float16)
    return q.device.type != "cpu" and is_half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _varlen(
    q_BSNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    window: int | None,
    sinks_N: Tensor | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    batch, seq_len = q_BSNH.shape[:2]
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, batch * seq_len + 1, seq_len, dtype=torch.int32, device=q_BSNH.device)
    # A document never crosses a row, so there is no need to ask the device for the longest.
    q, k, v = (tensor.flatten(0, 1) for tensor in (q_BSNH, k_BSKH, v_BSKH))
    if sinks_N is not None:
        return sink_attention_varlen(q, k, v, sinks_N, cu_seqlens, seq_len, scale, window).view_as(q_BSNH)
    heads_per_group = q.shape[1] // k.shape[1]
    if heads_per_group > 1:  # torch 2.11 has no enable_gqa here
        k, v = k.repeat_interleave(heads_per_group, dim=1), v.repeat_interleave(heads_per_group, dim=1)
    left = -1 if window is None else window - 1
    o = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, seq_len, seq_len, scale=scale, window_size=(left, 0))
    assert isinstance(o, Tensor)  # a pair only if its log-sum-exp is asked for
    return o.view_as(q_BSNH)
