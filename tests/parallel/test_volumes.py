"""The formulas of what travels, against numbers that were worked out by hand."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from titanmoe.config.sizes import Degrees
from titanmoe.models.build import build_model
from titanmoe.models.families.qwen3 import FAMILY
from titanmoe.models.spec import DecoderSpec, GroupedQuery, LayerSpec, MoE, Rope
from titanmoe.parallel.mesh import Mesh
from titanmoe.parallel.volumes import Rows, Step, axes_of, num_host_waits, num_sent, step_traffic

ATTENTION = GroupedQuery(4, 1, 8, Rope(8, 1e4))
EXPERTS = MoE(num_experts=6, top_k=2, hidden_dim=16)
MODEL = build_model(DecoderSpec(dim=8, vocab_size=10, layers=(LayerSpec(ATTENTION, EXPERTS),)))
STEP = Step(batch=3, seq_len=8, param_bytes=2, reduce_bytes=4)


def _by_kind(degrees: Degrees, step: Step = STEP, rows: list[Rows] | None = None) -> dict[tuple[str, str], Fraction]:
    sums: dict[tuple[str, str], Fraction] = defaultdict(Fraction)
    for traffic in step_traffic(MODEL, degrees, step, rows=rows):
        sums[traffic.kind, traffic.axis] += traffic.num_bytes
    return sums


def test_what_a_rank_sends_of_a_message() -> None:
    assert num_sent("all-gather", 12, 4) == num_sent("reduce-scatter", 12, 4) == num_sent("all-to-all", 12, 4) == 9
    assert num_sent("all-reduce", 12, 4) == 18
    assert num_sent("all-reduce", 8, 3) == Fraction(32, 3)
    assert num_sent("send", 12, 4) == 12


def test_one_process_sends_nothing_and_waits_for_nothing() -> None:
    assert step_traffic(MODEL, Degrees(), STEP) == []
    assert num_host_waits(MODEL, Degrees(), STEP) == 0


def test_shards_are_filled_up() -> None:
    """On 4 ranks 10 words are sent as 12, and the router's 6 rows as 8; 6 experts are cut along the model dim."""
    layer = 8 + 8 + 8 * 32 + 2 * 8 * 8 + 32 * 8 + 8 * 8 + 6 * (2 * 16 * 8 + 8 * 16)
    #       norms   q        k, v        o        gate    experts
    others = 12 * 8 + (8 + 12 * 8)
    sums = _by_kind(Degrees(dp_shard=4))
    # Of each 3 / 4 come from others. The layer and the embedding are gathered twice, norm and output once.
    assert sums["all-gather", "fsdp"] == (2 * layer + 2 * 12 * 8 + 8 + 12 * 8) * 2 * 3 // 4
    assert sums["reduce-scatter", "fsdp"] == (layer + others) * 4 * 3 // 4


def test_experts_are_sharded_over_what_expert_parallelism_leaves() -> None:
    sums = _by_kind(Degrees(dp_shard=4, ep=2))
    num_local = 3 * (2 * 16 * 8 + 8 * 16)  # 3 of 6 experts are cut along the model dim, as 3 are not for two ranks
    assert sums["reduce-scatter", "fsdp of experts"] == num_local * 4 // 2
    sums = _by_kind(Degrees(dp_shard=2, ep=2))
    assert ("reduce-scatter", "fsdp of experts") not in sums


def test_rows_travel_four_times_there_and_back() -> None:
    degrees = Degrees(dp_shard=2, ep=2)
    # 24 tokens choose 2 experts each; half of the 48 rows leave, as many come.
    numbers, row, weight = 6 * 8 // 2, 8 * 2, 4
    assert _by_kind(degrees)["all-to-all", "ep"] == numbers + 24 * (4 * row + 2 * weight)
    rows = [Rows(leaving=5, arriving=7)]
    # Results come back from where rows went, and each gradient goes the other way.
    assert _by_kind(degrees, rows=rows)["all-to-all", "ep"] == numbers + (5 + 7) * (2 * row + weight)
    again = Step(**{**vars(STEP), "recompute": "full"})
    sums = _by_kind(degrees, again, rows)
    assert sums["all-to-all", "ep"] == numbers + (2 * 5 + 7) * (row + weight) + (2 * 7 + 5) * row
    assert num_host_waits(MODEL, degrees, again) == num_host_waits(MODEL, degrees, STEP) == 1
    by_op = Step(**{**vars(STEP), "recompute": "selective"})
    assert _by_kind(degrees, by_op, rows)["all-to-all", "ep"] == 2 * numbers + (5 + 7) * (2 * row + weight)
    assert num_host_waits(MODEL, degrees, by_op) == 2


def test_heads_that_are_fewer_than_the_ranks_are_sent_to_several() -> None:
    channels = 32 + 2 * (2 * 8) + 32  # queries, the one key and value head twice, results
    num_tokens = 3 * 8 // 2
    assert _by_kind(Degrees(cp=2))["all-to-all", "cp"] == 2 * num_tokens * channels * 2 // 2


@pytest.mark.parametrize(
    "degrees", [Degrees(dp_replicate=2, dp_shard=2, ep=2), Degrees(cp=2, dp_shard=2, ep=4), Degrees(tp=2, cp=2, ep=2)]
)
def test_axes_are_those_of_the_mesh(degrees: Degrees) -> None:
    for rank, found in enumerate(run_ranks(_axes, degrees.num_ranks, degrees)):
        expected = axes_of(degrees, rank)
        assert found.items() <= expected.items()
        assert {name for name, ranks in expected.items() if len(ranks) > 1} <= found.keys() | {"world"}


def _axes(degrees: Degrees) -> dict[str, tuple[int, ...]]:
    mesh = Mesh.build(torch.device("cpu"), degrees)
    meshes = {"fsdp": mesh.fsdp}
    if degrees.shards_experts_apart:
        meshes |= {"fsdp of experts": mesh.fsdp_of_experts, "ep": mesh.expert}
    if degrees.tp > 1:
        meshes["tp"] = mesh.tensor
    if degrees.cp > 1:
        meshes["cp"] = mesh.context
    if degrees.cp * degrees.tp > 1:
        meshes["cp x tp"] = mesh.parts
    found = {name: tuple(dist.get_process_group_ranks(each.get_group(-1))) for name, each in meshes.items()}
    if degrees.dp_replicate > 1:
        found["dp_replicate"] = tuple(dist.get_process_group_ranks(mesh.fsdp.get_group("dp_replicate")))
    return found


def test_the_formulas_of_a_large_model_take_no_time_to_speak_of() -> None:
    traffic = step_traffic(
        build_model(FAMILY.flavor("235B-A22B")), Degrees(dp_shard=64, ep=8), Step(batch=1, seq_len=4096)
    )
    per_kind: dict[str, Fraction] = defaultdict(Fraction)
    for part in traffic:
        per_kind[part.kind] += part.num_bytes
    # 94 layers x 4096 tokens x 8 rows x 4096 channels x 2 bytes, 7 / 8 of them, twice forward and twice backward.
    assert float(per_kind["all-to-all"]) == pytest.approx(94 * 4096 * 8 * 4096 * 2 * 7 / 8 * 4, rel=1e-3)
