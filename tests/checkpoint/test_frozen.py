"""Frozen weights from files: equal to a model that was loaded whole and then quantised, or to the files' codes."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.checkpoint.memory import forget_peak, needs_proc, status_mib
from tests.checkpoint.quantized_files import Checkpoint, random_weights, write_folder
from tests.checkpoint.test_quantization import QWEN3_FP8, compressed_tensors
from tests.ranks import full_tensor, run_ranks
from titanmoe import convert, from_pretrained, load_config, save_pretrained
from titanmoe.benchmarks.load import _write_checkpoint
from titanmoe.checkpoint.hf_load import load_hf_weights
from titanmoe.config.errors import ConfigError
from titanmoe.config.job_config import JobConfig
from titanmoe.config.sizes import Degrees
from titanmoe.models.build import build_model, init_weights, materialize
from titanmoe.models.decoder import Decoder
from titanmoe.models.family import get_family
from titanmoe.models.spec import DecoderSpec, Dense, GroupedQuery, LayerSpec, MoE, Rope, Router
from titanmoe.ops.frozen_storage import Stored
from titanmoe.parallel.mesh import Mesh
from titanmoe.parallel.parallelize import parallelize

_ATTENTION = GroupedQuery(4, 2, 32, Rope(32, 1e4), qk_norm=True)
_LAYERS = (LayerSpec(_ATTENTION, MoE(3, 2, 160, Router())), LayerSpec(_ATTENTION, Dense(288)))
SPEC = DecoderSpec(dim=192, vocab_size=97, layers=_LAYERS, family="qwen3")
"""Blocks of 128 x 128 are cut off along most sides; all inputs are multiples of 32."""

_EVEN = replace(SPEC, vocab_size=98, layers=(replace(_LAYERS[0], feed_forward=MoE(4, 2, 160, Router())), _LAYERS[1]))

CHANNEL, BLOCK, MX, NF4 = "channel", "block", "mx", "nf4"
FORMATS = [CHANNEL, BLOCK, MX, NF4]
each_format = pytest.mark.parametrize("format", FORMATS)


def _settings(format: str) -> tuple[str, JobConfig]:
    """The converter, and its settings."""
    if format in (CHANNEL, BLOCK):
        return "quantize.frozen.float8", load_config(None, [f"--quantize.frozen.float8.recipe_name={format}"])
    return f"quantize.frozen.{format}", load_config(None, ["--quantize.frozen.nf4.block_size=32"])


def _freeze(model: Decoder, format: str) -> Decoder:
    name, config = _settings(format)
    convert(model, [name], config)
    return model


def _noise(spec: DecoderSpec, format: str) -> Decoder:
    """A frozen model in whose memory is nothing useful."""
    model = materialize(_freeze(build_model(spec), format), "cpu")
    for parameter in model.parameters():
        parameter.data.fill_(7)
    return model


def _saved(folder: Path, spec: DecoderSpec = SPEC) -> Path:
    model = materialize(build_model(spec), "cpu")
    init_weights(model, seed=5)
    save_pretrained(model, folder, verify=False)
    return folder


def _assert_equal(model: nn.Module, expected: nn.Module) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    different = [name for name in ours if not torch.equal(full_tensor(ours[name]), theirs[name])]
    assert not different


@each_format
def test_loaded_is_loaded_whole_and_quantised(format: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = _saved(tmp_path / "hf")
    expected = _freeze(from_pretrained(folder, dtype=torch.float32), format)
    model = _noise(SPEC, format)
    with caplog.at_level(logging.INFO, "titanmoe.checkpoint"):
        load_hf_weights(model, folder, get_family("qwen3"))
    _assert_equal(model, expected)
    assert "Frozen weights: 0 tensors taken as they are, 20 quantised while read" in caplog.text


@each_format
@pytest.mark.parametrize("family", ["gpt_oss", "llama4"])
def test_stacked_and_transposed_files(family: str, format: str, tmp_path: Path) -> None:
    """Experts are in one tensor there, with inputs before outputs."""
    spec = get_family(family).flavors["debugmodel"]
    layers = []
    for layer in spec.layers:
        inner = replace(layer.feed_forward, hidden_dim=96)
        if isinstance(inner, MoE):
            inner = replace(inner, num_experts=3, top_k=1, shared=inner.shared and Dense(96))
        layers.append(replace(layer, feed_forward=inner))
    spec = replace(spec, dim=160, vocab_size=97, layers=tuple(layers))
    folder = _saved(tmp_path / "hf", spec)
    expected = _freeze(from_pretrained(folder, dtype=torch.float32), format)
    model = _noise(spec, format)
    load_hf_weights(model, folder, get_family(family))
    _assert_equal(model, expected)


def _fp8_folder(folder: Path, format: str, plain: str = "", spec: DecoderSpec = SPEC) -> tuple[Path, Checkpoint]:
    """Qwen3's FP8 release, or compressed-tensors with a scale per output; some layers may be in bfloat16."""
    checkpoint, family = Checkpoint(), get_family("qwen3")
    for key, weight in random_weights(family, spec).items():
        if "_proj" not in key or (plain and plain in key):
            checkpoint.add_plain(key, weight)
        elif format == BLOCK:
            checkpoint.add_fp8(key, weight, (128, 128), key + "_scale_inv", torch.bfloat16)
        else:
            checkpoint.add_fp8(key, weight, (1, weight.shape[1]), key + "_scale")
    quantization = QWEN3_FP8 if format == BLOCK else compressed_tensors()
    config = family.to_hf_config(spec, "bfloat16") | {"quantization_config": quantization}
    return write_folder(folder, config, checkpoint.files), checkpoint


