"""report.html: one file that shows a run, from its metrics.jsonl and (where there is one) its config.toml.

It needs no network and no other file, so it can be mailed. `python -m titanmoe.metrics.report FOLDER` writes it anew
for any folder that holds a metrics.jsonl.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from titanmoe.config.errors import ConfigError
from titanmoe.metrics.chart import SCRIPT, Series, line_chart
from titanmoe.metrics.records import JSONL_NAME, read_records
from titanmoe.metrics.terminal import configure_logging
from titanmoe.metrics.units import format_count

REPORT_NAME = "report.html"
Records = Sequence[dict[str, Any]]


def write_report(dump_folder: str | Path) -> Path:
    """Write `report.html` into `dump_folder`, by rename, and return its path.

    Raises:
        ConfigError: the folder has no readable metrics.jsonl, or cannot be written.
    """
    folder = Path(dump_folder)
    source, target = folder / JSONL_NAME, folder / REPORT_NAME
    temporary = target.with_name(target.name + ".tmp")
    config = folder / "config.toml"
    try:
        records, damaged = read_records(source)
        config_text = config.read_text(encoding="utf-8") if config.is_file() else None
        temporary.write_text(render(folder.resolve().name, records, damaged, config_text), encoding="utf-8")
        temporary.replace(target)
    except FileNotFoundError as error:
        raise ConfigError("no such file", where=str(source), mend="name the job.dump_folder of a run") from error
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(error.strerror or str(error), where=str(error.filename or target)) from error
    return target


def render(name: str, records: Records, damaged: Sequence[int], config_text: str | None) -> str:
    """The page, as well-formed XHTML."""
    rows = "\n".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in summary(records, damaged).items())
    charts = _charts(records)
    config = ""
    if config_text is not None:
        config = f"<details><summary>Configuration</summary><pre>{escape(config_text)}</pre></details>"
    return f"""<!DOCTYPE html>
