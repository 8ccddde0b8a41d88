"""The counts of the MoE layer's operations: against hand-made ones, and not more than they were."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from titanmoe.benchmarks import moe_path
from titanmoe.models.spec import MoE

SIZES = ["--tokens", "40", "--dim", "16", "--hidden", "8", "--experts", "4", "--top-k", "2", "--rounds", "1"]


def _report(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert moe_path.main([*SIZES, "--device", "cpu", "--json", *options]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_bytes_are_what_is_read_and_what_is_written() -> None:
    x, indices = torch.randn(5, 4), torch.tensor([0, 3, 3])
    out = torch.empty(5, 4)

    def run() -> None:
        x.index_select(0, indices)  # 3 rows read and written, 3 indices
        torch.mul(x, x[:, :1].expand(5, 4), out=out)  # 20 and 5 read, 20 written
        out.add_(x)  # 40 read, 20 written
        x.view(4, 5)[1:]  # nothing
        torch.empty(7)  # nothing
        x.copy_(out)  # 20 read, 20 written
        (x > 0).sum().item()

    kinds, operations = moe_path._counts(run)
    assert kinds == {
        "copies": {"calls": 2, "bytes": 2 * 3 * 16 + 24 + 160},
        "other numbers": {"calls": 2, "bytes": 4 * (45 + 60)},
        "indices": {"calls": 2, "bytes": (80 + 20) + (20 + 8)},
        "reads by the host": {"calls": 1, "bytes": 8},
    }
    assert operations == {
        "index_select": 1,
        "mul": 1,
        "add_": 1,
        "copy_": 1,
        "gt": 1,
        "sum": 1,
        "_local_scalar_dense": 1,
    }


def test_the_least_is_five_operations_forward_and_seven_backward() -> None:
    least = moe_path.least(3, 16, MoE(4, 2, 8), item_bytes=2)
    assert {phase: sum(kind["calls"] for kind in kinds.values()) for phase, kinds in least.items()} == {
        "forward": 5,
        "backward": 7,
    }
    # 6 rows of 16 in, of 2 x 8 out, 4 experts' weights; 6 rows of 8 in, of 16 out.
    products = 6 * 16 + 4 * 16 * 16 + 6 * 16 + 6 * 8 + 4 * 16 * 8 + 6 * 16
    assert least["forward"]["products"] == {"calls": 2, "bytes": products * 2}
    assert least["backward"]["products"] == {"calls": 4, "bytes": products * 4}


def test_a_layer_does_not_do_more_than_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    report = _report(capsys)
    one, several = report["paths"]["one process"], report["paths"]["expert parallel"]
    for phase, num_collectives in (("forward", 4), ("backward", 3)):
        kinds = one[phase]["kinds"]
        # The router's, and where each expert's rows end.
        others = 4 * (40 * 16 + 4 * 16 + 40 * 4 + 2 * 4) * (1 if phase == "forward" else 2)
        assert kinds["products"]["bytes"] == report["least"][phase]["products"]["bytes"] + others
        assert kinds["sums of rows"]["calls"] == several[phase]["kinds"]["sums of rows"]["calls"] == 1
        # The rows, and two numbers per slot: weights as they are chosen, and as they are dealt.
        assert kinds["copies"]["calls"] <= 3
        assert several[phase]["kinds"]["collectives"]["calls"] == num_collectives
        assert "reads by the host" not in kinds and one[phase]["seconds"] > 0
    assert one["forward"]["kinds"]["indices"]["calls"] <= 11
    assert several["forward"]["kinds"]["indices"]["calls"] <= 25
    assert not torch.distributed.is_initialized()


def test_the_table_names_every_operation(capsys: pytest.CaptureFixture[str]) -> None:
    assert moe_path.main([*SIZES, "--device", "cpu", "--dtype", "bfloat16"]) == 0
    table = capsys.readouterr().out
    for word in ("least", "expert parallel", "titanmoe.rows_times_weights 2", "collectives", "milliseconds"):
        assert word in table


def test_what_is_counted_is_computed() -> None:
    """The counter changes nothing."""

    def run() -> list[Tensor]:
        x = torch.arange(6.0).requires_grad_()
        (x * x).sum().backward()
        assert x.grad is not None
        return [x.grad]

    found: list[Tensor] = []
    moe_path._counts(lambda: found.extend(run()))
    assert torch.equal(found[0], run()[0])
