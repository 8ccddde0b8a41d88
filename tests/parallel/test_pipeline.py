"""Every schedule gives the loss, the gradients and the norm of one process; and stages are cut as they should be."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from itertools import accumulate, combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

from tests.models.kinds import KINDS, deep
from tests.parallel.layouts import Change, Layout, all_to_one, balance_sequences, compare, freeze_experts
from tests.ranks import run_ranks
from titanmoe.config.errors import ConfigError
from titanmoe.config.pipeline import SCHEDULES
from titanmoe.config.sections.machine import Parallelism
from titanmoe.config.sizes import Degrees
from titanmoe.models.build import build_model
from titanmoe.models.decoder import Decoder, Part
from titanmoe.models.spec import DecoderSpec
from titanmoe.parallel.mesh import Mesh
from titanmoe.parallel.pipeline import Pipeline
from titanmoe.parallel.stages import Stages, balanced, plan_stages

SPLITS = torch.__version__ >= TorchVersion("2.13")
"""Whether this torch can run a backward pass in two parts."""


def _compare(spec: DecoderSpec, layout: Layout, change: Change | None = None, **section: object) -> None:
    name = str(section.get("pipeline_parallel_schedule", "1F1B"))
    if SCHEDULES[name].splits_backward and not SPLITS:
        with pytest.raises(ConfigError, match="too old"):
            plan_stages(spec, Parallelism(pipeline_parallel_degree=layout.pp, pipeline_parallel_schedule=name), 36)
        return
    errors = compare(spec, layout, change, **section)
    assert errors.loss < 1e-6 and errors.norm < 1e-6
    assert errors.gradient < 1e-5, errors


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_equals_one_process(schedule: str) -> None:
    spec = deep(KINDS["grouped-query"], 4, dense_first=True)
    _compare(spec, Layout(pp=2), balance_sequences, pipeline_parallel_schedule=schedule)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "grouped-query"])
@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
def test_every_kind_of_layer(schedule: str, kind: str) -> None:
    _compare(deep(KINDS[kind], 4), Layout(pp=2), balance_sequences, pipeline_parallel_schedule=schedule)


@pytest.mark.parametrize(
    ("layout", "schedule"),
    [
        (Layout(pp=4), "1F1B"),
        (Layout(pp=2, dp_shard=2), "Interleaved1F1B"),
        (Layout(pp=2, dp_shard=2, ep=2), "ZBVZeroBubble"),
        (Layout(pp=2, dp_replicate=2, recompute="full", reshard="always"), "1F1B"),
        (Layout(pp=2, cp=2, ep=2, recompute="selective"), "Interleaved1F1B"),
        (Layout(pp=2, tp=2, ep=2, recompute="full"), "1F1B"),
        (Layout(pp=2, tp=2, etp=2), "InterleavedZeroBubble"),
    ],
    ids=str,
)
def test_with_other_parallelism(layout: Layout, schedule: str) -> None:
    _compare(deep(KINDS["latent"], 4), layout, balance_sequences, pipeline_parallel_schedule=schedule)


@pytest.mark.parametrize("change", [all_to_one, freeze_experts])
@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
def test_experts_that_get_all_or_learn_nothing(schedule: str, change: Change) -> None:
    spec = deep(KINDS["latent"], 4, dense_first=True)
    _compare(spec, Layout(pp=2, dp_shard=2, ep=2), change, pipeline_parallel_schedule=schedule)


@pytest.mark.parametrize(
    ("layout", "schedule"),
    [
        (Layout(pp=2), "1F1B"),
        (Layout(pp=2), "Interleaved1F1B"),
        (Layout(pp=2), "InterleavedZeroBubble"),
        (Layout(pp=4), "1F1B"),
        (Layout(pp=2, dp_shard=2, recompute="full", reshard="always"), "Interleaved1F1B"),
        (Layout(pp=2, tp=2, ep=2), "1F1B"),
    ],
    ids=str,
)
def test_a_tied_embedding_has_one_gradient_on_two_ranks(layout: Layout, schedule: str) -> None:
    spec = replace(deep(KINDS["latent"], 4), tie_embeddings=True)
    _compare(spec, layout, balance_sequences, pipeline_parallel_schedule=schedule)


def _freeze_embedding(model: Decoder) -> None:
    if model.tok_embeddings is not None:
        model.tok_embeddings.requires_grad_(False)


def test_a_tied_embedding_that_learns_nothing() -> None:
    _compare(replace(deep(KINDS["dense"], 2), tie_embeddings=True), Layout(pp=2), _freeze_embedding)


# Stages


def _brute_force(costs: list[int], num_stages: int, last: int) -> tuple[int, int]:
    """The least (largest stage, sum of squares)."""
    found = []
    for ends in combinations(range(1, len(costs)), num_stages - 1):
        borders = [0, *ends, len(costs)]
        sums = [sum(costs[begin:end]) for begin, end in pairwise(borders)]
        sums[-1] += last
        found.append((max(sums), sum(each**2 for each in sums)))
    return min(found)


@pytest.mark.parametrize("seed", range(20))
def test_stages_are_balanced_as_well_as_can_be(seed: int) -> None:
    dice = random.Random(seed)
    costs = [dice.randint(1, 20) for _ in range(dice.randint(4, 10))]
    num_stages, last = dice.randint(1, 4), dice.randint(0, 40)
    sizes = balanced(costs, num_stages, last)
    ends = list(accumulate(sizes, initial=0))
    sums = [sum(costs[begin:end]) for begin, end in pairwise(ends)]
    sums[-1] += last
    assert ends[-1] == len(costs) and min(sizes) >= 1
    assert (max(sums), sum(each**2 for each in sums)) == _brute_force(costs, num_stages, last)


def _plan(num_layers: int = 6, spec: DecoderSpec = KINDS["dense"], **section: Any) -> Stages:
    options = {"pipeline_parallel_degree": 2} | section
    return plan_stages(deep(spec, num_layers), Parallelism(**options), seq_len=36)


def test_stages_by_flops_and_who_has_them() -> None:
    stages = _plan(8, KINDS["grouped-query"], pipeline_parallel_schedule="LoopedBFS")
    assert stages.ranks == (0, 1, 0, 1)
    assert [index for part in stages.parts for index in part.layers] == list(range(8))
    assert sum(stages.shares) == pytest.approx(1)
    assert stages.on(0) == Part((*stages.parts[0].layers, *stages.parts[2].layers), embeds=True, projects=False)
    assert stages.on(1).projects and not stages.on(1).embeds
    first, *_, last = stages.describe()
    assert first.startswith("pipeline stage 0 on rank 0: embedding, layers 0 to ")
    assert last.startswith("pipeline stage 3 on rank 1: ") and "output" in last


def test_the_output_projection_counts() -> None:
    """As much as twenty layers: its stage has no more than it must."""
    spec = replace(KINDS["dense"], vocab_size=100_000)
    stages = _plan(6, spec)
    assert [len(part.layers) for part in stages.parts] == [5, 1] and stages.shares[1] > 0.9


@pytest.mark.skipif(not SPLITS, reason="this torch cannot run a backward pass in two parts")
def test_a_v_begins_and_ends_on_the_first_rank() -> None:
    assert _plan(8, pipeline_parallel_degree=4, pipeline_parallel_schedule="ZBVZeroBubble").ranks == (
        *(0, 1, 2, 3),
        *(3, 2, 1, 0),
    )


@pytest.mark.parametrize(
    ("num_layers", "section", "sizes"),
    [
        (6, {"pipeline_parallel_layers_per_stage": 4}, [3, 3]),
        (9, {"pipeline_parallel_last_stage_less_layers": 3}, [6, 3]),
        (7, {"pipeline_parallel_first_stage_less_layers": 0}, [4, 3]),
        (
            10,
            {"pipeline_parallel_layers_per_stage": 3, "pipeline_parallel_schedule": "Interleaved1F1B"},
            [2, 3, 3, 2],
        ),
    ],
)
def test_stages_as_torchtitan_cuts_them(num_layers: int, section: dict[str, Any], sizes: list[int]) -> None:
    assert [len(part.layers) for part in _plan(num_layers, **section).parts] == sizes


NAMES = ("tok_embeddings", "layers.0", "layers.1", "layers.2", "norm", "output")


def test_stages_by_name() -> None:
    stages = _plan(3, module_fqns_per_model_part=(NAMES[:1], NAMES[1:]))
    assert stages.parts == (Part((), embeds=True, projects=False), Part((0, 1, 2), embeds=False, projects=True))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((NAMES[:2], NAMES[3:]), "missing: layers.1"),
        ((NAMES[:3], NAMES[2:]), "given twice: layers.1"),
        ((NAMES[:3], (*NAMES[3:], "layers.3")), "unknown: layers.3"),
        ((NAMES[3:], NAMES[:3]), "in order"),
        ((NAMES[:5], NAMES[5:]), "norm and output in the last one"),
        ((NAMES[:2], NAMES[2:3], NAMES[3:]), "1F1B has 1 * pipeline_parallel_degree = 2 stages, not 3"),
    ],
)
def test_names_that_are_not_a_pipeline(parts: tuple[tuple[str, ...], ...], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        _plan(3, module_fqns_per_model_part=parts)


@pytest.mark.skipif(not SPLITS, reason="this torch cannot run a backward pass in two parts")
@pytest.mark.parametrize("schedule", ["ZBVZeroBubble", "DualPipeV"])
def test_one_rank_cannot_have_both_ends_of_a_tied_embedding(schedule: str) -> None:
    spec = replace(KINDS["dense"], tie_embeddings=True)
    with pytest.raises(ConfigError, match=f"the schedule {schedule} has the first and the last stage on one rank"):
        _plan(8, spec, pipeline_parallel_schedule=schedule)


def test_fewer_layers_than_stages() -> None:
    with pytest.raises(ConfigError, match="3 layers cannot be dealt to 4 stages"):
        _plan(3, pipeline_parallel_degree=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0B0\n", "has 1 rows with the stages 0"),
        ("0F0,0B0\n0F1,0B1\n", "with the stages 0, 0"),
        ("0F0,0B0\n2F0,2B0\n", "with the stages 0, 2"),
        ("zero\none\n", "has 2 rows with the stages ;"),
    ],
)
def test_files_without_a_schedule(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "schedule.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        _plan(pipeline_parallel_schedule_csv=f"{tmp_path}/schedule.csv")


def _too_few(path: str) -> str:
    """A file with one microbatch, for two."""
    mesh = Mesh.build(torch.device("cpu"), Degrees(pp=2))
    stages = _plan(pipeline_parallel_schedule_csv=path)
    model = build_model(deep(KINDS["dense"], 6), part=stages.on(mesh.pipeline_rank))
    with pytest.raises(ConfigError) as caught:
        Pipeline(
            [model],
            stages,
            mesh.pipeline.get_group(),
            schedule="1F1B",
            file=path,
            num_microbatches=2,
            hidden_shape=(1, 36, 40),
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
    return str(caught.value)


def test_a_file_with_other_microbatches(tmp_path: Path) -> None:
    (tmp_path / "schedule.csv").write_text("0F0,0B0\n1F0,1B0\n")
    for message in run_ranks(_too_few, 2, f"{tmp_path}/schedule.csv"):
        assert "is not a schedule of 2 microbatches" in message
