"""A product, tried: `python -m titanmoe.ops.trial NAME KIND FORMAT DEVICE` prints why not to take it, or "".

It runs as it does in training, forward and backward, on sizes and numbers of rows as they occur there, in memory full
of NaN, and is compared with float32. What fails silently is looked for: experts without rows, rows that are of no
expert (a tail), and memory that is read before it is written. One with frozen weights must also be faster than
dequantising them.

Shape suffixes: R rows (sorted by expert), E experts, N output features, K input features.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from titanmoe.ops.backends import BACKENDS, Kind, on_device
from titanmoe.ops.float8 import Scaling
from titanmoe.ops.frozen_backends import NATIVE
from titanmoe.ops.frozen_formats import format_named
from titanmoe.ops.frozen_trial import OfPlainWeights, slowness
from titanmoe.ops.grouped_mm import GroupedProduct, PlainGroupedProduct, expert_rows
from titanmoe.ops.scaled_product import ScaledGroupedProduct, ScaledLinearProduct

LIMIT = {"bfloat16": 40.0, "float8": 25.0, "mx": 25.0}
"""The least signal-to-noise ratio, in dB. Right ones have 55, 28.5, and 27.4 where scales are rounded down."""

_SCALINGS = {  # all that the job config can ask for
    ("linear", "float8"): (Scaling("tensor"), Scaling("row")),
    ("grouped_mm", "float8"): (Scaling("row"),),
    ("linear", "mx"): (Scaling("block"), Scaling("block", "down")),
    ("grouped_mm", "mx"): (Scaling("block"),),
}
_NUM_ROWS = (300, 0, 129, 1000, 17, 256, 0, 64, 513, 0, 128, 77)
_NUM_FEATURES = (1536, 1024)  # N, K
_NUM_TAIL_ROWS = 256
_NUM_FREE = 1 << 27  # values of free memory that are overwritten
_NAMES = ("y", "dx", "dw")


def failure(name: str, kind: str, number_format: str, device: torch.device) -> str:
    """Why a backend's products are not right; "" if they are. The "torch" of experts in bfloat16 is one, too."""
    if number_format == "bfloat16":
        assert (name, kind) == ("torch", "grouped_mm")
        return try_grouped(PlainGroupedProduct("torch"), device, LIMIT[number_format])
    if number_format.startswith("float8-"):
        return _frozen_failure(kind, number_format, device)  # type: ignore[arg-type]
    (backend,) = (it for it in BACKENDS[kind, number_format] if it.name == name)  # type: ignore[index]
    for scaling in _SCALINGS[kind, number_format]:
        kernels = on_device(backend, device).kernels(scaling)
        if kind == "linear":
            found = try_linear(ScaledLinearProduct(kernels), device, LIMIT[number_format])
        else:
            found = try_grouped(ScaledGroupedProduct(kernels), device, LIMIT[number_format])
        if found:
            return f"{found}, with a scale for each {scaling.shared_by}"
    return ""


def _frozen_failure(kind: Kind, format_name: str, device: torch.device) -> str:
    kernels, format = NATIVE[kind, format_name][1](), format_named(format_name)
    product = OfPlainWeights(kind, format, kernels)
    attempt: Callable[..., str] = try_linear if kind == "linear" else try_grouped
    found = attempt(product, device, LIMIT["float8"], trains=False)
    return found or slowness(kind, format, kernels, device)


def try_linear(
    product: Callable[[Tensor, Tensor], Tensor], device: torch.device, limit: float, trains: bool = True
) -> str:
    """One weight for all rows, whose number is no multiple of 16.

    Args:
        trains: whether there is a gradient of the weight.
    """
    num_rows = sum(_NUM_ROWS) + 4
    x_RK, w_NK, dy_RN = _operands(num_rows, None, device)
    _poison(device)
    y_RN = product(x_RK, w_NK)
    gradients = torch.autograd.grad(y_RN, (x_RK, w_NK)[: 1 + trains], dy_RN)
    x, w, dy = x_RK.detach().float(), w_NK.detach().float(), dy_RN.float()
    pairs = zip((y_RN, *gradients), (x @ w.t(), dy @ w, dy.t() @ x), strict=False)
    return _compare(dict(zip(_NAMES, pairs, strict=False)), limit)


