from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from titanmoe.config.errors import ConfigError
from titanmoe.metrics.chart import Axis, Series, downsample, line_chart, nice_ticks
from titanmoe.metrics.report import main, render, summary, write_report

SPACE = "{http://www.w3.org/1999/xhtml}"


def record(step, **values):
    return {
        "step": step,
        "loss": 10 - step / 10,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens_per_second": 1e4,
        "mfu": None,
    } | values


def save(folder, records, cut=""):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records) + cut)


def charts(page):
    """{title: svg element} of a page, which must be well-formed XML."""
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    return {svg.get("aria-label"): svg for svg in root.iter(f"{SPACE}svg")}


def line_points(svg, name):
    return sum(len(line.get("points").split()) for line in svg.iter(f"{SPACE}polyline") if line.get("class") == name)


def test_the_page_has_every_point_and_no_link_to_elsewhere(tmp_path):
    records = []
    for step in range(1, 31):
        records.append(record(step, expert_load_cv=0.5, expert_load_max_mean=2.0, dead_experts=1, peak_memory_gib=3.0))
        if step % 10 == 0:
            records.append({"step": step, "validation_loss": 9.5})
    save(tmp_path, records)
    (tmp_path / "config.toml").write_text('[model]\nname = "<qwen3> & more"\n')
    page = write_report(tmp_path).read_text()
    found = charts(page)
    assert list(found) == [
        "Loss",
        "Gradient norm",
        "Learning rate",
        "Tokens per second",
        "Expert load",
        "Dead experts",
        "Peak memory (GiB)",
    ]
    assert line_points(found["Loss"], "series0") == 30 and line_points(found["Loss"], "series1") == 3
    assert line_points(found["Expert load"], "series1") == 30
    hover = json.loads(found["Loss"].get("data-series"))
    assert [(one["name"], len(one["points"])) for one in hover] == [("training", 30), ("validation", 3)]
    assert hover[0]["points"][0][2:] == ["1", "9.9"]
    assert "&lt;qwen3&gt; &amp; more" in page
    assert not re.search(r"(src|href|url|@import)\s*[=(]", page), "nothing is fetched from elsewhere"
    assert re.findall(r"https?://[^\"' ]+", page) == ["http://www.w3.org/1999/xhtml", "http://www.w3.org/2000/svg"]
    assert "prefers-color-scheme: dark" in page
    assert not list(tmp_path.glob("*.tmp"))


def test_html_parsers_see_the_same_structure(tmp_path):
    class Counter(HTMLParser):
        count = 0

        def handle_starttag(self, tag, attrs):
            self.count += tag == "svg"

    save(tmp_path, [record(1), record(2)])
    parser = Counter()
    parser.feed(write_report(tmp_path).read_text())
    assert parser.count == 4


def test_a_hundred_thousand_points_stay_small_and_keep_their_spikes(tmp_path):
    records = [record(step, loss=2 + math.sin(step / 999) / 10) for step in range(1, 100_001)]
    records[54_321]["loss"] = 77.0
    page = render("run", records, [], None)
    assert len(page) < 700_000
    loss = charts(page)["Loss"]
    assert 1000 < line_points(loss, "series0") <= 2000
    values = [point[3] for point in json.loads(loss.get("data-series"))[0]["points"]]
    assert "77" in values


def test_gaps_marks_and_unreadable_lines(tmp_path):
    records = [record(step) for step in range(1, 11)]
    records[4] |= {"loss": None, "nonfinite": ["loss"]}
    save(tmp_path, records, cut='{"step": 11, "lo')
    page = write_report(tmp_path).read_text()
    loss = charts(page)["Loss"]
    lines = [len(line.get("points").split()) for line in loss.iter(f"{SPACE}polyline")]
    assert lines == [4, 5], "a missing value parts the line"
    assert [line.get("class") for line in loss.iter(f"{SPACE}line")].count("mark") == 1
    assert "loss at step 5" in page and "1 of metrics.jsonl, left out" in page


@pytest.mark.parametrize(
    "records",
    [[], [record(1)], [record(1, loss=None, nonfinite=["loss"])], [{"step": 0, "validation_loss": 1.0}]],
)
def test_few_records_make_a_page(tmp_path, records):
    save(tmp_path, records)
    found = charts(write_report(tmp_path).read_text())
    assert ("Loss" in found) == any(one.get("loss") or one.get("validation_loss") for one in records)


def test_the_summary():
    records = [
        record(1, tokens_per_second=10.0, peak_memory_gib=1.0),
        *(record(step, tokens_per_second=step * 100.0, tokens_seen=step * 1000, mfu=0.25) for step in (2, 3, 4)),
        {"step": 2, "validation_loss": 5.0},
        {"step": 3, "validation_loss": 4.0},
        {"step": 4, "validation_loss": 4.5},
    ]
    assert summary(records, []) == {
        "Steps": "4",
        "Tokens": "4.00k",
        "Loss": "9.9000 at step 1, 9.6000 at step 4",
        "Validation loss": "5.0000 at step 2, 4.5000 at step 4, best 4.0000 at step 3",
        "Median tokens/s": "300",
        "Median MFU": "25.0%",
        "Peak memory": "1.00 GiB per device",
    }


def test_missing_and_unwritable_folders(tmp_path, capsys):
    with pytest.raises(ConfigError, match="no such file"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match="directory"):
        write_report(tmp_path)
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_the_command(tmp_path):
    save(tmp_path, [record(1), record(2)])
    command = [sys.executable, "-m", "titanmoe.metrics.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith(f"wrote {tmp_path / 'report.html'}") and done.stderr == ""
    assert charts((tmp_path / "report.html").read_text())


def test_downsample_keeps_extremes_ends_order_and_gaps():
    points = [(float(x), math.sin(x)) for x in range(10_000)]
    points[1234], points[7777] = (1234.0, 50.0), (7777.0, -50.0)
    points[5000:6000] = [(float(x), None) for x in range(5000, 6000)]
    kept = downsample(points, 100)
    assert len(kept) <= 400 and kept[0] == points[0] and kept[-1] == points[-1]
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert (1234.0, 50.0) in kept and (7777.0, -50.0) in kept
    assert sum(value is None for _, value in kept) == 10
    assert set(kept) <= set(points)
    assert downsample(points[:400], 100) == points[:400]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (1.5, 9.1, [2, 4, 6, 8]),
        (0, 3e-4, [0, 1e-4, 2e-4, 3e-4]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (100_000, 100_001, [100_000, 100_000.2, 100_000.4, 100_000.6, 100_000.8, 100_001]),
    ],
)
def test_ticks_are_round(low, high, ticks):
    assert nice_ticks(low, high, 4) == pytest.approx(ticks)


def test_a_log_axis():
    axis = Axis(-1, 2, 100.0, 0.0, is_log=True)
    assert axis.px(0.1) == 100 and axis.px(100) == 0 and axis.px(10) == pytest.approx(33.3)
    assert axis.ticks(4) == pytest.approx([0.1, 1, 10, 100])
    series = [Series("norm", [(1, 0.1), (2, 100.0)])]
    assert "(log scale)" in line_chart("Norm", series, label=str, log_if_wide=True)
    with_zero = [Series("norm", [(1, 0.0), (2, 100.0)])]
    assert "(log scale)" not in line_chart("Norm", with_zero, label=str, log_if_wide=True)


def test_flat_and_zero_curves_have_a_scale():
    for value in (0.0, 5.0, -3.0):
        svg = line_chart("Flat", [Series("flat", [(1, value), (2, value)])], label=str)
        assert "nan" not in svg and "inf" not in svg
        assert svg.count('class="grid"') >= 1
