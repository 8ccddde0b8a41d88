"""Tensors of codes and scales: what they stand for, for every layout of scales, and accidents, each with its error."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.checkpoint.quantized_files import E2M1, Checkpoint, quantize_fp8, write_folder
from tests.checkpoint.test_quantization import GPT_OSS, LLAMA_FBGEMM, QWEN3_FP8, compressed_tensors
from titanmoe.checkpoint.hf_folder import list_tensors
from titanmoe.checkpoint.quantization import parse_quantization
from titanmoe.checkpoint.quantized_rows import QuantizedSource, ScaleGrid
from titanmoe.checkpoint.row_source import Files, PlainSource, RowSource
from titanmoe.checkpoint.safetensors_io import read_header
from titanmoe.checkpoint.sources import sources_of
from titanmoe.config.errors import ConfigError

_Q = "model.layers.0.self_attn.q_proj.weight"
_GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
_PER_TENSOR = {**QWEN3_FP8, "weight_block_size": None}
_SMALL_BLOCKS = {**QWEN3_FP8, "weight_block_size": [16, 32]}


def _sources(folder: Path, quantization_config: dict | None) -> dict[str, RowSource]:
    return sources_of(list_tensors(folder), parse_quantization({"quantization_config": quantization_config}))


def _read(source: RowSource, chunk: int | None = None) -> Tensor:
    num_rows = torch.Size(source.shape[:-1]).numel()
    chunk = chunk or num_rows
    with Files() as files:
        rows = [source.rows(files, first, min(chunk, num_rows - first)) for first in range(0, num_rows, chunk)]
    return torch.cat(rows).view(source.shape)


def _decode(folder: Path, tensors: dict[str, Tensor], quantization_config: dict, key: str = _Q) -> Tensor:
    """The values of a tensor, which must not depend on how many rows are read at a time."""
    write_folder(folder, {}, tensors)
    sources = _sources(folder, quantization_config)
    assert list(sources) == [key]
    source = sources[key]
    assert isinstance(source, QuantizedSource)
    values = _read(source)
    assert values.dtype == torch.float32
    for chunk in (1, 7):
        assert torch.equal(_read(source, chunk), values)
    return values


def _weight(*shape: int) -> Tensor:
    """Values of very different sizes from row to row and column to column, so that no scale fits another block."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(shape, generator=generator)
    rows, columns = torch.rand((*shape[:-1], 1), generator=generator), torch.rand(shape[-1], generator=generator)
    return weight * (4 * rows).exp2() * (4 * columns).exp2()


# What codes and scales stand for


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
def test_blocks_that_are_cut_off(tmp_path: Path, scale_dtype: torch.dtype, suffix: str) -> None:
    checkpoint = Checkpoint()
    checkpoint.add_fp8(_Q, _weight(41, 70), (16, 32), _Q + suffix, scale_dtype)
    assert checkpoint.files[_Q + suffix].shape == (3, 3)
    assert torch.equal(_decode(tmp_path, checkpoint.files, _SMALL_BLOCKS), checkpoint.values[_Q])


def test_the_published_sizes_of_deepseek(tmp_path: Path) -> None:
    key = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    checkpoint = Checkpoint()
    checkpoint.add_fp8(key, _weight(576, 7168), (128, 128), key + "_scale_inv")
    assert checkpoint.files[key + "_scale_inv"].shape == (5, 56)
    values = _decode_whole(tmp_path, checkpoint.files, QWEN3_FP8, key)
    assert torch.equal(values, checkpoint.values[key])


def _decode_whole(folder: Path, tensors: dict[str, Tensor], quantization_config: dict, key: str) -> Tensor:
    write_folder(folder, {}, tensors)
    return _read(_sources(folder, quantization_config)[key], chunk=100)


def test_exponents_as_bytes(tmp_path: Path) -> None:
    checkpoint = Checkpoint()
    checkpoint.add_fp8(_Q, _weight(41, 70), (16, 32), _Q + "_scale_inv", torch.uint8)
    config = {**_SMALL_BLOCKS, "scale_fmt": "ue8m0"}
    assert torch.equal(_decode(tmp_path, checkpoint.files, config), checkpoint.values[_Q])


_CHANNEL, _TENSOR = compressed_tensors(), compressed_tensors(strategy="tensor")


