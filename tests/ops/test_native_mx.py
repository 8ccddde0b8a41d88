"""MX kernels: what is passed to torchao's, as far as can be told without their hardware; their numbers with it.

The stand-ins are no kernels: they check that the installed torchao takes the arguments that it gets, and give tensors
of the layouts that its kernels give, which torch's own checks of products then see.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.native import Operands, needs_capability, poison, random_operands
from titanmoe.ops.emulated import EmulatedKernels
from titanmoe.ops.float8 import Scaling
from titanmoe.ops.native_mx import MXGroupedKernels, MXLinearKernels, missing_packages
from titanmoe.ops.quiet_import import import_quietly

UP, DOWN = Scaling("block"), Scaling("block", "down")
K, N = 256, 384
FORMATS = "torchao.prototype.mx_formats.kernels"
EXPERTS = "torchao.prototype.moe_training.kernels.mxfp8"


def codes(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float8_e4m3fn, device="meta")


def scales(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float8_e8m0fnu, device="meta")


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def triton_to_mxfp8_dim0(x: Tensor, inner_block_size: int, scaling_mode: str) -> tuple[Tensor, Tensor]:
    assert x.is_contiguous() and x.dtype == torch.bfloat16 and inner_block_size == 32
    return codes(*x.shape), scales(*x.shape[:-1], x.shape[-1] // 32)


def mxfp8_quantize_cuda(x: Tensor, rowwise: bool, colwise: bool, scaling_mode: str) -> tuple[Tensor, ...]:
    assert x.dim() == 2 and x.shape[0] % 32 == x.shape[1] % 32 == 0 and colwise and not rowwise
    rows, columns = x.shape
    return codes(0), codes(columns, rows).t(), scales(0), scales(rows // 32, columns).t()


def triton_mx_block_rearrange(scale_tensor: Tensor) -> Tensor:
    return scales(padded(scale_tensor.shape[0], 128), padded(scale_tensor.shape[1], 4))


def triton_mx_block_rearrange_per_group_3d(scale_tensor: Tensor) -> Tensor:
    experts, rows, columns = scale_tensor.shape
    return scales(experts, padded(rows, 128) * padded(columns, 4))


def triton_mx_block_rearrange_2d_K_groups(scales_tensor: Tensor, input_offsets: Tensor) -> Tensor:
    assert input_offsets.dtype == torch.int32
    rows, columns = scales_tensor.shape
    return scales(padded(rows, 128), columns + 4 * input_offsets.shape[0])


def mxfp8_quantize_2d_1x32_cutedsl(x: Tensor, scaling_mode: str, offs: Tensor) -> tuple[Tensor, Tensor]:
    assert x.shape[0] % 128 == x.shape[1] % 128 == 0 and offs.dtype == torch.int32
    return torch.ops.torchao.mxfp8_quantize_2d_1x32_cutedsl(x, 32, scaling_mode, 2, offs)  # torchao's own on meta


def mxfp8_quantize_cuda_3d(
    x: Tensor, block_size: int, scale_block_dim1: int, scale_block_dim2: int, scaling_mode: str
) -> tuple[Tensor, Tensor]:
    return torch.ops.torchao.mxfp8_quantize_3d_cutedsl(x, block_size, scale_block_dim1, scale_block_dim2, scaling_mode)


STAND_INS = {
    FORMATS: (triton_to_mxfp8_dim0, mxfp8_quantize_cuda, triton_mx_block_rearrange),
    EXPERTS: (
        triton_mx_block_rearrange_per_group_3d,
        triton_mx_block_rearrange_2d_K_groups,
        mxfp8_quantize_2d_1x32_cutedsl,
        mxfp8_quantize_cuda_3d,
    ),
}


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The scaling modes that torchao's kernels are asked for."""
    asked: set[str] = set()

    def checked(stand_in: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def called(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs).arguments
            asked.update(filter(None, [bound.get("scaling_mode")]))
            return stand_in(**bound)

        return called

    for module_name, stand_ins in STAND_INS.items():
        module = import_quietly(module_name)
        for stand_in in stand_ins:
            original = getattr(module, stand_in.__name__)
            monkeypatch.setattr(module, stand_in.__name__, checked(stand_in, original))
    yield asked


def on_meta(operands: Operands) -> Operands:
    return Operands(*(tensor.to("meta") for tensor in (operands.x, operands.w, operands.dy)), operands.num_rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_rows", [(128, 0, 256, 128), (0, 0), (384,)])
def test_torch_and_torchao_take_the_layouts_of_experts(
    modes: set[str], num_rows: tuple[int, ...], dtype: torch.dtype
) -> None:
    operands = on_meta(random_operands(num_rows, K, N, dtype=dtype, tail=128))
    found = operands.computed_by(MXGroupedKernels(UP))
    assert modes == {"rceil"}
    assert [tuple(tensor.shape) for tensor in vars(found).values()] == [
        (operands.x.shape[0], N),
        tuple(operands.x.shape),
        (len(num_rows), N, K),
    ]


@pytest.mark.parametrize(("scaling", "mode"), [(UP, "rceil"), (DOWN, "floor")])
@pytest.mark.parametrize("rows", [128, 200, 37])
def test_torch_and_torchao_take_the_layouts_of_a_linear_layer(
    modes: set[str], rows: int, scaling: Scaling, mode: str
) -> None:
    found = on_meta(random_operands(rows, K, N)).computed_by(MXLinearKernels(scaling))
    assert modes == {mode}
    assert [tuple(tensor.shape) for tensor in vars(found).values()] == [(rows, N), (rows, K), (N, K)]


def test_ranks_without_rows_have_products_and_gradients(modes: set[str]) -> None:
    kernels, offsets = MXGroupedKernels(UP), torch.zeros(2, dtype=torch.int32, device="meta")
    rows, w = torch.empty(0, K, dtype=torch.bfloat16, device="meta"), torch.empty(2, N, K, device="meta")
    found = kernels.multiply(kernels.quantize_rows(rows, offsets), kernels.quantize_weights(w, "in"), "in", offsets, 0)
    assert found.shape == (0, N)
    assert kernels.weight_gradient(rows.new_empty(0, N), rows, offsets).shape == (2, N, K)


def test_groups_that_are_not_padded_are_an_error() -> None:
    operands = random_operands((96, 160), K, N)
    with pytest.raises(RuntimeError, match="multiples of 128"):
        MXGroupedKernels(UP).quantize_rows(operands.x, operands.offsets)
    assert [MXGroupedKernels(UP).row_multiple(trains) for trains in (True, False)] == [128, 128]


def test_missing_packages_have_names() -> None:
    assert all(isinstance(name, str) for name in missing_packages())


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [(384, 0, 128, 1024, 256, 0, 512), (0, 0, 2048, 0), (2048, 0, 0, 0)])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(1024, 1536), (2048, 768)])
def test_experts_on_a_gpu(num_rows: tuple[int, ...], num_inputs: int, num_outputs: int) -> None:
    needs_capability((10, 0), (10, 9))
    if missing_packages():
        pytest.skip(f"torchao needs {', '.join(missing_packages())}")
    operands = random_operands(num_rows, num_inputs, num_outputs, "cuda", tail=512)
    expected = operands.exact()
    poison("cuda")
    found = operands.computed_by(MXGroupedKernels(UP))
    assert min(found.decibels_to(expected).values()) > 27, found.decibels_to(expected)
    emulated = operands.computed_by(EmulatedKernels(UP))
    assert min(found.decibels_to(emulated).values()) > 40, found.decibels_to(emulated)
    assert not found.y[sum(num_rows) :].any() and not found.dx[sum(num_rows) :].any()
    assert not found.dw[[number == 0 for number in num_rows]].any()


@pytest.mark.gpu
@pytest.mark.parametrize(("scaling", "limit"), [(UP, 27), (DOWN, 25)])
@pytest.mark.parametrize("rows", [2048, 1000])
def test_linear_layers_on_a_gpu(scaling: Scaling, limit: float, rows: int) -> None:
    needs_capability((10, 0), (10, 9))
    operands = random_operands(rows, 1024, 1536, "cuda")
    expected = operands.exact()
    poison("cuda")
    found = operands.computed_by(MXLinearKernels(scaling))
    assert min(found.decibels_to(expected).values()) > limit, found.decibels_to(expected)
    emulated = operands.computed_by(EmulatedKernels(scaling))
    assert min(found.decibels_to(emulated).values()) > 40, found.decibels_to(emulated)
