"""Writing folders: files and index, targets in use, failing disks, comparing, shards, memory."""

from __future__ import annotations

import json
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from tests.checkpoint.hf_models import read_all, save_reference
from tests.checkpoint.memory import forget_peak, needs_proc, status_mib
from tests.checkpoint.small_models import ATTENTION, SPEC, WIDE, build, names_in
from tests.ranks import run_ranks
from titanmoe.checkpoint import hf_save
from titanmoe.checkpoint.hf_entries import Entry, entries_of
from titanmoe.checkpoint.hf_folder import list_tensors
from titanmoe.checkpoint.hf_load import load_hf_weights
from titanmoe.checkpoint.hf_save import save_hf
from titanmoe.checkpoint.hf_verify import find_difference
from titanmoe.checkpoint.model_tensors import model_tensors
from titanmoe.checkpoint.pretrained import family_of_spec, from_pretrained, save_pretrained, spec_of_hf_folder
from titanmoe.checkpoint.progress import log_progress
from titanmoe.config.errors import ConfigError
from titanmoe.data.tokenizer import load_tokenizer
from titanmoe.models.build import build_model, materialize
from titanmoe.models.common_rules import SELECTION_BIAS
from titanmoe.models.families.qwen3 import FAMILY
from titanmoe.models.family import Family
from titanmoe.models.keys import Axes, Piece, Rule
from titanmoe.models.spec import DecoderSpec, GroupedQuery, LayerSpec, MoE, Rope, Router
from titanmoe.ops.sharding import local_tensor
from titanmoe.parallel.ranks import Ranks
from titanmoe.training.errors import NotExportedError

# What is written


def test_one_file_when_it_fits(tmp_path: Path) -> None:
    save_pretrained(build(), tmp_path / "deep" / "er" / "model")
    assert names_in(tmp_path / "deep" / "er" / "model") == {"config.json", "model.safetensors"}
    assert names_in(tmp_path / "deep" / "er") == {"model"}


def test_shards_stay_below_the_limit_and_the_index_is_true(tmp_path: Path) -> None:
    limit = 20_000
    save_pretrained(build(), tmp_path / "model", max_shard_bytes=limit)
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
    assert total == sum(parameter.nbytes for parameter in build().parameters())


def test_a_tensor_larger_than_the_limit_has_a_file_of_its_own(tmp_path: Path) -> None:
    save_pretrained(build(), tmp_path / "model", max_shard_bytes=1)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == len(read_all(tmp_path / "model"))


def test_parameters_of_several_dtypes_keep_theirs(tmp_path: Path) -> None:
    model = build(dtype=torch.bfloat16)
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
    for name in ("tokenizer.json", "tokenizer_config.json", "README.md", "model.safetensors"):
        (source / name).write_text(name)
    (source / "generation_config.json").write_text('{"eos_token_id": [3, 5], "bos_token_id": null, "top_p": 0.9}')
    (source / "config.json").write_text('{"eos_token_id": 4, "bos_token_id": 2}')
    save_pretrained(build(), tmp_path / "model", tokenizer=source)
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (written["eos_token_id"], written["bos_token_id"]) == ([3, 5], 2)
    assert names_in(tmp_path / "model") == names_in(source) - {"README.md"}
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "tokenizer.json"
    save_pretrained(build(), tmp_path / "builtin", tokenizer="builtin")
    assert (tmp_path / "builtin" / "tokenizer.json").stat().st_size > 10_000
    # Made from the tokenizer, which has none of its own.
    tokenizer = load_tokenizer("builtin")
    generation = json.loads((tmp_path / "builtin" / "generation_config.json").read_text())
    config = json.loads((tmp_path / "builtin" / "config.json").read_text())
    for values in (generation, config):
        assert (values["eos_token_id"], values["pad_token_id"]) == (tokenizer.eos_id, tokenizer.pad_id)
    (source / "generation_config.json").write_text("[]")
    with pytest.raises(ConfigError, match="does not hold a JSON object"):
        save_pretrained(build(), tmp_path / "other", tokenizer=source)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        save_pretrained(build(), tmp_path / "other", tokenizer=tmp_path / "model" / "..")
    assert names_in(tmp_path) == {"source", "model", "builtin"}