def try_grouped(product: GroupedProduct, device: torch.device, limit: float, trains: bool = True) -> str:
    """Experts of very different numbers of rows, some without; then all rows at one expert."""
    num_experts = len(_NUM_ROWS)
    return _try_groups(product, _NUM_ROWS, device, limit, trains) or _try_groups(
        product, (*([0] * (num_experts - 1)), sum(_NUM_ROWS)), device, limit, trains
    )


def _try_groups(
    product: GroupedProduct, num_rows: tuple[int, ...], device: torch.device, limit: float, trains: bool
) -> str:
    multiple = product.row_multiple(torch.empty(0, dtype=torch.bfloat16, device=device), trains)
    num_rows = tuple(-(-number // multiple) * multiple for number in num_rows)
    offsets_E = torch.tensor(num_rows, device=device).cumsum(0, dtype=torch.int32)
    end = sum(num_rows)
    x_RK, w_ENK, dy_RN = _operands(end + _NUM_TAIL_ROWS, len(num_rows), device)
    for rows in (x_RK.data, dy_RN):
        rows[end:] = math.nan
    _poison(device)
    y_RN = product(x_RK, w_ENK, offsets_E)
    found = dict(zip(_NAMES, (y_RN, *torch.autograd.grad(y_RN, (x_RK, w_ENK)[: 1 + trains], dy_RN)), strict=False))
    x, w, dy = x_RK.detach().float(), w_ENK.detach().float(), dy_RN.float()
    expected = {"y": torch.zeros_like(y_RN, dtype=torch.float32), "dx": torch.zeros_like(x), "dw": torch.zeros_like(w)}
    for expert, group in expert_rows(offsets_E):
        expected["y"][group] = x[group] @ w[expert].t()
        expected["dx"][group] = dy[group] @ w[expert]
        expected["dw"][expert] = dy[group].t() @ x[group]
    for name in ("y", "dx"):
        if found[name][end:].count_nonzero():
            return f"{name} is not zero in rows of no expert"
    empty = torch.tensor([number == 0 for number in num_rows], device=device)
    if trains and found["dw"][empty].count_nonzero():
        return "dw is not zero for an expert without rows"
    return _compare({name: (tensor, expected[name]) for name, tensor in found.items()}, limit)


def _operands(num_rows: int, num_experts: int | None, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    num_outputs, num_inputs = _NUM_FEATURES
    shapes = ((num_rows, num_inputs), (num_outputs, num_inputs), (num_rows, num_outputs))
    x, w, dy = (
        torch.randn(*([num_experts] if place == 1 and num_experts else []), *shape, generator=generator, device=device)
        for place, shape in enumerate(shapes)
    )
    x, w, dy = x.bfloat16(), (w * num_inputs**-0.5).bfloat16(), (dy * 1e-3).bfloat16()
    return x.requires_grad_(), w.requires_grad_(), dy


def _poison(device: torch.device) -> None:
    """Fill free memory with NaN."""
    torch.full((_NUM_FREE,), math.nan, dtype=torch.bfloat16, device=device)


def _compare(pairs: dict[str, tuple[Tensor, Tensor]], limit: float) -> str:
    for name, (found, expected) in pairs.items():
        noise = (found.detach().double() - expected.double()).norm()
        ratio = float(20 * torch.log10(expected.double().norm() / noise))
        if not ratio >= limit:  # NaN is not
            return f"{name} has a signal-to-noise ratio of {ratio:.1f} dB, less than {limit:g}"
    return ""


def main(name: str, kind: str, number_format: str, device: str) -> None:
    # Several GPUs in this process are one; what it is compared with is not to be rounded itself.
    torch.cuda.set_device(torch.device(device))
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        found = failure(name, kind, number_format, torch.device(device))
        torch.cuda.synchronize()
    except Exception as error:  # whatever it is, it is the answer
        found = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
