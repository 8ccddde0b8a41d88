"""Asking for huge pages: taken where the system has them, and harmless for any tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from titanmoe.parallel.host_memory import prefer_huge_pages

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _huge_kib() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line for line in rollup if line.startswith("AnonHugePages")).split()[1])


@pytest.mark.skipif(not _SETTING.exists() or "[never]" in _SETTING.read_text(), reason="the system has no huge pages")
def test_a_new_tensor_gets_them() -> None:
    gained = []
    for _ in range(3):  # other processes may have left too few for one of them
        tensor = torch.empty(64 << 20, dtype=torch.uint8)
        prefer_huge_pages(tensor)
        before = _huge_kib()
        tensor.fill_(7)
        gained.append(_huge_kib() - before)
    assert max(gained) >= 32 << 10
    assert (tensor == 7).all()


@pytest.mark.parametrize("num_bytes", [0, 1, 1000, 2 << 20, (4 << 20) + 1])
def test_any_tensor_keeps_its_values(num_bytes: int) -> None:
    tensor = torch.full((num_bytes,), 3, dtype=torch.uint8)
    prefer_huge_pages(tensor)
    assert (tensor == 3).all()
    prefer_huge_pages(torch.empty(num_bytes, device="meta"))
