"""Parameters of every flavor: as many as the built model has, and as many as its makers publish."""

from __future__ import annotations

from math import prod

import pytest

from titanmoe.metrics.flops import num_parameters
from titanmoe.metrics.model_sizes import PUBLISHED, Published, count_as_published, main
from titanmoe.models.build import build_model
from titanmoe.models.family import FAMILIES, get_family
from titanmoe.models.spec import MoE

_FLAVORS = [(family, flavor) for family in FAMILIES for flavor in get_family(family).flavors]


@pytest.mark.parametrize(("family", "flavor"), _FLAVORS)
def test_counts_are_those_of_the_built_model(family: str, flavor: str) -> None:
    spec = get_family(family).flavor(flavor)
    total = active = 0
    for name, parameter in build_model(spec, device="meta").named_parameters():
        total += parameter.numel()
        if ".moe.experts." in name:
            moe = spec.layers[int(name.split(".")[1])].feed_forward
            assert isinstance(moe, MoE) and parameter.shape[0] == moe.num_experts
            active += moe.top_k * prod(parameter.shape[1:])
        else:
            active += parameter.numel()
    count = num_parameters(spec)
    assert (count.total, count.active) == (total, active)


def _agrees(published: str, count: int) -> bool:
    """Less than one of the last digit apart: some figures are rounded, some cut off."""
    decimals = len(published.removesuffix("B").partition(".")[2])
    return abs(float(published.removesuffix("B")) - count / 1e9) < 10**-decimals


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: entry.release)
def test_published_figures_agree(entry: Published) -> None:
    count = count_as_published(entry)
    assert entry.total.endswith("B") and _agrees(entry.total, count.total)
    if entry.active:
        assert _agrees(entry.active, count.active)
    else:
        assert count.active == count.total


def test_agreement_is_not_given_away() -> None:
    assert _agrees("30.5B", 30_532_122_624) and not _agrees("30.5B", 30_700_000_000)
    assert _agrees("405B", 405_850_000_000) and not _agrees("405B", 406_100_000_000)
    assert not _agrees("8.03B", 8_010_000_000)


def test_every_family_with_a_release_has_a_published_figure() -> None:
    assert {entry.family for entry in PUBLISHED} == set(FAMILIES)


@pytest.mark.parametrize("args", [[], ["--published"]])
def test_the_command_prints_a_table(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(args)
    header, rule, *rows = capsys.readouterr().out.splitlines()
    assert {line.count("|") for line in (header, rule, *rows)} == {header.count("|")}
    assert len(rows) == (len(PUBLISHED) if args else len(_FLAVORS))


def test_kinds_of_layers_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    text = capsys.readouterr().out
    assert (
        "| `gpt_oss` | `20b` | 24 | 2,880 | 64 / 8 of 64, window 128 in 12 layers | 32 x 2,880, top 4 | 201,088 |"
        in text
    )
    assert "128 x 8,192, top 1, shared 8,192; 16,384 in 24 layers" in text