@pytest.mark.parametrize(
    ("config", "key", "shape", "block", "scale_shape"),
    [
        # Matrices. A single column of blocks is not a scale per channel, nor the other way round.
        (_TENSOR, _Q, (6, 10), (6, 10), ()),
        (_PER_TENSOR, _Q, (6, 10), (6, 10), (1,)),
        (_TENSOR, _Q, (6, 10), (6, 10), (1, 1)),
        (_CHANNEL, _Q, (6, 10), (1, 10), (6,)),
        (_CHANNEL, _Q, (6, 10), (1, 10), (6, 1)),
        (LLAMA_FBGEMM, _Q, (6, 10), (1, 10), (6, 1)),
        (_CHANNEL, _Q, (6, 6), (1, 6), (6,)),
        ({**QWEN3_FP8, "weight_block_size": [1, 10]}, _Q, (6, 10), (1, 10), (6, 1)),
        ({**QWEN3_FP8, "weight_block_size": [2, 10]}, _Q, (12, 10), (2, 10), (6, 1)),
        (compressed_tensors(strategy="block", block_structure=[4, 4]), _Q, (6, 10), (4, 4), (2, 3)),
        # Stacks of experts.
        (_TENSOR, _GATE_UP, (3, 8, 10), (8, 10), (3,)),
        (_TENSOR, _GATE_UP, (3, 8, 10), (8, 10), (3, 1)),
        (_TENSOR, _GATE_UP, (3, 8, 10), (8, 10), (3, 1, 1)),
        (_CHANNEL, _GATE_UP, (3, 8, 10), (1, 10), (3, 8)),
        (_CHANNEL, _GATE_UP, (3, 8, 10), (1, 10), (3, 8, 1)),
        (_CHANNEL, _GATE_UP, (3, 8, 8), (1, 8), (3, 8)),
        (_SMALL_BLOCKS, _GATE_UP, (3, 40, 70), (16, 32), (3, 3, 3)),
        # Gate and up with scales of their own.
        (_TENSOR, "mlp.gate_up_proj.weight", (8, 10), (4, 10), (2,)),
        (_PER_TENSOR, _GATE_UP, (3, 8, 10), (4, 10), (3, 2, 1)),
        (_PER_TENSOR, _GATE_UP, (3, 8, 10), (4, 10), (3, 2)),
        (_PER_TENSOR, _GATE_UP, (2, 8, 10), (8, 10), (2,)),
        (QWEN3_FP8, _GATE_UP, (3, 8, 10), (4, 10), (3, 2, 1)),
        # Stacks with outputs last.
        (_CHANNEL, _GATE_UP, (3, 8, 10), (8, 1), (3, 1, 10)),
        (_CHANNEL, _GATE_UP, (3, 8, 8), (8, 1), (3, 1, 8)),
        (LLAMA_FBGEMM, _GATE_UP, (3, 8, 10), (8, 1), (3, 1, 10)),
        (LLAMA_FBGEMM, "mlp.experts.down_proj", (3, 8, 10), (8, 1), (3, 10, 1)),
        (LLAMA_FBGEMM, "mlp.experts.down_proj", (3, 8, 8), (8, 1), (3, 8, 1)),
    ],
)
def test_layouts_of_scales(
    tmp_path: Path,
    config: dict,
    key: str,
    shape: tuple[int, ...],
    block: tuple[int, int],
    scale_shape: tuple[int, ...],
) -> None:
    checkpoint = Checkpoint()
    scale_key = key + ("_scale_inv" if config["quant_method"] == "fp8" else "_scale")
    checkpoint.add_fp8(key, _weight(*shape), block, scale_key)
    checkpoint.files[scale_key] = checkpoint.files[scale_key].reshape(scale_shape)
    assert torch.equal(_decode(tmp_path, checkpoint.files, config, key), checkpoint.values[key])


def test_one_scale_for_a_whole_stack(tmp_path: Path) -> None:
    codes, scales, decoded = quantize_fp8(_weight(24, 10), (24, 10))
    tensors = {_GATE_UP: codes.view(3, 8, 10), _GATE_UP + "_scale": scales.view(())}
    assert torch.equal(_decode(tmp_path, tensors, _TENSOR, _GATE_UP), decoded.view(3, 8, 10))


