"""Tables of model sizes, in Markdown: python -m titanmoe.metrics.model_sizes [--published]."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from titanmoe.metrics.flops import ParameterCount, num_parameters
from titanmoe.metrics.units import format_count
from titanmoe.models.family import FAMILIES, get_family
from titanmoe.models.spec import DecoderSpec, Dense, GroupedQuery, Latent, MoE


@dataclass(frozen=True)
class Published:
    """What the makers of a model say of its size, and what they count."""

    release: str
    family: str
    flavor: str
    total: str
    active: str = ""
    counted: str = "everything"
    total_embeddings: int = 2
    """How many of the two, input embedding and output projection, are in `total`."""
    active_embeddings: int = 2
    extra_layers: int = 0
    """Layers for predicting several tokens, which are not part of our models."""
    beside: int = 0
    """Parameters beside the language model."""


_VISION = 871_932_416
PUBLISHED = (
    Published("Qwen3-30B-A3B", "qwen3", "30B-A3B", "30.5B", "3.3B"),
    Published("Qwen3-235B-A22B", "qwen3", "235B-A22B", "235B", "22B"),
    Published("Qwen2.5-72B", "qwen2", "72B", "72.7B"),
    Published("Llama 3.1 8B", "llama3", "8B", "8.03B"),
    Published("Llama 3.1 70B", "llama3", "70B", "70.6B"),
    Published("Llama 3.1 405B", "llama3", "405B", "405B"),
    Published("Mixtral 8x7B", "mixtral", "8x7B", "46.7B", "12.9B"),
    Published("GLM-4.5-Air", "glm4_moe", "4.5-Air", "106B", "12B", "without embeddings", 0, 0),
    Published("GLM-4.5", "glm4_moe", "4.5", "355B", "32B", "without embeddings, with the MTP layer", 0, 0, 1),
    Published("GLM-4.7-Flash", "glm4_moe_lite", "4.7-Flash", "30B", "3B", "active: without embeddings", 2, 0),
    Published("DeepSeek-V2-Lite", "deepseek_v3", "16B", "15.7B", "2.4B", "active: without the input embedding", 2, 1),
    Published("DeepSeek-V2", "deepseek_v3", "236B", "236B", "21B", "active: without the input embedding", 2, 1),
    Published("DeepSeek-V3", "deepseek_v3", "671B", "671B", "37B", "active: without the input embedding", 2, 1),
    Published("gpt-oss-20b", "gpt_oss", "20b", "20.91B", "3.61B", "active: without the input embedding", 2, 1),
    Published("gpt-oss-120b", "gpt_oss", "120b", "116.83B", "5.13B", "active: without the input embedding", 2, 1),
    Published("Llama 4 Scout", "llama4", "17bx16e", "109B", "17B", "total: with the vision encoder", beside=_VISION),
    Published("Llama 4 Maverick", "llama4", "17bx128e", "400B", "17B"),
)
"""From model cards and technical reports. Some are rounded, some cut off: they agree with a count that differs by less
than one of the last digit given."""


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m titanmoe.metrics.model_sizes", description=__doc__)
    parser.add_argument(
        "--published", action="store_true", help="published figures beside ours, instead of all flavors"
    )
    rows = published_rows() if parser.parse_args(args).published else flavor_rows()
    for number, row in enumerate(rows):
        print(f"| {' | '.join(row)} |")
        if number == 0:
            print("|---" * len(row) + "|")


def flavor_rows() -> Iterator[tuple[str, ...]]:
    """A header, then a row of cells per flavor of every family."""
    yield "Family", "Flavor", "Layers", "Dim", "Heads", "Feed-forward", "Vocabulary", "Parameters", "Active"
    for family in FAMILIES:
        for flavor, spec in get_family(family).flavors.items():
            count = num_parameters(spec)
            sizes = f"{len(spec.layers)}", f"{spec.dim:,}", _heads(spec), _feed_forward(spec), f"{spec.vocab_size:,}"
            yield f"`{family}`", f"`{flavor}`", *sizes, format_count(count.total), format_count(count.active)


def published_rows() -> Iterator[tuple[str, ...]]:
    """A header, then a row of cells per entry of PUBLISHED."""
    yield "Release", "Flavor", "Published", "Here", "Active, published", "Here", "Counted"
    for entry in PUBLISHED:
        count = count_as_published(entry)
        totals = entry.total, _in_billions(count.total, entry.total)
        actives = (entry.active, _in_billions(count.active, entry.active)) if entry.active else ("", "")
        yield entry.release, f"`{entry.family}` `{entry.flavor}`", *totals, *actives, entry.counted


def count_as_published(entry: Published) -> ParameterCount:
    """Our parameters, counted in the way of the published figures."""
    spec = get_family(entry.family).flavor(entry.flavor)
    if entry.extra_layers:
        spec = replace(spec, layers=spec.layers + spec.layers[-1:] * entry.extra_layers)
    count, embedding = num_parameters(spec), spec.dim * spec.vocab_size
    # Each extra layer joins two hidden states, both normalised, by a projection, and has a norm of its own at the end.
    beside = entry.extra_layers * (2 * spec.dim**2 + 3 * spec.dim)
    return ParameterCount(
        count.total + beside - (2 - entry.total_embeddings) * embedding + entry.beside,
        count.active + beside - (2 - entry.active_embeddings) * embedding,
    )


def _in_billions(count: int, like: str) -> str:
    """With one digit more than the published figure, to show what it was made from."""
    decimals = len(like.rstrip("B").partition(".")[2])
    return f"{count / 1e9:.{decimals + 1}f}B"


def _heads(spec: DecoderSpec) -> str:
    """Heads and their channels; layers that see less than all of the document, or positions."""
    attentions = [layer.attention for layer in spec.layers]
    first = attentions[0]
    if isinstance(first, Latent):
        return f"{first.num_heads} of {first.qk_head_dim} / {first.v_head_dim}, latent {first.kv_lora_rank}"
    grouped = [attention for attention in attentions if isinstance(attention, GroupedQuery)]
    text = f"{first.num_heads} / {first.num_kv_heads} of {first.head_dim}"
    for word, sizes in (
        ("window", [attention.window for attention in grouped if attention.window]),
        ("chunk", [attention.chunk for attention in grouped if attention.chunk]),
    ):
        if sizes:
            text += f", {word} {sizes[0]:,} in {len(sizes)} layers"
    return text


def _feed_forward(spec: DecoderSpec) -> str:
    """E x H, top K (and what is always on), and the hidden dim of dense layers."""
    dense = [layer.feed_forward for layer in spec.layers if isinstance(layer.feed_forward, Dense)]
    experts = _first(layer.feed_forward for layer in spec.layers if isinstance(layer.feed_forward, MoE))
    if experts is None:
        return f"{dense[0].hidden_dim:,}"
    text = f"{experts.num_experts} x {experts.hidden_dim:,}, top {experts.top_k}"
    if experts.shared is not None:
        text += f", shared {experts.shared.hidden_dim:,}"
    return text + (f"; {dense[0].hidden_dim:,} in {len(dense)} layers" if dense else "")


def _first(experts: Iterable[MoE]) -> MoE | None:
    return next(iter(experts), None)


if __name__ == "__main__":
    main()
