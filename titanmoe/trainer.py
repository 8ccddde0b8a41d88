"""The Trainer: builds a job in order, runs its loop, and leaves nothing behind half done."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from titanmoe.checkpoint.checkpointer import Checkpointer
from titanmoe.checkpoint.files import write_whole
from titanmoe.checkpoint.hf_load import load_hf_weights
from titanmoe.checkpoint.hf_save import save_hf
from titanmoe.checkpoint.pretrained import spec_of_hf_folder
from titanmoe.checkpoint.run_state import RunState
from titanmoe.config.errors import ConfigError
from titanmoe.config.job_config import JobConfig
from titanmoe.config.render import to_toml
from titanmoe.config.sizes import data_parallel_degrees, global_batch_size
from titanmoe.config.validate import validate
from titanmoe.data.loader import DataLoader, merge_states
from titanmoe.data.sources import open_source
from titanmoe.data.tokenizer import BUILTIN_TOKENIZER, check_vocab, load_tokenizer
from titanmoe.metrics.console import RunInfo
from titanmoe.metrics.expert_load import load_summary
from titanmoe.metrics.flops import hardware_flops_per_token, num_parameters, peak_flops, training_flops_per_token
from titanmoe.metrics.logger import Metrics, build_metrics
from titanmoe.metrics.throughput import StepTimer, Work
from titanmoe.models.build import build_model, init_weights, materialize
from titanmoe.models.decoder import Decoder
from titanmoe.models.family import Family, get_family
from titanmoe.models.spec import DecoderSpec, with_selection_bias
from titanmoe.parallel.activation_checkpoint import recomputed_blocks
from titanmoe.parallel.mesh import Mesh
from titanmoe.parallel.parallelize import parallelize
from titanmoe.parallel.world import (
    close_world,
    init_world,
    max_over_ranks,
    set_timeout,
    sum_over_ranks,
    world_size_from_env,
)
from titanmoe.training.balance import collect_expert_counts, update_selection_bias
from titanmoe.training.determinism import GarbageCollection, set_deterministic, set_seed
from titanmoe.training.gradients import clip_gradients, count_nonfinite
from titanmoe.training.optimizer import build_optimizer
from titanmoe.training.profiling import Profiler
from titanmoe.training.schedule import LearningRate
from titanmoe.training.step import accumulate_gradients, evaluate, num_supervised
from titanmoe.training.stop import StopRequest

logger = logging.getLogger("titanmoe")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class NonFiniteError(RuntimeError):
    """Loss or gradients are NaN or infinite; the step was not taken."""


class StoppedUnsavedError(RuntimeError):
    """The job was told to stop while checkpoints are off."""


class Trainer:
    """One training job, as one of its processes sees it.

    Everything a user can get wrong is looked at before the processes meet; then model, optimizer, data, checkpoint
    and metrics are built, in this order. `train()` runs the loop and closes everything, however it ends.

    Raises:
        ConfigError: a mistake in the config, the data, the tokenizer or a checkpoint.
    """

    def __init__(self, config: JobConfig) -> None:
        validate(config, world_size_from_env())
        self.config = config
        self.family, self.spec = _choose_model(config)
        self.tokenizer = load_tokenizer(config.model.tokenizer_path or config.model.hf_assets_path)
        check_vocab(self.tokenizer, self.spec.vocab_size)
        self.dump_folder = _make_folder(Path(config.job.dump_folder))
        self._closers: list[Callable[[], None]] = []
        try:
            self.stop = StopRequest()
            self._closers.append(self.stop.close)
            self._build()
        except BaseException:
            self.close()
            raise

    # ---- building ----------------------------------------------------------------------------------------------

    def _build(self) -> None:
        config = self.config
        self.world = init_world(config.comm.init_timeout_seconds)
        self._closers.append(close_world)
        self.seed = config.debug.seed or 0
        set_seed(self.seed, self.world.rank)
        if config.debug.deterministic:
            set_deterministic(config.debug.deterministic_warn_only)
        replicate, shard = data_parallel_degrees(config, self.world.size)
        self.mesh = Mesh.build(self.world.device, dp_replicate=replicate, dp_shard=shard)
        self.global_batch_size = global_batch_size(config, self.world.size)
        self.lanes_per_rank = self.global_batch_size // self.mesh.num_data_ranks
        self.num_microbatches = self.lanes_per_rank // config.training.local_batch_size

        self.loader = self._build_loader("train", config.training.local_batch_size)
        self.num_steps = self._count_steps()
        if config.validation.enable:
            # Any size that divides the lanes will do: only the sum over all of them is reported.
            at_once = _largest_divisor(self.lanes_per_rank, config.validation.local_batch_size)
            self.num_validation_microbatches = self.lanes_per_rank // at_once
            self.validation_loader = self._build_loader("validation", at_once)
        self.model = self._build_model()
        self.optimizer = build_optimizer(
            self.model,
            name=config.optimizer.name,
            lr=config.optimizer.lr,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            implementation=config.optimizer.implementation,
        )
        self.schedule = LearningRate(
            self.optimizer,
            warmup_steps=config.lr_scheduler.warmup_steps,
            total_steps=config.lr_scheduler.total_steps or self.num_steps,
            decay_ratio=config.lr_scheduler.decay_ratio,
            decay_type=config.lr_scheduler.decay_type,
            min_lr_factor=config.lr_scheduler.min_lr_factor,
        )
        self.step = self.tokens_seen = 0
        self.checkpointer = self._build_checkpointer()
        self._load()
        self.first_step = self.step + 1
        if self.world.is_main:
            write_whole(self.dump_folder / "config.toml", to_toml(config).encode())
            if name := config.job.save_config_file:
                write_whole(self.dump_folder / name, to_toml(config).encode())
        self.metrics = self._build_metrics()
        self._closers.append(self.metrics.close)

    def _build_loader(self, split: Literal["train", "validation"], local_batch_size: int) -> DataLoader:
        """As many lanes for validation as for training, so that neither depends on the number of ranks."""
        config, is_training = self.config, split == "train"
        section = config.training if is_training else config.validation
        source = open_source(section.dataset, section.dataset_path, split, config.data.text_key)
        first_lane = self.mesh.data_rank * self.lanes_per_rank
        loader = DataLoader(
            source,
            self.tokenizer,
            seq_len=section.seq_len,
            lanes=range(first_lane, first_lane + self.lanes_per_rank),
            num_lanes=self.global_batch_size,
            local_batch_size=local_batch_size,
            seed=self.seed,
            shuffle=config.data.shuffle and is_training,
            epochs=config.training.epochs if is_training else 1,
            document_mask=config.data.document_mask,
            append_eos=config.data.append_eos,
            prefetch=section.dataloader.num_workers * (section.dataloader.prefetch_factor or 2),
        )
        self._closers.append(loader.close)
        return loader

    def _count_steps(self) -> int:
        epochs = self.config.training.epochs
        if epochs is None:
            return self.config.training.steps
        num_steps = max_over_ranks(self.loader.count_steps())
        if num_steps == 0:
            raise ConfigError(
                f"{epochs:g} epochs of this data are fewer than two tokens",
                where="training.epochs",
                mend="Give more epochs or more data.",
            )
        logger.info("%g epochs of this data are %d steps", epochs, num_steps)
        return num_steps

    def _build_model(self) -> Decoder:
        config = self.config
        recompute = config.activation_checkpoint
        model = build_model(self.spec, dtype=_DTYPES[config.training.dtype])
        parallelize(
            model,
            self.mesh,
            param_dtype=_DTYPES[config.training.mixed_precision_param],
            reduce_dtype=_DTYPES[config.training.mixed_precision_reduce],
            accumulates=self.num_microbatches > 1,
            reshard_after_forward=config.parallelism.fsdp_reshard_after_forward,
            checkpoint_mode=recompute.mode,
            checkpoint_option=recompute.selective_ac_option,
            checkpoint_early_stop=recompute.early_stop,
            preserve_rng_state=recompute.preserve_rng_state,
            compile_backend=config.compile.backend
            if config.compile.enable and "model" in config.compile.components
            else None,
        )
        materialize(model, self.world.device)
        init_weights(model, self.seed)
        for _, layer in model.moe_layers():
            layer.router.force_balance = config.debug.moe_force_load_balance
            layer.router.aux_loss_weight = config.moe.aux_loss_coeff / self.global_batch_size
        return model

    def _build_checkpointer(self) -> Checkpointer | None:
        checkpoint = self.config.checkpoint
        if not checkpoint.enable:
            return None
        checkpointer = Checkpointer(
            self.dump_folder / checkpoint.folder,
            keep_latest_k=checkpoint.keep_latest_k,
            async_mode=checkpoint.async_mode,
            mesh=self.mesh.describe(),
            config_hash=hashlib.sha256(to_toml(self.config).encode()).hexdigest(),
            timeout=timedelta(hours=1),
        )
        self._closers.append(checkpointer.close)
        return checkpointer

    def _load(self) -> None:
        """Resume from this job's newest checkpoint, or begin with the weights that the config names."""
        checkpoint = self.config.checkpoint
        if self.checkpointer is None:
            return
        excluded = checkpoint.exclude_from_loading
        if self.checkpointer.load(self._run_state(), checkpoint.load_step, exclude=excluded) is not None:
            return
        path = checkpoint.initial_load_path
        if checkpoint.initial_load_in_hf:
            folder = path or self.config.model.hf_assets_path
            assert folder is not None, "validated"
            load_hf_weights(self.model, folder, self.family.rules, ignored_keys=self.family.ignored_keys)
        elif path is not None and checkpoint.initial_load_model_only:
            self.checkpointer.load_model(path, self.model)
        elif path is not None:
            self.checkpointer.load_from(path, self._run_state(), exclude=excluded)

    def _build_metrics(self) -> Metrics:
        config = self.config
        return build_metrics(
            self.dump_folder,
            rank=self.world.rank,
            log_freq=config.metrics.log_freq,
            tensorboard=config.metrics.enable_tensorboard,
            tensorboard_folder=config.metrics.save_tb_folder,
            all_ranks=config.metrics.save_for_all_ranks,
            wandb=config.metrics.enable_wandb,
            wandb_config=asdict(config),
            color=not config.metrics.disable_color_printing,
            resumed_step=self.step,
        )

    def _run_state(self) -> RunState:
        return RunState(
            model=self.model,
            optimizers=[self.optimizer],
            train_state=self,
            lr_scheduler=None,  # a function of the step
            data=self.loader,
            merge_data=merge_states,
            seed=self.seed,
        )

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step, "tokens_seen": self.tokens_seen}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.step, self.tokens_seen = state["step"], state["tokens_seen"]

    # ---- running -----------------------------------------------------------------------------------------------

    def train(self) -> bool:
        """Run to the last step. True if it was reached, False if the job was told to stop and has saved.

        Raises:
            NonFiniteError: loss or gradients are not finite.
            StoppedUnsavedError: the job was told to stop, and checkpoints are off.
        """
        try:
            return self._run()
        finally:
            self.close()

    def close(self) -> None:
        """Give everything back, last first; safe at any time and more than once. The process group always goes."""
        error: BaseException | None = None
        while self._closers:
            try:
                self._closers.pop()()
            except Exception as failure:
                error = error or failure
        if error is not None:
            raise error

    def _run(self) -> bool:
        config = self.config
        if config.checkpoint.create_seed_checkpoint:
            self._save()
            return True
        self.metrics.start(self._describe())
        self.timer = StepTimer(self._work(), self.world.device)
        garbage = GarbageCollection(config.training.gc_freq)
        self._closers.append(garbage.close)
        profiler = self._start_profiler()
        if self.step == 0:
            self._validate()
        told_to_stop = False
        while self.step < self.num_steps and not told_to_stop:
            told_to_stop = self._train_step()
            if self.step == self.first_step:
                set_timeout(config.comm.train_timeout_seconds)
            is_last = self.step == self.num_steps
            if is_last or self.step % config.validation.freq == 0:
                self._validate()
            if is_last or told_to_stop or self._is_save_due():
                self._save(model_only=is_last and config.checkpoint.last_save_model_only)
            if profiler is not None:
                profiler.step(self.step)
            garbage.step(self.step)
        is_done = self.step >= self.num_steps
        self.metrics.finish(self.step, self._write_outputs(is_done), "done" if is_done else "stopped")
        if not is_done and (self.checkpointer is None or config.checkpoint.load_only):
            raise StoppedUnsavedError(f"told to stop after step {self.step}; nothing is saved, as checkpoints are off")
        return is_done

    def _train_step(self) -> bool:
        """One optimizer step. True if some rank was told to stop."""
        step, device = self.step + 1, self.world.device
        with self.timer.data():
            batches = [next(self.loader) for _ in range(self.num_microbatches)]
            if self.config.training.dataloader.pin_memory and device.type == "cuda":
                batches = [batch.pin_memory() for batch in batches]
        # The one agreement between hosts in a step: how many tokens count, and whether anybody must stop.
        num_tokens, num_stopping = sum_over_ranks(num_supervised(batches), int(self.stop.requested))
        loss = accumulate_gradients(self.model, batches, max(num_tokens, 1), device)
        grad_norm = clip_gradients(self.model.parameters(), self.config.training.max_norm)
        is_due = self.metrics.due(step, self.num_steps)
        if device.type == "cpu" or is_due:  # on an accelerator, reading every step would make the host wait
            self._require_finite(step, loss, grad_norm)
        lr = self.schedule.set(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        counts_LE = self._balance_experts(is_due)
        self.step = step
        self.tokens_seen += num_tokens
        self.timer.step(self.global_batch_size * self.config.training.seq_len)
        if is_due:
            self._log(loss, grad_norm, lr, counts_LE)
        self.metrics.progress(step)
        return num_stopping > 0

    def _balance_experts(self, is_due: bool) -> Tensor | None:
        """Move the selection biases. Returns the step's token counts over all ranks, if this step needs them."""
        rate = self.config.moe.bias_update_rate
        counts_LE = collect_expert_counts(self.model)
        if counts_LE is None or not (is_due or rate):
            return None
        dist.all_reduce(counts_LE)
        update_selection_bias(self.model, counts_LE, rate)
        return counts_LE

    def _log(self, loss: Tensor, grad_norm: Tensor, lr: float, counts_LE: Tensor | None) -> None:
        dist.all_reduce(loss)
        scalars = {"loss": loss, "grad_norm": grad_norm}
        if counts_LE is not None:
            scalars |= load_summary(counts_LE)
        read = torch.stack(list(scalars.values())).tolist()  # one transfer for all of them
        values = dict(zip(scalars, read, strict=True)) | {"lr": lr, "tokens_seen": self.tokens_seen}
        self.metrics.log(self.step, values | self.timer.read())

    def _require_finite(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        if math.isfinite(loss.item()) and math.isfinite(grad_norm.item()):
            return
        names = count_nonfinite(self.model.named_parameters())
        raise NonFiniteError(
            f"step {step} was not taken: its loss on rank {self.world.rank} is {loss.item()}, its gradient norm "
            f"{grad_norm.item()}. {len(names)} parameters have gradients that are not finite"
            + (f", first of all {', '.join(names[:3])}" if names else "")
        )

    def _validate(self) -> None:
        if not self.config.validation.enable:
            return
        with self.timer.aside():
            loss, num_tokens = evaluate(
                self.model,
                self.validation_loader,
                num_microbatches=self.num_validation_microbatches,
                max_batches=self.config.validation.steps,
                device=self.world.device,
            )
        self.metrics.log_validation(self.step, {"validation_loss": loss, "validation_tokens": num_tokens})

    def _is_save_due(self) -> bool:
        checkpoint = self.config.checkpoint
        is_first = self.step == 1 and checkpoint.enable_first_step_checkpoint
        return is_first or self.step % checkpoint.interval == 0

    def _save(self, *, model_only: bool = False) -> None:
        if self.checkpointer is None or self.config.checkpoint.load_only:
            return
        with self.timer.aside():
            self.checkpointer.save(self.step, self._run_state(), model_only=model_only)

    def _write_outputs(self, is_done: bool) -> dict[str, str]:
        """Finish what is being written. Returns what was left behind, and where."""
        checkpoint = self.config.checkpoint
        if self.checkpointer is None or checkpoint.load_only:
            return {}
        self.checkpointer.wait()
        folder = self.dump_folder / checkpoint.folder
        outputs = {"checkpoint": str(folder / f"step-{self.step}")}
        if is_done and checkpoint.last_save_in_hf:
            outputs["hugging face"] = str(folder / f"step-{self.step}-hf")
            save_hf(
                self.model,
                outputs["hugging face"],
                self.family,
                self.spec,
                dtype=_DTYPES[checkpoint.export_dtype],
                tokenizer_dir=_tokenizer_folder(self.config),
                overwrite=True,
            )
        return outputs

    # ---- describing --------------------------------------------------------------------------------------------

    def _work(self) -> Work:
        config, device = self.config, self.world.device
        recompute = config.activation_checkpoint
        recomputed = recomputed_blocks(len(self.spec.layers), recompute.mode, recompute.selective_ac_option)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        return Work(
            flops_per_token=training_flops_per_token(self.spec, config.training.seq_len),
            hardware_flops_per_token=hardware_flops_per_token(self.spec, config.training.seq_len, recomputed),
            peak_flops=peak_flops(name, config.training.mixed_precision_param),
            num_devices=self.world.size,
        )

    def _describe(self) -> RunInfo:
        config = self.config
        count = num_parameters(self.spec)
        device = self.world.device
        return RunInfo(
            model=f"{self.family.name} {config.model.flavor if config.model.name != 'auto' else '(config.json)'}",
            num_parameters=count.total,
            num_active_parameters=count.active,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            num_devices=self.world.size,
            mesh=", ".join(f"{axis} {size}" for axis, size in self.mesh.describe().items()),
            global_batch_size=self.global_batch_size,
            seq_len=config.training.seq_len,
            num_steps=self.num_steps,
            data=config.training.dataset_path or config.training.dataset,
            dump_folder=str(self.dump_folder),
            first_step=self.first_step,
            extra={
                "precision": f"{config.training.dtype} parameters, {config.training.mixed_precision_param} compute",
                "seed": str(self.seed),
            },
        )

    def _start_profiler(self) -> Profiler | None:
        profiling = self.config.profiling
        if not profiling.enable_profiling:
            return None
        profiler = Profiler(
            self.dump_folder / profiling.save_traces_folder,
            self.world.rank,
            self.first_step,
            every=profiling.profile_freq,
            warmup=profiling.profiler_warmup,
            active=profiling.profiler_active,
        )
        self._closers.append(profiler.close)
        return profiler


def _choose_model(config: JobConfig) -> tuple[Family, DecoderSpec]:
    model = config.model
    if model.name == "auto":
        assert model.hf_assets_path is not None, "validated"
        family, spec = spec_of_hf_folder(model.hf_assets_path)
    else:
        family = get_family(model.name)
        spec = family.flavor(model.flavor)
    if config.moe.bias_update_rate:
        spec = with_selection_bias(spec)
    return family, spec


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make the folder {folder}: {error.strerror}",
            where="job.dump_folder",
            mend="Name a folder that can be written.",
        ) from error
    return folder


def _largest_divisor(number: int, at_most: int) -> int:
    return next(size for size in range(min(number, at_most), 0, -1) if number % size == 0)


def _tokenizer_folder(config: JobConfig) -> str | Path:
    path = config.model.tokenizer_path or config.model.hf_assets_path
    return BUILTIN_TOKENIZER if path in (None, "builtin") else path