@pytest.mark.parametrize("format", [CHANNEL, BLOCK])
def test_fp8_files_are_taken_as_they_are(format: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, checkpoint = _fp8_folder(tmp_path / "hf", format)
    model = _noise(SPEC, format)
    with caplog.at_level(logging.INFO, "titanmoe.checkpoint"):
        load_hf_weights(model, folder, get_family("qwen3"))
    assert "Frozen weights: 20 tensors taken as they are, 0 quantised while read" in caplog.text
    weights = dict(model.named_modules())
    codes = checkpoint.files["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(weights["layers.1.feed_forward.up_proj"].weight_payload, codes.view(torch.uint8))
    read = weights["layers.0.moe.experts"]
    up = read.read(read, "gate_up").dequantize(torch.float32).unflatten(1, (2, -1))[2, 1]
    assert torch.equal(up, checkpoint.values["model.layers.0.mlp.experts.2.up_proj.weight"])
    plain = from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(20).view(1, 20)
    torch.testing.assert_close(model.float()(tokens), plain(tokens), rtol=1e-4, atol=1e-4)


def test_another_recipe_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, _ = _fp8_folder(tmp_path / "hf", BLOCK)
    with caplog.at_level(logging.INFO, "titanmoe.checkpoint"):
        load_hf_weights(_noise(SPEC, CHANNEL), folder, get_family("qwen3"))
    assert 'with quantize.frozen.float8.recipe_name = "block", 20 would be taken as they are' in caplog.text


@pytest.mark.parametrize("filters", [False, True])
def test_layers_that_the_files_have_in_bfloat16(
    filters: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are quantised, and named, unless the converter leaves them: then they are as the files have them."""
    folder, checkpoint = _fp8_folder(tmp_path / "hf", CHANNEL, plain="layers.1.")
    config = load_config(None, ["--quantize.frozen.float8.filter_fqns=layers.1"] if filters else [])
    with caplog.at_level(logging.INFO, "titanmoe.checkpoint"):
        model = from_pretrained(folder, converters=["quantize.frozen.float8"], config=config)
    up_proj = model.get_submodule("layers.1.feed_forward.up_proj")
    if filters:
        assert "Frozen weights: 13 tensors taken as they are, 0 quantised while read\n" in caplog.text
        assert torch.equal(up_proj.weight, checkpoint.files["model.layers.1.mlp.up_proj.weight"].bfloat16())
    else:
        line = next(line for line in caplog.text.splitlines() if "Frozen weights" in line)
        assert "13 tensors taken as they are, 7 quantised while read: " in line and "mlp.up_proj.weight" in line
        assert up_proj.weight is None


@pytest.mark.parametrize("format", [MX, NF4])
def test_fp8_files_into_another_format(format: str, tmp_path: Path) -> None:
    folder, _ = _fp8_folder(tmp_path / "hf", BLOCK)
    expected = _freeze(from_pretrained(folder, dtype=torch.float32), format)
    model = _noise(SPEC, format)
    load_hf_weights(model, folder, get_family("qwen3"))
    _assert_equal(model, expected)


@pytest.mark.parametrize("damage", ["code", "value"])
def test_what_is_not_finite_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    if damage == "code":
        folder, _ = _fp8_folder(tmp_path / "hf", BLOCK)
    else:
        folder = _saved(tmp_path / "hf")
    file = next(folder.glob("*.safetensors"))
    tensors, key = load_file(file), "model.layers.0.mlp.experts.1.gate_proj.weight"
    if damage == "code":
        tensors[key].view(torch.uint8)[3, 4] = 0xFF
    else:
        tensors[key][3, 4] = math.inf
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=r"finite|no number") as error:
        load_hf_weights(_noise(SPEC, BLOCK), folder, get_family("qwen3"))
    assert key in str(error.value)


def test_missing_weights_are_named_as_files_name_them(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "hf")
    file = next(folder.glob("*.safetensors"))
    tensors, key = load_file(file), "model.layers.0.mlp.experts.1.gate_proj.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, file)
    with pytest.raises(ConfigError, match=key):
        load_hf_weights(_noise(SPEC, NF4), folder, get_family("qwen3"))


def _sharded(folder: Path, format: str, degrees: Degrees) -> list[str]:
    """Parts cut wherever they may be: along experts that are not even, through blocks."""
    model = _freeze(build_model(SPEC if degrees == _FSDP else _EVEN), format)
    mesh = Mesh.build(torch.device("cpu"), degrees)
    parallelize(model, mesh, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    materialize(model, "cpu")
    load_hf_weights(model, folder, get_family("qwen3"))
    whole = _noise(model.spec, format)
    load_hf_weights(whole, folder, get_family("qwen3"))
    theirs = whole.state_dict()
    return [name for name, ours in model.state_dict().items() if not torch.equal(full_tensor(ours), theirs[name])]


_FSDP, _EP, _TP = Degrees(dp_shard=2), Degrees(dp_shard=4, ep=2), Degrees(tp=2, etp=2)


@pytest.mark.parametrize(
    ("format", "degrees"),
    [*((format, degrees) for format in FORMATS for degrees in (_FSDP, _EP)), (CHANNEL, _TP)],
    ids=str,
)
def test_sharded(format: str, degrees: Degrees, tmp_path: Path) -> None:
    spec = SPEC if degrees == _FSDP else _EVEN
    if format in (CHANNEL, BLOCK):
        folder = _fp8_folder(tmp_path / "hf", format, spec=spec)[0]
    else:
        folder = _saved(tmp_path / "hf", spec)
    num_ranks = degrees.dp_shard * degrees.tp
    assert run_ranks(_sharded, num_ranks, folder, format, degrees) == [[]] * num_ranks


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 MiB of weights in bfloat16, most of them a stack of experts."""
    layers = (LayerSpec(_ATTENTION, MoE(16, 2, 1024, Router())),)
    spec = DecoderSpec(dim=1024, vocab_size=97, layers=layers, family="qwen3")
    model = materialize(build_model(spec, dtype=torch.bfloat16), "cpu")
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    folder = tmp_path_factory.mktemp("large") / "hf"
    save_pretrained(model, folder, verify=False)
    return folder


@needs_proc
@pytest.mark.parametrize(("format", "expected"), [(CHANNEL, 48), (BLOCK, 48), (MX, 50), (NF4, 26)])
def test_loading_takes_little_more_than_the_parts(format: str, expected: int, large: Path) -> None:
    """Not the 96 MiB of the weights in bfloat16, nor the 64 of a stack of experts."""
    name, config = _settings(format)
    from_pretrained(large, converters=[name], config=config)  # imports what it needs
    forget_peak()
    before = status_mib("VmRSS")
    model = from_pretrained(large, converters=[name], config=config)
    num_mib = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    assert expected < num_mib < expected + 2
    assert status_mib("VmHWM") - before - num_mib < 16


_PEAK = """
import sys
from tests.checkpoint.memory import forget_peak, status_mib
from titanmoe import from_pretrained, load_config
import titanmoe.converters.apply

forget_peak()
before = status_mib("VmRSS")
config = load_config(None, [f"--quantize.frozen.float8.recipe_name={sys.argv[2]}"])
model = from_pretrained(sys.argv[1], converters=["quantize.frozen.float8"], config=config)
print(before, status_mib("VmHWM"))
"""


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["block", "channel"])
def test_a_gigabyte_in_fp8(recipe: str, tmp_path: Path) -> None:
    """Taken as it is, and quantised anew: all that is ever resident is less than 1.3 of the files, imports included.

    With CUDA's libraries the imports alone are twice as large.
    """
    _write_checkpoint(tmp_path, 1.0, "fp8")
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) / 2**20
    assert size > 1024
    done = subprocess.run([sys.executable, "-c", _PEAK, tmp_path, recipe], capture_output=True, text=True, check=True)
    before, peak = map(float, done.stdout.split())
    assert peak - before < 1.05 * size
    assert peak < 1.3 * size or before > 350


@each_format
def test_few_values_are_quantised_at_once(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = (LayerSpec(_ATTENTION, MoE(2, 1, 1024, Router())),)
    spec = DecoderSpec(dim=1024, vocab_size=97, layers=layers, family="qwen3")
    folder, sizes = _saved(tmp_path / "hf", spec), []
    fill = Stored.fill

    def count(self: Stored, module: nn.Module, matrix: tuple[int, ...], first_row: int, values_RC: Tensor) -> None:
        sizes.append(values_RC.numel())
        fill(self, module, matrix, first_row, values_RC)

    monkeypatch.setattr(Stored, "fill", count)
    load_hf_weights(_noise(spec, format), folder, get_family("qwen3"))
    assert len(sizes) > 24 and max(sizes) <= 1 << 17


def test_frozen_models_from_pretrained(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "hf")
    name, config = _settings(NF4)
    model = from_pretrained(folder, dtype=torch.float32, converters=[name], config=config)
    _assert_equal(model, _freeze(from_pretrained(folder, dtype=torch.float32), NF4))
