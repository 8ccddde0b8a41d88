"""Line charts as inline SVG, with the few lines of script that show values under the pointer.

Colours are CSS classes (`series0`, `series1`, ...) of the page, so that light and dark mode need no second drawing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float | None]
WIDTH, HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 26
_MAX_BUCKETS = 500
_MAX_DOTS = 40


@dataclass(frozen=True)
class Series:
    """Points in the order of x; a value of None is a gap."""

    name: str
    points: Sequence[Point]

    @property
    def known(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in self.points if y is not None]


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels; `low` and `high` are values (their logarithms, base 10, where `is_log`)."""

    low: float
    high: float
    from_px: float
    to_px: float
    is_log: bool = False

    def px(self, value: float) -> float:
        position = math.log10(value) if self.is_log else value
        share = (position - self.low) / (self.high - self.low)
        return round(self.from_px + share * (self.to_px - self.from_px), 1)

    def ticks(self, count: int) -> list[float]:
        if self.is_log:
            every = max(1, round((self.high - self.low) / count))
            decades = range(math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9) + 1, every)
            return [10.0**decade for decade in decades]
        return nice_ticks(self.low, self.high, count)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    label: Callable[[float], str],
    from_zero: bool = False,
    log_if_wide: bool = False,
    marks: Sequence[float] = (),
) -> str:
    """A chart with its heading, legend and read-out, as XHTML; steps on the x axis.

    Args:
        series: at least one of them with a known value.
        label: how a value is written on the axis and in the read-out.
        from_zero: the y axis begins at 0.
        log_if_wide: the y axis is logarithmic if all values are positive and span more than a factor of 50.
        marks: steps that get a red line, for values that were not finite.
    """
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.known]
    assert ys, f"no values for {title}"
    x_axis = Axis(min(xs), max(max(xs), min(xs) + 1), _LEFT, WIDTH - _RIGHT)
    y_axis = _y_axis(ys, from_zero, log_if_wide)
    body = [_grid(x_axis, y_axis, label)]
    for mark in sorted({x_axis.px(step) for step in marks}):
        body.append(f'<line class="mark" x1="{mark}" x2="{mark}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
    hover = []
    for index, one in enumerate(series):
        points = downsample(one.points, _MAX_BUCKETS)
        body.append(_line(points, index, x_axis, y_axis, dots=len(one.known) <= _MAX_DOTS))
        rows = [[x_axis.px(x), y_axis.px(y), f"{x:,.0f}", label(y)] for x, y in points if y is not None]
        hover.append({"name": one.name, "points": rows})
    legend = "".join(f'<span class="key series{i}">{escape(one.name)}</span>' for i, one in enumerate(series))
    scale = " (log scale)" if y_axis.is_log else ""
    return (
        f"<figure><figcaption><b>{escape(title)}</b>{scale} {legend if len(series) > 1 else ''}"
        f'<output></output></figcaption>\n<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'data-series="{escape(json.dumps(hover, separators=(",", ":")))}">\n' + "\n".join(body) + "\n</svg></figure>"
    )


def downsample(points: Sequence[Point], num_buckets: int) -> list[Point]:
    """At most four points for each of `num_buckets` equal stretches of x: the first, lowest, highest and last.

    Drawn at one bucket per pixel it is the same picture (Jugel et al., M4, VLDB 2014). A stretch whose values are all
    None stays a gap. Short lists come back as they are.
    """
    if len(points) <= 4 * num_buckets:
        return list(points)
    first, last = points[0][0], points[-1][0]
    buckets: list[list[Point]] = [[] for _ in range(num_buckets)]
    for point in points:
        buckets[min(int((point[0] - first) / (last - first) * num_buckets), num_buckets - 1)].append(point)
    kept: list[Point] = []
    for bucket in buckets:
        known = [(x, y) for x, y in bucket if y is not None]
        if known:
            low, high = min(known, key=lambda point: point[1]), max(known, key=lambda point: point[1])
            kept += sorted({known[0], low, high, known[-1]})
        else:
            kept += bucket[:1]
    return kept


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high], about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.7 * rough)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _y_axis(values: Sequence[float], from_zero: bool, log_if_wide: bool) -> Axis:
    low, high = min(values), max(values)
    is_log = log_if_wide and low > 0 and high > 50 * low
    if is_log:
        low, high = math.log10(low), math.log10(high)
    elif from_zero:
        low = min(low, 0.0)
    if low == high:
        low, high = (0.0, 1.0) if low == 0 else (low - abs(low) / 10, high + abs(high) / 10)
    margin = 0.05 * (high - low)
    bottom = low if from_zero and low == 0 else low - margin
    return Axis(bottom, high + margin, HEIGHT - _BOTTOM, _TOP, is_log)


def _grid(x_axis: Axis, y_axis: Axis, label: Callable[[float], str]) -> str:
    parts = []
    for value in y_axis.ticks(4):
        y = y_axis.px(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{escape(_short(label(value)))}</text>')
    for value in x_axis.ticks(6):
        if value == int(value):
            x = x_axis.px(value)
            anchor = "end" if x > WIDTH - 30 else "middle"
            parts.append(f'<text x="{x}" y="{HEIGHT - 8}" text-anchor="{anchor}">{value:,.0f}</text>')
    return "\n".join(parts)


def _short(text: str) -> str:
    """5.00k as 5k: on an axis the zeros say nothing."""
    return re.sub(r"\.0+(?![0-9])", "", text)


def _line(points: Sequence[Point], index: int, x_axis: Axis, y_axis: Axis, dots: bool) -> str:
    segments: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            segments.append([])
        else:
            segments[-1].append((x_axis.px(x), y_axis.px(y)))
    parts = []
    for segment in segments:
        if len(segment) > 1:
            path = " ".join(f"{x},{y}" for x, y in segment)
            parts.append(f'<polyline class="series{index}" points="{path}"/>')
        # A value between two gaps has no line to be seen by.
        if dots or len(segment) == 1:
            parts += [f'<circle class="series{index}" cx="{x}" cy="{y}" r="2.5"/>' for x, y in segment]
    return "\n".join(parts)


# No "<" and no "&" in it, so that the page is well-formed XML too.
SCRIPT = """
for (const svg of document.querySelectorAll("svg[data-series]")) {
  const series = JSON.parse(svg.dataset.series), output = svg.parentNode.querySelector("output");
  const make = name => svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", name));
  const dots = series.map((one, index) => { const dot = make("circle"); dot.setAttribute("r", 4);
    dot.setAttribute("class", "hover series" + index); return dot; });
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
    let words = [];
    series.forEach((one, index) => {
      if (one.points.length === 0) return;
      const near = one.points.reduce((a, b) => Math.abs(a[0] - x) > Math.abs(b[0] - x) ? b : a);
      dots[index].setAttribute("cx", near[0]); dots[index].setAttribute("cy", near[1]);
      dots[index].style.display = "inline";
      words.push("step " + near[2] + (series.length > 1 ? " " + one.name : "") + ": " + near[3]);
    });
    output.textContent = words.join("   ");
  });
  svg.addEventListener("pointerleave", () => { output.textContent = "";
    dots.forEach(dot => { dot.style.display = "none"; }); });
}
"""
