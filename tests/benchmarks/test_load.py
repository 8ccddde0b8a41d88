"""The loading benchmark: what it writes is a checkpoint, what it prints adds up, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from titanmoe.benchmarks import load


@pytest.mark.parametrize("layout", ["per-expert", "stacked", "fp8"])
def test_it_writes_loads_reports_and_cleans_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(load, "_SHARD_BYTES", 20_000_000)
    arguments = ["--gigabytes", "0.02", "--rounds", "2", "--layout", layout, "--folder", str(tmp_path), "--json"]
    assert load.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    # Attention's four matrices come on top of what is asked for.
    assert 0.02 < report["gigabytes"] < 0.1
    assert report["num_files"] > 1
    assert report["layout"] == layout
    rates = [read / loaded for read, loaded in zip(report["seconds_read"], report["seconds_load"], strict=True)]
    assert report["load_of_read_rate"]["min"] == min(rates)
    assert not list(tmp_path.iterdir())


def test_the_table_says_where_files_stayed_in_the_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(load.os, "posix_fadvise")
    assert load.main(["--gigabytes", "0.01", "--rounds", "1", "--folder", str(tmp_path)]) == 0
    assert "NOT dropped from the page cache" in capsys.readouterr().out


def test_the_default_is_about_four_gigabytes_of_qwen3_s_widths() -> None:
    spec = load._spec(4e9)
    experts = spec.layers[0].feed_forward
    assert (spec.dim, experts.hidden_dim) == (2048, 768)
    assert len(spec.layers) > 1
    num_values = 2 * spec.vocab_size * spec.dim + len(spec.layers) * experts.num_experts * 3 * 768 * 2048
    assert num_values * 2 == pytest.approx(4e9, rel=0.01)
