from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from titanmoe.checkpoint import files
from titanmoe.checkpoint.files import HashingWriter, retrying, sha256_of_file, write_whole
from titanmoe.checkpoint.manifest import (
    FileRecord,
    Manifest,
    ManifestError,
    check_contents,
    read_manifest,
    write_manifest,
)


def make(folder: Path, contents: dict[str, bytes], step: int = 4) -> Manifest:
    records = {}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        records[name] = FileRecord(len(content), hashlib.sha256(content).hexdigest())
    manifest = Manifest(step, 2, {"dp": 2}, "abc", False, {"torch": "2"}, records)
    write_manifest(folder, manifest)
    return manifest


def rewrite(folder: Path, change: dict, *, keep_checksum: bool = False) -> None:
    """Change fields; the checksum is recomputed as the format says, so that only the field is wrong."""
    content = json.loads((folder / "manifest.json").read_bytes())
    checksum = content.pop("sha256")
    content.update(change)
    if not keep_checksum:
        checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**content, "sha256": checksum}))


def test_what_was_written_is_read(tmp_path: Path) -> None:
    manifest = make(tmp_path, {"a.bin": b"hello", "b.bin": b""})
    assert read_manifest(tmp_path, 4) == manifest
    assert manifest.num_bytes == 5
    assert check_contents(tmp_path, manifest) is None
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "b.bin", "manifest.json"], "temporary files stay behind"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"step": 5}, "belongs to step 5"),
        ({"format_version": 2}, "format 2"),
        ({"files": {"../a.bin": {"size": 1, "sha256": ""}}}, "outside the folder"),
        ({"files": {"a.bin": {"size": 1}}}, "lacks fields"),
        ({"files": []}, "lacks fields"),
        ({"surplus": 1}, "lacks fields"),
    ],
)
def test_a_manifest_with_a_wrong_field_says_which(tmp_path: Path, change: dict, reason: str) -> None:
    make(tmp_path, {"a.bin": b"hello"})
    rewrite(tmp_path, change)
    with pytest.raises(ManifestError, match=reason):
        read_manifest(tmp_path, 4)


def test_a_changed_manifest_does_not_match_its_checksum(tmp_path: Path) -> None:
    make(tmp_path, {"a.bin": b"hello"})
    rewrite(tmp_path, {"world_size": 3}, keep_checksum=True)
    with pytest.raises(ManifestError, match="own checksum"):
        read_manifest(tmp_path, 4)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"{}", b'"x"', b"\xff\xfe", b'{"sha256": 1}'])
def test_garbled_manifests(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(ManifestError, match="garbled"):
        read_manifest(tmp_path, 4)


def test_missing_and_unreadable_manifests(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="empty"):
        read_manifest(tmp_path, 4)
    (tmp_path / "__0_0.distcp").write_bytes(b"x")
    with pytest.raises(ManifestError, match=r"no manifest\.json"):
        read_manifest(tmp_path, 4)
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest(tmp_path, 4)


def test_files_missing_or_of_another_size(tmp_path: Path) -> None:
    make(tmp_path, {"a.bin": b"hello", "b.bin": b"x"})
    (tmp_path / "a.bin").write_bytes(b"hell")
    with pytest.raises(ManifestError, match=r"a\.bin has 4 bytes, its manifest says 5"):
        read_manifest(tmp_path, 4)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(ManifestError, match=r"a\.bin is missing"):
        read_manifest(tmp_path, 4)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7])
def test_parts_check_every_file_once(tmp_path: Path, num_parts: int) -> None:
    manifest = make(tmp_path, {f"{index}.bin": bytes([index]) * (10 * index) for index in range(1, 6)})
    for name in manifest.files:
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])  # one bit
        verdicts = [check_contents(tmp_path, manifest, part, num_parts) for part in range(num_parts)]
        assert sum(verdict is not None for verdict in verdicts) == 1
        assert any(verdict and name in verdict for verdict in verdicts)
        (tmp_path / name).write_bytes(content)


def test_writer_hashes_what_it_writes(tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    with HashingWriter(tmp_path / "x") as file:
        file.write(content[:10])
        file.write(memoryview(content)[10:])
    assert file.num_bytes == len(content)
    assert file.sha256 == hashlib.sha256(content).hexdigest() == sha256_of_file(tmp_path / "x")


def test_write_whole_replaces_in_one_go(tmp_path: Path) -> None:
    write_whole(tmp_path / "x", b"one")
    write_whole(tmp_path / "x", b"two")
    assert (tmp_path / "x").read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["x"]


class Failing:
    def __init__(self, *codes: int) -> None:
        self.codes = list(codes)

    def __call__(self) -> str:
        if self.codes:
            raise OSError(self.codes.pop(0), "injected")
        return "done"


def test_passing_errors_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(files.time, "sleep", waits.append)
    assert retrying(Failing(errno.EIO, errno.ESTALE, errno.EAGAIN), "test") == "done"
    assert waits == sorted(waits)
    assert len(waits) == 3
    with pytest.raises(OSError, match="injected"):
        retrying(Failing(*[errno.EIO] * 4), "test")


def test_a_full_disk_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.time, "sleep", lambda _: pytest.fail("waited"))
    with pytest.raises(OSError, match="injected"):
        retrying(Failing(errno.ENOSPC), "test")