def test_gate_and_up_with_blocks_of_their_own(tmp_path: Path) -> None:
    """Two matrices of 20 rows have 2 rows of blocks each, and one of 40 rows would have 3."""
    codes, scales, decoded = quantize_fp8(_weight(3, 2, 20, 70), (16, 32))
    tensors = {_GATE_UP: codes.flatten(1, 2), _GATE_UP + "_scale_inv": scales.flatten(1, 2)}
    assert torch.equal(_decode(tmp_path, tensors, _SMALL_BLOCKS, _GATE_UP), decoded.flatten(1, 2))


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
def test_both_names_of_scales_multiply(tmp_path: Path, suffix: str) -> None:
    weight = _weight(256, 384)
    checkpoint = Checkpoint()
    checkpoint.add_fp8(_Q, weight, (128, 128), _Q + suffix)
    error = (_decode_whole(tmp_path, checkpoint.files, QWEN3_FP8, _Q) - weight).abs()
    # e4m3 has three bits after the leading one: half a step is 1/16 of the value at most, for values of normal size.
    normal = weight.abs() > checkpoint.files[_Q + suffix].float().max() * 2**-6
    assert normal.float().mean() > 0.9
    assert (error[normal] < 0.07 * weight.abs()[normal]).all()


def test_every_code_and_zero_scales(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[0x7F, 0xFF]] = 0  # not a number
    fp8 = codes.view(torch.float8_e4m3fn).view(1, 2, 128).repeat(2, 1, 1).view(4, 128)
    tensors = {_Q: fp8, _Q + "_scale": torch.tensor([[0.3], [0.7], [0.0], [0.0]])}
    values = _decode(tmp_path, tensors, _CHANNEL)
    expected = fp8.double().float() * tensors[_Q + "_scale"]
    assert torch.equal(values, expected)
    assert torch.equal(values[2:].abs(), torch.zeros(2, 128))


def test_transformers_decodes_fp8_the_same_way(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight

    checkpoint = Checkpoint()
    checkpoint.add_fp8(_Q, _weight(41, 70), (16, 32), _Q + "_scale_inv")
    codes, scales = checkpoint.files[_Q], checkpoint.files[_Q + "_scale_inv"]
    values = _decode(tmp_path / "cut off", checkpoint.files, _SMALL_BLOCKS)
    assert torch.equal(values, _dequantize_fp8_weight(codes, scales, [16, 32], torch.float32))

    # This one takes whole blocks only.
    checkpoint.add_fp8(_Q, _weight(48, 64), (16, 32), _Q + "_scale_inv", torch.uint8)
    codes, scales = checkpoint.files[_Q], checkpoint.files[_Q + "_scale_inv"]
    values = _decode(tmp_path / "whole", checkpoint.files, {**_SMALL_BLOCKS, "scale_fmt": "ue8m0"})
    quantizer = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=[16, 32]))
    assert torch.equal(values, Fp8Dequantize(quantizer)._dequantize_one(codes, scales, torch.float32))


