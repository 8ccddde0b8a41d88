"""Linear cross-entropy against float64 logits, and what it must not compute."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import run_ranks
from titanmoe.ops.linear_cross_entropy import linear_cross_entropy


def reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients in float64."""
    hidden, weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    loss = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))


def inputs(
    num_rows: int, dim: int, num_words: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows + num_words)
    hidden = torch.randn(num_rows, dim, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(num_words, dim, generator=generator) * (4 / dim**0.5)).to(dtype).requires_grad_()
    labels = torch.randint(num_words, (num_rows,), generator=generator)
    labels[torch.rand(num_rows, generator=generator) < 0.3] = -100
    return hidden, weight, labels


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want).norm() / want.norm().clamp_min(1e-30))


def sqnr(got: Tensor, want: Tensor) -> float:
    return float(20 * torch.log10(want.norm() / (got.detach().double() - want).norm()))


@pytest.mark.parametrize("chunk_rows", [None, 1, 7, 1000])
@pytest.mark.parametrize(("num_rows", "dim", "num_words"), [(1, 8, 5), (61, 33, 101), (40, 16, 3001)])
def test_float32_matches_float64(num_rows: int, dim: int, num_words: int, chunk_rows: int | None) -> None:
    hidden, weight, labels = inputs(num_rows, dim, num_words)
    labels[0] = 2
    want_loss, want_hidden, want_weight = reference(hidden, weight, labels)
    loss = linear_cross_entropy(hidden, weight, labels, chunk_rows=chunk_rows)
    (loss * 0.25).backward()
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert relative(loss, want_loss) < 1e-6
    assert relative(hidden.grad, want_hidden / 4) < 1e-5
    assert relative(weight.grad, want_weight / 4) < 1e-5
    assert not hidden.grad[labels == -100].any()


@pytest.mark.parametrize("chunk_rows", [None, 16])
def test_bfloat16_is_as_exact_as_its_inputs(chunk_rows: int | None) -> None:
    hidden, weight, labels = inputs(200, 64, 500, torch.bfloat16)
    want_loss, want_hidden, want_weight = reference(hidden, weight, labels)
    loss = linear_cross_entropy(hidden, weight, labels, chunk_rows=chunk_rows)
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert relative(loss, want_loss) < 1e-3
    assert sqnr(hidden.grad, want_hidden) > 45
    assert sqnr(weight.grad, want_weight) > 45


def test_bfloat16_weight_gradient_is_summed_in_float32_over_chunks() -> None:
    hidden, weight, labels = inputs(1024, 16, 50, torch.bfloat16)
    want = reference(hidden, weight, labels)[2]
    linear_cross_entropy(hidden, weight, labels, chunk_rows=1).backward()
    chunked = sqnr(weight.grad, want)
    weight.grad = None
    linear_cross_entropy(hidden, weight, labels, chunk_rows=4096).backward()
    assert chunked > sqnr(weight.grad, want) - 3  # 1024 roundings of the sum would cost 20 dB


