"""Adapters as parameters of a model: their names, and what magnitudes are at first."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from titanmoe.models.linear import Linear
from titanmoe.models.moe.experts import Experts
from titanmoe.ops.low_rank import Adapted, LowRankGroupedProduct, LowRankLinearProduct

_PARTS = ("lora_a", "lora_b", "lora_magnitude")


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name is an adapter's."""
    return name.endswith(_PARTS)


@torch.no_grad()
def row_norms(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The first values of the module's own magnitudes, by name: norms of its weights, which must be there."""
    if isinstance(module, Linear) and isinstance(module.product, LowRankLinearProduct):
        yield from _norms("lora_magnitude", module.product, module.read(module))
    elif isinstance(module, Experts):
        products: dict[str, object] = {"gate_up": module.gate_up_product, "down": module.down_product}
        for weight, product in products.items():
            if isinstance(product, LowRankGroupedProduct):
                yield from _norms(f"{weight}_lora_magnitude", product, module.read(module, weight))


def _norms(
    name: str, product: LowRankLinearProduct | LowRankGroupedProduct, adapted: Adapted
) -> Iterator[tuple[str, Tensor]]:
    if adapted.magnitude is not None:
        product.norms = None
        yield name, product.base_norms(adapted)
