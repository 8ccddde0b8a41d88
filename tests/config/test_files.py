"""TOML files: where they are looked for, `base`, and files that are not what they should be."""

from __future__ import annotations

from pathlib import Path

import pytest

from titanmoe.config import ConfigError, files
from titanmoe.config.files import find_config_file, read_toml, read_with_bases


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder of ready-made configs in place of the real one."""
    folder = tmp_path / "train_configs"
    folder.mkdir()
    (folder / "qwen3_moe.toml").write_text("[training]\nsteps = 5\n")
    (folder / "debug.toml").write_text("")
    monkeypatch.setattr(files, "train_configs_folders", lambda: [folder])
    monkeypatch.chdir(tmp_path)
    return folder


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text)


def test_a_bare_name_is_looked_up_here_and_then_in_train_configs(shipped, tmp_path):
    assert find_config_file("qwen3_moe.toml") == shipped / "qwen3_moe.toml"
    write(tmp_path, qwen3_moe="")
    assert find_config_file("qwen3_moe.toml") == Path("qwen3_moe.toml")


@pytest.mark.parametrize(
    "name", ["qwen3_mo.toml", "elsewhere/qwen3_moe.toml", "", "qwen3_moe", "~nobody-here/qwen3_moe.toml"]
)
def test_a_missing_file_lists_what_is_there(shipped, name):
    with pytest.raises(ConfigError) as error:
        find_config_file(name)
    assert "no such config file" in str(error.value)
    assert "debug.toml, qwen3_moe.toml" in str(error.value)
    assert name == "" or "Did you mean qwen3_moe.toml?" in str(error.value)


def test_the_real_folder_is_found_beside_or_inside_the_package(tmp_path, monkeypatch):
    package = tmp_path / "site" / "titanmoe"
    (package / "config").mkdir(parents=True)
    monkeypatch.setattr(files, "__file__", str(package / "config" / "files.py"))
    assert files.train_configs_folders() == []
    (package / "train_configs").mkdir()
    assert files.train_configs_folders() == [package / "train_configs"]
    (tmp_path / "site" / "train_configs").mkdir()
    assert files.train_configs_folders()[0] == tmp_path / "site" / "train_configs"


def test_bases_are_relative_to_their_file_and_come_first(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path, grandparent="[training]\nsteps = 1\n")
    write(tmp_path / "deep", parent='base = "../grandparent.toml"\n', child='base = "parent.toml"\n[debug]\nseed = 1\n')
    found = read_with_bases(tmp_path / "deep" / "child.toml")
    assert [file.path.name for file in found] == ["grandparent.toml", "parent.toml", "child.toml"]
    assert [file.tables for file in found] == [{"training": {"steps": 1}}, {}, {"debug": {"seed": 1}}]


def test_a_base_is_also_looked_up_in_train_configs(shipped, tmp_path):
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine", job='base = "qwen3_moe.toml"\n')
    assert read_with_bases(tmp_path / "mine" / "job.toml")[0].path == shipped / "qwen3_moe.toml"


def test_a_circle_of_bases_is_named(tmp_path):
    write(tmp_path, a='base = "b.toml"', b='base = "c.toml"', c='base = "./a.toml"')
    with pytest.raises(ConfigError, match="in a circle") as error:
        read_with_bases(tmp_path / "a.toml")
    names = [Path(part).name for part in error.value.what.partition(": ")[2].split(" -> ")]
    assert names == ["a.toml", "b.toml", "c.toml", "a.toml"]
    assert error.value.where == f"{tmp_path / 'c.toml'}, base"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('base = "gone.toml"', "no such config file"),
        ("base = 3", "one file name"),
        ('base = ["a", "b"]', "one file name"),
    ],
)
def test_a_bad_base(tmp_path, text, message):
    write(tmp_path, job=text)
    with pytest.raises(ConfigError, match=message) as error:
        read_with_bases(tmp_path / "job.toml")
    assert error.value.where == f"{tmp_path / 'job.toml'}, base"


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("[training]\nsteps = ten\n", "2:9", "steps = ten"),
        ("[training]\nsteps = 1\nsteps = 2\n", "3:10", "already set"),
        ("[training]\n[debug]\n[training]\n", "3:10", "already in the file"),
        ("[training\nsteps = 1\n", "1:10", "[training"),
        ('x = "abc', "1:9", "Unterminated"),
        ("a = [1,\n", "2:1", "end of the file"),
    ],
)
def test_a_syntax_error_has_its_place_and_its_line(tmp_path, text, place, message):
    write(tmp_path, bad=text)
    with pytest.raises(ConfigError) as error:
        read_toml(tmp_path / "bad.toml")
    assert error.value.where == f"{tmp_path / 'bad.toml'}:{place}"
    assert message in str(error.value)


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b"[job]\ndescription = '\xe4'\n")
    with pytest.raises(ConfigError, match="0xe4 is not valid UTF-8") as error:
        read_toml(tmp_path / "latin.toml")
    assert error.value.where.endswith("latin.toml:2")
    (tmp_path / "nul.toml").write_bytes(bytes(16))
    with pytest.raises(ConfigError, match=r"nul.toml:1:1"):
        read_toml(tmp_path / "nul.toml")


def test_empty_files_and_windows_files_are_read(tmp_path):
    write(tmp_path, empty="")
    assert read_toml(tmp_path / "empty.toml") == {}
    (tmp_path / "windows.toml").write_bytes(b"\xef\xbb\xbf[training]\r\nsteps = 3\r\n")
    assert read_toml(tmp_path / "windows.toml") == {"training": {"steps": 3}}


def test_a_directory_is_not_a_file(tmp_path):
    write(tmp_path, one="", two="")
    with pytest.raises(ConfigError, match="a directory") as error:
        read_toml(find_config_file(str(tmp_path)))
    assert "one.toml, two.toml" in str(error.value)


def test_an_unreadable_file(tmp_path):
    loop = tmp_path / "loop.toml"
    loop.symlink_to(loop)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_with_bases(find_config_file(str(loop)))


def test_absurd_nesting_is_an_error_and_no_crash(tmp_path):
    write(tmp_path, deep="a = " + "[" * 100_000)
    with pytest.raises(ConfigError, match=r"deep\.toml"):
        read_toml(tmp_path / "deep.toml")
