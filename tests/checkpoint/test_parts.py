"""Ranks that have different tensors save and load as if one rank had them all, whatever the layout."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.checkpoint.parts import (
    SPEC,
    build_part,
    forget_values,
    is_last_rank,
    merged,
    num_ranks,
)
from tests.checkpoint.small_models import names_in
from tests.checkpoint.test_resume import adamw_8bit, eager_steps
from tests.checkpoint.tiny_run import TinyRun, all_tensors, assert_equal
from tests.parity.reference import read_all
from tests.ranks import full_tensor, run_ranks
from titanmoe.checkpoint import hf_save
from titanmoe.checkpoint.checkpointer import Checkpointer
from titanmoe.checkpoint.hf_load import load_hf_weights
from titanmoe.checkpoint.hf_save import save_hf
from titanmoe.checkpoint.pretrained import from_pretrained, save_pretrained
from titanmoe.checkpoint.safetensors_io import TensorWriter
from titanmoe.config.errors import ConfigError
from titanmoe.models.decoder import Decoder
from titanmoe.models.families.glm4_moe import FAMILY
from titanmoe.ops.sharding import local_box, local_tensor
from titanmoe.training.errors import NotExportedError

TIED = replace(SPEC, tie_embeddings=True)
OPTIMIZERS: dict[str, Callable[..., Any]] = {"adamw": partial(torch.optim.AdamW, foreach=False), "8bit": adamw_8bit}


def whole_tensors(model: Decoder) -> dict[str, Tensor]:
    return {name: full_tensor(tensor).clone() for name, tensor in model.state_dict().items()}


def expected_tensors(spec: Any = SPEC) -> dict[str, Tensor]:
    return whole_tensors(build_part("whole", spec))


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save_pretrained(build_part("whole"), folder / "model", max_shard_bytes=300_000)
    return folder / "model"


# Regions


def check_regions() -> list[str]:
    """Against DTensor's own way of making tensors whole."""
    wrong = []
    for layout in ("fsdp 2 x tp 2, etp 2", "fsdp 2 x tp 2, ep 2", "fsdp 4, ep 2 x etp 2"):
        model = build_part(layout)
        expected = expected_tensors()
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            box = local_box(parameter)
            region = tuple(slice(begin, begin + size) for begin, size in zip(box.offsets, box.sizes, strict=True))
            if not torch.equal(full_tensor(parameter), expected[name]):
                wrong.append(f"{layout}: {name} is not whole")
            if not torch.equal(local_tensor(parameter), expected[name][region]):
                wrong.append(f"{layout}: {name} {parameter.placements}")
    return wrong


def test_regions_of_strided_shards_and_of_shards_in_several_dims() -> None:
    assert run_ranks(check_regions, 4) == [[]] * 4


# Checkpoints of a run


def make_run(layout: str, kind: str, spec: Any = SPEC) -> TinyRun:
    return TinyRun(OPTIMIZERS[kind], make_model=lambda: build_part(layout, spec))


def step_without_forward(run: TinyRun) -> None:
    """A part of a model cannot be run alone: gradients are made up, the same for every layout."""
    for name, parameter in run.model.named_parameters():
        seed = sum(name.encode()) + run.counters.values["step"]
        whole = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        box = local_box(parameter)
        region = tuple(slice(begin, begin + size) for begin, size in zip(box.offsets, box.sizes, strict=True))
        parameter.grad = torch.zeros_like(parameter)
        local_tensor(parameter.grad).copy_(whole[region])
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.counters.values["step"] += 1


def save_part(folder: Path, layout: str, kind: str, spec: Any, async_mode: str) -> dict[str, Tensor]:
    with eager_steps():
        run = make_run(layout, kind, spec)
        step_without_forward(run)
        run.data.values["lanes"]["0"] = 1
        checkpointer = Checkpointer(folder, async_mode=async_mode)
        checkpointer.save(1, run.state())
        expected = all_tensors(run)
        if async_mode != "disabled":
            forget_values(run.model)
        checkpointer.close()
    return expected


def load_part(folder: Path, layout: str, kind: str, spec: Any) -> dict[str, Tensor]:
    with eager_steps():
        run = make_run(layout, kind, spec)
        forget_values(run.model)
        checkpointer = Checkpointer(folder)
        assert checkpointer.load(run.state()) == 1
        checkpointer.close()
    assert run.data.values == {"lanes": {"0": 1}}
    return all_tensors(run)


