"""Loading from folders: accounting for every tensor, tied embeddings, shards, memory, and accidents."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from tests.checkpoint.hf_models import MOE_SIZES, read_all, save_reference, some_tokens
from tests.checkpoint.memory import forget_peak, needs_proc, status_mib
from tests.ranks import full_tensor, run_ranks
from titanmoe.checkpoint.hf_folder import describe_keys
from titanmoe.checkpoint.hf_load import LoadSummary, load_hf_weights
from titanmoe.checkpoint.pretrained import from_pretrained, spec_of_hf_folder
from titanmoe.checkpoint.safetensors_io import TensorWriter
from titanmoe.config.errors import ConfigError
from titanmoe.models.build import build_model, materialize
from titanmoe.models.decoder import Decoder
from titanmoe.models.families.qwen3 import FAMILY
from titanmoe.models.family import Family
from titanmoe.models.keys import Axes, Rule, map_keys
from titanmoe.models.spec import DecoderSpec, GroupedQuery, LayerSpec, MoE, Rope, Router

_GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_reference(folder, "moe", max_shard_size="40KB")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def _rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Replace the weights by one file with these tensors."""
    for file in folder.glob("model*safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")


def _edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# Accounting for every tensor


def test_everything_that_differs_is_in_one_message_before_anything_is_read(folder: Path) -> None:
    tensors = read_all(folder)
    del tensors[_GATE], tensors["model.norm.weight"]
    tensors["model.layers.2.input_layernorm.weight"] = torch.zeros(48)
    tensors["lm_head.weight"] = torch.zeros(96, 48)
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(64, 48, dtype=torch.int8)
    _rewrite(folder, tensors)
    _, spec = spec_of_hf_folder(folder)
    model = materialize(build_model(spec), "cpu")
    for parameter in model.parameters():
        parameter.data.fill_(7)
    with pytest.raises(ConfigError) as caught:
        load_hf_weights(model, folder, FAMILY)
    message = str(caught.value)
    assert str(folder) in message
    assert f"missing in the files (2): {_GATE}, model.norm.weight" in message
    assert "unknown in the files (1): model.layers.2.input_layernorm.weight" in message
    assert "shape mismatch (1): lm_head.weight: found [96, 48], expected [97, 48]" in message
    assert "dtype I8 not supported (1): model.layers.0.self_attn.q_proj.weight" in message
    assert all((parameter == 7).all() for parameter in model.parameters())


def test_fp8_without_a_quantization_config(folder: Path) -> None:
    _rewrite(folder, {**read_all(folder), _GATE: torch.zeros(40, 48).to(torch.float8_e4m3fn)})
    with pytest.raises(ConfigError, match=rf"{_GATE}: holds F8_E4M3 codes, and config.json has no quantization_config"):
        from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_dtypes_that_are_no_weights_of_ours(folder: Path, dtype: torch.dtype) -> None:
    _rewrite(folder, {**read_all(folder), _GATE: torch.zeros(40, 48).to(dtype)})
    with pytest.raises(ConfigError, match=rf"not supported \(1\): {_GATE}"):
        from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_float_dtypes_are_converted(folder: Path, dtype: torch.dtype) -> None:
    tensors = read_all(folder)
    _rewrite(folder, {**tensors, _GATE: tensors[_GATE].to(dtype)})
    model = from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(model.get_parameter("layers.1.moe.experts.gate_up")[3, 0], tensors[_GATE].to(dtype).float())


