"""Which layers are in which stage of a pipeline, and which ranks have which stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.torch_version import TorchVersion

from titanmoe.config.errors import ConfigError
from titanmoe.config.pipeline import Schedule, schedule_of
from titanmoe.config.sections.machine import Parallelism
from titanmoe.models.decoder import Part
from titanmoe.models.flops import layer_flops, output_flops
from titanmoe.models.spec import DecoderSpec

_DEGREE = "parallelism.pipeline_parallel_degree"
_LAYERS = "parallelism.pipeline_parallel_layers_per_stage"
_NAMES = "parallelism.module_fqns_per_model_part"


@dataclass(frozen=True)
class Stages:
    """All stages of a pipeline, in order.

    Attributes:
        parts: what is in each.
        ranks: the rank of the pipeline that has it.
        shares: of the counted FLOPs of a forward pass; they add up to 1.
    """

    parts: tuple[Part, ...]
    ranks: tuple[int, ...]
    shares: tuple[float, ...]

    def of(self, rank: int) -> list[int]:
        """The stages of a rank, in order."""
        return [stage for stage, its_rank in enumerate(self.ranks) if its_rank == rank]

    def on(self, rank: int) -> Part:
        """All that a rank has."""
        parts = [self.parts[stage] for stage in self.of(rank)]
        return Part(
            tuple(index for part in parts for index in part.layers),
            embeds=any(part.embeds for part in parts),
            projects=any(part.projects for part in parts),
        )

    def describe(self) -> list[str]:
        """A line for each stage."""
        rows = zip(self.parts, self.ranks, self.shares, strict=True)
        return [
            f"pipeline stage {stage} on rank {rank}: {_describe(part)}; {share:.1%} of the FLOPs"
            for stage, (part, rank, share) in enumerate(rows)
        ]


def plan_stages(spec: DecoderSpec, section: Parallelism, seq_len: int) -> Stages:
    """The stages that the config asks for; if it says nothing of them, balanced by the FLOPs of a forward pass.

    What is counted is what `models.flops` counts, with sequences of `seq_len` tokens: looking up embeddings costs
    nothing, the output projection what it costs.

    Raises:
        ConfigError: the model cannot be cut as asked, or one rank would have both ends, and these are tied.
    """
    costs = [sum(layer_flops(layer, spec.dim, seq_len).values()) for layer in spec.layers]
    schedule = schedule_of(section)
    if schedule.splits_backward and torch.__version__ < TorchVersion("2.13"):
        raise ConfigError(
            f"the schedule runs backward passes in two parts, for which torch {torch.__version__} is too old",
            where="parallelism.pipeline_parallel_schedule",
            mend="Install torch 2.13, or choose 1F1B or Interleaved1F1B.",
        )
    names = section.module_fqns_per_model_part
    if names is not None:
        parts = _parts_by_name(names, len(costs))
    else:
        parts = _cut(_sizes(costs, output_flops(spec), section, schedule))
    ranks = _deal(len(parts), section, schedule, _NAMES if names is not None else _LAYERS)
    if spec.tie_embeddings and ranks[0] == ranks[-1]:
        # FSDP would have to gather one parameter for two of its models.
        name = section.pipeline_parallel_schedule_csv or section.pipeline_parallel_schedule
        raise ConfigError(
            f"the schedule {name} has the first and the last stage on one rank, and the model one weight for "
            "embedding and output, which two stages of a rank cannot share",
            where="parallelism.pipeline_parallel_schedule",
            mend="Choose 1F1B or Interleaved1F1B.",
        )
    work = [sum(costs[index] for index in part.layers) + part.projects * output_flops(spec) for part in parts]
    return Stages(tuple(parts), tuple(ranks), tuple(cost / sum(work) for cost in work))


def balanced(costs: Sequence[int], num_stages: int, last: int = 0) -> list[int]:
    """How many layers each stage gets, so that the most costly stage costs as little as can be.

    Of all ways to do that, the one with the smallest sum of squares, which is the most even.

    Args:
        costs: of each layer; a stage has neighbours, at least one.
        last: what the last stage costs beside its layers.
    """
    limit, _ = _cheapest(costs, num_stages, last, max)
    _, sizes = _cheapest(
        costs, num_stages, last, lambda total, cost: total + cost**2 if cost <= limit else float("inf")
    )
    return sizes


def _cheapest(
    costs: Sequence[int], num_stages: int, last: int, add: Callable[[float, int], float]
) -> tuple[float, list[int]]:
    """The least total of all cuts, and the sizes of its stages. `add` must grow with the total."""
    assert 1 <= num_stages <= len(costs)
    before = [0, *accumulate(costs)]
    best: dict[int, tuple[float, list[int]]] = {0: (0, [])}  # by the number of layers in the stages so far
    for stage in range(num_stages):
        num_after = num_stages - 1 - stage
        extra = 0 if num_after else last
        best = {
            end: min(
                (add(total, before[end] - before[begin] + extra), [*sizes, end - begin])
                for begin, (total, sizes) in best.items()
                if begin < end
            )
            for end in range(stage + 1, len(costs) - num_after + 1)
        }
    return best[len(costs)]


def _sizes(costs: Sequence[int], last: int, section: Parallelism, schedule: Schedule) -> list[int]:
    """How many layers each stage gets."""
    first_less = section.pipeline_parallel_first_stage_less_layers
    last_less = section.pipeline_parallel_last_stage_less_layers
    per_stage = section.pipeline_parallel_layers_per_stage
    if schedule.ranks is not None:
        num_stages = len(schedule.ranks)
    elif per_stage is not None:
        num_stages = -(-(len(costs) + first_less + last_less) // per_stage)
    else:
        num_stages = section.pipeline_parallel_degree * schedule.stages_per_rank
    if len(costs) < num_stages:
        raise ConfigError(
            f"{len(costs)} layers cannot be dealt to {num_stages} stages: pipeline_parallel_degree * stages per rank",
            where=_DEGREE,
        )
    if (first_less, last_less, per_stage) == (1, 1, None):
        return balanced(costs, num_stages, last)
    even, rest = divmod(len(costs) + first_less + last_less, num_stages)
    sizes = [even + (stage < rest) for stage in range(num_stages)]
    sizes[0] -= first_less
    sizes[-1] -= last_less
    if min(sizes) < 0:
        raise ConfigError(
            f"the stages would have {', '.join(map(str, sizes))} layers",
            where=f"{_LAYERS}, ..._first_stage_less_layers, ..._last_stage_less_layers",
        )
    return sizes


def _cut(sizes: Sequence[int]) -> list[Part]:
    ends = list(accumulate(sizes))
    return [
        Part(tuple(range(end - size, end)), embeds=stage == 0, projects=stage == len(sizes) - 1)
        for stage, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]


def _parts_by_name(names: Sequence[Sequence[str]], num_layers: int) -> list[Part]:
    wanted = ["tok_embeddings", *(f"layers.{index}" for index in range(num_layers)), "norm", "output"]
    given = [name for part in names for name in part]
    wrong = {
        "unknown": [name for name in given if name not in wanted],
        "missing": [name for name in wanted if name not in given],
        "given twice": sorted({name for name in given if given.count(name) > 1}),
    }
    if any(wrong.values()):
        what = "; ".join(f"{kind}: {', '.join(found)}" for kind, found in wrong.items() if found)
        raise ConfigError(f"it must name every part of the model once; {what}", where=_NAMES)
    places = [sorted(wanted.index(name) for name in part) for part in names]
    is_in_order = [place for part in places for place in part] == list(range(len(wanted)))
    if not all(places) or not is_in_order or len(places[-1]) < 2:
        raise ConfigError(
            "its parts must have neighbouring layers in order, with norm and output in the last one", where=_NAMES
        )
    sizes = [sum(1 <= place <= num_layers for place in part) for part in places]
    return _cut(sizes)


def _deal(num_stages: int, section: Parallelism, schedule: Schedule, where: str) -> Sequence[int]:
    """The rank of every stage."""
    if schedule.ranks is not None:
        if len(schedule.ranks) != num_stages:
            file = section.pipeline_parallel_schedule_csv
            raise ConfigError(f"there are {num_stages} stages, but {len(schedule.ranks)} in {file}", where=where)
        return schedule.ranks
    num_ranks = section.pipeline_parallel_degree
    per_rank, rest = divmod(num_stages, num_ranks)
    can_be_more = schedule.may_have is not None and per_rank >= schedule.may_have
    if rest or not (per_rank == schedule.stages_per_rank or can_be_more):
        wanted = f"{schedule.stages_per_rank} * pipeline_parallel_degree = {schedule.stages_per_rank * num_ranks}"
        if schedule.may_have is not None:
            wanted = f"a multiple of pipeline_parallel_degree = {num_ranks}"
        raise ConfigError(
            f"the schedule {section.pipeline_parallel_schedule} has {wanted} stages, not {num_stages}",
            where=where,
        )
    if schedule.is_v:
        return [min(stage, num_stages - 1 - stage) for stage in range(num_stages)]
    return [stage % num_ranks for stage in range(num_stages)]


def _describe(part: Part) -> str:
    found = ["embedding"] if part.embeds else []
    if part.layers:
        first, last = part.layers[0], part.layers[-1]
        found.append(f"layer {first}" if first == last else f"layers {first} to {last}")
    return ", ".join([*found, *(["output"] if part.projects else [])])