@pytest.mark.parametrize(
    ("saved_as", "loaded_as", "kind", "spec", "async_mode"),
    [
        ("2 stages", "whole", "8bit", SPEC, "disabled"),
        ("whole", "2 stages x fsdp 2", "8bit", SPEC, "disabled"),
        ("2 stages by turns", "whole", "adamw", TIED, "async"),
        ("fsdp 2 x tp 2, etp 2", "2 stages x fsdp 2", "adamw", SPEC, "disabled"),
        ("fsdp 4, ep 2 x etp 2", "2 stages x tp 2, ep 2", "adamw", TIED, "async"),
    ],
)
def test_any_layout_to_any_other(
    tmp_path: Path, saved_as: str, loaded_as: str, kind: str, spec: Any, async_mode: str
) -> None:
    saved = merged(run_ranks(save_part, num_ranks(saved_as), tmp_path, saved_as, kind, spec, async_mode))
    loaded = merged(run_ranks(load_part, num_ranks(loaded_as), tmp_path, loaded_as, kind, spec))
    assert len(saved) > 3 * len(expected_tensors(spec)), "the optimizer's states should be there"
    assert_equal(loaded, saved)


def load_seed(folder: Path) -> dict[str, Tensor]:
    model = build_part("2 stages x fsdp 2")
    forget_values(model)
    checkpointer = Checkpointer(folder / "run")
    assert checkpointer.load_model(folder, model) == 0
    checkpointer.close()
    return whole_tensors(model)


def test_a_seed_of_one_rank_begins_any_layout(tmp_path: Path) -> None:
    run = make_run("whole", "adamw")
    Checkpointer(tmp_path).save(0, run.state(), model_only=True)
    assert_equal(merged(run_ranks(load_seed, 4, tmp_path)), expected_tensors())


def resume_partly_trained(folder: Path) -> tuple[list[str], bool]:
    """The last rank trained nothing, then trains in bfloat16: rank 0 tells what is new there."""
    run = make_run("2 stages", "adamw")
    state = run.state()
    if is_last_rank():
        state = replace(state, optimizers=[])
    else:
        step_without_forward(run)
    checkpointer = Checkpointer(folder)
    checkpointer.save(1, state)
    same = make_run("2 stages", "adamw")
    same_state = replace(same.state(), optimizers=state.optimizers and [same.optimizer])
    checkpointer.load(same_state)
    is_equal = len(same.optimizer.state) == (0 if is_last_rank() else len(list(same.model.parameters())))
    changed = make_run("2 stages", "adamw")
    if is_last_rank():
        changed.model.norm.to(torch.bfloat16)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("titanmoe").addHandler(handler)
    logging.getLogger("titanmoe").setLevel(logging.INFO)
    checkpointer.load(changed.state())
    checkpointer.close()
    return lines, is_equal


def test_what_only_another_rank_has_is_told_too(tmp_path: Path) -> None:
    (lines, first), (others, second) = run_ranks(resume_partly_trained, 2, tmp_path)
    assert first and second
    assert any("have no optimizer state" in line and "layers.2." in line for line in lines)
    assert any("1 tensors change their type: model.norm.weight" in line for line in lines)
    assert not any("change their type" in line for line in others)


def load_with_less(folder: Path, kind: str) -> str:
    checkpointer = Checkpointer(folder)
    layers = ["01", ""] if kind == "no rank has layer 2" else None
    run = TinyRun(OPTIMIZERS["adamw"], make_model=lambda: build_part("2 stages", layers=layers))
    try:
        checkpointer.load(run.state(), 1)
    except ConfigError as error:
        return str(error)
    return "loaded"


def test_all_ranks_refuse_a_checkpoint_that_lacks_a_part_or_has_one_too_many(tmp_path: Path) -> None:
    run_ranks(save_part, 2, tmp_path, "2 stages", "adamw", SPEC, "disabled")
    first, second = run_ranks(load_with_less, 2, tmp_path, "no rank has layer 2")
    assert first == second
    assert "only in the checkpoint: model.layers.2." in first and "only in the model" not in first
    (tmp_path / "step-1" / "__1_0.distcp").unlink()
    first, second = run_ranks(load_with_less, 2, tmp_path, "a file is missing")
    assert first == second and "__1_0.distcp is missing" in first


# Folders in Hugging Face layout


def load_and_save_part(source: Path, target: Path, layout: str, spec: Any) -> tuple[int, int, dict[str, Tensor]]:
    model = build_part(layout, spec)
    forget_values(model)
    summary = load_hf_weights(model, source, FAMILY)
    tensors = whole_tensors(model)
    save_hf(model, target, FAMILY, spec, max_shard_bytes=300_000)
    num_local = sum(local_tensor(tensor).numel() for tensor in model.state_dict().values())
    return summary.bytes_read, 4 * num_local, tensors


