from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from titanmoe.config.errors import ConfigError
from titanmoe.data.sources import DocumentSource, open_source

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of `datasets` of this test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def texts(source: DocumentSource) -> list[str]:
    return [source[index] for index in range(len(source))]


def write_rows(file: Path, rows: list[object]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def write_parquet(file: Path, columns: dict[str, list[object]]) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return str(file)


def test_json_lines_lists_gzip_and_directories(tmp_path: Path):
    write_rows(tmp_path / "b.jsonl", [{"text": "1", "n": 1}, {"text": "", "n": 2}, {"text": "2020-01-01", "n": 3}])
    (tmp_path / "a.json").write_text(json.dumps([{"text": "é\n", "n": 0}], indent=2))
    (tmp_path / "c").mkdir()
    with gzip.open(tmp_path / "c" / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "zip", "n": 4}\n')
    (tmp_path / "empty.jsonl").write_text("")
    source = open_source("json", str(tmp_path), "train")
    assert texts(source) == ["é\n", "1", "", "2020-01-01", "zip"]
    assert texts(open_source("json", str(tmp_path / "*.json"), "train")) == ["é\n"]


def test_zstandard(tmp_path: Path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "packed"}\n'))
    assert texts(open_source("json", str(tmp_path), "train")) == ["packed"]


def test_parquet_and_text_key(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", {"body": ["one", "two"], "n": [1, 2]})
    assert texts(open_source("parquet", path, "train", "body")) == ["one", "two"]
    with pytest.raises(ConfigError, match="no column 'text'; there are 'body', 'n'"):
        open_source("parquet", path, "train")
    with pytest.raises(ConfigError, match="'n' holds int64, not text"):
        open_source("parquet", path, "train", "n")


def test_a_name_that_looks_like_a_pattern(tmp_path: Path):
    path = write_rows(tmp_path / "a[1]*.jsonl", [{"text": "x"}])
    write_rows(tmp_path / "a1b.jsonl", [{"text": "y"}])
    assert texts(open_source("json", path, "train")) == ["x"]


def test_a_changed_file_is_read_anew(tmp_path: Path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "old"}])
    assert texts(open_source("json", path, "train")) == ["old"]
    write_rows(tmp_path / "a.jsonl", [{"text": "new"}])
    os.utime(path, (1, 1))
    assert texts(open_source("json", path, "train")) == ["new"]


def test_fingerprint_follows_rows_and_column(tmp_path: Path):
    rows = [{"text": "a", "body": "b"}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    first = open_source("json", path, "train").fingerprint
    assert open_source("json", path, "train").fingerprint == first
    assert open_source("json", path, "train", "body").fingerprint != first
    write_rows(tmp_path / "a.jsonl", rows * 2)
    assert open_source("json", path, "train").fingerprint != first


def test_a_row_without_text(tmp_path: Path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a"}, {"text": None}, {"n": 1}])
    source = open_source("json", path, "train")
    assert source[0] == "a"
    for index in (1, 2):
        with pytest.raises(ConfigError, match=f"row {index} .* has no text") as caught:
            source[index]
        assert caught.value.where == path


def test_bytes_that_are_not_utf_8(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    source = open_source("json", str(tmp_path), "train")
    assert source[0] == "a"
    with pytest.raises(ConfigError, match=r"row 1 .* is not UTF-8"):
        source[1]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"text": "a"}\n{"text": "b', 2),
        (b'{"text": "a"}\n{"text": "b"}\nnot json\n', 3),
        (b'{"text": "a"}\n{"text": 3}\n', 2),
        (b'{"text": "a"}\n[1, 2]\n', 2),
        (b"\x00\x01\x02", 1),
    ],
)
def test_broken_json_names_the_line(tmp_path: Path, content: bytes, line: int):
    (tmp_path / "good.jsonl").write_bytes(b'{"text": "a"}\n')
    (tmp_path / "z.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read as json") as caught:
        open_source("json", str(tmp_path), "train")
    assert caught.value.where == f"{tmp_path / 'z.jsonl'}:{line}"
    assert caught.value.mend


def test_a_number_far_down_does_not_change_the_texts_around_it(tmp_path: Path):
    row = json.dumps({"text": "x" * 1000}).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes(row * 11000 + b'{"text": 5}\n' + row)
    with pytest.raises(ConfigError) as caught:
        open_source("json", str(tmp_path), "train")
    assert caught.value.where == f"{tmp_path / 'a.jsonl'}:11001"


def test_cut_off_and_empty_files(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", {"text": ["one", "two"]})
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(ConfigError, match="cannot be read as parquet") as caught:
        open_source("parquet", path, "train")
    assert caught.value.where == path

    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"text": "zip"}\n' * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes((tmp_path / "a.jsonl.gz").read_bytes()[:30])
    with pytest.raises(ConfigError, match="cannot be read as json") as caught:
        open_source("json", str(tmp_path / "a.jsonl.gz"), "train")
    assert caught.value.where == str(tmp_path / "a.jsonl.gz")

    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match="all files are empty"):
        open_source("json", str(tmp_path / "empty.jsonl"), "train")
    path = write_parquet(tmp_path / "none.parquet", {"text": []})
    with pytest.raises(ConfigError):
        open_source("parquet", path, "train")


def test_missing_paths(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such file"):
        open_source("json", str(tmp_path / "nowhere.jsonl"), "train")
    with pytest.raises(ConfigError, match="no such file"):
        open_source("parquet", "hf://datasets/someone/something", "train")
    with pytest.raises(ConfigError, match=r"holds no files of this kind\n.*\.jsonl"):
        open_source("json", str(tmp_path), "train")
