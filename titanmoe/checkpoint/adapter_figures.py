"""What the values of adapters are like, in a few figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from torch import Tensor

from titanmoe.ops.sharding import local_tensor


@dataclass(frozen=True)
class Figures:
    """Of the values of a tensor. Quartiles are values of it: those nearest to their places in order."""

    shape: tuple[int, ...]
    mean: float
    std: float
    min: float
    quartile1: float
    median: float
    quartile3: float
    max: float

    @staticmethod
    def of(tensor: Tensor) -> Figures:
        values = local_tensor(tensor.detach()).float().flatten().sort().values
        in_order = (values[round(part * (len(values) - 1))].item() for part in (0, 0.25, 0.5, 0.75, 1))
        return Figures(tuple(tensor.shape), values.mean().item(), values.std(correction=0).item(), *in_order)


def table(before: Mapping[str, Figures] | None, after: Mapping[str, Figures]) -> Iterator[str]:
    """Lines: two for each tensor, before training and after it; one if what was before is not known."""
    titles = ("mean", "std", "min", "quartile 1", "median", "quartile 3", "max")
    yield f"{'parameter':<52} {'shape':<18} {'':<6} " + " ".join(f"{title:>10}" for title in titles)
    for name, found in after.items():
        head = f"{name:<52} {' x '.join(map(str, found.shape)):<18}"
        for title, figures in (("before", before and before.get(name)), ("after", found)):
            if figures:
                values = [value for key, value in asdict(figures).items() if key != "shape"]
                yield f"{head} {title:<6} " + " ".join(f"{value:>10.3g}" for value in values)
                head = " " * len(head)
