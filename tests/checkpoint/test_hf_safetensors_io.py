"""Our reader and writer of the safetensors format, beside the safetensors library."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from titanmoe.checkpoint.safetensors_io import DTYPES, TensorWriter, read_header
from titanmoe.config.errors import ConfigError


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    writer = TensorWriter(path, [(key, tensor.dtype, tensor.shape) for key, tensor in tensors.items()])
    for key, tensor in tensors.items():
        writer.write(key, tensor)
    writer.close()


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = {
        "z.float32": _random((3, 5), torch.float32),
        "scalar": torch.tensor(2.5),
        "b.bfloat16": _random((7, 3), torch.bfloat16),
        "a.bfloat16": _random((1,), torch.bfloat16),
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
        "transposed é": _random((4, 6), torch.float16).T,
    }
    _write(tmp_path / "file.safetensors", tensors)
    read = load_file(tmp_path / "file.safetensors")
    assert read.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert read[key].dtype == tensor.dtype
        assert torch.equal(read[key], tensor), key
    with safe_open(tmp_path / "file.safetensors", "pt") as file:
        # transformers refuses files without it.
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("key_length", range(1, 10))
def test_every_tensor_is_aligned_to_its_dtype(tmp_path: Path, key_length: int) -> None:
    path = tmp_path / "file.safetensors"
    # Odd sizes of a small dtype first would push a larger one off its alignment.
    _write(path, {"k" * key_length: _random((3,), torch.float32), "half": _random((3,), torch.bfloat16)})
    for info in read_header(path).values():
        assert info.start % DTYPES[info.dtype].itemsize == 0
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    assert header_bytes % 8 == 0


def test_the_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="larger dtypes"):
        TensorWriter(tmp_path / "file", [("a", torch.bfloat16, (1,)), ("b", torch.float32, (1,))])
    writer = TensorWriter(tmp_path / "file", [("a", torch.float32, (2,))])
    with pytest.raises(AssertionError, match="announced"):
        writer.write("a", torch.zeros(3))
    with pytest.raises(AssertionError, match="not every"):
        writer.close()
    writer.abandon()


def test_headers_equal_the_library_s(tmp_path: Path) -> None:
    tensors = {f"tensor.{index}": _random((index, 3), torch.float32) for index in range(1, 5)}
    tensors["half"] = _random((2, 2, 2), torch.float16)
    save_file(tensors, tmp_path / "file.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "file.safetensors")
    with safe_open(tmp_path / "file.safetensors", "pt") as file:
        assert list(header) == file.offset_keys()
        for key, info in header.items():
            assert list(info.shape) == file.get_slice(key).get_shape()
            assert info.dtype == file.get_slice(key).get_dtype()


def _damage_header(path: Path, change: dict[str, object]) -> None:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["x"].update(change)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: path.write_bytes(b"abc"), "the file is cut short: 3 bytes"),
        (
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"),
            r"Git-LFS pointer(.|\n)*git lfs pull",
        ),
        (lambda path: path.write_bytes(b"\xff" * 64), "not a safetensors file"),
        (lambda path: os.truncate(path, 30), "the file is cut short: 30 bytes"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "the file is cut short"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "longer than its header says"),
        (lambda path: path.write_bytes(path.read_bytes()[:8] + b"?" + path.read_bytes()[9:]), "header is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:8] + b"\xff" + path.read_bytes()[9:]), "header is damaged"),
        (lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]"), "header is damaged"),
        (lambda path: path.write_bytes((8).to_bytes(8, "little") + b'{"x":{}}'), "header is damaged"),
        (lambda path: _damage_header(path, {"shape": [3, 5]}), "takes 48 bytes"),
        (lambda path: _damage_header(path, {"shape": [-3, -4]}), "impossible sizes"),
        (lambda path: _damage_header(path, {"shape": "big"}), "header is damaged"),
        (lambda path: _damage_header(path, {"data_offsets": [4, 52]}), "does not begin where"),
        (lambda path: _damage_header(path, {"data_offsets": [48, 0]}), "impossible sizes"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read: Is a directory"),
        (lambda path: path.unlink(), "cannot be read: No such file"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, damage, message: str) -> None:
    path = tmp_path / "file.safetensors"
    save_file({"x": _random((3, 4), torch.float32)}, path)
    damage(path)
    with pytest.raises(ConfigError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
