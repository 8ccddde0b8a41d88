"""Writing folders: files and index, targets in use, failing disks, shards, memory."""

from __future__ import annotations

import json
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch.distributed.fsdp import fully_shard

from tests.checkpoint.hf_models import read_all, save_reference
from tests.checkpoint.memory import forget_peak, needs_proc, status_mib
from tests.ranks import run_ranks
from titanmoe.checkpoint.hf_load import load_hf_weights
from titanmoe.checkpoint.hf_save import save_hf
from titanmoe.checkpoint.pretrained import family_of_spec, from_pretrained, save_pretrained, spec_of_hf_folder
from titanmoe.config.errors import ConfigError
from titanmoe.models.build import build_model, init_weights, materialize
from titanmoe.models.decoder import Decoder
from titanmoe.models.families.qwen3 import FAMILY
from titanmoe.models.spec import DecoderSpec, Dense, GroupedQuery, LayerSpec, MoE, Rope, Router

_ATTENTION = GroupedQuery(4, 2, 16, Rope(16, 1e4), qk_norm=True)
_SPEC = DecoderSpec(
    dim=48,
    vocab_size=97,
    layers=(LayerSpec(_ATTENTION, MoE(6, 2, 40)), LayerSpec(_ATTENTION, Dense(56))),
    max_seq_len=64,
)


def _model(spec: DecoderSpec = _SPEC, dtype: torch.dtype = torch.float32) -> Decoder:
    model = materialize(build_model(spec, dtype=dtype), "cpu")
    init_weights(model, seed=3)
    return model


def _names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


# What is written


def test_one_file_when_it_fits(tmp_path: Path) -> None:
    save_pretrained(_model(), tmp_path / "deep" / "er" / "model")
    assert _names(tmp_path / "deep" / "er" / "model") == {"config.json", "model.safetensors"}
    assert _names(tmp_path / "deep" / "er") == {"model"}


def test_shards_stay_below_the_limit_and_the_index_is_true(tmp_path: Path) -> None:
    limit = 20_000
    save_pretrained(_model(), tmp_path / "model", max_shard_bytes=limit)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    assert len(files) > 5
    weight_map, total = {}, 0
    for file in files:
        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.offset_keys()}
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        assert num_bytes <= limit
        total += num_bytes
        weight_map |= dict.fromkeys(tensors, file.name)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": total}, "weight_map": weight_map}
    assert total == sum(parameter.nbytes for parameter in _model().parameters())


def test_a_tensor_larger_than_the_limit_has_a_file_of_its_own(tmp_path: Path) -> None:
    save_pretrained(_model(), tmp_path / "model", max_shard_bytes=1)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == len(read_all(tmp_path / "model"))


def test_parameters_of_several_dtypes_keep_theirs(tmp_path: Path) -> None:
    model = _model(dtype=torch.bfloat16)
    gate = model.layers["0"].moe.router.gate
    gate.weight = torch.nn.Parameter(gate.weight.float() * 1.001)
    save_pretrained(model, tmp_path / "model")
    tensors = read_all(tmp_path / "model")
    assert torch.equal(tensors.pop("model.layers.0.mlp.gate.weight"), gate.weight)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md", "model.safetensors"):
        (source / name).write_text(name)
    save_pretrained(_model(), tmp_path / "model", tokenizer=source)
    assert _names(tmp_path / "model") == _names(source) - {"README.md"} | {"config.json"}
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "tokenizer.json"
    save_pretrained(_model(), tmp_path / "builtin", tokenizer="builtin")
    assert (tmp_path / "builtin" / "tokenizer.json").stat().st_size > 10_000
    with pytest.raises(ConfigError, match="has no tokenizer"):
        save_pretrained(_model(), tmp_path / "other", tokenizer=tmp_path / "model" / "..")
    assert _names(tmp_path) == {"source", "model", "builtin"}


def test_wrapper_names_do_not_reach_the_files(tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = _model()
    save_pretrained(model, tmp_path / "plain")
    model.layers["0"] = checkpoint_wrapper(model.layers["0"])
    model.layers["1"] = torch.compile(model.layers["1"], backend="eager")
    save_pretrained(model, tmp_path / "wrapped")
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() == (
        tmp_path / "wrapped" / "model.safetensors"
    ).read_bytes()
    load_hf_weights(model, tmp_path / "plain", FAMILY)


# What cannot be written


def test_a_buffer_without_a_place_in_the_files_is_named_before_anything_is_written(tmp_path: Path) -> None:
    biased = MoE(6, 2, 40, Router(selection_bias=True))
    spec = replace(_SPEC, layers=(LayerSpec(_ATTENTION, biased),))
    with pytest.raises(ConfigError, match=r"no place for layers.0.moe.router.expert_bias"):
        save_hf(_model(spec), tmp_path / "model", FAMILY, spec)
    assert _names(tmp_path) == set()


def test_a_spec_that_config_json_cannot_say_is_refused(tmp_path: Path) -> None:
    spec = replace(_SPEC, layers=(LayerSpec(_ATTENTION, MoE(6, 2, 40, Router(scale=2.5))),))
    with pytest.raises(ConfigError, match="cannot describe this model"):
        save_hf(_model(spec), tmp_path / "model", FAMILY, spec)
    with pytest.raises(ConfigError, match="can describe this model"):
        save_pretrained(_model(spec), tmp_path / "model")
    assert _names(tmp_path) == set()
    assert family_of_spec(_SPEC) is FAMILY


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float64])
def test_dtypes_that_are_not_written(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match="Choose float32, bfloat16 or float16"):
        save_pretrained(_model(), tmp_path / "model", dtype=dtype)