def test_wrapper_names_do_not_reach_the_files(tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = build()
    save_pretrained(model, tmp_path / "plain")
    model.layers["0"] = checkpoint_wrapper(model.layers["0"])
    model.layers["1"] = torch.compile(model.layers["1"], backend="eager")
    save_pretrained(model, tmp_path / "wrapped")
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() == (
        tmp_path / "wrapped" / "model.safetensors"
    ).read_bytes()
    load_hf_weights(model, tmp_path / "plain", FAMILY)


def test_a_buffer_stays_float32_whatever_the_dtype(tmp_path: Path) -> None:
    spec = replace(SPEC, layers=(LayerSpec(ATTENTION, MoE(6, 2, 40, Router(selection_bias=True))),))
    family = replace(FAMILY, rules=(*FAMILY.rules, *SELECTION_BIAS), from_hf_config=lambda config: spec)
    model = build(spec)
    bias = model.layers["0"].moe.router.expert_bias
    bias.copy_(torch.randn(6) * 1e-3)
    tensors = model_tensors(model)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        entries = entries_of(tensors, family, dtype)
        assert {entry.dtype for entry in entries if entry.name.endswith("expert_bias")} == {torch.float32}
        save_hf(model, tmp_path / str(dtype), family, spec, dtype=dtype, verify=False)
        assert torch.equal(read_all(tmp_path / str(dtype))["model.layers.0.mlp.gate.e_score_correction_bias"], bias)


@pytest.mark.parametrize("stacked", [torch.arange(24.0).view(3, 2, 4), torch.arange(6_000_000.0).view(3, 400, 5000)])
def test_rows_of_transposed_files_come_a_few_at_a_time(stacked: Tensor) -> None:
    """Over all blocks they are the whole file tensor, and no block is more than 1 MiB or one slice."""
    axes = Axes("e d h", "e h d")
    entry = Entry("key", "name", Piece("key", (), axes), torch.float32, axes.merge(stacked.mT.shape))
    blocks = list(entry.row_blocks(stacked))
    assert [row for row, _ in blocks] == [sum(len(block) for _, block in blocks[:i]) for i in range(len(blocks))]
    assert all(len(block) == 1 or block.nbytes <= 1 << 20 for _, block in blocks)
    for row, block in blocks:
        assert torch.equal(block, stacked.mT[row : row + len(block)])


# What cannot be written


def test_a_buffer_without_a_place_in_the_files_is_named_before_anything_is_written(tmp_path: Path) -> None:
    biased = MoE(6, 2, 40, Router(selection_bias=True))
    spec = replace(SPEC, layers=(LayerSpec(ATTENTION, biased),))
    with pytest.raises(ConfigError, match=r"no place for layers.0.moe.router.expert_bias"):
        save_hf(build(spec), tmp_path / "model", FAMILY, spec)
    assert names_in(tmp_path) == set()


def test_a_spec_that_config_json_cannot_say_is_refused(tmp_path: Path) -> None:
    spec = replace(SPEC, layers=(LayerSpec(ATTENTION, MoE(6, 2, 40, Router(scale=2.5))),))
    with pytest.raises(ConfigError, match="cannot describe this model"):
        save_hf(build(spec), tmp_path / "model", FAMILY, spec)
    with pytest.raises(ConfigError, match="the model belongs to no family"):
        save_pretrained(build(replace(SPEC, family="")), tmp_path / "model")
    assert names_in(tmp_path) == set()
    assert family_of_spec(SPEC) is FAMILY


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.int8, torch.float64])
def test_dtypes_that_are_not_written(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match="Choose float32, bfloat16, float16 or float8_e4m3fn"):
        save_pretrained(build(), tmp_path / "model", dtype=dtype)


# Targets in use


def test_an_existing_export_is_replaced_only_on_request(tmp_path: Path) -> None:
    target = tmp_path / "model"
    save_pretrained(build(), target, max_shard_bytes=20_000)
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    with pytest.raises(ConfigError, match="not empty"):
        save_pretrained(build(), target)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    save_pretrained(build(), target, overwrite=True)
    assert names_in(target) == {"config.json", "model.safetensors"}
    assert names_in(tmp_path) == {"model"}


def test_foreign_files_are_never_deleted(tmp_path: Path) -> None:
    target = tmp_path / "model"
    save_pretrained(build(), target)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not of a model export \(notes.txt\)"):
        save_pretrained(build(), target, overwrite=True)
    assert names_in(target) == {"config.json", "model.safetensors", "notes.txt"}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        save_pretrained(build(), tmp_path / "file", overwrite=True)
    with pytest.raises(ConfigError, match="file: is a file"):
        save_pretrained(build(), tmp_path / "file" / "model")
    assert names_in(tmp_path) == {"model", "file"}


