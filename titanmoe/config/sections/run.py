"""The run itself: where it writes, what it records, how it is debugged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from titanmoe.config.keys import key

_NO_FAULT_TOLERANCE = "fault_tolerance.enable is off"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Where the job is described and where it writes."""

    config_file: str | None = field(default=None, compare=False)
    """The TOML file of this job. A bare file name is also looked up in train_configs/. The last one given wins.
    Two configs read from different files are equal if all else is."""

    dump_folder: str = "./outputs"
    """Folder for everything the run leaves behind: config.toml, metrics, traces, checkpoints."""

    description: str = "default job"
    """What this job is, in the user's words; printed at the start."""

    print_config: bool = False
    """Print the resolved config at the start."""

    save_config_file: str | None = None
    """Also save the resolved config under this name in `job.dump_folder` (config.toml is always saved there)."""

    custom_config_module: str = key("", later="merging a user's own JobConfig class")
    """Python module with a JobConfig class to merge into this one."""


@dataclass(frozen=True, kw_only=True)
class Profiling:
    """Profiler traces, for chrome://tracing or Perfetto."""

    enable_profiling: bool = False
    """Record a trace of a few steps, again and again through the run."""

    save_traces_folder: str = "profile_traces"
    """Folder for the traces, inside `job.dump_folder`."""

    profile_freq: int = key(10, at_least=1)
    """Steps from one trace to the next; each cycle waits, warms up and then records."""

    profiler_active: int = key(1, at_least=1)
    """Steps that are recorded in each cycle."""

    profiler_warmup: int = key(3, at_least=0)
    """Steps before each recording in which the profiler runs and its output is thrown away."""

    enable_memory_snapshot: bool = key(False, later="memory snapshots")
    """Record the history of GPU allocations."""

    save_memory_snapshot_folder: str = key("memory_snapshot", inert="profiling.enable_memory_snapshot is off")
    """Folder for memory snapshots, inside `job.dump_folder`."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Which figures are logged, how often and where to. The console and metrics.jsonl are always written."""

    log_freq: int = key(10, at_least=1)
    """Log every n-th step; figures are means over the steps in between."""

    enable_tensorboard: bool = False
    """Also write TensorBoard event files."""

    disable_color_printing: bool = False
    """No colours on the console, even where it is a terminal."""

    save_tb_folder: str = "tb"
    """Folder for TensorBoard files, inside `job.dump_folder`."""

    save_for_all_ranks: bool = False
    """Write TensorBoard files on every rank instead of on rank 0 only."""

    enable_wandb: bool = False
    """Also log to Weights & Biases; needs the package `wandb`."""


@dataclass(frozen=True, kw_only=True)
class Comm:
    """Process groups: how long to wait for other ranks."""

    init_timeout_seconds: int = key(300, at_least=1)
    """How long a collective may take until the first step is done: start-up, loading and compiling differ by rank."""

    train_timeout_seconds: int = key(100, at_least=1)
    """How long a collective may take after the first step; a longer wait ends the run."""

    trace_buf_size: int = key(20000, at_least=0, inert="collectives are not recorded here")
    """Number of collectives that a flight recorder keeps."""

    save_traces_folder: str = key("comm_traces", inert="collectives are not recorded here")
    """Folder for records of collectives, inside `job.dump_folder`."""

    save_traces_file_prefix: str = key("rank_", inert="collectives are not recorded here")
    """Start of the file name of each rank's record of collectives."""

    mode: Literal["default", "fake_backend", "local_tensor"] = key("default", later="a run without real communication")
    """How ranks communicate; the modes other than `default` are dry runs on one process."""


@dataclass(frozen=True, kw_only=True)
class Debug:
    """Seeds and determinism."""

    seed: int | None = key(None, at_least=0, less_than=2**63)
    """Seed of weights and data order. With `none` it is 0, so that the same config gives the same run."""

    deterministic: bool = False
    """Use deterministic algorithms only: slower, and equal runs give equal bits."""

    deterministic_warn_only: bool = False
    """With `debug.deterministic`, warn about an operation that has no deterministic form instead of failing."""

    moe_force_load_balance: bool = False
    """Deal tokens to experts in turn instead of by the router's choice: for measuring speed, not for learning."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimation:
    """A dry run that only estimates memory."""

    enable: bool = key(False, later="estimating memory without training")
    """Estimate memory instead of training."""

    disable_fake_mode: bool = key(False, inert="memory_estimation.enable is off")
    """Estimate with real tensors instead of fake ones."""


@dataclass(frozen=True, kw_only=True)
class FaultTolerance:
    """Training that goes on while replicas of the model come and go."""

    enable: bool = key(False, later="fault tolerance across replicas")
    """Continue with the replicas that are left when one fails."""

    process_group: str = key("gloo", inert=_NO_FAULT_TOLERANCE)
    """Backend that connects replicas."""

    process_group_timeout_ms: int = key(10000, at_least=1, inert=_NO_FAULT_TOLERANCE)
    """Milliseconds before a collective between replicas is given up."""

    replica_id: int = key(0, at_least=0, inert=_NO_FAULT_TOLERANCE)
    """Number of this replica."""

    group_size: int = key(0, at_least=0, inert=_NO_FAULT_TOLERANCE)
    """How many replicas there are."""

    min_replica_size: int = key(1, at_least=1, inert=_NO_FAULT_TOLERANCE)
    """Fewest replicas with which a step is made."""

    semi_sync_method: str | None = key(None, inert=_NO_FAULT_TOLERANCE)
    """Algorithm by which replicas are synchronised less often than every step."""


@dataclass(frozen=True, kw_only=True)
class Experimental:
    """Extension by import."""

    custom_import: str = ""
    """Python module to import before training, such as one that registers a converter."""

    custom_args_module: str = key("", later="merging a user's own JobConfig class")
    """Older name of `job.custom_config_module`."""
