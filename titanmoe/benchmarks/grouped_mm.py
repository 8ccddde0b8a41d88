"""Experts' products in low precision, forward and backward, beside bfloat16: python -m titanmoe.benchmarks.grouped_mm.

Sizes are those of torchao's tables and of models' experts, or any. Groups have the uneven numbers of rows that a router
gives them, and are padded to the multiple that each format wants, as the dispatcher does it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch

from titanmoe.benchmarks import products
from titanmoe.benchmarks.products import DTYPE, PLAIN, Row, Setting, Size
from titanmoe.ops.grouped_mm import GroupedProduct, PlainGroupedProduct
from titanmoe.ops.scaled_product import ScaledGroupedProduct


def _sweep(rows: Sequence[int], groups: Sequence[int], *weights: tuple[int, int]) -> tuple[Size, ...]:
    return tuple(Size(m, n, k, g) for m in rows for n, k in weights for g in groups)


# llama4 and deepseek_v3 are the tables of torchao's MoE training; of the others, gate and up as one product, and down,
# with the rows of 4,096 and of 16,384 tokens that choose 8 experts each.
PRESETS = {
    "cpu": _sweep((2048,), (8,), (512, 256), (256, 512)),
    "llama4": _sweep((16_640, 128_000), (1, 2, 4, 8, 16), (8192, 5120)),
    "deepseek_v3": _sweep((16_640, 128_000), (1, 2, 4, 8, 16), (2048, 7168)),
    "qwen3_30b_a3b": _sweep((32_768, 131_072), (128,), (1536, 2048), (2048, 768)),
    "glm4_5_air": _sweep((32_768, 131_072), (128,), (2816, 4096), (4096, 1408)),
}
_SPREAD = 0.5


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m titanmoe.benchmarks.grouped_mm", description=__doc__.splitlines()[0]
    )
    products.add_options(parser, ["grouped_mm"], list(PRESETS))
    products.add_dims(parser, m="rows of all groups", n="output features", k="input features", g="groups")
    parser.add_argument("--even", action="store_true", help="groups of equal size")
    options = parser.parse_args(args)

    def measure(setting: Setting) -> list[Row]:
        sizes = products.choose_sizes(options, PRESETS, setting.device)
        return [_measure(size, options.frozen, options.even, setting) for size in sizes]

    return products.run("grouped_mm", options, ["grouped_mm"], measure)


def group_sizes(num_rows: int, num_groups: int, is_even: bool) -> list[int]:
    """How many rows each group has: the same everywhere, or those that a router might give them, whose popularity is
    log-normal (a coefficient of variation of about a half). Always the same."""
    if is_even:
        return [num_rows // num_groups + (group < num_rows % num_groups) for group in range(num_groups)]
    generator = torch.Generator().manual_seed(0)
    popularity_G = torch.randn(num_groups, generator=generator).mul(_SPREAD).exp()
    choices = torch.multinomial(popularity_G, num_rows, replacement=True, generator=generator)
    counts: list[int] = torch.bincount(choices, minlength=num_groups).tolist()
    return counts


def _measure(size: Size, is_frozen: bool, is_even: bool, setting: Setting) -> Row:
    assert size.g is not None
    formats, left_out = setting.fitting(size.n, size.k)
    contenders: dict[str, GroupedProduct] = {PLAIN: PlainGroupedProduct()}
    for name, (converter,) in formats.items():
        contenders[name] = ScaledGroupedProduct(converter.kernels(), converter.rounds_weight_gradient)
    num_rows_G = group_sizes(size.m, size.g, is_even)
    device = setting.device
    aligns = {
        name: product.row_multiple(torch.empty(0, device=device, dtype=DTYPE), not is_frozen)
        for name, product in contenders.items()
    }
    most_rows = max(sum(_padded(num_rows_G, align)) for align in aligns.values())
    generator = torch.Generator(device).manual_seed(0)
    x, w, dy = (
        torch.randn(shape, generator=generator, device=device, dtype=DTYPE)
        for shape in ((most_rows, size.k), (size.g, size.n, size.k), (most_rows, size.n))
    )
    w.requires_grad_(not is_frozen)

    def call(name: str, product: GroupedProduct) -> Callable[[], object]:
        padded_G = torch.tensor(_padded(num_rows_G, aligns[name]))
        offsets_G, num_rows = padded_G.cumsum(0).int().to(device), int(padded_G.sum())
        own_x, own_dy = x[:num_rows].requires_grad_(), dy[:num_rows]
        wanted = [own_x] if is_frozen else [own_x, w]
        return lambda: torch.autograd.grad(product(own_x, w, offsets_G, num_rows), wanted, own_dy)

    calls = {name: call(name, product) for name, product in contenders.items()}
    row = products.compare(size, is_frozen, calls, left_out, setting)
    return row | {"group_rows": {"min": min(num_rows_G), "max": max(num_rows_G)}, "padded_to": aligns}


def _padded(num_rows_G: Sequence[int], align: int) -> list[int]:
    return [-(-num_rows // align) * align for num_rows in num_rows_G]


if __name__ == "__main__":
    sys.exit(main())
