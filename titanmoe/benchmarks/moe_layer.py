"""An MoE layer in low precision, and with frozen experts, beside bfloat16: python -m titanmoe.benchmarks.moe_layer.

Router, dispatch, experts, shared experts and combination, forward and backward, in one process, with the sizes of a
model's layer. In low precision are the experts and the linear layers of shared experts. Frozen are the experts alone:
they have no gradients of weights, which are a third of their FLOPs. With --bases they are stored in few bits, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from titanmoe.benchmarks import products
from titanmoe.benchmarks.device_timing import peak_bytes
from titanmoe.benchmarks.low_precision import BASES, build_base
from titanmoe.benchmarks.products import DTYPE, PLAIN, Row, Setting
from titanmoe.benchmarks.turns import ratio
from titanmoe.converters.frozen import Frozen
from titanmoe.converters.low_precision import LowPrecision
from titanmoe.models.family import get_family
from titanmoe.models.flops import layer_flops
from titanmoe.models.moe.experts import Experts
from titanmoe.models.moe.layer import MoELayer
from titanmoe.models.spec import LayerSpec, MoE
from titanmoe.ops.backends import Kind


@dataclass(frozen=True)
class Preset:
    """
    Attributes:
        num_tokens: per step.
        num_experts: of them in this process, where the model has too many for one; with its share of rows, since each
            token still chooses as many.
    """

    family: str
    flavor: str
    num_tokens: int
    num_experts: int | None = None


PRESETS = {
    "cpu": Preset("qwen3", "debugmodel_moe", 256, num_experts=16),
    "qwen3_30b_a3b": Preset("qwen3", "30B-A3B", 16_384),
    "glm4_5_air": Preset("glm4_moe", "4.5-Air", 16_384),
    "llama4": Preset("llama4", "17bx16e", 32_768),
    "deepseek_v3": Preset("deepseek_v3", "671B", 16_384, num_experts=32),
}
_KINDS: tuple[Kind, ...] = ("linear", "grouped_mm")
_IN_COMMON = 0.25


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m titanmoe.benchmarks.moe_layer", description=__doc__.splitlines()[0]
    )
    products.add_options(parser, ["grouped_mm"], list(PRESETS))
    parser.add_argument("--tokens", type=products.positive, nargs="+", help="per step")
    parser.add_argument("--bases", nargs="*", choices=BASES, default=[], help="formats of frozen experts")
    parser.add_argument("--experts", type=products.positive, help="in this process")
    options = parser.parse_args(args)

    def measure(setting: Setting) -> list[Row]:
        bases = {base: build_base(base, setting.device) for base in options.bases}
        name = products.choose_preset(options.preset, list(PRESETS), setting.device, options.tokens is not None)
        preset = PRESETS[name]
        dim, layer = layer_spec(preset, options.experts)
        all_tokens = options.tokens or [preset.num_tokens]
        return [row for num_tokens in all_tokens for row in _measure(layer, dim, num_tokens, setting, bases)]

    return products.run("moe_layer", options, _KINDS, measure)


def layer_spec(preset: Preset, num_experts: int | None = None) -> tuple[int, LayerSpec]:
    """The model's dim, and its first layer with experts, `num_experts` of them if it is given."""
    spec = get_family(preset.family).flavor(preset.flavor)
    layer = next(layer for layer in spec.layers if isinstance(layer.feed_forward, MoE))
    assert isinstance(layer.feed_forward, MoE)
    num_experts = num_experts or preset.num_experts or layer.feed_forward.num_experts
    return spec.dim, replace(layer, feed_forward=replace(layer.feed_forward, num_experts=num_experts))