def test_a_confident_token_keeps_its_gradient_in_bfloat16() -> None:
    hidden = torch.tensor([[1.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[8.0], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.tensor([0])).backward()
    missing = 1 / (1 + torch.e**8)  # 1 - p, below the resolution of bfloat16 at 1
    assert weight.grad.flatten().tolist() == pytest.approx([-missing, missing], rel=2**-8)


@pytest.mark.parametrize("device_like_cuda", [False, True])
def test_masking_equals_leaving_rows_out(device_like_cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the CPU, ignored rows are masked. They may hold anything, NaN included."""
    hidden, weight, labels = inputs(50, 12, 40)
    want_loss, want_hidden, want_weight = reference(hidden, weight, labels)
    with torch.no_grad():
        hidden[labels == -100] = float("nan")
    want_hidden[labels == -100] = 0
    if device_like_cuda:
        monkeypatch.setattr("titanmoe.ops.linear_cross_entropy._values_are_free", lambda tensor: False)
    loss = linear_cross_entropy(hidden, weight, labels, chunk_rows=16)
    loss.backward()
    assert relative(loss, want_loss) < 1e-6
    assert relative(hidden.grad, want_hidden) < 1e-5
    assert relative(weight.grad, want_weight) < 1e-5


@pytest.mark.parametrize("device_like_cuda", [False, True])
@pytest.mark.parametrize("num_rows", [0, 9])
def test_nothing_supervised(num_rows: int, device_like_cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if device_like_cuda:
        monkeypatch.setattr("titanmoe.ops.linear_cross_entropy._values_are_free", lambda tensor: False)
    hidden, weight, _ = inputs(num_rows, 4, 6)
    loss = linear_cross_entropy(hidden, weight, torch.full((num_rows,), -100))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.shape == hidden.shape and not hidden.grad.any()
    assert weight.grad.shape == weight.shape and not weight.grad.any()


class CountProducts(TorchDispatchMode):
    """Matrix products and the widest float32 tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_, torch.ops.aten.addmm)
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize(
    ("hidden_wants", "weight_wants", "grad_mode", "products"),
    [(True, True, True, 3), (True, False, True, 2), (False, True, True, 2), (True, True, False, 1)],
)
def test_only_wanted_products_are_computed(
    hidden_wants: bool, weight_wants: bool, grad_mode: bool, products: int
) -> None:
    hidden, weight, labels = inputs(64, 8, 50)
    hidden.requires_grad_(hidden_wants), weight.requires_grad_(weight_wants)
    with torch.set_grad_enabled(grad_mode), CountProducts() as counter:
        loss = linear_cross_entropy(hidden, weight, labels)
        if grad_mode:
            loss.backward()
    assert counter.products == products
    assert (hidden.grad is not None) == (hidden_wants and grad_mode)
    assert (weight.grad is not None) == (weight_wants and grad_mode)


def test_no_tensor_is_as_large_as_all_logits() -> None:
    hidden, weight, labels = inputs(512, 8, 3000)
    with CountProducts() as counter:
        linear_cross_entropy(hidden, weight, labels, chunk_rows=32).backward()
    assert counter.largest <= 32 * 3000


def test_gradients_flow_from_a_three_dimensional_view_and_from_other_uses() -> None:
    """Tied weights: what another use of the same leaf contributes is added."""
    hidden, weight, labels = inputs(12, 8, 20)
    labels[0] = 3
    _, want_hidden, want_weight = reference(hidden, weight, labels)
    hidden_BSD = hidden.detach().view(3, 4, 8).requires_grad_()
    (linear_cross_entropy(hidden_BSD.flatten(0, 1), weight, labels) + weight.sum()).backward()
    assert relative(hidden_BSD.grad.view(12, 8), want_hidden) < 1e-5
    assert relative(weight.grad, want_weight + 1) < 1e-5


def test_nan_propagates() -> None:
    hidden, weight, _ = inputs(6, 4, 10)
    with torch.no_grad():
        hidden[3, 1] = float("nan")
    loss = linear_cross_entropy(hidden, weight, torch.arange(6))
    loss.backward()
    assert loss.isnan()
    assert hidden.grad[3].isnan().all() and hidden.grad[[0, 1, 2, 4, 5]].isfinite().all()
    assert weight.grad.isnan().any()


def test_large_logits_do_not_overflow() -> None:
    hidden = torch.tensor([[1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    loss.backward()
    assert loss.item() == 2e4
    assert weight.grad.flatten().tolist() == [1e4, -1e4, 0]


@pytest.mark.parametrize("label", [10, -1, 2**40])
def test_label_out_of_range(label: int) -> None:
    hidden, weight, _ = inputs(3, 4, 10)
    with pytest.raises(IndexError, match=rf"label {label} is out of range: the vocabulary has 10 words"):
        linear_cross_entropy(hidden, weight, torch.tensor([0, label, -100]))


def test_wrong_shapes_and_dtypes() -> None:
    hidden, weight, labels = inputs(3, 4, 10)
    with pytest.raises(ValueError, match="must be"):
        linear_cross_entropy(hidden.view(1, 3, 4), weight, labels)
    with pytest.raises(ValueError, match="int64"):
        linear_cross_entropy(hidden, weight, labels[:2])
    with pytest.raises(ValueError, match="int64"):
        linear_cross_entropy(hidden, weight, labels.int())
    with pytest.raises(ValueError, match="must be equal"):
        linear_cross_entropy(hidden.bfloat16(), weight, labels)
    with pytest.raises(ValueError, match="at least 1"):
        linear_cross_entropy(hidden, weight, labels, chunk_rows=0)


def test_second_derivatives_and_second_backwards_are_refused() -> None:
    hidden, weight, _ = inputs(3, 4, 10)
    labels = torch.arange(3)
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), weight)
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gradients are gone"):
        loss.backward()


def test_under_fake_tensors_nothing_is_read() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        hidden = torch.empty(64, 8, requires_grad=True)
        weight = torch.empty(100, 8, requires_grad=True)
        loss = linear_cross_entropy(hidden, weight, torch.empty(64, dtype=torch.int64))
        loss.backward()
        assert loss.shape == () and weight.grad.shape == (100, 8)


def test_compiled_gives_the_same() -> None:
    hidden, weight, labels = inputs(24, 8, 30)
    want_loss, want_hidden, want_weight = reference(hidden, weight, labels)

    def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(hidden * 2, weight, labels, chunk_rows=10) * 0.5

    loss = torch.compile(step, backend="aot_eager")(hidden / 2, weight, labels)
    loss.backward()
    assert relative(loss, want_loss / 2) < 1e-6
    assert relative(hidden.grad, want_hidden / 2) < 1e-5
    assert relative(weight.grad, want_weight / 2) < 1e-5


class Head(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, self.weight, labels)


def _sharded_gradient(rank_rows: int) -> tuple[Tensor, Tensor]:
    hidden, weight, labels = inputs(2 * rank_rows, 8, 31)
    head = fully_shard(Head(weight))
    head.set_gradient_divide_factor(1.0)
    head.set_force_sum_reduction_for_comms(True)
    rank = torch.distributed.get_rank()
    rows = slice(rank * rank_rows, (rank + 1) * rank_rows)
    loss = head(hidden.detach()[rows], labels[rows])
    loss.backward()
    assert isinstance(head.weight.grad, DTensor)
    return loss.detach(), head.weight.grad.full_tensor()


def test_fsdp2_shards_the_weight_gradient() -> None:
    hidden, weight, labels = inputs(20, 8, 31)
    want_loss, _, want_weight = reference(hidden, weight, labels)
    results = run_ranks(_sharded_gradient, 2, 10)
    assert relative(results[0][0] + results[1][0], want_loss) < 1e-6
    assert all(relative(grad, want_weight) < 1e-5 for _, grad in results)