# Targets in use


def test_an_existing_export_is_replaced_only_on_request(tmp_path: Path) -> None:
    target = tmp_path / "model"
    save_pretrained(_model(), target, max_shard_bytes=20_000)
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    with pytest.raises(ConfigError, match="not empty"):
        save_pretrained(_model(), target)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    save_pretrained(_model(), target, overwrite=True)
    assert _names(target) == {"config.json", "model.safetensors"}
    assert _names(tmp_path) == {"model"}


def test_foreign_files_are_never_deleted(tmp_path: Path) -> None:
    target = tmp_path / "model"
    save_pretrained(_model(), target)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not of a model export \(notes.txt\)"):
        save_pretrained(_model(), target, overwrite=True)
    assert _names(target) == {"config.json", "model.safetensors", "notes.txt"}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        save_pretrained(_model(), tmp_path / "file", overwrite=True)
    with pytest.raises(ConfigError, match="Not a directory"):
        save_pretrained(_model(), tmp_path / "file" / "model")
    assert _names(tmp_path) == {"model", "file"}


def test_an_empty_folder_and_a_link_are_targets(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_pretrained(_model(), tmp_path / "link")
    assert (tmp_path / "real" / "model.safetensors").exists()
    assert (tmp_path / "link").is_symlink()


# Failing disks


def _save_with_small_files_only(target: Path) -> str:
    """The system fails every write beyond 50 kB of a file, as a full disk fails it."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    model = _model()
    if os.environ["WORLD_SIZE"] != "1":
        fully_shard(model)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        save_pretrained(model, target)
    except ConfigError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "saved"


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, world_size: int) -> None:
    messages = run_ranks(_save_with_small_files_only, world_size, tmp_path / "model")
    assert len(messages) == world_size
    for message in messages:
        assert "writing the model failed: File too large" in message
    assert _names(tmp_path) == set()


def test_too_little_space_is_seen_in_advance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match="too little space: the weights take"):
        save_pretrained(_model(), tmp_path / "model")
    assert _names(tmp_path) == set()


def test_a_failing_rename_keeps_the_old_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    save_pretrained(_model(), target)
    before = (target / "model.safetensors").read_bytes()
    rename = Path.replace

    def failing(self: Path, other: Path) -> Path:
        if self.suffix == ".tmp" and self.is_dir():
            raise OSError(5, "Input/output error", str(self))
        return rename(self, other)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(ConfigError, match="Input/output error"):
        save_pretrained(_model(), target, dtype=torch.bfloat16, overwrite=True)
    assert (target / "model.safetensors").read_bytes() == before
    assert _names(tmp_path) == {"model"}


# Shards


def _load_and_save(source: Path, target: Path) -> None:
    _, spec = spec_of_hf_folder(source)
    model = build_model(spec, dtype=torch.bfloat16)
    for block in model.blocks():
        fully_shard(block)
    fully_shard(model)
    load_hf_weights(materialize(model, "cpu"), source, FAMILY)
    save_pretrained(model, target, max_shard_bytes=50_000)


def test_two_ranks_write_the_files_of_one(tmp_path: Path) -> None:
    save_reference(tmp_path / "source", "moe_with_dense_layers_and_bias", torch.bfloat16)
    save_pretrained(from_pretrained(tmp_path / "source"), tmp_path / "one", max_shard_bytes=50_000)
    run_ranks(_load_and_save, 2, tmp_path / "source", tmp_path / "two")
    assert _names(tmp_path / "one") == _names(tmp_path / "two")
    assert len(_names(tmp_path / "one")) > 3
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


# Memory


def _peak_while_saving(target: Path, dtype: torch.dtype) -> tuple[float, float]:
    """MiB of the model, and of what saving it took beyond that at its peak."""
    layer = LayerSpec(GroupedQuery(4, 2, 64, Rope(64, 1e4), qk_norm=True), MoE(24, 2, 640))
    spec = DecoderSpec(dim=768, vocab_size=4096, layers=(layer,) * 2)
    model = materialize(build_model(spec), "cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    forget_peak()
    before = status_mib("VmRSS")
    save_pretrained(model, target, dtype=dtype)
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    return num_bytes / 2**20, status_mib("VmHWM") - before


@needs_proc
def test_saving_takes_little_memory_beyond_the_model(tmp_path: Path) -> None:
    ((model_mib, beyond_mib),) = run_ranks(_peak_while_saving, 1, tmp_path / "model", torch.bfloat16)
    assert model_mib > 290
    # A stacked parameter is 90 MiB; its pieces of 2 MiB are converted one by one.
    assert beyond_mib < 30
