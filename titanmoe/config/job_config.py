"""JobConfig: everything that describes a job, one dataclass per section of the TOML."""

from __future__ import annotations

from dataclasses import dataclass, field

from titanmoe.config.sections.checkpoint import Checkpoint
from titanmoe.config.sections.learning import Data, LRScheduler, Optimizer, Training, Validation
from titanmoe.config.sections.lora import LoRA
from titanmoe.config.sections.machine import ActivationCheckpoint, Compile, Parallelism
from titanmoe.config.sections.model import Model, MoE
from titanmoe.config.sections.quantize import Quantize
from titanmoe.config.sections.run import (
    Comm,
    Debug,
    Experimental,
    FaultTolerance,
    Job,
    MemoryEstimation,
    Metrics,
    Profiling,
)


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """A whole job. Immutable: `dataclasses.replace` makes a changed copy.

    Sections and keys are those of torchtitan v0.2.2, with `data`, `moe`, `lora`, `training.epochs` and the optimizer
    `AdamW8bit` added.
    """

    job: Job = field(default_factory=Job)
    """Where the job is described and where it writes."""

    model: Model = field(default_factory=Model)
    """Which model."""

    training: Training = field(default_factory=Training)
    """Batches, precision, length of the run."""

    data: Data = field(default_factory=Data)
    """How documents become sequences."""

    optimizer: Optimizer = field(default_factory=Optimizer)
    """The optimizer."""

    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    """The learning rate over time."""

    moe: MoE = field(default_factory=MoE)
    """Balancing the load of experts."""

    validation: Validation = field(default_factory=Validation)
    """Loss on held-out data."""

    parallelism: Parallelism = field(default_factory=Parallelism)
    """How the model is spread over ranks."""

    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    """What is recomputed in the backward pass."""

    compile: Compile = field(default_factory=Compile)
    """torch.compile."""

    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """Saving, resuming, initial weights."""

    metrics: Metrics = field(default_factory=Metrics)
    """Which figures are logged."""

    profiling: Profiling = field(default_factory=Profiling)
    """Profiler traces."""

    debug: Debug = field(default_factory=Debug)
    """Seeds and determinism."""

    comm: Comm = field(default_factory=Comm)
    """Timeouts of process groups."""

    quantize: Quantize = field(default_factory=Quantize)
    """Settings of low-precision converters."""

    lora: LoRA = field(default_factory=LoRA)
    """Settings of the converter that adds adapters."""

    memory_estimation: MemoryEstimation = field(default_factory=MemoryEstimation)
    """Memory estimation."""

    fault_tolerance: FaultTolerance = field(default_factory=FaultTolerance)
    """Fault tolerance."""

    experimental: Experimental = field(default_factory=Experimental)
    """Extension by import."""