def _measure(layer: LayerSpec, dim: int, num_tokens: int, setting: Setting, bases: Mapping[str, Frozen]) -> list[Row]:
    """A row with experts that learn, and one with frozen ones."""
    spec = layer.feed_forward
    assert isinstance(spec, MoE)
    shared = () if spec.shared is None else (spec.shared.hidden_dim,)
    formats, left_out = setting.fitting(dim, spec.hidden_dim, *shared)
    weights, x, dy = _inputs(dim, spec, num_tokens, setting.device)
    _, experts_TK = _layer(dim, spec, weights).router(x)
    num_rows_E = experts_TK.flatten().bincount(minlength=spec.num_experts)

    def call(converters: Sequence[LowPrecision | Frozen], is_frozen: bool) -> Callable[[], object]:
        from torchao.quantization import quantize_  # after titanmoe.converters, which imports it without its warnings

        module = _layer(dim, spec, weights)
        module.experts.requires_grad_(not is_frozen)
        for converter in converters:
            only = Experts if isinstance(converter, Frozen) else nn.Module
            quantize_(
                module,
                converter,
                filter_fn=lambda part, _, it=converter, only=only: it.may_change(part) and isinstance(part, only),
            )
        wanted = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
        return lambda: torch.autograd.grad(module(x), wanted, dy)

    contenders: dict[str, tuple[LowPrecision | Frozen, ...]] = {PLAIN: (), **formats}
    for name, base in bases.items():
        if why := base.misfit(_layer(dim, spec, weights).experts):
            left_out[name] = why
        else:
            contenders[name] = (base,)
    cases = [(is_frozen, name) for is_frozen in (False, True) for name in contenders if is_frozen or name not in bases]
    # Each alone, as if the others were not there.
    peaks = {case: peak_bytes(call(contenders[case[1]], case[0]), setting.device) for case in cases}
    calls = {_label(*case): call(contenders[case[1]], case[0]) for case in cases}
    seconds, matmul_rate = products.time_products(calls, setting)
    flops = layer_flops(layer, dim, num_tokens)
    rows = []
    for is_frozen in (False, True):
        forward = flops["router"] + flops.get("shared_experts", 0) + flops["experts"]
        total = num_tokens * (3 * forward - (flops["experts"] if is_frozen else 0))
        own = {name: seconds[_label(frozen, name)] for frozen, name in cases if frozen == is_frozen}
        row = {
            "size": {
                "tokens": num_tokens,
                "dim": dim,
                "hidden": spec.hidden_dim,
                "experts": spec.num_experts,
                "top_k": spec.top_k,
            },
            "weights": products.weights_of(is_frozen),
            "group_rows": {"min": int(num_rows_E.min()), "max": int(num_rows_E.max())},
            "left_out": left_out,
            **products.figures(own, total, matmul_rate),
        }
        for name, product in row["products"].items():
            product["peak_bytes"] = peaks[is_frozen, name]
            if name in bases:
                product["experts"] = bases[name].backend_of(_layer(dim, spec, weights).experts)
            elif is_frozen:
                product["of_trainable"] = ratio(own[name], seconds[_label(False, name)])
        rows.append(row)
    return rows


def _label(is_frozen: bool, name: str) -> str:
    return f"{products.weights_of(is_frozen)} {name}"


def _inputs(dim: int, spec: MoE, num_tokens: int, device: torch.device) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A layer's weights by name, tokens, and the gradient of what becomes of them. Always the same.

    Tokens have something in common, so that the router prefers some experts.
    """
    with torch.device("meta"):
        layer = MoELayer(dim, spec).to(DTYPE)
    layer.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for buffer in layer.buffers():
        buffer.zero_()
    for parameter in layer.parameters():
        parameter.data.normal_(0.0, 0.02, generator=generator)
    x, dy, common = (
        torch.randn(1, rows, dim, generator=generator, device=device, dtype=DTYPE)
        for rows in (num_tokens, num_tokens, 1)
    )
    return layer.state_dict(), (x + _IN_COMMON * common).requires_grad_(), dy


def _layer(dim: int, spec: MoE, weights: dict[str, Tensor]) -> MoELayer:
    """A layer of its own with these very tensors as parameters."""
    with torch.device("meta"):
        layer = MoELayer(dim, spec)
    layer.load_state_dict(weights, assign=True)
    return layer


if __name__ == "__main__":
    sys.exit(main())
