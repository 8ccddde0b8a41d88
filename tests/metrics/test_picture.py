"""Charts as files of their own."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

from titanmoe.metrics.chart import Series
from titanmoe.metrics.picture import picture


def test_a_picture_is_a_whole_svg_with_a_line_and_a_name_for_each_series() -> None:
    series = [Series(f"R & D {number}", [(1, 2.0), (2, 1.0 + number)]) for number in range(3)]
    text = picture("Loss", series)
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("aria-label") == "Loss"
    assert "data-series" not in text  # what the page's script would read
    lines = [each.get("class") for each in root.iter() if each.tag.endswith("polyline")]
    names = {each.get("class"): each.text for each in root.iter() if each.tag.endswith("text") and each.get("class")}
    assert lines == ["series0", "series1", "series2"]
    assert names == {f"series{number}": f"R & D {number}" for number in range(3)}
    style = next(each.text for each in root.iter() if each.tag.endswith("style"))
    assert style is not None
    for number in range(3):
        assert len(re.findall(rf"--c{number}: #", style)) == 2  # in light and in dark
        assert f"polyline.series{number} {{ stroke: var(--c{number})" in style


def test_long_names_stay_inside() -> None:
    long = "x" * 60
    root = ElementTree.fromstring(picture("Loss", [Series(long, [(1, 2.0), (2, 1.0)])]))
    (name,) = (each for each in root.iter() if each.text == long)
    assert float(name.get("x", "nan")) + 7 * 60 <= 640