@pytest.mark.parametrize(
    ("layout", "spec"),
    [
        ("2 stages", SPEC),
        ("2 stages by turns", TIED),
        ("2 stages x fsdp 2", SPEC),
        ("2 stages x tp 2, ep 2", TIED),
        ("fsdp 4, ep 2 x etp 2", SPEC),
    ],
)
def test_the_files_of_parts_are_those_of_the_whole(tmp_path: Path, layout: str, spec: Any) -> None:
    one, parts = tmp_path / "one", tmp_path / "parts"
    save_pretrained(build_part("whole", spec), one, max_shard_bytes=300_000)
    assert len(names_in(one)) > 3
    results = run_ranks(load_and_save_part, num_ranks(layout), one, parts, layout, spec)
    assert_equal(merged([tensors for *_, tensors in results]), expected_tensors(spec))
    assert names_in(one) == names_in(parts)
    for file in one.iterdir():
        assert file.read_bytes() == (parts / file.name).read_bytes(), file.name
    if " x tp" not in layout and " etp" not in layout:  # these cut rows, which are read whole
        assert all(bytes_read == num_local for bytes_read, num_local, _ in results)


def test_a_part_exported_reads_as_a_whole(tmp_path: Path, hf_folder: Path) -> None:
    run_ranks(load_and_save_part, 2, hf_folder, tmp_path / "parts", "2 stages", SPEC)
    assert_equal(from_pretrained(tmp_path / "parts", dtype=torch.float32).state_dict(), expected_tensors())


def refused(folder: Path, layers: list[str] | None, tie: bool) -> tuple[str, bool]:
    """The message, and whether every value is as it was."""
    model = build_part("2 stages", replace(SPEC, tie_embeddings=tie), layers)
    forget_values(model)
    try:
        load_hf_weights(model, folder, FAMILY)
    except ConfigError as error:
        return str(error), all(local_tensor(tensor).isnan().all() for tensor in model.state_dict().values())
    return "loaded", False


@pytest.mark.parametrize(
    ("changes", "layers", "message"),
    [
        (
            {"model.layers.2.self_attn.q_proj.weight": None},
            None,
            "missing in the files (1): model.layers.2.self_attn.q",
        ),
        ({"model.layers.0.mlp.up_proj.weight": None}, None, "missing in the files (1): model.layers.0.mlp.up_proj"),
        ({"model.layers.3.odd": torch.zeros(2)}, None, "unknown in the files (1): model.layers.3.odd"),
        (
            {"model.norm.weight": torch.zeros(3)},
            None,
            "shape mismatch (1): model.norm.weight: found [3], expected [64]",
        ),
        ({}, ["01", ""], "unknown in the files (26): "),
    ],
)
def test_every_rank_refuses_what_the_whole_model_does_not_find(
    tmp_path: Path, hf_folder: Path, changes: dict[str, Tensor | None], layers: list[str] | None, message: str
) -> None:
    tensors = {key: value for key, value in {**read_all(hf_folder), **changes}.items() if value is not None}
    writer = TensorWriter(
        tmp_path / "model.safetensors", [(key, t.dtype, tuple(t.shape)) for key, t in tensors.items()]
    )
    for key, tensor in tensors.items():
        writer.write(key, tensor)
    writer.close()
    (tmp_path / "config.json").write_bytes((hf_folder / "config.json").read_bytes())
    (first, is_untouched), (second, is_second_untouched) = run_ranks(refused, 2, tmp_path, layers, False)
    assert first == second
    assert message in first
    assert is_untouched and is_second_untouched


def save_less(target: Path) -> str:
    model = build_part("2 stages", layers=["01", ""])
    try:
        save_hf(model, target, FAMILY, SPEC)
    except ConfigError as error:
        return str(error)
    return "saved"


def test_a_layer_that_no_rank_has_is_named_before_anything_is_written(tmp_path: Path) -> None:
    first, second = run_ranks(save_less, 2, tmp_path / "model")
    assert first == second
    assert "no rank has layers.2.attention_norm.weight" in first
    assert names_in(tmp_path) == set()


def save_with_a_wrong_value(target: Path) -> str:
    """What rank 1 alone has is changed between writing and comparing."""
    model = build_part("2 stages")
    compare = hf_save.find_difference

    def change_and_compare(*args: Any) -> str:
        if is_last_rank():
            with torch.no_grad():
                model.layers["2"].moe.router.expert_bias[1] += 1
        return compare(*args)

    hf_save.find_difference = change_and_compare
    try:
        save_hf(model, target, FAMILY, SPEC)
    except NotExportedError as error:
        return str(error)
    return "saved"


def test_a_difference_in_what_another_rank_has_is_found(tmp_path: Path) -> None:
    first, second = run_ranks(save_with_a_wrong_value, 2, tmp_path / "model")
    assert first == second
    assert "in the model (layers.2.moe.router.expert_bias)" in first
    assert names_in(tmp_path) == set() and not dist.is_initialized()
