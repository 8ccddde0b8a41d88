"""What a run is, for its banner, and what its work costs, for its rates: taken from the config and the model's spec."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from titanmoe.config.job_config import JobConfig
from titanmoe.metrics.console import RunInfo
from titanmoe.metrics.flops import hardware_flops_per_token, num_parameters, peak_flops, training_flops_per_token
from titanmoe.metrics.throughput import Work
from titanmoe.metrics.units import format_count
from titanmoe.models.decoder import Decoder
from titanmoe.parallel.activation_checkpoint import recomputed_blocks


def describe_run(
    config: JobConfig,
    family: str,
    model: Decoder,
    mesh: Mapping[str, int],
    device: torch.device,
    *,
    num_devices: int,
    global_batch_size: int,
    num_steps: int,
    first_step: int,
) -> RunInfo:
    """What the banner tells. `model` is the whole, `mesh` has the sizes of the axes by name; `device` is that of this
    rank."""
    count = num_parameters(model.spec)
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    trained = {} if num_trained == count.total else {"trained": f"{format_count(num_trained)} parameters"}
    return RunInfo(
        model=f"{family} {config.model.flavor if config.model.name != 'auto' else '(config.json)'}",
        num_parameters=count.total,
        num_active_parameters=count.active,
        device="CPU" if device.type == "cpu" else torch.cuda.get_device_name(device),
        num_devices=num_devices,
        mesh=", ".join(f"{axis} {size}" for axis, size in mesh.items()),
        global_batch_size=global_batch_size,
        seq_len=config.training.seq_len,
        num_steps=num_steps,
        data=config.training.dataset_path or config.training.dataset,
        dump_folder=config.job.dump_folder,
        first_step=first_step,
        extra={
            "job": config.job.description,
            **trained,
            "precision": f"{config.training.dtype} parameters, {config.training.mixed_precision_param} compute",
            "seed": str(config.debug.seed or 0),
        },
    )


def work_per_token(config: JobConfig, model: Decoder, device: torch.device, num_devices: int) -> Work:
    """The FLOPs of a token of training of a whole model, and a device's peak rate, None on a CPU."""
    seq_len, recompute = config.training.seq_len, config.activation_checkpoint
    recomputed = recomputed_blocks(len(model.spec.layers), recompute.mode, recompute.selective_ac_option)
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return Work(
        flops_per_token=training_flops_per_token(model, seq_len),
        hardware_flops_per_token=hardware_flops_per_token(model, seq_len, recomputed),
        peak_flops=peak_flops(name, config.training.mixed_precision_param),
        num_devices=num_devices,
    )
