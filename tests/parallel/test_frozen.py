"""Frozen weights in few bits on several ranks: the numbers of one process, and no more bytes sent than are stored."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.kinds import WIDE
from tests.parallel.layouts import Layout, Precision, Step, build, compare, one_process
from tests.ranks import run_ranks
from titanmoe.config.errors import ConfigError
from titanmoe.config.sizes import Degrees
from titanmoe.models.build import build_model, init_weights, materialize
from titanmoe.models.spec import Dense, GroupedQuery, LayerSpec, Rope
from titanmoe.parallel.limits import check_stored_can_be_split
from titanmoe.parallel.mesh import Mesh
from titanmoe.parallel.parallelize import parallelize

_NF4 = ("quantize.frozen.nf4.block_size=32",)
FORMATS = {
    "channel": Precision(("quantize.frozen.float8",), ("quantize.frozen.float8.recipe_name=channel",)),
    # Sums of codes times scales that are no powers of two are not exact, so that roundings may go either way.
    "emulated": Precision(("quantize.frozen.float8",), ("quantize.frozen.float8.backend=emulated",), noise=0.08),
    "block": Precision(("quantize.frozen.float8",), ("quantize.frozen.float8.recipe_name=block",)),
    "mx": Precision(("quantize.frozen.mx",)),
    "nf4": Precision(("quantize.frozen.nf4",), _NF4),
    "nf4, scales in float32": Precision(("quantize.frozen.nf4",), (*_NF4, "quantize.frozen.nf4.double_quant=false")),
    "nf4 and lora": Precision(("quantize.frozen.nf4", "lora"), (*_NF4, "lora.rank=8")),
}


@functools.cache
def _reference(name: str) -> Step:
    return one_process(WIDE, num_steps=1, precision=FORMATS[name])[0]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("nf4 and lora", Layout(dp_shard=2)),
        ("block", Layout(dp_shard=2)),
        ("nf4", Layout(dp_shard=2, ep=2)),
        ("channel", Layout(dp_shard=2, ep=2)),
        ("channel", Layout(tp=2)),
        ("emulated", Layout(tp=2, etp=2)),
        ("mx", Layout(tp=2, ep=2)),
        ("nf4, scales in float32", Layout(tp=2, etp=2)),
        ("nf4", Layout(pp=2)),
        ("nf4", Layout(dp_shard=2, recompute="selective")),
        pytest.param("nf4", Layout(dp_shard=2, compiled=True), marks=pytest.mark.slow),
        ("mx", Layout(dp_shard=2, offload=True)),
    ],
    ids=str,
)
def test_equal_to_one_process(name: str, layout: Layout) -> None:
    errors = compare(WIDE, layout, None, [_reference(name)], FORMATS[name])
    assert FORMATS[name].allows(errors), errors


@pytest.mark.parametrize(
    ("name", "degrees", "words"),
    [
        ("block", Degrees(tp=2), "32 x 64|outputs, not a multiple of 128|inputs, not a multiple of 128"),
        ("block", Degrees(dp_shard=2, tp=1, ep=1, etp=1), ""),
        ("nf4", Degrees(tp=2), "outputs, not a multiple of"),
        ("mx", Degrees(tp=2), ""),
    ],
)
def test_cuts_through_what_shares_scales_are_refused(name: str, degrees: Degrees, words: str) -> None:
    model = build_model(WIDE)
    FORMATS[name].apply(model)
    if not words:
        check_stored_can_be_split(model, degrees)
        return
    with pytest.raises(ConfigError, match=words) as error:
        check_stored_can_be_split(model, degrees)
    assert error.value.where == "parallelism.tensor_parallel_degree"


@pytest.mark.parametrize(("name", "layout"), [("emulated", Layout(tp=4)), ("channel", Layout(tp=4))], ids=str)
def test_parts_that_native_kernels_cannot_have_are_refused(name: str, layout: Layout) -> None:
    """8 of 32 values; dequantised, they may be any number."""
    found = run_ranks(_why_refused, 4, name, layout)
    assert all("is 8 x 64, but its product wants multiples of 16" in why for why in found) == (name == "emulated")


def _why_refused(name: str, layout: Layout) -> str:
    spec = replace(WIDE, layers=(LayerSpec(GroupedQuery(4, 4, 8, Rope(8, 1e4)), Dense(128)),))
    try:
        build(spec, layout, precision=FORMATS[name])
    except ConfigError as error:
        return error.what
    return ""


class _Gathered(TorchDispatchMode):
    """Bytes that all-gathers give."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.c10d._allgather_base_:
            self.num_bytes += args[0].nbytes
        return result


def _bytes_gathered(name: str) -> tuple[int, int]:
    mesh = Mesh.build(torch.device("cpu"), Degrees(dp_shard=2))
    model = build_model(WIDE)
    FORMATS[name].apply(model)
    model.tok_embeddings.requires_grad_(False)
    parallelize(model, mesh, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    init_weights(materialize(model, "cpu"), seed=3)
    stored = sum(parameter.numel() * (1 if parameter.dtype == torch.uint8 else 2) for parameter in model.parameters())
    with torch.no_grad(), _Gathered() as gathered:
        model(torch.arange(24).view(1, 24))
    dist.barrier()
    return gathered.num_bytes, stored


@pytest.mark.parametrize("name", ["channel", "mx", "nf4"])
def test_bytes_gathered_are_bytes_stored(name: str) -> None:
    """Payloads and scales as they are, although parameters are gathered in bfloat16. Shards are padded a little."""
    for num_bytes, stored in run_ranks(_bytes_gathered, 2, name):
        assert stored <= num_bytes < 1.02 * stored
