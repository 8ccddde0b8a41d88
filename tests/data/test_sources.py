from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from titanmoe.config.errors import ConfigError
from titanmoe.data import sources
from titanmoe.data.files import find_files
from titanmoe.data.sources import DocumentSource, open_source, open_stdlib, open_text


def texts(source: DocumentSource) -> list[str]:
    return [source[index] for index in range(len(source))]


def test_stdlib_splits_are_sorted_disjoint_and_large_enough():
    train, validation = open_stdlib("train"), open_stdlib("validation")
    assert train.files == sorted(train.files, key=str) and validation.files == sorted(validation.files, key=str)
    assert not set(train.files) & set(validation.files)
    assert 0.02 < len(validation.files) / (len(train.files) + len(validation.files)) < 0.10
    assert sum(map(len, texts(train))) > 5_000_000
    for file in (*train.files, *validation.files):
        assert not {"site-packages", "dist-packages", "__pycache__", "test", "tests"} & set(file.parts)


def test_stdlib_is_the_same_in_another_process():
    code = "from titanmoe.data.sources import open_stdlib; print(open_stdlib('validation').fingerprint)"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == open_stdlib("validation").fingerprint
    assert there != open_stdlib("train").fingerprint


def test_stdlib_counts_what_it_cannot_read(tmp_path: Path, monkeypatch, caplog):
    for number in range(40):
        (tmp_path / f"m{number:02}.py").write_text(f"x = {number}\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text("never")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(sources, "_stdlib_split", lambda name: "train")
    with caplog.at_level(logging.INFO, logger="titanmoe"):
        source = open_stdlib("train")
    assert texts(source) == [f"x = {number}\n" for number in range(40)]
    assert "skipped 2 of 42 files" in caplog.text
    with pytest.raises(ConfigError, match="not there"):
        open_stdlib("validation")


def test_names_and_paths_that_do_not_fit():
    with pytest.raises(ConfigError, match="takes no path"):
        open_source("stdlib", "x", "train")
    with pytest.raises(ConfigError, match="unknown dataset 'wiki'"):
        open_source("wiki", None, "train")
    with pytest.raises(ConfigError, match="needs a path") as caught:
        open_source("text", None, "validation")
    assert caught.value.where == "validation.dataset_path"


def test_text_files(tmp_path: Path):
    (tmp_path / "b.txt").write_bytes("bé\r\n".encode())
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.md").write_text("z")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "c.py").write_text("any name, if it is given")
    assert texts(open_source("text", str(tmp_path), "train")) == ["z", "bé\r\n", ""]
    assert texts(open_text(str(tmp_path / "c.py"))) == ["any name, if it is given"]
    assert texts(open_text(str(tmp_path / "**" / "*.md"))) == ["z"]


@pytest.mark.parametrize("kind", ["lines", "words", "no spaces"])
def test_a_large_file_is_several_documents(tmp_path: Path, caplog, kind: str):
    text = {"lines": "é some words 日本\n", "words": "é some words 日本 ", "no spaces": "日本é🦊"}[kind] * 20_000
    (tmp_path / "large.txt").write_bytes(text.encode())
    (tmp_path / "small.txt").write_text("small")
    with caplog.at_level(logging.INFO, logger="titanmoe"):
        source = open_text(str(tmp_path))
    *pieces, small = texts(source)
    assert small == "small" and "".join(pieces) == text
    assert len(pieces) == -(-len(text.encode()) // 8192) > 10
    assert all(7000 < len(piece.encode()) < 9500 for piece in pieces[:-1])
    if kind != "no spaces":
        assert all(piece[-1] == text[-1] for piece in pieces)
    assert f"2 file(s) cut into {len(source)} documents" in caplog.text


def test_text_fingerprint(tmp_path: Path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("aa")
        (tmp_path / folder / "b.txt").write_text("bb")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert open_text(one).fingerprint == open_text(two).fingerprint
    (tmp_path / "two" / "b.txt").write_text("bbb")
    assert open_text(one).fingerprint != open_text(two).fingerprint
    (tmp_path / "two" / "b.txt").rename(tmp_path / "two" / "c.txt")
    (tmp_path / "two" / "c.txt").write_text("bb")
    assert open_text(one).fingerprint != open_text(two).fingerprint


def test_text_accidents(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such file"):
        open_text(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="holds no files of this kind"):
        open_text(str(tmp_path))
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ConfigError, match="all files are empty"):
        open_text(str(tmp_path))
    (tmp_path / "b.txt").write_bytes(b"x" * 20000 + b"\xff")
    source = open_text(str(tmp_path))
    with pytest.raises(ConfigError, match="byte 20000 is 0xff") as caught:
        texts(source)
    assert caught.value.where == str(tmp_path / "b.txt")
    (tmp_path / "b.txt").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        source[1]


def test_a_name_that_looks_like_a_pattern(tmp_path: Path):
    (tmp_path / "a[1].txt").write_text("x")
    assert find_files(str(tmp_path / "a[1].txt"), (".txt",)) == [tmp_path / "a[1].txt"]
