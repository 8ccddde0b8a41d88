from __future__ import annotations

import pytest

from titanmoe.metrics.units import format_clock, format_count, format_duration


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (12.345, "12.3"),
        (999, "999"),
        (999.6, "1.00k"),
        (1000, "1.00k"),
        (3412, "3.41k"),
        (81_920, "81.9k"),
        (999_499, "999k"),
        (999_500, "1.00M"),
        (30_532_122_624, "30.5B"),
        (1.2e13, "12.0T"),
        (2e16, "20000T"),
    ],
)
def test_format_count(value, text):
    assert format_count(value) == text


def test_format_times():
    assert [format_clock(s) for s in (0, 5, 65, 3599.6, 7384)] == ["0:00", "0:05", "1:05", "1:00:00", "2:03:04"]
    assert [format_duration(s) for s in (4.21, 65, 7384)] == ["4.2 s", "1 min 05 s", "2 h 03 min"]
