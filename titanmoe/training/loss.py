"""The language-model loss, computed inside the model's forward so that sharded output weights are gathered there.

Shapes: B batch, S sequence, D model dim, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from titanmoe.data.packing import IGNORED, Batch
from titanmoe.ops.linear_cross_entropy import linear_cross_entropy


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """Sum of the cross-entropies of all supervised tokens of one microbatch.

    Divide it by the supervised tokens of the *global* batch: then data parallelism with uneven ranks and gradient
    accumulation need no other scaling.

    Args:
        model: a Decoder, or anything that calls `head(hidden_BSD, weight_VD)` in place of its output projection.
        batch: on the model's device. Its labels are already shifted: `labels_BS[b, s]` is the token to predict at s.

    Returns:
        A float32 scalar; an equal share of it where the vocabulary is on several ranks, which get the same batch.
    """

    def head(hidden_BSD: Tensor, weight_VD: Tensor, words: ProcessGroup | None = None) -> Tensor:
        hidden_TD, labels_T = hidden_BSD.flatten(0, 1), batch.labels_BS.flatten()
        return linear_cross_entropy(hidden_TD, weight_VD, labels_T, ignore_index=IGNORED, words=words)

    loss: Tensor = model(batch.tokens_BS, position_ids=batch.position_ids_BS, cu_seqlens=batch.cu_seqlens, head=head)
    return loss


def causal_lm_loss(
    model: nn.Module,
    tokens_BS: Tensor,
    labels_BS: Tensor,
    *,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy over the supervised tokens, in the convention of Hugging Face models.

    Labels are aligned with tokens and shifted in here: position s is compared with `labels_BS[:, s + 1]`, so that
    `labels = tokens` trains on everything, and -100 leaves a token out. The first label is never used. With
    `cu_seqlens`, the first token of each document should be labelled -100, or it is predicted from the document before.

    Returns:
        A float32 scalar; 0, with zero gradients, where no token is supervised.
    """
    shifted_BS = torch.full_like(labels_BS, IGNORED)
    shifted_BS[:, :-1] = labels_BS[:, 1:]
    if position_ids is None:
        position_ids = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand(tokens_BS.shape)
    num_supervised = (shifted_BS != IGNORED).sum().clamp_min(1)
    return loss_sum(model, Batch(tokens_BS, shifted_BS, position_ids, cu_seqlens)) / num_supervised
