"""Cross-entropy fused with the output projection: the logits of a whole batch never exist.

At a vocabulary of 152k a token's float32 logits take 0.6 MB, so those of 16k tokens take 10 GB and more than once.
Here the rows go through in chunks, and a chunk's gradients are computed in the forward pass, while its logits are
still at hand: nothing is recomputed, and what is kept for the backward pass is as large as the inputs.

Shapes: T tokens, C rows of a chunk, V vocabulary, D model dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from titanmoe.ops.collectives import all_gather
from titanmoe.ops.partial_backward import wants_gradient

# A chunk's logits, in the dtype of the product. The weight is read, and its gradient read and written, once per chunk:
# measured, two hundred rows hide that on a CPU; calculated from its FLOPs and bandwidth, an H100 wants a thousand.
_CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 256 << 20}
# What one pass of elementwise work touches, so that it stays in the cache between its kernels.
_CPU_SOFTMAX_BYTES = 4 << 20
_WEIGHT_GRAD_BYTES = {"cpu": 4 << 20, "cuda": 32 << 20}


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    *,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    words: dist.ProcessGroup | None = None,
) -> Tensor:
    """Sum over tokens of the cross-entropy of `hidden_TD @ weight_VD.T` against `labels_T`.

    Logits are rounded to the dtype of the inputs, as `F.linear` would; softmax and loss are float32. Rows whose label
    is `ignore_index` contribute nothing; on a CPU they are left out of the products as well (elsewhere that would cost
    a synchronisation). The gradient of `hidden_TD` has its dtype; that of `weight_VD` is summed over chunks in
    float32 and has the weight's dtype. A gradient nobody wants is not computed. NaNs propagate.

    FLOPs: 2 T V D for the loss, and 2 T V D for each of the two gradients wanted.
    Bytes: with n = T / chunk_rows and elements of b bytes, the logits of a chunk pass through memory about 4 times
    (4 b T V in all), the weight is read 2 n times, and its gradient read and written n times (8 n V D).
    Memory: one chunk's logits, and the gradients.

    Args:
        hidden_TD: float32, bfloat16 or float16.
        weight_VD: the output projection, of the same dtype and device.
        labels_T: int64, each in [0, V) or `ignore_index`.
        ignore_index: the label of rows without supervision.
        chunk_rows: rows per chunk; by default so many that their logits take 128 MiB (CPU) or 256 MiB.
        words: the ranks over which the vocabulary is dealt, in equal parts and in order; `weight_VD` has this rank's.
            Hidden states and labels are the same on all of them. Each rank then gets an equal share of the loss, the
            whole gradient of its words, and an addend of the hidden states' gradient. Sends 8 T bytes.

    Returns:
        A float32 scalar, differentiable once.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        IndexError: a label out of range (checked on a CPU; CUDA asserts on the device).
    """
    _check_inputs(hidden_TD, weight_VD, labels_T, chunk_rows)
    supervised_T = labels_T != ignore_index
    ignored_T = None
    if _values_are_free(labels_T):
        if not supervised_T.all():
            rows_R = supervised_T.nonzero().squeeze(1)
            hidden_TD, labels_T = hidden_TD.index_select(0, rows_R), labels_T.index_select(0, rows_R)
        _check_labels(labels_T, weight_VD.shape[0] * (1 if words is None else words.size()), ignore_index)
    else:
        # Zeroed rows add exactly zero to the weight's gradient whatever they held, and masked_fill's own backward
        # zeroes their gradient, so that only the loss has to know which they are.
        ignored_T = ~supervised_T
        hidden_TD = hidden_TD.masked_fill(ignored_T.unsqueeze(1), 0)
        labels_T = labels_T.masked_fill(ignored_T, 0)
    rows = chunk_rows or _default_chunk_rows(hidden_TD, weight_VD)
    # A Function sees requires_grad of its inputs even under no_grad, so the mode is asked here.
    wanted = torch.is_grad_enabled()
    want_hidden, want_weight = wanted and hidden_TD.requires_grad, wanted and weight_VD.requires_grad
    weight_VD = weight_VD.view_as(weight_VD)  # see `wants_gradient`
    loss: Tensor = _LinearCrossEntropy.apply(
        hidden_TD, weight_VD, labels_T, ignored_T, rows, want_hidden, want_weight, words
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients of the sum in the forward pass and scales them in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        ignored_T: Tensor | None,
        chunk_rows: int,
        want_hidden: bool,
        want_weight: bool,
        words: dist.ProcessGroup | None,
    ) -> Tensor:
        num_rows, (num_words, _) = hidden_TD.shape[0], weight_VD.shape
        loss_T = torch.empty(num_rows, dtype=torch.float32, device=hidden_TD.device)
        grad_hidden_TD = torch.empty_like(hidden_TD) if want_hidden else None
        grad_weight_VD = None
        if want_weight:
            one_chunk = 0 < num_rows <= chunk_rows
            dtype = weight_VD.dtype if one_chunk else torch.float32
            grad_weight_VD = (torch.empty_like if one_chunk else torch.zeros_like)(weight_VD, dtype=dtype)

        # One buffer for all chunks: fresh pages cost a CPU more than the softmax.
        buffer_CV = hidden_TD.new_empty(min(chunk_rows, num_rows), num_words)
        for start in range(0, num_rows, chunk_rows):
            chunk = slice(start, start + chunk_rows)
            hidden_CD = hidden_TD[chunk]
            logits_CV = torch.mm(hidden_CD, weight_VD.t(), out=buffer_CV[: hidden_CD.shape[0]])
            if words is None:
                loss_T[chunk] = _loss_and_gradient_(logits_CV, labels_T[chunk], want_hidden or want_weight)
            else:
                loss_T[chunk] = _loss_and_gradient_of_part_(logits_CV, labels_T[chunk], words)
            if grad_hidden_TD is not None:
                torch.mm(logits_CV, weight_VD, out=grad_hidden_TD[chunk])
            if grad_weight_VD is not None:
                _add_weight_gradient(grad_weight_VD, logits_CV, hidden_CD, overwrite=num_rows <= chunk_rows)

        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        ctx.wanted, ctx.grads = (want_hidden, want_weight), [grad_hidden_TD, grad_weight_VD]
        if ignored_T is not None:
            loss_T.masked_fill_(ignored_T, 0)
        return loss_T.sum() if words is None else loss_T.sum() / words.size()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # In place, since the gradients may be as large as all that is left of the memory; so each is given out once,
        # be it in one backward pass or, as schedules of pipelines have it, in two.
        scaled: list[Tensor | None] = [None, None]
        for index, was_wanted in enumerate(ctx.wanted):
            if was_wanted and wants_gradient(ctx, index):
                if ctx.grads[index] is None:
                    raise RuntimeError("a second backward pass through linear_cross_entropy: its gradients are gone")
                scaled[index], ctx.grads[index] = ctx.grads[index].mul_(grad_loss), None
        return (*scaled, None, None, None, None, None, None)


def _loss_and_gradient_(logits_CV: Tensor, labels_C: Tensor, want_gradient: bool) -> Tensor:
    """Return the float32 loss of each row; turn its logits, in place, into the gradient softmax - onehot."""
    num_rows, num_words = logits_CV.shape
    block_rows = max(1, _CPU_SOFTMAX_BYTES // (4 * num_words)) if logits_CV.device.type == "cpu" else num_rows
    losses = []
    for start in range(0, num_rows, block_rows):
        block_bV, labels_b = logits_CV[start : start + block_rows], labels_C[start : start + block_rows]
        rows_b = torch.arange(len(labels_b), device=logits_CV.device)
        p_bV = block_bV.float()  # the block itself or a copy, of which a CPU finds the largest several times as fast
        # The largest probability is 1 / sum(exp(logits - max)), so one softmax gives the log-sum-exp as well, with the
        # same rounding, and no second exponential is needed.
        max_b, label_b = p_bV.amax(1), p_bV[rows_b, labels_b]
        torch.softmax(p_bV, 1, out=p_bV)
        loss_b = max_b - label_b - p_bV.amax(1).log()
        losses.append(loss_b)
        if want_gradient:
            block_bV.copy_(p_bV)
            # expm1 keeps the gradient of a confident token, where p - 1 of a rounded p would be zero. Not scatter_,
            # which takes the CPU two copies of all.
            block_bV[rows_b, labels_b] = torch.expm1(-loss_b).to(block_bV.dtype)
    return torch.cat(losses)


def _loss_and_gradient_of_part_(logits_CV: Tensor, labels_C: Tensor, words: dist.ProcessGroup) -> Tensor:
    """As `_loss_and_gradient_`, where the logits are those of this rank's words. Collective."""
    num_rows, num_words = logits_CV.shape
    labels_C = labels_C - words.rank() * num_words
    is_elsewhere_C1 = ((labels_C < 0) | (labels_C >= num_words)).unsqueeze(1)
    labels_C1 = labels_C.unsqueeze(1).masked_fill(is_elsewhere_C1, 0)
    block_rows = max(1, _CPU_SOFTMAX_BYTES // (4 * num_words)) if logits_CV.device.type == "cpu" else num_rows
    log_sum_C = torch.cat([block.float().logsumexp(1) for block in logits_CV.split(block_rows)])
    label_C = logits_CV.gather(1, labels_C1).float().masked_fill(is_elsewhere_C1, 0).squeeze(1)
    found_G2C = all_gather(torch.stack([log_sum_C, label_C])[None], words)
    log_sum_C1 = found_G2C[:, 0].logsumexp(0).unsqueeze(1)
    loss_C1 = log_sum_C1 - found_G2C[:, 1].sum(0).unsqueeze(1)
    for block, log_sum in zip(logits_CV.split(block_rows), log_sum_C1.split(block_rows), strict=True):
        block.copy_((block.float() - log_sum).exp_())
    at_label_C1 = torch.where(is_elsewhere_C1, logits_CV.gather(1, labels_C1), torch.expm1(-loss_C1).to(logits_CV))
    logits_CV.scatter_(1, labels_C1, at_label_C1)
    return loss_C1.squeeze(1)


def _add_weight_gradient(grad_VD: Tensor, grad_logits_CV: Tensor, hidden_CD: Tensor, *, overwrite: bool) -> None:
    """`grad_VD (+)= grad_logits_CV.T @ hidden_CD`, where the sum may have a wider dtype than the product."""
    if overwrite:
        torch.mm(grad_logits_CV.t(), hidden_CD, out=grad_VD)
    elif grad_VD.dtype == hidden_CD.dtype:
        grad_VD.addmm_(grad_logits_CV.t(), hidden_CD)
    else:
        # Block by block, so that the narrow product is still in the cache when it is added to the wide sum.
        block_bytes = _WEIGHT_GRAD_BYTES.get(grad_VD.device.type, _WEIGHT_GRAD_BYTES["cuda"])
        block_rows = max(256, block_bytes // (hidden_CD.shape[1] * hidden_CD.element_size()))
        for start in range(0, grad_VD.shape[0], block_rows):
            words = slice(start, start + block_rows)
            grad_VD[words] += torch.mm(grad_logits_CV[:, words].t(), hidden_CD)


def _default_chunk_rows(hidden_TD: Tensor, weight_VD: Tensor) -> int:
    """So many rows that their logits take `_CHUNK_BYTES`, evened out over the chunks."""
    row_bytes = max(1, weight_VD.shape[0] * hidden_TD.element_size())
    most = max(16, _CHUNK_BYTES.get(hidden_TD.device.type, _CHUNK_BYTES["cuda"]) // row_bytes)
    num_chunks = -(-hidden_TD.shape[0] // most)
    if num_chunks <= 1:
        return most
    even = -(-hidden_TD.shape[0] // num_chunks)
    return -(-even // 16) * 16


def _values_are_free(tensor: Tensor) -> bool:
    """Whether reading values costs no synchronisation and is possible: not on a GPU, nor on a fake or traced tensor."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor and not torch.compiler.is_compiling()


def _check_inputs(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk_rows: int | None) -> None:
    if hidden_TD.dim() != 2 or weight_VD.dim() != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        shapes = f"{tuple(hidden_TD.shape)} and {tuple(weight_VD.shape)}"
        raise ValueError(f"hidden and weight must be (T, D) and (V, D), not {shapes}")
    if labels_T.shape != hidden_TD.shape[:1] or labels_T.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 of shape ({hidden_TD.shape[0]},), not {labels_T.dtype} of {tuple(labels_T.shape)}"
        )
    if hidden_TD.dtype != weight_VD.dtype:
        raise ValueError(f"hidden is {hidden_TD.dtype} but weight is {weight_VD.dtype}; they must be equal")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, not {chunk_rows}")


def _check_labels(labels_R: Tensor, num_words: int, ignore_index: int) -> None:
    if labels_R.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(labels_R))
    if low < 0 or high >= num_words:
        raise IndexError(
            f"label {low if low < 0 else high} is out of range: the vocabulary has {num_words} words "
            f"(0 to {num_words - 1}), and only {ignore_index} means 'not supervised'"
        )
