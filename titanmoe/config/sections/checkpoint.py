"""What is kept: saving, resuming, and the weights a run begins with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from titanmoe.config.keys import key


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Checkpoints in `job.dump_folder`/`checkpoint.folder`/step-N. One without a valid manifest does not exist."""

    enable: bool = False
    """Save checkpoints, and resume from the newest one. Loading `checkpoint.initial_load_path` needs it too."""

    enable_ft_dataloader_checkpoints: bool = key(True, inert="fault_tolerance.enable is off")
    """Save the position in the data of every replica."""

    folder: str = "checkpoint"
    """Folder for checkpoints, inside `job.dump_folder`. A run that finds a checkpoint in it resumes from it."""

    interval: int = key(500, at_least=1)
    """Save after every n-th step; the last step is always saved."""

    initial_load_path: str | None = None
    """Weights to begin with: a checkpoint step-N, or with `initial_load_in_hf` a Hugging Face directory. Not used when
    `checkpoint.folder` already holds a checkpoint."""

    initial_load_model_only: bool = True
    """Take only the model from `initial_load_path`; otherwise also optimizer, schedule, position in the data."""

    initial_load_in_hf: bool = False
    """Begin with safetensors in Hugging Face layout, from `initial_load_path` or else from `model.hf_assets_path`."""

    initial_load_in_hf_quantized: bool = key(False, inert="whether weights are quantised is read from config.json")
    """The safetensors to begin with are quantised."""

    initial_adapter_path: str | None = None
    """An adapter to go on from: a folder that PEFT wrote (adapter_config.json, adapter_model.safetensors), for the
    model that the run begins with. Its ranks and alpha must be those of `lora`. Not used when a run is resumed."""

    last_save_model_only: bool = False
    """At the last step, save only the model, in `checkpoint.export_dtype`. Training cannot be resumed from it.
    torchtitan's default is true; here a finished run can be prolonged."""

    last_save_in_hf: bool = False
    """At the last step, save the model as safetensors in Hugging Face layout too, adapters merged into its weights;
    with `last_save_model_only`, instead of a checkpoint."""

    export_dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    """Format of the weights that `last_save_model_only` and `last_save_in_hf` write."""

    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """Write while training goes on: `async` copies to host memory first, `async_with_pinned_mem` to page-locked memory
    that is kept, which is faster and takes more memory."""

    keep_latest_k: int = key(10, at_least=0)
    """Delete all but the k newest checkpoints; 0 keeps all. 1 is refused: a crash while saving would leave none."""

    load_step: int = key(-1, at_least=-1)
    """Resume from this step; -1 is the newest valid one."""

    exclude_from_loading: tuple[Literal["model", "optimizer", "lr_scheduler", "dataloader", "train_state"], ...] = ()
    """Parts of a checkpoint that are left as they are when it is loaded."""

    enable_first_step_checkpoint: bool = False
    """Also save after the first step, to find problems with saving early."""

    create_seed_checkpoint: bool = False
    """Save the initial model as step-0 and end. Needs one rank."""

    load_only: bool = False
    """Load checkpoints but never save one."""
