"""Asking for huge pages: taken where the system has them, and harmless for any tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from titanmoe.parallel.host_memory import prefer_huge_pages

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _asks_for_huge_pages(address: int) -> bool:
    """Whether the kernel has it down for the memory around an address. It may have none to give at the moment."""
    is_around = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if first == "VmFlags:" and is_around:
            return "hg" in rest
        if "-" in first and not first.endswith(":"):
            begin, end = (int(bound, 16) for bound in first.split("-"))
            is_around = begin <= address < end
    raise AssertionError("no memory there")


@pytest.mark.skipif(not _SETTING.exists(), reason="the system knows no huge pages")
def test_a_new_tensor_asks_for_them() -> None:
    tensor = torch.empty(64 << 20, dtype=torch.uint8)
    middle = tensor.data_ptr() + tensor.numel() // 2
    assert not _asks_for_huge_pages(middle)
    prefer_huge_pages(tensor)
    assert _asks_for_huge_pages(middle)
    tensor.fill_(7)
    assert (tensor == 7).all()


@pytest.mark.parametrize("num_bytes", [0, 1, 1000, 2 << 20, (4 << 20) + 1])
def test_any_tensor_keeps_its_values(num_bytes: int) -> None:
    tensor = torch.full((num_bytes,), 3, dtype=torch.uint8)
    prefer_huge_pages(tensor)
    assert (tensor == 3).all()
    prefer_huge_pages(torch.empty(num_bytes, device="meta"))
