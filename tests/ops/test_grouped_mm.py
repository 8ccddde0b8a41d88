"""The grouped product against float64 loops: K != N, empty experts, one expert that takes all, odd sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from titanmoe.ops.grouped_mm import _uses_grouped_kernel, grouped_mm

COUNTS = {
    "even": [16, 16, 16, 16],
    "empty experts": [0, 37, 0, 5],
    "one takes all": [0, 0, 71, 0],
    "odd": [1, 300, 33, 7],
    "no rows": [0, 0, 0, 0],
}


def _reference(x_RK: Tensor, w_ENK: Tensor, counts: list[int]) -> Tensor:
    """Ten lines that cannot be wrong."""
    rows, start = [], 0
    for expert, count in enumerate(counts):
        rows.append(x_RK[start : start + count] @ w_ENK[expert].T)
        start += count
    return torch.cat(rows)


def _operands(counts: list[int], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_RK = torch.randn(sum(counts), 40, generator=generator, dtype=torch.float64)
    w_ENK = torch.randn(len(counts), 24, 40, generator=generator, dtype=torch.float64)
    dy_RN = torch.randn(sum(counts), 24, generator=generator, dtype=torch.float64)
    offsets_E = torch.tensor(counts).cumsum(0).int()
    return *(tensor.to(device, dtype) for tensor in (x_RK, w_ENK, dy_RN)), offsets_E.to(device)


def _sqnr(value: Tensor, reference: Tensor) -> float:
    """Signal to error ratio in dB."""
    return (20 * torch.log10(reference.norm() / (value.double() - reference).norm())).item()


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize(("dtype", "least_db"), [(torch.float32, 120.0), (torch.bfloat16, 48.0)])
def test_forward_and_gradients(name: str, dtype: torch.dtype, least_db: float) -> None:
    counts = COUNTS[name]
    x_RK, w_ENK, dy_RN, offsets_E = _operands(counts, dtype)
    inputs = [x_RK.clone().requires_grad_(), w_ENK.clone().requires_grad_()]
    exact = [x_RK.double().requires_grad_(), w_ENK.double().requires_grad_()]
    y_RN, expected = grouped_mm(*inputs, offsets_E), _reference(*exact, counts)
    y_RN.backward(dy_RN)
    expected.backward(dy_RN.double())
    assert y_RN.dtype == dtype
    for value, reference in ((y_RN, expected), (inputs[0].grad, exact[0].grad), (inputs[1].grad, exact[1].grad)):
        assert value.shape == reference.shape
        if reference.numel() and reference.norm() > 0:
            assert _sqnr(value.detach(), reference.detach()) > least_db
        else:
            assert not value.any()


def test_gradient_of_an_expert_without_rows_is_zero_in_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    x_RK, w_ENK, dy_RN, offsets_E = _operands(COUNTS["empty experts"], torch.float32)
    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *size, **kw: new_empty(self, *size, **kw).fill_(float("nan")))
    w_ENK.requires_grad_()
    y_RN = grouped_mm(x_RK, w_ENK, offsets_E)
    y_RN.backward(dy_RN)
    assert y_RN.isfinite().all()
    assert w_ENK.grad.isfinite().all()
    assert not w_ENK.grad[0].any()


@pytest.mark.parametrize("frozen", ["x", "w"])
def test_only_the_gradients_that_are_needed_are_computed(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import titanmoe.ops.grouped_mm as module

    calls = []
    for name in ("rows_times_weights", "rows_times_rows"):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _f=function, _n=name, **kw: calls.append(_n) or _f(*a, **kw))
    x_RK, w_ENK, dy_RN, offsets_E = _operands(COUNTS["even"], torch.float32)
    (w_ENK if frozen == "x" else x_RK).requires_grad_()
    grouped_mm(x_RK, w_ENK, offsets_E).backward(dy_RN)
    assert calls == ["rows_times_weights", "rows_times_rows" if frozen == "x" else "rows_times_weights"]


def test_expanded_gradient() -> None:
    """`.sum()` hands back a gradient with stride 0."""
    x_RK, w_ENK, _, offsets_E = _operands(COUNTS["odd"], torch.float32)
    x_RK.requires_grad_()
    grouped_mm(x_RK, w_ENK, offsets_E).sum().backward()
    expert_R = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS["odd"]))
    torch.testing.assert_close(x_RK.grad, w_ENK.sum(1)[expert_R])


def test_compiles_without_a_graph_break() -> None:
    x_RK, w_ENK, _, offsets_E = _operands(COUNTS["odd"], torch.float32)
    compiled = torch.compile(grouped_mm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x_RK, w_ENK, offsets_E), grouped_mm(x_RK, w_ENK, offsets_E))


@pytest.mark.parametrize(
    ("dtype", "num_features", "expected"),
    [
        (torch.bfloat16, (24, 40), True),
        (torch.bfloat16, (20, 40), False),
        (torch.bfloat16, (24, 36), False),
        (torch.float32, (24, 40), False),
    ],
)
@pytest.mark.parametrize("num_rows", [16, 37])
def test_which_products_a_device_kernel_takes(
    dtype: torch.dtype, num_features: tuple[int, int], expected: bool, num_rows: int
) -> None:
    """Row strides must be multiples of 16 bytes; the number of rows is free."""
    rows = torch.empty(num_rows, num_features[1], dtype=dtype, device="meta")
    assert _uses_grouped_kernel(rows, num_features, "auto") is expected
    assert not _uses_grouped_kernel(torch.empty(num_rows, num_features[1], dtype=dtype), num_features, "auto")


@pytest.mark.gpu
@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize(("dtype", "least_db"), [(torch.float32, 60.0), (torch.bfloat16, 48.0)])
def test_on_gpu(name: str, dtype: torch.dtype, least_db: float) -> None:
    counts = COUNTS[name]
    x_RK, w_ENK, dy_RN, offsets_E = _operands(counts, dtype, "cuda")
    inputs = [x_RK.clone().requires_grad_(), w_ENK.clone().requires_grad_()]
    exact = [x_RK.double().requires_grad_(), w_ENK.double().requires_grad_()]
    y_RN, expected = grouped_mm(*inputs, offsets_E), _reference(*exact, counts)
    y_RN.backward(dy_RN)
    expected.backward(dy_RN.double())
    for value, reference in ((y_RN, expected), (inputs[0].grad, exact[0].grad), (inputs[1].grad, exact[1].grad)):
        if reference.numel() and reference.norm() > 0:
            assert _sqnr(value.detach(), reference.detach()) > least_db
        else:
            assert not value.any()
