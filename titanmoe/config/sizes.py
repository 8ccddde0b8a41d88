"""Batch sizes and degrees of data parallelism: the formulas that validation and training share."""

from __future__ import annotations

import math
from collections.abc import Collection

from titanmoe.config.errors import ConfigError
from titanmoe.config.job_config import JobConfig


def data_parallel_degrees(config: JobConfig, world_size: int) -> tuple[int, int]:
    """(replicate, shard) degrees of data parallelism, with a shard degree of -1 resolved.

    Raises:
        ConfigError: replicate * shard * tensor * pipeline * context is not the number of ranks.
    """
    degrees = config.parallelism
    replicate, shard = degrees.data_parallel_replicate_degree, degrees.data_parallel_shard_degree
    others = degrees.tensor_parallel_degree * degrees.pipeline_parallel_degree * degrees.context_parallel_degree
    if shard == -1:
        shard, left = divmod(world_size, replicate * others)
        fits = left == 0 and shard >= 1
    else:
        fits = replicate * shard * others == world_size
    if fits:
        return replicate, shard
    numbers = " * ".join(
        str(degree)
        for degree in (
            replicate,
            degrees.data_parallel_shard_degree,
            degrees.tensor_parallel_degree,
            degrees.pipeline_parallel_degree,
            degrees.context_parallel_degree,
        )
    )
    mend = f"With a shard degree of -1, {replicate * others} must divide {world_size}."
    if degrees.data_parallel_shard_degree != -1:
        product = replicate * shard * others
        mend = f"Start {product} ranks (NGPU={product} on one node), or set data_parallel_shard_degree = -1."
    raise ConfigError(
        "data_parallel_replicate_degree * data_parallel_shard_degree * tensor_parallel_degree * "
        f"pipeline_parallel_degree * context_parallel_degree = {numbers} does not fit {world_size} ranks",
        where="[parallelism]",
        mend=mend,
    )


def check_degrees(config: JobConfig, world_size: int) -> None:
    """
    Raises:
        ConfigError: the ranks that share experts are not a part of those that share shards; sequences cannot be cut.
    """
    degree, context = config.parallelism.expert_parallel_degree, config.parallelism.context_parallel_degree
    shard = data_parallel_degrees(config, world_size)[1] * context
    if shard % degree:
        raise ConfigError(
            "expert_parallel_degree must divide data_parallel_shard_degree * context_parallel_degree: "
            f"{shard} is not a multiple of {degree}",
            where="parallelism.expert_parallel_degree",
            mend=f"Choose one of {_divisors(shard)}.",
        )
    lengths = {"training.seq_len": config.training.seq_len}
    if config.validation.enable:
        lengths["validation.seq_len"] = config.validation.seq_len
    for where, seq_len in lengths.items():
        if seq_len % context:
            raise ConfigError(
                f"context_parallel_degree must divide seq_len: {seq_len} is not a multiple of {context}", where=where
            )


def check_experts_can_be_dealt(degree: int, num_experts: Collection[int]) -> None:
    """
    Args:
        degree: of expert parallelism.
        num_experts: what the layers of the model have; empty if it has no MoE layer.

    Raises:
        ConfigError: not every rank would get the same number of experts.
    """
    common = math.gcd(*num_experts)
    if degree > 1 and (not num_experts or common % degree):
        what = f"{common} experts cannot be dealt evenly to {degree} ranks" if num_experts else "it has no experts"
        raise ConfigError(
            f"the model cannot be split over experts: {what}",
            where="parallelism.expert_parallel_degree",
            mend=f"Choose one of {_divisors(max(common, 1))}.",
        )


def check_heads_can_be_dealt(degree: int, num_heads: Collection[int]) -> None:
    """
    Args:
        degree: of context parallelism, whose ranks compute attention for a part of the heads each.
        num_heads: query heads of the model's layers.

    Raises:
        ConfigError: not every rank would get the same number of heads.
    """
    common = math.gcd(*num_heads)
    if common % degree:
        raise ConfigError(
            f"context_parallel_degree must divide the number of attention heads: {common} is not a multiple of "
            f"{degree}",
            where="parallelism.context_parallel_degree",
            mend=f"Choose one of {_divisors(common)}.",
        )


def _divisors(number: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)


def data_parallel_degree(config: JobConfig, world_size: int) -> int:
    """Number of ranks, or groups of ranks, that see different sequences: replicate * shard.

    Raises:
        ConfigError: as `data_parallel_degrees`.
    """
    replicate, shard = data_parallel_degrees(config, world_size)
    return replicate * shard


def global_batch_size(config: JobConfig, world_size: int) -> int:
    """Sequences per optimizer step over all ranks.

    Raises:
        ConfigError: it is not a multiple of local_batch_size * data-parallel degree, or as `data_parallel_degrees`.
    """
    local = config.training.local_batch_size
    degree = data_parallel_degree(config, world_size)
    total = config.training.global_batch_size
    if total == -1:
        return local * degree
    if total % (local * degree):
        at_once = local * degree
        nearest = max(1, round(total / at_once)) * at_once
        raise ConfigError(
            "training.global_batch_size must be a multiple of training.local_batch_size * data-parallel degree: "
            f"{total} is not a multiple of {local} * {degree} = {at_once}",
            where="[training]",
            mend=f"The nearest is {nearest}; -1 means {at_once}.",
        )
    return total


def accumulation_steps(config: JobConfig, world_size: int) -> int:
    """Batches of local_batch_size that each rank computes for one optimizer step.

    Raises:
        ConfigError: as `global_batch_size`.
    """
    at_once = config.training.local_batch_size * data_parallel_degree(config, world_size)
    return global_batch_size(config, world_size) // at_once


def tokens_per_step(config: JobConfig, world_size: int) -> int:
    """Tokens per optimizer step over all ranks.

    Raises:
        ConfigError: as `global_batch_size`.
    """
    return global_batch_size(config, world_size) * config.training.seq_len