def test_more_layers_in_the_files_than_in_the_config(folder: Path) -> None:
    _edit_json(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(ConfigError, match=r"unknown in the files \(27\): .*model.layers.1.input_layernorm.weight"):
        from_pretrained(folder)


_EXTRA = replace(FAMILY, extra_layer_key="model.layers.{i}.eh_proj.weight")


def _with_extra_layer(tensors: dict[str, Tensor], layer: int, eh_proj: bool = True) -> dict[str, Tensor]:
    """A layer for multi-token prediction as DeepSeek's files have it: a whole layer, and an embedding of its own."""
    prefix = f"model.layers.{layer}."
    extra = {
        key.replace("model.layers.1.", prefix): tensor.clone() for key, tensor in tensors.items() if ".layers.1." in key
    }
    extra |= {f"{prefix}{name}.weight": torch.zeros(9) for name in ("enorm", "hnorm", "shared_head.head", "eh_proj")}
    # Neither dtype nor a scale without its weight matters: nobody reads them.
    extra |= {
        f"{prefix}embed_tokens.weight": torch.zeros(3, dtype=torch.int8),
        f"{prefix}x.weight_scale_inv": torch.ones(1),
    }
    if not eh_proj:
        del extra[f"{prefix}eh_proj.weight"]
    return {**tensors, **extra}


@pytest.mark.parametrize("quantized", [False, True])
def test_layers_for_multi_token_prediction_are_dropped_with_one_line(
    folder: Path, caplog: pytest.LogCaptureFixture, quantized: bool
) -> None:
    expected = from_pretrained(folder, dtype=torch.float32)
    tensors = read_all(folder)
    _rewrite(folder, _with_extra_layer(_with_extra_layer(tensors, 10), 2))
    if quantized:
        _edit_json(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    model = materialize(build_model(expected.spec), "cpu")
    with caplog.at_level(logging.INFO):
        summary = load_hf_weights(model, folder, _EXTRA)
    dropped = [message for message in caplog.messages if "dropped" in message]
    assert dropped == ["Layers for multi-token prediction, dropped: 2, 10 (66 tensors)"]
    assert summary.num_tensors == len(tensors)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_what_only_looks_like_such_a_layer_stays_an_error(folder: Path) -> None:
    tensors = read_all(folder)
    _, spec = spec_of_hf_folder(folder)
    model = materialize(build_model(spec), "cpu")
    # A layer beyond the model's without the key, as with a config.json of another size; the key in a layer of ours.
    _rewrite(folder, {**_with_extra_layer(tensors, 2, eh_proj=False), "model.layers.1.eh_proj.weight": torch.zeros(2)})
    with pytest.raises(ConfigError, match=r"unknown in the files \(33\): .*layers.*eh_proj"):
        load_hf_weights(model, folder, _EXTRA)
    # A family that has no such layers.
    _rewrite(folder, _with_extra_layer(tensors, 2))
    with pytest.raises(ConfigError, match=r"unknown in the files \(33\)"):
        load_hf_weights(model, folder, FAMILY)


def _stack_experts(tensors: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The layer's experts as newer releases hold them: gate above up, all experts in one tensor."""
    prefix = f"model.layers.{layer}.mlp.experts."
    parts = {
        name: torch.stack([tensors[f"{prefix}{expert}.{name}.weight"] for expert in range(MOE_SIZES["num_experts"])])
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    return {
        **{key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)},
        f"{prefix}gate_up_proj": torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1),
        f"{prefix}down_proj": parts["down_proj"],
    }


def test_layers_may_differ_in_their_layout(folder: Path) -> None:
    expected = from_pretrained(folder).state_dict()
    _rewrite(folder, _stack_experts(read_all(folder), 1))
    for name, tensor in from_pretrained(folder).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_parameter_that_is_half_in_one_layout_and_half_in_another(folder: Path) -> None:
    tensors = read_all(folder)
    _rewrite(folder, {**_stack_experts(tensors, 1), _GATE: tensors[_GATE]})
    with pytest.raises(ConfigError) as caught:
        from_pretrained(folder)
    message, stacked = str(caught.value), "model.layers.1.mlp.experts.gate_up_proj"
    missing = 2 * MOE_SIZES["num_experts"] - 1
    assert f"missing in the files ({missing}): model.layers.*.mlp.experts.*.gate_proj.weight" in message
    assert f"of the same parameters in several layouts, none of them whole (2): {_GATE}, {stacked}" in message
    assert f"unknown in the files (1): {stacked}" in message


def test_renamed_experts_are_listed_with_what_is_expected_in_every_layout(folder: Path) -> None:
    """Expected beside found: who renamed them can see it."""
    _rewrite(folder, {key.replace("mlp.experts", "moe.experts"): tensor for key, tensor in read_all(folder).items()})
    with pytest.raises(ConfigError) as caught:
        from_pretrained(folder)
    message, count = str(caught.value), 2 * MOE_SIZES["num_experts"]
    assert (
        f"missing in the files ({3 * count}): model.layers.*.mlp.experts.*.gate_proj.weight ({count}, from" in message
    )
    assert "nor, in another layout (4): model.layers.*.mlp.experts.gate_up_proj (2, from" in message
    assert (
        f"unknown in the files ({3 * count}): model.layers.*.moe.experts.*.down_proj.weight ({count}, from" in message
    )


def test_rope_frequencies_are_dropped_with_a_line(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    _rewrite(folder, {**read_all(folder), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    with caplog.at_level(logging.INFO):
        from_pretrained(folder)
    assert "dropped: model.layers.0.self_attn.rotary_emb.inv_freq" in caplog.text


@pytest.mark.parametrize("differs", [False, True])
def test_a_tied_output_in_the_files_is_compared_and_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, differs: bool
) -> None:
    save_reference(tmp_path, "dense_tied")
    tensors = read_all(tmp_path)
    assert "lm_head.weight" not in tensors
    _rewrite(tmp_path, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + differs})
    with caplog.at_level(logging.INFO):
        model = from_pretrained(tmp_path, dtype=torch.float32)
    assert model.output is None
    assert ("lm_head.weight differs from the embedding" in caplog.text) == differs
    assert ("lm_head.weight is a copy of the embedding" in caplog.text) != differs

    _rewrite(tmp_path, {**tensors, "lm_head.weight": torch.zeros(3, 48)})
    with pytest.raises(ConfigError, match="shape mismatch"):
        from_pretrained(tmp_path)


def test_an_untied_model_needs_its_output(folder: Path) -> None:
    tensors = read_all(folder)
    del tensors["lm_head.weight"]
    _rewrite(folder, tensors)
    with pytest.raises(ConfigError, match=r"missing in the files \(1\): lm_head.weight"):
        from_pretrained(folder)


def test_what_no_rule_fills(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, spec = spec_of_hf_folder(folder)
    model = materialize(build_model(spec), "cpu")
    bias = torch.arange(6.0)
    model.layers["0"].moe.router.register_buffer("expert_bias", bias)
    with caplog.at_level(logging.INFO):
        load_hf_weights(model, folder, FAMILY)
    assert "left as initialised: layers.0.moe.router.expert_bias" in caplog.text
    assert torch.equal(bias, torch.arange(6.0))
    model.layers["0"].moe.router.extra = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ConfigError, match=r"no file tensor .* layers.0.moe.router.extra"):
        load_hf_weights(model, folder, FAMILY)


def test_progress_reaches_the_end(folder: Path) -> None:
    _, spec = spec_of_hf_folder(folder)
    seen: list[tuple[int, int]] = []
    summary = load_hf_weights(
        materialize(build_model(spec), "cpu"),
        folder,
        FAMILY,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert len(seen) == summary.num_tensors == len(read_all(folder))
    assert seen == sorted(seen)
    assert seen[-1] == (summary.bytes_read, summary.bytes_read)


def test_long_lists_of_names_stay_short() -> None:
    keys = [f"model.layers.{layer}.experts.{expert}.w1" for layer in range(9) for expert in range(9)]
    assert describe_keys(["x", *keys]) == "x, model.layers.*.experts.*.w1 (81, from model.layers.0.experts.0.w1 on)"
    assert describe_keys(f"name{letter}" for letter in "abcdefghijklmnop").endswith("namel, and 4 more kinds")


# Shards


def _poison(model: Decoder) -> None:
    """So that an element which is not written shows."""
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))


def _fully_shard(model: Decoder, layout: str) -> None:
    shape: tuple[int, ...] = (dist.get_world_size(),)
    names: tuple[str, ...] = ("shard",)
    if layout == "hsdp":
        shape, names = (2, 2), ("replicate", "shard")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    # By number of dims: gate_up is (E, 2, H, D), down is (E, D, H). "inner" cuts matrices and down within their rows.
    dims = {"shard1": {4: 1, 3: 1}, "shard2": {4: 2, 3: 1}, "inner": {4: 3, 3: 2, 2: 1}}.get(layout, {})

    def place(parameter: Tensor) -> Shard | None:
        return Shard(dims[parameter.dim()]) if parameter.dim() in dims else None

    for block in model.blocks():
        fully_shard(block, mesh=mesh, shard_placement_fn=place)
    fully_shard(model, mesh=mesh, shard_placement_fn=place)


def _load_sharded(
    folder: Path, layout: str, family: Family = FAMILY
) -> tuple[LoadSummary, int, dict[str, Tensor], Tensor]:
    _, spec = spec_of_hf_folder(folder)
    model = build_model(spec)
    _fully_shard(model, layout)
    materialize(model, "cpu")
    _poison(model)
    summary = load_hf_weights(model, folder, family)
    num_local = sum(parameter.to_local().numel() for parameter in model.parameters())
    whole = {name: full_tensor(tensor) for name, tensor in model.state_dict().items()}
    return summary, num_local, whole, model(some_tokens()).detach()


@pytest.mark.parametrize(
    ("layout", "world_size"), [("shard0", 2), ("shard1", 2), ("shard2", 2), ("inner", 2), ("hsdp", 4)]
)
def test_each_rank_reads_only_what_it_keeps(saved: Path, layout: str, world_size: int) -> None:
    expected = from_pretrained(saved, dtype=torch.float32)
    results = run_ranks(_load_sharded, world_size, saved, layout)
    for summary, num_local, whole, logits in results:
        assert whole.keys() == expected.state_dict().keys()
        for name, tensor in expected.state_dict().items():
            assert torch.equal(whole[name], tensor), name
        assert (logits - expected(some_tokens())).abs().max() < 1e-6
        if layout != "inner":
            assert summary.bytes_read == 4 * num_local
    if layout in ("shard0", "shard1", "shard2"):
        num_parameters = sum(parameter.numel() for parameter in expected.parameters())
        assert sum(summary.bytes_read for summary, *_ in results) == 4 * num_parameters


def _other_order(tensors: dict[str, Tensor], interleaved: bool) -> dict[str, Tensor]:
    """Experts stacked and (in, out), as Llama 4 has them, or with gate and up interleaved, as gpt-oss; and q_proj.T."""
    changed = {}
    for layer in range(MOE_SIZES["num_hidden_layers"]):
        tensors = _stack_experts(tensors, layer)
        prefix = f"model.layers.{layer}."
        gate, up = tensors[f"{prefix}mlp.experts.gate_up_proj"].transpose(1, 2).chunk(2, dim=2)
        merged = torch.stack([gate, up], dim=3).flatten(2) if interleaved else torch.cat([gate, up], dim=2)
        changed[f"{prefix}mlp.experts.gate_up_proj"] = merged
        changed[f"{prefix}mlp.experts.down_proj"] = tensors[f"{prefix}mlp.experts.down_proj"].transpose(1, 2)
        changed[f"{prefix}self_attn.q_proj.weight"] = tensors[f"{prefix}self_attn.q_proj.weight"].T
    return {key: tensor.contiguous() for key, tensor in {**tensors, **changed}.items()}


def _family_in_other_order(interleaved: bool) -> Family:
    experts, ours = "model.layers.{i}.mlp.experts", "layers.{i}.moe.experts"
    changed = (
        Rule(
            f"{experts}.gate_up_proj",
            f"{ours}.gate_up",
            axes=Axes(f"e d ({'h g' if interleaved else 'g h'})", "e g h d"),
        ),
        Rule(f"{experts}.down_proj", f"{ours}.down", axes=Axes("e h d", "e d h")),
        Rule("model.layers.{i}.self_attn.q_proj.weight", "layers.{i}.attention.q_proj.weight", axes=Axes("d o", "o d")),
    )
    replaced = {rule.pattern for rule in changed}
    return replace(FAMILY, rules=(*(rule for rule in FAMILY.rules if rule.pattern not in replaced), *changed))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_order_of_dims_whole(folder: Path, interleaved: bool, dtype: torch.dtype) -> None:
    expected = from_pretrained(folder, dtype=dtype)
    _rewrite(folder, _other_order(read_all(folder), interleaved))
    model = materialize(build_model(expected.spec, dtype=dtype), "cpu")
    _poison(model)
    load_hf_weights(model, folder, _family_in_other_order(interleaved))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("layout", "world_size", "interleaved"),
    [
        ("shard0", 2, False),
        ("shard1", 2, False),
        ("shard2", 2, True),
        ("inner", 2, True),
        ("shard0", 4, True),
        ("shard2", 4, False),
        ("inner", 4, False),
        ("hsdp", 4, True),
    ],
)
def test_another_order_of_dims_in_shards(folder: Path, layout: str, world_size: int, interleaved: bool) -> None:
    expected = from_pretrained(folder, dtype=torch.float32)
    _rewrite(folder, _other_order(read_all(folder), interleaved))
    for _, _, whole, _ in run_ranks(_load_sharded, world_size, folder, layout, _family_in_other_order(interleaved)):
        for name, tensor in expected.state_dict().items():
            assert torch.equal(whole[name], tensor), name


def _load_with_one_bad_rank(folder: Path) -> str:
    """Rank 1 finds another folder under the same name, as on a node whose copy is incomplete."""
    if os.environ["RANK"] == "1":
        folder = folder.with_name("incomplete")
    _, spec = spec_of_hf_folder(folder)
    model = build_model(spec)
    _fully_shard(model, "shard0")
    materialize(model, "cpu")
    try:
        load_hf_weights(model, folder, FAMILY)
    except ConfigError as error:
        return str(error)
    return "loaded"


def test_all_ranks_refuse_what_one_refuses(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("incomplete"))
    next(folder.with_name("incomplete").glob("model-00002-*")).unlink()
    messages = run_ranks(_load_with_one_bad_rank, 2, folder)
    assert messages[0] == messages[1]
    assert "the folder does not have it" in messages[0]


# Memory


def _peak_while_loading(folder: Path, dtype: torch.dtype) -> tuple[float, float]:
    """MiB of the model, and of what loading it took beyond that at its peak."""
    forget_peak()
    before = status_mib("VmRSS")
    model = from_pretrained(folder, dtype=dtype)
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return num_bytes / 2**20, status_mib("VmHWM") - before - num_bytes / 2**20


@needs_proc
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_takes_little_memory_beyond_the_model(tmp_path: Path, dtype: torch.dtype) -> None:
    layer = LayerSpec(GroupedQuery(4, 2, 64, Rope(64, 1e4), qk_norm=True), MoE(24, 2, 640, Router()))
    spec = DecoderSpec(dim=768, vocab_size=4096, layers=(layer,) * 2)
    (tmp_path / "config.json").write_text(json.dumps(FAMILY.to_hf_config(spec, "float32")))
    _write_zeros(tmp_path / "model.safetensors", spec)
    assert (tmp_path / "model.safetensors").stat().st_size > 300e6
    ((model_mib, beyond_mib),) = run_ranks(_peak_while_loading, 1, tmp_path, dtype, fresh=True)
    assert model_mib > 140
    # Four threads that stage 4 MiB each and what their allocators keep. A stacked parameter is 90 MiB, the file 300.
    assert beyond_mib < 75


def _write_zeros(path: Path, spec: DecoderSpec) -> None:
    shapes = {name: tensor.shape for name, tensor in build_model(spec).state_dict().items()}
    by_file_key, _ = map_keys([FAMILY.rules], shapes)
    announced = [(key, torch.float32, piece.shape(shapes[name])) for key, (name, piece) in by_file_key.items()]
    writer = TensorWriter(path, announced)
    for key, dtype, shape in announced:
        writer.write(key, torch.zeros(shape, dtype=dtype))
    writer.close()


# Accidents


def _only_pickle(folder: Path) -> None:
    for file in folder.glob("model*safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


def _edit_index(folder: Path, key: str, file_name: str) -> None:
    file = folder / "model.safetensors.index.json"
    weight_map = json.loads(file.read_text())["weight_map"]
    _edit_json(file, weight_map={**weight_map, key: file_name})


def _first_shard(folder: Path) -> Path:
    return min(folder.glob("model-00001-*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: _first_shard(folder).unlink(), r"names model-00001-of-\d+.safetensors .* does not have it"),
        (lambda folder: _first_shard(folder).write_bytes(b""), "the file is empty"),
        (
            lambda folder: _first_shard(folder).write_text("version https://git-lfs.github.com/spec/v1\n"),
            "Git-LFS pointer",
        ),
        (lambda folder: os.truncate(_first_shard(folder), 9000), "the file is cut short"),
        (
            lambda folder: _edit_index(folder, "model.extra", _first_shard(folder).name),
            "lacks tensors that the index promises: model.extra",
        ),
        (lambda folder: _edit_index(folder, "lm_head.weight", "../model.safetensors"), "outside its own folder"),
        (lambda folder: _edit_index(folder, "lm_head.weight", 3), "no weight_map"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "index.json: is not valid JSON"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
        (
            lambda folder: (folder / "model.safetensors.index.json").unlink(),
            "safetensors files .* without model.safetensors.index",
        ),
        (_only_pickle, r"pickled weights \(pytorch_model.bin\)(.|\n)*save_pretrained"),
        (
            lambda folder: [file.unlink() for file in folder.glob("model*")],
            r"has no weights(.|\n)*It contains: config.json",
        ),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: is not valid JSON"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "config.json: is not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: does not hold a JSON object"),
        (
            lambda folder: _edit_json(folder / "config.json", architectures=["GPT2LMHeadModel"]),
            r"config.json: architectures: (.|\n)*GPT2LMHeadModel(.|\n)*Qwen3MoeForCausalLM",
        ),
        (
            lambda folder: _edit_json(folder / "config.json", quantization_config={"quant_method": "awq"}),
            "quant_method 'awq' is not supported",
        ),
        (
            lambda folder: _edit_json(folder / "config.json", num_hidden_layers="two"),
            "num_hidden_layers: 'two' is not a positive whole number",
        ),
        (
            lambda folder: _edit_json(folder / "config.json", rms_norm_eps="small"),
            "rms_norm_eps: 'small' is not a number",
        ),
        (lambda folder: _edit_json(folder / "config.json", hidden_size=None), "hidden_size is missing"),
        (lambda folder: shutil.rmtree(folder), "no such folder"),
    ],
)
def test_accidents_are_named(folder: Path, damage, message: str) -> None:
    damage(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        from_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_a_hub_name_is_not_downloaded() -> None:
    with pytest.raises(ConfigError, match="Nothing is downloaded") as caught:
        from_pretrained("Qwen/Qwen3-30B-A3B")
    assert "hf download Qwen/Qwen3-30B-A3B --local-dir" in str(caught.value)
    with pytest.raises(ConfigError, match="is a file"):
        from_pretrained(__file__)


def test_any_single_file_name_will_do_and_the_index_may_forget_a_tensor(folder: Path) -> None:
    _rewrite(folder, read_all(folder))
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    expected = from_pretrained(folder).state_dict()
    (folder / "weights.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, tensor in from_pretrained(folder).state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_the_spec_comes_from_the_config(folder: Path) -> None:
    family, spec = spec_of_hf_folder(folder)
    assert family is FAMILY
    experts = spec.layers[0].feed_forward
    assert isinstance(experts, MoE)
    assert (experts.num_experts, experts.top_k, experts.hidden_dim) == (
        MOE_SIZES["num_experts"],
        MOE_SIZES["num_experts_per_tok"],
        MOE_SIZES["moe_intermediate_size"],
    )