<html lang="en" xmlns="http://www.w3.org/1999/xhtml">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{escape(name)} - titanmoe</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(name)}</h1>
<table>
{rows}
</table>
<main>
{chr(10).join(charts) or "<p>No values have been logged yet.</p>"}
</main>
{config}
<script>{SCRIPT}</script>
</body>
</html>
"""


def summary(records: Records, damaged: Sequence[int]) -> dict[str, str]:
    """What a run came to, as names and texts; medians are over the logged steps but the first, which warms up."""
    steps = [record for record in records if "loss" in record]
    if not steps:
        return {"Steps": "none logged yet"}
    last = steps[-1]
    rows = {"Steps": f"{last['step']:,}"}
    if last.get("tokens_seen") is not None:
        rows["Tokens"] = format_count(last["tokens_seen"])
    losses = _known(steps, "loss")
    if losses:
        rows["Loss"] = f"{losses[0][1]:.4f} at step {losses[0][0]:,}, {losses[-1][1]:.4f} at step {losses[-1][0]:,}"
    validation = _known(records, "validation_loss")
    if validation:
        best = min(validation, key=lambda point: point[1])
        named = [("", *validation[0]), ("", *validation[-1]), ("best ", *best)]
        rows["Validation loss"] = ", ".join(f"{name}{loss:.4f} at step {step:,}" for name, step, loss in named)
    warm = steps[1:] or steps
    for title, key, form in (
        ("Median tokens/s", "tokens_per_second", format_count),
        ("Median TFLOP/s per device", "tflops", lambda value: f"{value:.3g}"),
        ("Median MFU", "mfu", lambda value: f"{100 * value:.1f}%"),
        ("Median HFU", "hfu", lambda value: f"{100 * value:.1f}%"),
    ):
        values = [value for _, value in _known(warm, key)]
        if values:
            rows[title] = form(statistics.median(values))
    memory = [value for _, value in _known(steps, "peak_memory_gib")]
    if memory:
        rows["Peak memory"] = f"{max(memory):.2f} GiB per device"
    broken = [f"{', '.join(r['nonfinite'])} at step {r['step']:,}" for r in records if r.get("nonfinite")]
    if broken:
        rows["Not finite"] = "; ".join(broken[:5]) + (f"; and {len(broken) - 5} more" if len(broken) > 5 else "")
    if damaged:
        rows["Unreadable lines"] = f"{len(damaged)} of {JSONL_NAME}, left out"
    return rows


def _charts(records: Records) -> list[str]:
    four, rate, percent = (lambda v: f"{v:.4g}"), format_count, (lambda v: f"{100 * v:.3g}%")
    charts = []
    for title, series, label, options in (
        ("Loss", {"loss": "training", "validation_loss": "validation"}, four, {}),
        ("Gradient norm", {"grad_norm": "gradient norm"}, four, {"log_if_wide": True}),
        ("Learning rate", {"lr": "learning rate"}, lambda v: f"{v:.3g}", {"from_zero": True}),
        ("Tokens per second", {"tokens_per_second": "tokens/s"}, rate, {"from_zero": True}),
        ("Model FLOPs utilisation", {"mfu": "MFU", "hfu": "HFU"}, percent, {"from_zero": True}),
        (
            "Expert load",
            {"expert_load_cv": "coefficient of variation", "expert_load_max_mean": "max/mean"},
            four,
            {"from_zero": True},
        ),
        ("Dead experts", {"dead_experts": "dead experts"}, four, {"from_zero": True}),
        ("Peak memory (GiB)", {"peak_memory_gib": "memory"}, four, {"from_zero": True}),
        ("Data wait per step (s)", {"data_seconds": "data wait"}, four, {"from_zero": True}),
    ):
        # Validation has records of its own, so a series is made of the records that have its key.
        lines = [
            Series(name, [(record["step"], record[key]) for record in records if key in record])
            for key, name in series.items()
        ]
        lines = [line for line in lines if line.known]
        marks = [r["step"] for r in records if not series.keys().isdisjoint(r.get("nonfinite", ()))]
        if lines:
            charts.append(line_chart(title, lines, label=label, marks=marks, **options))
    return charts


def _known(records: Records, key: str) -> list[tuple[int, float]]:
    return [(record["step"], record[key]) for record in records if record.get(key) is not None]


_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #656d76; --line: #d8dee4; --page: #f6f8fa; --card: #ffffff;
  --c0: #0969da; --c1: #d1570b; --bad: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #8d96a0; --line: #30363d; --page: #0d1117;
  --card: #161b22; --c0: #58a6ff; --c1: #f0883e; --bad: #f85149; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 1320px;
  margin: 0 auto; padding: 24px; }
h1 { font-size: 22px; margin: 0 0 12px; }
table { border-collapse: collapse; margin-bottom: 20px; }
th { text-align: left; font-weight: 400; color: var(--soft); padding: 1px 24px 1px 0; vertical-align: top;
  white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); gap: 16px; }
figure { margin: 0; padding: 12px 12px 4px; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
figcaption { display: flex; flex-wrap: wrap; gap: 4px 14px; font-size: 14px; min-height: 21px; }
figcaption output { flex: 1 1 240px; min-height: 21px; text-align: right;
  color: var(--soft); font-variant-numeric: tabular-nums; white-space: pre; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; margin: 0 6px 4px 0;
  background: currentColor; }
span.series0 { color: var(--c0); } span.series1 { color: var(--c1); }
svg { display: block; width: 100%; touch-action: pan-y; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); stroke-width: 1; } .mark { stroke: var(--bad); stroke-width: 1; }
polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
polyline.series0 { stroke: var(--c0); } polyline.series1 { stroke: var(--c1); }
circle.series0 { fill: var(--c0); } circle.series1 { fill: var(--c1); }
circle.hover { display: none; stroke: var(--card); stroke-width: 1.5; }
details { margin-top: 20px; } summary { cursor: pointer; color: var(--soft); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px;
  overflow-x: auto; font-size: 13px; }
"""


def main(args: Sequence[str] | None = None) -> int:
    """Write the report of one folder; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m titanmoe.metrics.report", description="Write report.html of a run."
    )
    parser.add_argument("folder", help="the run's job.dump_folder, with its metrics.jsonl")
    configure_logging(rank=0)
    try:
        logging.getLogger("titanmoe").info("wrote %s", write_report(parser.parse_args(args).folder))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
