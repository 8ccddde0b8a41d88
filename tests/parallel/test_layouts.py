"""Every data-parallel layout gives the loss and the gradients of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.models.kinds import KINDS
from tests.ranks import run_ranks
from titanmoe.data.packing import Batch
from titanmoe.models.build import build_model, init_weights, materialize
from titanmoe.models.decoder import Decoder
from titanmoe.models.spec import DecoderSpec
from titanmoe.parallel.mesh import Mesh
from titanmoe.parallel.parallelize import parallelize

SPEC = KINDS["grouped-query"]
GLOBAL_BATCH, SEQ_LEN = 4, 36
Change = Callable[[Decoder], None]


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(97, (GLOBAL_BATCH, SEQ_LEN), generator=generator)
    return tokens, tokens.roll(-1, dims=1)


def _all_to_one(model: Decoder) -> None:
    """Every token chooses the last expert first, and its group's neighbours."""
    for _, layer in model.moe_layers():
        assert layer.router.expert_bias is not None
        layer.router.expert_bias[-1] = 100.0
        layer.router.expert_bias[-3:-1] = 50.0


def _aux_loss(model: Decoder) -> None:
    for _, layer in model.moe_layers():
        layer.router.aux_loss_weight = 0.1


def _freeze_experts(model: Decoder) -> None:
    for _, layer in model.moe_layers():
        layer.experts.requires_grad_(False)


def _step(
    model: Decoder, tokens: Tensor, labels: Tensor, rows: slice = slice(None), part: int = 0, num_parts: int = 1
) -> tuple[float, dict[str, Tensor]]:
    """The summed loss over all ranks divided by the global number of tokens, and every whole gradient.

    Of the rows' tokens, this rank computes a part. Each row holds two documents.
    """
    num_rows = tokens[rows].shape[0]
    starts = [row * SEQ_LEN + begin for row in range(num_rows) for begin in (0, 11)]
    cu_seqlens = torch.tensor([*starts, num_rows * SEQ_LEN], dtype=torch.int32)
    position_ids = torch.cat([torch.arange(11), torch.arange(SEQ_LEN - 11)]).expand(num_rows, -1)
    whole = Batch(tokens[rows], labels[rows], position_ids, cu_seqlens)
    batch = whole.part(part, num_parts)
    labels = batch.labels_BS
    logits = model(batch.tokens_BS, position_ids=batch.position_ids_BS, cu_seqlens=batch.cu_seqlens)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum") / (GLOBAL_BATCH * SEQ_LEN)
    loss.backward()
    total = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    grads = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is None:
            assert not parameter.requires_grad, name
            continue
        grads[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
    return total.item(), grads


def _reference(spec: DecoderSpec, change: Change | None = None) -> tuple[float, dict[str, Tensor]]:
    model = build_model(spec, device="cpu")
    init_weights(model, seed=3)
    if change is not None:
        change(model)
    return _step(model, *_batch())


def _on_rank(
    spec: DecoderSpec,
    dp_replicate: int,
    dp_shard: int,
    mode: str,
    reshard: str,
    ep: int = 1,
    change: Change | None = None,
    cp: int = 1,
) -> tuple[float, dict[str, Tensor]]:
    mesh = Mesh.build(torch.device("cpu"), dp_replicate=dp_replicate, dp_shard=dp_shard, ep=ep, cp=cp)
    model = build_model(spec)
    parallelize(
        model,
        mesh,
        param_dtype=torch.float32,
        reduce_dtype=torch.float32,
        reshard_after_forward=reshard,
        checkpoint_mode=mode,
    )
    materialize(model, "cpu")
    init_weights(model, seed=3)
    if change is not None:
        change(model)
    rows = GLOBAL_BATCH // mesh.num_data_ranks
    mine = slice(mesh.data_rank * rows, (mesh.data_rank + 1) * rows)
    return _step(model, *_batch(), mine, mesh.context_rank, mesh.cp)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("dp_replicate", "dp_shard", "mode", "reshard"),
    [
        (1, 2, "none", "default"),
        (2, 1, "none", "default"),
        (1, 4, "full", "always"),
        (2, 2, "selective", "never"),
        (4, 1, "full", "default"),
    ],
)
def test_layout_equals_one_process(tied: bool, dp_replicate: int, dp_shard: int, mode: str, reshard: str) -> None:
    spec = replace(SPEC, tie_embeddings=tied)
    _compare(spec, run_ranks(_on_rank, dp_replicate * dp_shard, spec, dp_replicate, dp_shard, mode, reshard))


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "grouped-query"])
def test_every_kind_of_layer_shards_and_recomputes(kind: str, mode: str) -> None:
    _compare(KINDS[kind], run_ranks(_on_rank, 2, KINDS[kind], 1, 2, mode, "always"))


