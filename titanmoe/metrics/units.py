"""Numbers as people read them: 1.23M tokens, 1:02:03, 4.05e-04."""

from __future__ import annotations

import math


def format_count(value: float) -> str:
    """Three significant digits and a decimal unit: 950, 1.23k, 45.6M, 3.05B, 1.20T."""
    scaled, unit = float(value), ""
    for unit in ("", "k", "M", "B", "T"):
        # 999.5 and more would be printed as 1000, so it already takes the next unit.
        if abs(scaled) < 999.5 or unit == "T":
            break
        scaled /= 1000
    if unit == "" and scaled == int(scaled):
        return str(int(scaled))
    magnitude = math.floor(math.log10(abs(scaled))) if scaled else 0
    return f"{scaled:.{min(max(2 - magnitude, 0), 2)}f}{unit}"


def format_clock(seconds: float) -> str:
    """1:05 or 2:03:04, for time left."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def format_duration(seconds: float) -> str:
    """4.2 s, 1 min 05 s or 2 h 03 min, for time taken."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours} h {minute:02d} min" if hours else f"{minute} min {second:02d} s"
