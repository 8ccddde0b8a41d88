"""Batch sizes and degrees of parallelism: the formulas that validation and training share."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from titanmoe.config.errors import ConfigError
from titanmoe.config.job_config import JobConfig


@dataclass(frozen=True)
class Degrees:
    """Over how many ranks each thing is spread.

    The ranks of ep and etp are among those of dp_shard, cp and tp; the product of the others is the number of ranks.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def num_data_ranks(self) -> int:
        """Ranks, or groups of them, that read different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def num_ranks(self) -> int:
        return self.pp * self.num_data_ranks * self.cp * self.tp

    @property
    def shards_experts_apart(self) -> bool:
        """Whether the parameters of experts are sharded over other ranks than those of other layers."""
        return self.ep > 1 or self.tp > 1

    def named(self) -> dict[str, int]:
        return asdict(self)


def degrees_of(config: JobConfig, world_size: int) -> Degrees:
    """The degrees of parallelism, with a shard degree of -1 resolved.

    Raises:
        ConfigError: replicate * shard * tensor * pipeline * context is not the number of ranks; the ranks that share
            experts are not a part of those that share shards; an expert is split otherwise than its layer.
    """
    section = config.parallelism
    shard = section.data_parallel_shard_degree
    given = Degrees(
        pp=section.pipeline_parallel_degree,
        dp_replicate=section.data_parallel_replicate_degree,
        dp_shard=1,
        cp=section.context_parallel_degree,
        tp=section.tensor_parallel_degree,
        ep=section.expert_parallel_degree,
        etp=section.expert_tensor_parallel_degree,
    )
    degrees = replace(given, dp_shard=max(1, world_size // given.num_ranks) if shard == -1 else shard)
    if degrees.num_ranks != world_size:
        numbers = f"{given.dp_replicate} * {shard} * {given.tp} * {given.pp} * {given.cp}"
        num_ranks = degrees.num_ranks
        mend = f"Start {num_ranks} ranks (NGPU={num_ranks} on one node), or set data_parallel_shard_degree = -1."
        if shard == -1:
            mend = f"With a shard degree of -1, {given.num_ranks} must divide {world_size}."
        raise ConfigError(
            "data_parallel_replicate_degree * data_parallel_shard_degree * tensor_parallel_degree * "
            f"pipeline_parallel_degree * context_parallel_degree = {numbers} does not fit {world_size} ranks",
            where="[parallelism]",
            mend=mend,
        )
    if degrees.etp not in (1, degrees.tp):
        raise ConfigError(
            f"an expert is split like its layer or not at all: {degrees.etp} is neither tensor_parallel_degree = "
            f"{degrees.tp} nor 1",
            where="parallelism.expert_tensor_parallel_degree",
        )
    among = degrees.dp_shard * degrees.cp * degrees.tp
    if among % (degrees.ep * degrees.etp):
        raise ConfigError(
            "expert_parallel_degree * expert_tensor_parallel_degree must divide data_parallel_shard_degree * "
            "context_parallel_degree * tensor_parallel_degree: "
            f"{among} is not a multiple of {degrees.ep} * {degrees.etp}",
            where="parallelism.expert_parallel_degree",
            mend=f"Choose one of {_divisors(among // degrees.etp)}.",
        )
    return degrees


def check_sequences_can_be_cut(config: JobConfig) -> None:
    """
    Raises:
        ConfigError: not every rank would get the same number of tokens of a sequence.
    """
    section = config.parallelism
    num_parts = section.context_parallel_degree * section.tensor_parallel_degree
    lengths = {"training.seq_len": config.training.seq_len}
    if config.validation.enable:
        lengths["validation.seq_len"] = config.validation.seq_len
    for where, seq_len in lengths.items():
        if seq_len % num_parts:
            raise ConfigError(
                "context_parallel_degree * tensor_parallel_degree must divide seq_len: "
                f"{seq_len} is not a multiple of {section.context_parallel_degree} * {section.tensor_parallel_degree}",
                where=where,
                mend=f"The next is {-(-seq_len // num_parts) * num_parts}.",
            )


def _divisors(number: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)


def global_batch_size(config: JobConfig, world_size: int) -> int:
    """Sequences per optimizer step over all ranks.

    Raises:
        ConfigError: it is not a multiple of local_batch_size * data-parallel degree, or as `degrees_of`.
    """
    local = config.training.local_batch_size
    degree = degrees_of(config, world_size).num_data_ranks
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
    at_once = config.training.local_batch_size * degrees_of(config, world_size).num_data_ranks
    return global_batch_size(config, world_size) // at_once


def tokens_per_step(config: JobConfig, world_size: int) -> int:
    """Tokens per optimizer step over all ranks.

    Raises:
        ConfigError: as `global_batch_size`.
    """
    return global_batch_size(config, world_size) * config.training.seq_len