def test_every_byte_of_mxfp4_with_every_scale(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    bytes_ = torch.arange(256, dtype=torch.uint8).view(16, 16)
    blocks = bytes_.expand(1, 255, 16, 16).contiguous()
    scales = torch.arange(255, dtype=torch.uint8)[None, :, None].expand(1, 255, 16).contiguous()
    key = _GATE_UP + "_blocks"
    values = _decode(tmp_path, {key: blocks, _GATE_UP + "_scales": scales}, GPT_OSS, key)
    assert values.shape == (1, 255, 512)

    numbers = torch.tensor([E2M1[nibble] for byte in range(256) for nibble in (byte & 15, byte >> 4)]).double()
    expected = numbers * 2.0 ** torch.arange(-127, 128, dtype=torch.float64)[:, None]
    # The largest do not fit float32, nor does the product of the largest number and the largest scale.
    assert torch.equal(values[0], expected.float())
    transposed = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(values.mT, transposed)


def test_mxfp4_of_random_weights(tmp_path: Path) -> None:
    checkpoint = Checkpoint()
    weight = _weight(3, 10, 96)
    checkpoint.add_mxfp4(_GATE_UP + "_blocks", weight)
    assert checkpoint.files[_GATE_UP + "_blocks"].shape == (3, 10, 3, 16)
    values = _decode(tmp_path, checkpoint.files, GPT_OSS, _GATE_UP + "_blocks")
    assert torch.equal(values, checkpoint.values[_GATE_UP + "_blocks"])
    # Half a step of a 4-bit number: 1/6 of the largest in the block, as the largest code is 6 and 4 is next.
    largest = weight.unflatten(-1, (3, 32)).abs().amax(-1, keepdim=True).expand(3, 10, 3, 32).flatten(-2)
    assert ((values - weight).abs() <= largest / 3.9).all()


# Beyond 2^31


def test_rows_beyond_two_to_the_31st() -> None:
    first = 2**33
    rows = torch.arange(first, first + 3)
    assert ScaleGrid(2**20, 128, 128).scale_row(rows).tolist() == [2**13 * 2**13] * 3
    assert ScaleGrid(2**34, 1, 32).scale_row(rows).tolist() == rows.tolist()


def test_bytes_beyond_two_to_the_31st(tmp_path: Path) -> None:
    """A file of 3 GiB that takes no space, but for its last row and the scales."""
    file = tmp_path / "model.safetensors"
    shape = (3, 2**20, 1024)
    num_bytes = 3 * 2**30
    header = (
        f'{{"{_GATE_UP}":{{"dtype":"F8_E4M3","shape":{list(shape)},"data_offsets":[0,{num_bytes}]}},'
        f'"{_GATE_UP}_scale":{{"dtype":"F32","shape":[3],"data_offsets":[{num_bytes},{num_bytes + 12}]}}}}'
    ).encode()
    with open(file, "wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        start = out.tell()
        out.seek(start + num_bytes - 1024)
        out.write(torch.full((1024,), 2.0).to(torch.float8_e4m3fn).view(torch.uint8).numpy().tobytes())
        out.write(torch.tensor([1.0, 2.0, 3.5]).numpy().tobytes())
    source = sources_of(read_header(file), parse_quantization({"quantization_config": _TENSOR}))[_GATE_UP]
    with Files() as files:
        rows = source.rows(files, 3 * 2**20 - 2, 2)
    assert torch.equal(rows, torch.tensor([[0.0], [7.0]]).expand(2, 1024))


# What goes with what


@pytest.mark.parametrize(("weight_shard", "scale_shard"), [(1, 2), (2, 1), (1, 1)])
def test_scales_in_other_files(tmp_path: Path, weight_shard: int, scale_shard: int) -> None:
    checkpoint = Checkpoint()
    checkpoint.add_fp8(_Q, _weight(41, 70), (16, 32), _Q + "_scale_inv")
    checkpoint.add_plain("model.norm.weight", torch.randn(70))
    write_folder(
        tmp_path, {}, checkpoint.files, lambda key: scale_shard if key.endswith("_scale_inv") else weight_shard
    )
    sources = _sources(tmp_path, _SMALL_BLOCKS)
    assert sorted(sources) == ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]
    assert torch.equal(_read(sources[_Q]), checkpoint.values[_Q])
    assert isinstance(sources["model.norm.weight"], PlainSource)


def test_a_layer_that_was_left_as_it_was_needs_no_entry(tmp_path: Path) -> None:
    """The first layer is not quantised, and the config does not say so; the second is."""
    checkpoint = Checkpoint()
    checkpoint.add_plain("model.layers.0.mlp.up_proj.weight", _weight(6, 10).bfloat16())
    checkpoint.add_fp8(
        "model.layers.1.mlp.up_proj.weight", _weight(6, 10), (1, 10), "model.layers.1.mlp.up_proj.weight_scale"
    )
    write_folder(tmp_path, {}, checkpoint.files)
    for key, source in _sources(tmp_path, _CHANNEL).items():
        assert isinstance(source, PlainSource if ".0." in key else QuantizedSource)
        assert torch.equal(_read(source), checkpoint.values[key])


def test_scales_of_activations_are_dropped_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = Checkpoint()
    checkpoint.add_fp8(_Q, _weight(6, 10), (6, 10), _Q + "_scale")
    attention = "model.layers.0.self_attn."
    dropped = [
        *(attention + f"q_proj.{name}" for name in ("input_scale", "input_scale_ub", "output_scale")),
        *(attention + name for name in ("k_scale", "v_scale", "k_proj.k_scale")),
        "model.layers.0.mlp.experts.gate_up_proj_input_scale",
        "model.layers.0.mlp.experts.down_proj_activation_scale",
    ]
    write_folder(tmp_path, {}, checkpoint.files | {key: torch.ones(1) for key in dropped})
    with caplog.at_level(logging.INFO):
        assert list(_sources(tmp_path, _TENSOR)) == [_Q]
    lines = [record.getMessage() for record in caplog.records if "activations" in record.getMessage()]
    assert len(lines) == 1
    assert all(key in lines[0] for key in dropped)


def test_unquantised_files_never_meet_quantised_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("quantised code was called")

    for name in ("_pair_weights", "_pair_blocks", "QuantizedSource", "ScaleGrid"):
        monkeypatch.setattr(f"titanmoe.checkpoint.sources.{name}", refuse)
    write_folder(tmp_path, {}, {_Q: torch.randn(6, 10), "logit_scale": torch.ones(1)})
    sources = _sources(tmp_path, None)
    assert all(type(source) is PlainSource for source in sources.values())
    assert sorted(sources) == ["logit_scale", _Q]


# Accidents


def _fp8(*shape: int) -> Tensor:
    return torch.ones(shape).to(torch.float8_e4m3fn)


_S, _SI = _Q + "_scale", _Q + "_scale_inv"
_B, _BS = _GATE_UP + "_blocks", _GATE_UP + "_scales"
_U8 = torch.uint8


@pytest.mark.parametrize(
    ("config", "tensors", "culprit", "message"),
    [
        (QWEN3_FP8, {_Q: _fp8(6, 10)}, _Q, rf"no file has its scale: {_SI} or {_S} \(beside it: nothing\)"),
        (
            QWEN3_FP8,
            {_Q: _fp8(6, 10), _Q.replace("weight", "qscale"): torch.ones(1, 1)},
            _Q,
            r"no file has its scale.*\(beside it: model.layers.0.self_attn.q_proj.qscale\)",
        ),
        (QWEN3_FP8, {_SI: torch.ones(1, 1)}, _SI, "no file has the weight"),
        (QWEN3_FP8, {_GATE_UP + "_scale_inv": torch.ones(3, 1, 1)}, _GATE_UP + "_scale_inv", "no file has the weight"),
        (
            QWEN3_FP8,
            {_Q: torch.ones(6, 10).bfloat16(), _SI: torch.ones(1, 1)},
            _SI,
            f"its weight is not quantised: {_Q} is BF16 in model-00000.safetensors",
        ),
        (QWEN3_FP8, {_Q: _fp8(6, 10), _SI: torch.ones(1, 1), _S: torch.ones(1, 1)}, _Q, "two scales"),
        (
            QWEN3_FP8,
            {_Q: _fp8(300, 200), _SI: torch.ones(2, 3)},
            _SI,
            r"of shape \[2, 3\]; a weight of shape \[300, 200\] with a scale per block of \[128, 128\].* has \[3, 2\]",
        ),
        (_CHANNEL, {_Q: _fp8(6, 10), _S: torch.ones(10)}, _S, r"shape \[10\].* per channel.* has \[6, 1\] or \[6\]"),
        (_CHANNEL, {_Q: _fp8(6, 10), _S: torch.ones(())}, _S, r"shape \[\]; .* per channel"),
        (_TENSOR, {_Q: _fp8(6, 10), _S: torch.ones(6, 1)}, _S, r"shape \[6, 1\]; .* per tensor"),
        (
            _CHANNEL,
            {_Q: _fp8(6, 10), _S: torch.ones(6, dtype=torch.int32)},
            _S,
            "scale of dtype I32; expected is one of",
        ),
        (
            QWEN3_FP8,
            {_Q: _fp8(6, 10), _SI: torch.ones(1, 1, dtype=_U8)},
            _SI,
            "scale of dtype U8; expected is one of F32",
        ),
        (QWEN3_FP8, {_Q: _fp8(10), _SI: torch.ones(1)}, _Q, r"FP8 of shape \[10\]"),
        (
            QWEN3_FP8,
            {_Q: torch.ones(6, 10).to(torch.float8_e5m2), _SI: torch.ones(1, 1)},
            _Q,
            "F8_E5M2 weights are not supported",
        ),
        (
            _CHANNEL,
            {_Q: torch.ones(6, 10, dtype=torch.int8), _S: torch.ones(6, 1)},
            _Q,
            "int8 weights are not supported",
        ),
        (None, {_Q: _fp8(6, 10), _SI: torch.ones(1, 1)}, _Q, "holds F8_E4M3 codes, and config.json has no"),
        (None, {_Q: torch.ones(6, 10).to(torch.float8_e5m2)}, _Q, "holds F8_E5M2 codes"),
        (
            compressed_tensors(ignore=["re:.*self_attn"]),
            {_Q: _fp8(6, 10), _S: torch.ones(6, 1)},
            _Q,
            "is FP8, though quantization_config.ignore lists its module",
        ),
        (
            compressed_tensors(["re:.*mlp", "Attention"]),
            {_Q: _fp8(6, 10), _S: torch.ones(6, 1)},
            _Q,
            r"no group .* is for its module \(targets: re:.\*mlp, Attention\)",
        ),
        (GPT_OSS, {_B: torch.ones(2, 4, 3, 16, dtype=_U8)}, _B, f"no file has their scales: {_BS}"),
        (GPT_OSS, {_BS: torch.ones(2, 4, 3, dtype=_U8)}, _BS, "no file has the blocks"),
        (
            GPT_OSS,
            {_B: torch.ones(2, 4, 3, 16, dtype=_U8), _BS: torch.ones(2, 4, 4, dtype=_U8)},
            _BS,
            r"scales of shape \[2, 4, 4\]; blocks of \[2, 4, 3, 16\]",
        ),
        (
            GPT_OSS,
            {_B: torch.ones(2, 4, 48, dtype=_U8), _BS: torch.ones(2, 4, 3, dtype=_U8)},
            _B,
            r"blocks of shape \[2, 4, 48\]; expected is \(..., outputs, blocks, 16\)",
        ),
        (
            GPT_OSS,
            {_B: torch.ones(2, 4, 3, 16, dtype=torch.int8), _BS: torch.ones(2, 4, 3, dtype=_U8)},
            _B,
            "blocks of dtype I8; expected is U8",
        ),
        (
            GPT_OSS,
            {_B: torch.ones(2, 4, 3, 16, dtype=_U8), _BS: torch.ones(2, 4, 3)},
            _BS,
            "scales of dtype F32; expected is U8",
        ),
        (GPT_OSS, {_Q: _fp8(6, 10)}, _Q, "is F8_E4M3 in a checkpoint that quantization_config says is mxfp4"),
    ],
)
def test_headers_that_do_not_fit(
    tmp_path: Path, config: dict | None, tensors: dict[str, Tensor], culprit: str, message: str
) -> None:
    """Found from the headers, before a byte is read, naming the tensor and its file."""
    write_folder(tmp_path, {}, tensors)
    with pytest.raises(ConfigError, match=message) as caught:
        _sources(tmp_path, config)
    assert caught.value.where == f"{tmp_path / 'model-00000.safetensors'}: {culprit}"


@pytest.mark.parametrize("config", [None, QWEN3_FP8, GPT_OSS])
def test_other_floats_are_left_to_the_reader(tmp_path: Path, config: dict | None) -> None:
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    write_folder(tmp_path, {}, {str(dtype): torch.ones(6, 10, dtype=dtype) for dtype in dtypes})
    sources = _sources(tmp_path, config)
    assert len(sources) == len(dtypes) and all(isinstance(source, PlainSource) for source in sources.values())


@pytest.mark.parametrize("config", [None, QWEN3_FP8])
def test_packed_floats_are_refused_by_name(tmp_path: Path, config: dict | None) -> None:
    header = b'{"%s":{"dtype":"F4","shape":[4,4],"data_offsets":[0,8]}}' % _Q.encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ConfigError, match=r"packed 4-bit floats \(F4\) are not supported") as caught:
        _sources(tmp_path, config)
    assert _Q in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float32, float("nan")),
        (torch.float32, float("inf")),
        (torch.bfloat16, -0.5),
        (torch.float8_e8m0fnu, float("nan")),
    ],
)
def test_scales_that_are_no_numbers(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    scales = torch.ones(3, 3)
    scales[2, 1] = value
    save_file({_Q: _fp8(41, 70), _SI: scales.to(dtype)}, tmp_path / "model.safetensors")
    source = _sources(tmp_path, _SMALL_BLOCKS)[_Q]
    with Files() as files:
        assert torch.equal(source.rows(files, 0, 32), torch.ones(32, 70))
        with pytest.raises(ConfigError, match=r"a scale is (nan|inf|-0.5) \(row 2, column 1") as caught:
            source.rows(files, 30, 5)
    assert str(tmp_path / "model.safetensors") in str(caught.value) and _SI in str(caught.value)


def test_an_mxfp4_scale_that_is_not_a_number(tmp_path: Path) -> None:
    scales = torch.full((2, 4, 3), 127, dtype=_U8)
    scales[1, 3, 2] = 255
    save_file({_B: torch.ones(2, 4, 3, 16, dtype=_U8), _BS: scales}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"a scale is nan \(row 7, column 2") as caught:
        _read(_sources(tmp_path, GPT_OSS)[_B])
    assert _BS in str(caught.value)
