"""Forward and backward of one rank's part of a global batch, and the same without backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from titanmoe.config.errors import ConfigError
from titanmoe.data.loader import DataLoader
from titanmoe.data.packing import IGNORED, Batch
from titanmoe.models.decoder import Decoder
from titanmoe.parallel.fsdp import set_gradient_sync
from titanmoe.parallel.ranks import Ranks
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


def accumulate_gradients(model: Decoder, batches: Sequence[Batch], num_tokens: int, device: torch.device) -> Tensor:
    """Add the gradient of the global batch's mean loss to `.grad`, microbatch by microbatch.

    Args:
        batches: this rank's microbatches, on the host.
        num_tokens: supervised tokens of the *global* batch, over all ranks and microbatches. Every loss is divided by
            it before backward, and gradients are summed over ranks, so that neither uneven ranks nor the number of
            microbatches changes anything.

    Returns:
        This rank's part of the mean loss (float32, 0-dim, on `device`); the sum over ranks is the loss.
    """
    total = torch.zeros((), device=device)
    for index, batch in enumerate(batches):
        set_gradient_sync(model, index == len(batches) - 1)
        loss = loss_sum(model, batch.to(device, non_blocking=True)) / num_tokens
        loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def evaluate(
    model: Decoder,
    loader: DataLoader,
    *,
    num_microbatches: int,
    max_batches: int,
    device: torch.device,
    ranks: Ranks,
    should_stop: Callable[[], bool],
) -> tuple[float, int] | None:
    """Mean loss over validation data, and its supervised tokens, over all ranks; the same on every rank.

    Args:
        loader: read from its start. Ranks whose lanes end early go on with padding until all have ended, because the
            forward of a sharded model is a collective.
        num_microbatches: of the loader, per global batch.
        max_batches: global batches to read at most; -1 reads all.
        ranks: of the job, to share an error in the data.
        should_stop: asked before each global batch; if it is true on any rank, the result is None.

    Raises:
        ConfigError: on every rank, if the data of one is broken.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    num_batches = num_tokens = 0
    loader.reset()
    model.eval()
    try:
        has_more = True
        while has_more and num_batches != max_batches:
            batches, error = read_batches(loader, num_microbatches)
            num_unfinished, num_stopping, num_failed = sum_over_ranks(
                int(not loader.exhausted), int(should_stop()), int(error is not None)
            )
            if num_failed:
                ranks.share_error(error)
            if num_stopping:
                return None
            num_tokens += num_supervised(batches)
            for batch in batches:
                total += loss_sum(model, batch.to(device, non_blocking=True))
            num_batches += 1
            has_more = num_unfinished > 0
    finally:
        model.train()
    dist.all_reduce(total)
    (num_tokens,) = sum_over_ranks(num_tokens)
    return total.item() / max(num_tokens, 1), num_tokens