@pytest.mark.parametrize(
    ("dp_replicate", "dp_shard", "ep", "mode", "reshard"),
    [
        (1, 2, 2, "none", "default"),
        (1, 4, 2, "full", "always"),
        (2, 2, 2, "selective", "default"),
        (1, 2, 2, "selective", "never"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_experts_on_several_ranks(
    kind: str, dp_replicate: int, dp_shard: int, ep: int, mode: str, reshard: str
) -> None:
    results = run_ranks(_on_rank, dp_replicate * dp_shard, KINDS[kind], dp_replicate, dp_shard, mode, reshard, ep)
    _compare(KINDS[kind], results)


@pytest.mark.parametrize(
    ("dp_replicate", "dp_shard", "cp", "ep", "mode"),
    [(1, 1, 2, 1, "none"), (1, 1, 4, 1, "selective"), (1, 2, 2, 4, "full"), (2, 1, 2, 2, "selective")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_on_several_ranks(kind: str, dp_replicate: int, dp_shard: int, cp: int, ep: int, mode: str) -> None:
    """With fewer key heads than ranks, and with documents, windows and chunks that cross the parts."""
    if ep == 4 and kind != "latent":
        ep = 2  # six experts
    size = dp_replicate * dp_shard * cp
    results = run_ranks(_on_rank, size, KINDS[kind], dp_replicate, dp_shard, mode, "default", ep, _aux_loss, cp)
    _compare(KINDS[kind], results, _aux_loss)


@pytest.mark.parametrize("change", [_all_to_one, _freeze_experts])
@pytest.mark.parametrize(("dp_shard", "ep", "mode"), [(2, 2, "full"), (4, 2, "none"), (4, 4, "selective")])
def test_experts_that_get_all_or_learn_nothing(change: Change, dp_shard: int, ep: int, mode: str) -> None:
    """Ranks that no token comes to, and experts without gradients."""
    spec = KINDS["latent"]
    _compare(spec, run_ranks(_on_rank, dp_shard, spec, 1, dp_shard, mode, "default", ep, change), change)


def _compare(spec: DecoderSpec, results: list[tuple[float, dict[str, Tensor]]], change: Change | None = None) -> None:
    loss, grads = _reference(spec, change)
    for rank_loss, rank_grads in results:
        assert rank_loss == pytest.approx(loss, rel=1e-6)
        assert rank_grads.keys() == grads.keys()
        for name, grad in grads.items():
            error = (rank_grads[name] - grad).abs().max() / grad.abs().max().clamp_min(1e-30)
            assert error < 1e-5, f"{name}: relative error {error:.2e}"


def _mixed(dtype: torch.dtype, param_dtype: torch.dtype) -> tuple[float, dict[str, Tensor], set]:
    mesh = Mesh.build(torch.device("cpu"), dp_replicate=1, dp_shard=dist.get_world_size())
    model = build_model(SPEC, dtype=dtype)
    parallelize(model, mesh, param_dtype=param_dtype, reduce_dtype=torch.float32)
    materialize(model, "cpu")
    init_weights(model, seed=3)
    rows = GLOBAL_BATCH // mesh.num_data_ranks
    mine = slice(mesh.data_rank * rows, (mesh.data_rank + 1) * rows)
    loss, grads = _step(model, *_batch(), mine)
    return loss, grads, {parameter.grad.dtype for parameter in model.parameters()}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_compute_keeps_the_stored_dtype(world_size: int, dtype: torch.dtype) -> None:
    """float32 masters keep float32 gradients; the loss stays within bfloat16's rounding of the float32 one."""
    reference, _ = _reference(SPEC)
    for loss, _, dtypes in run_ranks(_mixed, world_size, dtype, torch.bfloat16):
        assert loss == pytest.approx(reference, rel=2e-2)
        assert dtypes == {dtype}