def test_an_empty_folder_and_a_link_are_targets(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_pretrained(build(), tmp_path / "link")
    assert (tmp_path / "real" / "model.safetensors").exists()
    assert (tmp_path / "link").is_symlink()


# Failing disks


def _save_with_small_files_only(target: Path) -> str:
    """The system fails every write beyond 50 kB of a file, as a full disk fails it."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    model = build()
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
    assert names_in(tmp_path) == set()


def test_too_little_space_is_seen_in_advance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match="too little space: the weights take"):
        save_pretrained(build(), tmp_path / "model")
    assert names_in(tmp_path) == set()


def test_a_failing_rename_keeps_the_old_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    save_pretrained(build(), target)
    before = (target / "model.safetensors").read_bytes()
    rename = Path.replace

    def failing(self: Path, other: Path) -> Path:
        if self.suffix == ".tmp" and self.is_dir():
            raise OSError(5, "Input/output error", str(self))
        return rename(self, other)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(ConfigError, match="Input/output error"):
        save_pretrained(build(), target, dtype=torch.bfloat16, overwrite=True)
    assert (target / "model.safetensors").read_bytes() == before
    assert names_in(tmp_path) == {"model"}


# Comparing


def _flip(folder: Path, key: str, byte: int) -> None:
    """Flip the highest bit of a byte of a tensor."""
    info = list_tensors(folder)[key]
    with info.path.open("r+b") as file:
        file.seek(info.start + byte)
        (old,) = file.read(1)
        file.seek(info.start + byte)
        file.write(bytes([old ^ 0x80]))


def _save_with_a_flip(target: Path, dtype: torch.dtype, key: str, byte: int) -> str:
    """The disk changes a byte between writing and comparing."""
    model = build(WIDE)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        fully_shard(model)

    def flip_and_compare(folder: Path | None, *args: Any) -> str:
        if folder is not None:
            _flip(folder, key, byte)
        return find_difference(folder, *args)

    with mock.patch.object(hf_save, "find_difference", flip_and_compare):
        try:
            save_pretrained(model, target, dtype=dtype, max_shard_bytes=100_000)
        except NotExportedError as error:
            return str(error)
    return "saved"


@pytest.mark.parametrize(
    ("dtype", "key", "place"),
    [
        (torch.float32, "model.layers.0.mlp.experts.1.up_proj.weight", "[0, 3]"),
        (torch.bfloat16, "lm_head.weight", "[0, 6]"),
        (torch.float8_e4m3fn, "model.layers.0.self_attn.q_proj.weight", "[0, 13]"),
        (torch.float8_e4m3fn, "model.norm.weight", "[6]"),
    ],
)
def test_a_changed_byte_is_found(tmp_path: Path, dtype: torch.dtype, key: str, place: str) -> None:
    message = _save_with_a_flip(tmp_path / "model", dtype, key, 13)
    assert f"what was written is not the model: {key} {place}: " in message
    assert names_in(tmp_path) == set()


def test_a_changed_scale_is_found(tmp_path: Path) -> None:
    key = "model.layers.1.mlp.down_proj.weight"
    message = _save_with_a_flip(tmp_path / "model", torch.float8_e4m3fn, f"{key}_scale_inv", 2)
    assert f"{key} [" in message
    message = _save_with_a_flip(tmp_path / "model", torch.float8_e4m3fn, f"{key}_scale_inv", 3)
    assert "scales are finite and not negative" in message and f"{key}_scale_inv" in message


def test_on_two_ranks_both_hear_of_a_difference(tmp_path: Path) -> None:
    arguments = (tmp_path / "model", torch.bfloat16, "model.layers.1.ffn", 0)
    messages = run_ranks(_save_with_a_flip, 2, *arguments[:2], "model.layers.1.mlp.up_proj.weight", 7)
    assert messages[0] == messages[1] and "model.layers.1.mlp.up_proj.weight [0, 3]" in messages[0]
    assert names_in(tmp_path) == set()


def test_without_comparing_a_changed_byte_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_save, "find_difference", None)
    save_pretrained(build(), tmp_path / "model", verify=False)
    assert names_in(tmp_path) == {"model"}


def test_a_wrong_order_is_found(tmp_path: Path) -> None:
    """Rules that read another permutation than was written, of the same shapes."""
    spec = replace(SPEC, dim=40)
    model = build(spec)
    save_pretrained(model, tmp_path / "model")
    tensors = model_tensors(model)
    entries = entries_of(tensors, FAMILY, None)
    right = find_difference(tmp_path / "model", tensors, FAMILY, spec, entries, Ranks(0, 1, None), log_progress())
    assert right == ""
    swapped = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    for wrong in (
        [replace(rule, at=(rule.at[0], 1 - rule.at[1])) if len(rule.at) == 2 else rule for rule in FAMILY.rules],
        [replace(rule, axes=Axes("e d h", "e h d")) if rule.at == ("e",) else rule for rule in FAMILY.rules],
        [
            replace(rule, pattern=rule.pattern.replace(name, swapped[name]))
            if (name := rule.pattern.split(".")[-2]) in swapped
            else rule
            for rule in FAMILY.rules
        ],
    ):
        if any(rule.axes for rule in wrong):
            wrong = [replace(rule, axes=Axes("d h", "h d")) if rule.axes else rule for rule in wrong]
        message = find_difference(
            tmp_path / "model", tensors, replace(FAMILY, rules=wrong), spec, entries, Ranks(0, 1, None), log_progress()
        )
        assert "in the file" in message, message


def test_other_files_than_were_meant_are_found(tmp_path: Path) -> None:
    model = build()
    tensors = model_tensors(model)

    def difference(dtype: torch.dtype | None = None, spec: DecoderSpec = SPEC) -> str:
        return find_difference(
            tmp_path / "model",
            tensors,
            FAMILY,
            spec,
            entries_of(tensors, FAMILY, dtype),
            Ranks(0, 1, None),
            log_progress(),
        )

    save_pretrained(model, tmp_path / "model")
    assert difference() == ""
    assert "model.embed_tokens.weight is F32" in difference(torch.bfloat16)
    assert "config.json describes another model" in difference(spec=replace(SPEC, norm_eps=1e-5))
    with torch.no_grad():
        model.norm.weight[5] += 1e-6
    assert "model.norm.weight [5]: 1.0 in the file, 1.00000" in difference()
    save_pretrained(build(replace(SPEC, tie_embeddings=True)), tmp_path / "model", overwrite=True)
    (tmp_path / "model" / "config.json").write_text(json.dumps(FAMILY.to_hf_config(SPEC, "float32")))
    assert "missing or unknown tensors: lm_head.weight" in difference()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    assert "the file is empty" in difference()


def test_numbers_that_are_not_finite_are_compared_by_their_bits(tmp_path: Path) -> None:
    model = build()
    model.norm.weight.data[:3] = torch.tensor([torch.nan, torch.inf, -0.0])
    save_pretrained(model, tmp_path / "model")
    assert str(read_all(tmp_path / "model")["model.norm.weight"][:3].tolist()) == "[nan, inf, -0.0]"


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
    assert names_in(tmp_path / "one") == names_in(tmp_path / "two")
    assert len(names_in(tmp_path / "one")) > 3
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


# Memory


_STACKED = replace(
    FAMILY,
    rules=(
        *(rule for rule in FAMILY.rules if "experts" not in rule.pattern),
        Rule("model.layers.{i}.gate_up", "layers.{i}.moe.experts.gate_up", axes=Axes("e d (g h)", "e g h d")),
        Rule("model.layers.{i}.down", "layers.{i}.moe.experts.down", axes=Axes("e h d", "e d h")),
    ),
)
"""Experts stacked and transposed, as Llama 4 has them."""


def _peak_while_saving(target: Path, dtype: torch.dtype, family: Family) -> tuple[float, float]:
    """MiB of the model, and of what saving it took beyond that at its peak."""
    layer = LayerSpec(GroupedQuery(4, 2, 64, Rope(64, 1e4), qk_norm=True), MoE(24, 2, 640))
    spec = DecoderSpec(dim=768, vocab_size=4096, layers=(layer,) * 2, family="qwen3")
    model = build_model(spec)
    is_sharded = os.environ["WORLD_SIZE"] != "1"
    if is_sharded:
        for block in model.blocks():
            fully_shard(block)
        fully_shard(model)
    materialize(model, "cpu")
    for parameter in model.parameters():
        local_tensor(parameter.data).zero_()
    if is_sharded:  # once in advance, as the first messages between ranks take memory of their own
        save_hf(model, target, family, spec, dtype=dtype, verify=False)
    dist.barrier()
    forget_peak()
    before = status_mib("VmRSS")
    save_hf(model, target, family, spec, dtype=dtype, overwrite=is_sharded)
    num_bytes = sum(local_tensor(parameter).nbytes for parameter in model.parameters())
    return num_bytes / 2**20, status_mib("VmHWM") - before


@needs_proc
@pytest.mark.parametrize(
    ("family", "dtype"),
    [(FAMILY, torch.bfloat16), (FAMILY, torch.float8_e4m3fn), (_STACKED, torch.float32), (_STACKED, torch.bfloat16)],
)
def test_saving_takes_little_memory_beyond_the_model(tmp_path: Path, family: Family, dtype: torch.dtype) -> None:
    ((model_mib, beyond_mib),) = run_ranks(_peak_while_saving, 1, tmp_path / "model", dtype, family, fresh=True)
    assert model_mib > 290
    # A stacked parameter is 90 MiB; some rows of it are converted, or read back, at a time.
    assert beyond_mib < 45


@needs_proc
def test_on_two_ranks_saving_gathers_one_parameter_at_a_time(tmp_path: Path) -> None:
    peaks = run_ranks(_peak_while_saving, 2, tmp_path / "model", torch.bfloat16, FAMILY, fresh=True)
    assert all(145 < model_mib < 200 for model_mib, _ in peaks)
    # A layer is 142 MiB, of which 90 are one parameter; the whole model is 298.
    assert 80 < peaks[0][1] < 125
    assert peaks[1][1] < 20
