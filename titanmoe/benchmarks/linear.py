"""Linear layers in low precision, forward and backward, beside bfloat16: python -m titanmoe.benchmarks.linear [--json].

Sizes are those of a preset's linear layers, or any; FP8 with a scale per tensor or per row, and MXFP8.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from titanmoe.benchmarks import products
from titanmoe.benchmarks.products import DTYPE, PLAIN, Row, Setting, Size
from titanmoe.models.linear import LinearProduct
from titanmoe.ops.scaled_product import ScaledLinearProduct


def _sweep(tokens: Sequence[int], *weights: tuple[int, int]) -> tuple[Size, ...]:
    return tuple(Size(m, n, k) for m in tokens for n, k in weights)


# Outputs and inputs: queries; keys or values; output of attention; gate or up; down.
PRESETS = {
    "cpu": _sweep((512,), (512, 512), (1536, 512), (512, 1536)),
    "square": tuple(Size(side, side, side) for side in (1024, 2048, 4096, 8192, 16_384)),
    "llama3_8b": _sweep((8192, 32_768), (4096, 4096), (1024, 4096), (14_336, 4096), (4096, 14_336)),
    "qwen3_32b": _sweep((8192, 32_768), (8192, 5120), (1024, 5120), (5120, 8192), (25_600, 5120), (5120, 25_600)),
    "qwen3_30b_a3b": _sweep((8192, 32_768), (4096, 2048), (512, 2048), (2048, 4096)),
}


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m titanmoe.benchmarks.linear", description=__doc__.splitlines()[0])
    products.add_options(parser, ["linear"], list(PRESETS))
    products.add_dims(parser, m="tokens", n="output features", k="input features")
    options = parser.parse_args(args)

    def measure(setting: Setting) -> list[Row]:
        sizes = products.choose_sizes(options, PRESETS, setting.device)
        return [_measure(size, options.frozen, setting) for size in sizes]

    return products.run("linear", options, ["linear"], measure)


def _measure(size: Size, is_frozen: bool, setting: Setting) -> Row:
    formats, left_out = setting.fitting(size.n, size.k)
    contenders: dict[str, LinearProduct] = {PLAIN: F.linear}
    for name, (converter,) in formats.items():
        contenders[name] = ScaledLinearProduct(converter.kernels(), converter.rounds_weight_gradient)
    generator = torch.Generator(setting.device).manual_seed(0)
    x, w, dy = (
        torch.randn(shape, generator=generator, device=setting.device, dtype=DTYPE)
        for shape in ((size.m, size.k), (size.n, size.k), (size.m, size.n))
    )
    x.requires_grad_()
    w.requires_grad_(not is_frozen)
    wanted = [x] if is_frozen else [x, w]

    def call(product: LinearProduct) -> Callable[[], object]:
        return lambda: torch.autograd.grad(product(x, w, None), wanted, dy)

    calls = {name: call(product) for name, product in contenders.items()}
    return products.compare(size, is_frozen, calls, left_out, setting)


if __name__ == "__main__":
    sys.exit(main())
