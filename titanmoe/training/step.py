"""Forward and backward of one rank's part of a global batch, and the same without backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from titanmoe.config.errors import ConfigError
from titanmoe.data.loader import DataLoader
from titanmoe.data.packing import IGNORED, Batch
from titanmoe.models.decoder import Decoder
from titanmoe.parallel.fsdp import set_gradient_sync
from titanmoe.parallel.pipeline import Pipeline
from titanmoe.parallel.ranks import Ranks
from titanmoe.parallel.tensor import finish_gradients
from titanmoe.parallel.world import sum_over_ranks
from titanmoe.training.loss import loss_sum


def num_supervised(batches: Sequence[Batch]) -> int:
    """Positions with a label. The batches are on the host, so counting needs no device."""
    return sum(int((batch.labels_BS != IGNORED).sum()) for batch in batches)


def read_batches(loader: DataLoader, number: int, pin: bool = False) -> tuple[list[Batch], ConfigError | None]:
    """The next microbatches, or what is wrong with the data.

    The error is returned, for the caller to share: raised on one rank alone, it would leave the others waiting.
    """
    try:
        batches = [next(loader) for _ in range(number)]
    except ConfigError as error:
        return [], error
    return ([batch.pin_memory() for batch in batches] if pin else batches), None


class Step(Protocol):
    """Forward and backward of one rank's part of a global batch."""

    def accumulate(self, batches: Sequence[Batch], num_tokens: int) -> Tensor:
        """Add the gradient of the global batch's mean loss to `.grad`.

        Args:
            batches: this rank's microbatches, on the host.
            num_tokens: supervised tokens of the *global* batch, over all ranks and microbatches. Every loss is divided
                by it before backward, and gradients are summed over ranks, so that neither uneven ranks nor the number
                of microbatches changes anything.

        Returns:
            This rank's share of the mean loss (float32, 0-dim); the sum over ranks is the loss.
        """

    def loss_sums(self, batches: Sequence[Batch]) -> Tensor:
        """This rank's share of the sum of all losses, without gradients (float64, 0-dim)."""


class PlainStep:
    """Every rank has all layers."""

    def __init__(self, model: Decoder, device: torch.device) -> None:
        self._model, self._device = model, device

    def accumulate(self, batches: Sequence[Batch], num_tokens: int) -> Tensor:
        total = torch.zeros((), device=self._device)
        for index, batch in enumerate(batches):
            set_gradient_sync(self._model, index == len(batches) - 1)
            loss = loss_sum(self._model, batch.to(self._device, non_blocking=True)) / num_tokens
            loss.backward()
            total += loss.detach()
        finish_gradients(self._model)
        return total

    @torch.no_grad()
    def loss_sums(self, batches: Sequence[Batch]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for batch in batches:
            total += loss_sum(self._model, batch.to(self._device, non_blocking=True))
        return total


class PipelinedStep:
    """Layers are dealt to the ranks of a pipeline, all of which read the same batches.

    Args:
        model: all that this rank has.
        num_parts: ranks that share the tokens of a batch between layers, as tensor-parallel ones do.
    """

    def __init__(self, model: Decoder, pipeline: Pipeline[Batch], device: torch.device, num_parts: int = 1) -> None:
        self._model, self._pipeline, self._device, self._num_parts = model, pipeline, device, num_parts

    def accumulate(self, batches: Sequence[Batch], num_tokens: int) -> Tensor:
        losses = self._pipeline.run(self._moved(batches), partial(_stage, num_tokens))
        finish_gradients(self._model)
        self._pipeline.add_tied_gradients()
        return torch.zeros((), device=self._device) + sum(losses)

    def loss_sums(self, batches: Sequence[Batch]) -> Tensor:
        num_rows, num_tokens = batches[0].tokens_BS.shape
        shape = (num_rows, num_tokens // self._num_parts, self._model.spec.dim)
        losses = self._pipeline.run_forward(self._moved(batches), partial(_stage, 1), shape)
        return torch.zeros((), dtype=torch.float64, device=self._device) + sum(loss.double() for loss in losses)

    def _moved(self, batches: Sequence[Batch]) -> list[Batch]:
        return [batch.to(self._device, non_blocking=True) for batch in batches]


def _stage(num_tokens: int, part: Decoder, hidden_BPD: Tensor | None, batch: Batch) -> Tensor:
    """What a stage of a pipeline returns; from the last one, the share of the mean loss."""
    if hidden_BPD is not None:
        batch = replace(batch, tokens_BS=hidden_BPD)
    if part.norm is not None:
        return loss_sum(part, batch) / num_tokens
    hidden_BPD = part(batch.tokens_BS, position_ids=batch.position_ids_BS, cu_seqlens=batch.cu_seqlens)
    return hidden_BPD


def evaluate(
    model: Decoder,
    step: Step,
    loader: DataLoader,
    *,
    num_microbatches: int,
    max_batches: int,
    counts_data: bool,
    ranks: Ranks,
    should_stop: Callable[[], bool],
) -> tuple[float, int] | None:
    """Mean loss over validation data, and its supervised tokens, over all ranks; the same on every rank.

    Args:
        step: computes with `model`.
        loader: read from its start. Ranks whose lanes end early go on with padding until all have ended, because the
            forward of a sharded model is a collective.
        num_microbatches: of the loader, per global batch.
        max_batches: global batches to read at most; -1 reads all.
        counts_data: whether the tokens that this rank reads count; others read them too if not.
        ranks: of the job, to share an error in the data.
        should_stop: asked before each global batch; if it is true on any rank, the result is None.

    Raises:
        ConfigError: on every rank, if the data of one is broken, or nothing in that of all is supervised.
    """
    totals: list[Tensor] = []
    num_tokens = 0
    loader.reset()
    model.eval()
    try:
        has_more = True
        while has_more and len(totals) != max_batches:
            batches, error = read_batches(loader, num_microbatches)
            num_unfinished, num_stopping, num_failed = sum_over_ranks(
                int(not loader.exhausted), int(should_stop()), int(error is not None)
            )
            if num_failed:
                ranks.share_error(error)
            if num_stopping:
                return None
            num_tokens += num_supervised(batches) if counts_data else 0
            totals.append(step.loss_sums(batches))
            has_more = num_unfinished > 0
    finally:
        model.train()
    total = torch.stack(totals).sum()
    dist.all_reduce(total)
    (num_tokens,) = sum_over_ranks(num_tokens)
    if num_tokens == 0:
        raise ConfigError(
            "no token of the validation data is learned from: all documents are empty, or too long",
            where="validation.dataset",
            mend="Give other data, or a larger validation.seq_len.",
        )
    return total.item() / num_tokens, num_tokens
