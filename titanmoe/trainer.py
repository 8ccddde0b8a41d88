"""The Trainer: builds a job in order, runs its loop, and leaves nothing behind half done."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import torch
import torch.distributed as dist

from titanmoe.checkpoint.checkpointer import Checkpointer
from titanmoe.checkpoint.hf_load import load_hf_weights
from titanmoe.checkpoint.hf_save import check_exportable, save_hf
from titanmoe.checkpoint.pretrained import choose_model, tokenizer_folder
from titanmoe.checkpoint.run_config import log_changes, write_config
from titanmoe.checkpoint.run_state import RunState
from titanmoe.config.changes import config_fingerprint
from titanmoe.config.errors import ConfigError
from titanmoe.config.job_config import JobConfig
from titanmoe.config.sizes import (
    degrees_of,
    global_batch_size,
)
from titanmoe.config.validate import validate
from titanmoe.data.loader import DataLoader, merge_states
from titanmoe.data.sources import open_source
from titanmoe.data.tokenizer import check_vocab, load_tokenizer
from titanmoe.metrics.describe import describe_run, work_per_token
from titanmoe.metrics.expert_load import load_summary
from titanmoe.metrics.logger import Metrics, build_metrics
from titanmoe.metrics.progress import progress_bar
from titanmoe.metrics.terminal import current_terminal
from titanmoe.metrics.throughput import StepTimer
from titanmoe.models.build import build_model, init_weights, materialize
from titanmoe.models.decoder import Decoder
from titanmoe.parallel.limits import check_model_can_be_split
from titanmoe.parallel.mesh import Mesh
from titanmoe.parallel.parallelize import parallelize
from titanmoe.parallel.ranks import Ranks
from titanmoe.parallel.world import (
    close_world,
    init_world,
    max_over_ranks,
    set_timeout,
    sum_over_ranks,
    world_size_from_env,
)
from titanmoe.training.balance import ExpertBalance
from titanmoe.training.determinism import GarbageCollection, set_deterministic, set_seed
from titanmoe.training.errors import NonFiniteError, NotExportedError, StoppedUnsavedError
from titanmoe.training.gradients import clip_gradients, count_nonfinite
from titanmoe.training.optimizer import build_optimizer
from titanmoe.training.profiling import Profiler
from titanmoe.training.schedule import LearningRate
from titanmoe.training.step import accumulate_gradients, evaluate, num_supervised, read_batches
from titanmoe.training.stop import StopRequest

logger = logging.getLogger("titanmoe")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PATIENCE = timedelta(hours=1)  # for the others, where one rank may read or write much


class _Closable(Protocol):
    def close(self) -> None: ...


Closable = TypeVar("Closable", bound=_Closable)


class Trainer:
    """One training job, as one of its processes sees it.

    What can be looked at alone is looked at before the processes meet; then data, model, optimizer and checkpoint are
    built, in this order. From then on an error on one rank is raised on all of them. `train()` runs the loop and
    closes everything, however it ends: the process group is destroyed and the signals are given back.

    Args:
        config: the whole job.
        stop: what tells the job to stop; one that listens to signals by default.

    Raises:
        ConfigError: a mistake in the config, the data, the tokenizer or a checkpoint.
    """

    def __init__(self, config: JobConfig, stop: StopRequest | None = None) -> None:
        validate(config, world_size_from_env())
        self.config = config
        model = config.model
        self.family, self.spec = choose_model(
            model.name, model.flavor, model.hf_assets_path, selection_bias=config.moe.bias_update_rate > 0
        )
        check_model_can_be_split(self.spec, degrees_of(config, world_size_from_env()))
        self.tokenizer = load_tokenizer(model.tokenizer_path or model.hf_assets_path)
        check_vocab(self.tokenizer, self.spec.vocab_size)
        self.dump_folder = Path(config.job.dump_folder)
        self._closers: list[Callable[[], None]] = []
        try:
            self.stop = stop or self._closing(StopRequest())
            self._build()
        except BaseException:
            self.close()
            raise

    # ---- building ----------------------------------------------------------------------------------------------

    def _build(self) -> None:
        config = self.config
        self.world = init_world(config.comm.init_timeout_seconds)
        self._closers.append(close_world)
        self.ranks = self._closing(Ranks.create(_PATIENCE))
        self.seed = config.debug.seed or 0
        set_seed(self.seed + self.world.rank)
        if config.debug.deterministic:
            set_deterministic(config.debug.deterministic_warn_only)
        degrees = degrees_of(config, self.world.size)
        self.mesh = Mesh.build(self.world.device, degrees)
        self.global_batch_size = global_batch_size(config, self.world.size)
        self.lanes_per_rank = self.global_batch_size // degrees.num_data_ranks
        self.num_microbatches = self.lanes_per_rank // config.training.local_batch_size

        self.loader = self.ranks.on_each(partial(self._build_loader, "train", config.training.local_batch_size))
        self.num_steps = self._count_steps()
        if config.validation.enable:
            # Any size that divides the lanes will do: only the sum over all of them is reported.
            at_once = _largest_divisor(self.lanes_per_rank, config.validation.local_batch_size)
            self.num_validation_microbatches = self.lanes_per_rank // at_once
            self.validation_loader = self.ranks.on_each(partial(self._build_loader, "validation", at_once))
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
        self.balance = ExpertBalance(self.model, config.moe.bias_update_rate)
        self.step = self.tokens_seen = 0
        self.checkpointer = self._build_checkpointer()
        self._load()
        self.first_step = self.step + 1
        self.ranks.on_first(partial(write_config, self.dump_folder, config, config.job.save_config_file))

    def _build_loader(self, split: Literal["train", "validation"], local_batch_size: int) -> DataLoader:
        """As many lanes for validation as for training, so that neither depends on the number of ranks."""
        config, is_training = self.config, split == "train"
        section = config.training if is_training else config.validation
        source = open_source(section.dataset, section.dataset_path, split, config.data.text_key)
        first_lane = self.mesh.data_rank * self.lanes_per_rank
        return self._closing(
            DataLoader(
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
                part=(self.mesh.context_rank, self.mesh.degrees.cp),
                prefetch=section.dataloader.num_workers * (section.dataloader.prefetch_factor or 2),
            )
        )

    def _count_steps(self) -> int:
        epochs = self.config.training.epochs
        if epochs is None:
            return self.config.training.steps
        num_steps = max_over_ranks(self.ranks.on_each(self.loader.count_steps))
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
        if config.checkpoint.last_save_in_hf:
            check_exportable(model, self.family, self.spec)
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
        return self._closing(
            Checkpointer(
                self.dump_folder / checkpoint.folder,
                keep_latest_k=checkpoint.keep_latest_k,
                async_mode=checkpoint.async_mode,
                mesh=self.mesh.describe(),
                config_hash=config_fingerprint(self.config),
                timeout=_PATIENCE,
            )
        )

    def _load(self) -> None:
        """Resume from the newest checkpoint, or begin with the seed, or with the weights that the config names."""
        checkpoint = self.config.checkpoint
        if self.checkpointer is None:
            return
        excluded = checkpoint.exclude_from_loading
        if self.checkpointer.load(self._run_state(), checkpoint.load_step, exclude=excluded) is not None:
            self.ranks.on_first(partial(log_changes, self.dump_folder, self.config))
            return
        path, seed = checkpoint.initial_load_path, self.dump_folder / checkpoint.folder / "step-0"
        if self.ranks.on_first(seed.is_dir):
            self.checkpointer.load_model(seed, self.model)
        elif checkpoint.initial_load_in_hf:
            folder = path or self.config.model.hf_assets_path
            assert folder is not None, "validated"
            terminal = current_terminal()
            bar = partial(progress_bar(terminal), "read") if self.world.rank == 0 else None
            try:
                load_hf_weights(self.model, folder, self.family, on_progress=bar)
            finally:
                terminal.clear_bar()
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

    def _build_profiler(self) -> Profiler | None:
        profiling = self.config.profiling
        if not profiling.enable_profiling:
            return None
        return self._closing(
            Profiler(
                self.dump_folder / profiling.save_traces_folder,
                self.world.rank,
                self.first_step,
                every=profiling.profile_freq,
                warmup=profiling.profiler_warmup,
                active=profiling.profiler_active,
            )
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
            ConfigError: broken data.
            TrainingFailedError: loss or gradients are not finite, or what is to be kept cannot be.
            OSError: a checkpoint or the metrics cannot be written; earlier checkpoints are whole.
        """
        try:
            if self.config.checkpoint.create_seed_checkpoint:
                self._save_seed()
                return True
            return self._run()
        finally:
            self.close()

    def close(self) -> None:
        """Give everything back, last first; safe at any time and more than once. The process group always goes.

        What fails here is logged: `train()` has waited for everything that was to be kept, or is failing anyway.
        """
        while self._closers:
            try:
                self._closers.pop()()
            except Exception as error:
                logger.error("while closing: %s", error)

    def _closing(self, part: Closable) -> Closable:
        self._closers.append(part.close)
        return part

    def _run(self) -> bool:
        config = self.config
        self.metrics = self._closing(self.ranks.on_each(self._build_metrics))
        self.metrics.start(
            describe_run(
                config,
                self.family.name,
                self.spec,
                self.mesh.describe(),
                self.world.device,
                num_devices=self.world.size,
                global_batch_size=self.global_batch_size,
                num_steps=self.num_steps,
                first_step=self.first_step,
            )
        )
        self.timer = StepTimer(work_per_token(config, self.spec, self.world.device, self.world.size), self.world.device)
        garbage = self._closing(GarbageCollection(config.training.gc_freq))
        profiler = self._build_profiler()
        told_to_stop = sum_over_ranks(int(self.stop.requested)) != [0]
        if self.step == 0 and not told_to_stop:
            told_to_stop = self._validate()
        while self.step < self.num_steps and not told_to_stop:
            told_to_stop = self._train_step()
            if self.step == self.first_step:
                set_timeout(config.comm.train_timeout_seconds)
            is_last = self.step == self.num_steps
            if (is_last or self.step % config.validation.freq == 0) and not told_to_stop:
                told_to_stop = self._validate()
            if is_last or told_to_stop or self._is_save_due(self.step):
                self._save(is_last)
            if profiler is not None:
                profiler.step(self.step)
            garbage.step(self.step)
        is_done = self.step >= self.num_steps
        self.metrics.finish(self.step, self._write_outputs(is_done), "done" if is_done else "stopped")
        if not is_done and not self._saves and self.step >= self.first_step:
            raise StoppedUnsavedError(
                f"told to stop after step {self.step}, and nothing was saved: checkpoint.enable is off or load_only on"
            )
        return is_done

    def _train_step(self) -> bool:
        """One optimizer step. True if some rank was told to stop."""
        training, step, device = self.config.training, self.step + 1, self.world.device
        with self.timer.data():
            pin = training.dataloader.pin_memory and device.type == "cuda"
            batches, error = read_batches(self.loader, self.num_microbatches, pin)
        # The one agreement between hosts in a step: how many tokens count, must anybody stop, is anybody's data broken.
        num_tokens, num_stopping, num_failed = sum_over_ranks(
            num_supervised(batches), int(self.stop.requested), int(error is not None)
        )
        if num_failed:
            self.ranks.share_error(error)
        loss = accumulate_gradients(self.model, batches, max(num_tokens, 1), device)
        dist.all_reduce(loss)
        grad_norm = clip_gradients(self.model.parameters(), training.max_norm)
        is_logged = self.metrics.due(step, self.num_steps)
        # On an accelerator, reading every step would make the host wait.
        if device.type == "cpu" or is_logged or num_stopping or self._is_save_due(step):
            self._require_finite(step, loss.item(), grad_norm.item())
        lr = self.schedule.set(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        counts = self.balance.step(is_logged)
        self.step = step
        self.tokens_seen += num_tokens
        self.timer.step(self.global_batch_size * training.seq_len)
        if is_logged:
            scalars = {"loss": loss, "grad_norm": grad_norm} | (load_summary(*counts) if counts else {})
            read = torch.stack(list(scalars.values())).tolist()  # one transfer for all of them
            values = dict(zip(scalars, read, strict=True)) | {"lr": lr, "tokens_seen": self.tokens_seen}
            self.metrics.log(step, values | self.timer.read())
        self.metrics.progress(step)
        return num_stopping > 0

    def _require_finite(self, step: int, loss: float, grad_norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        names = count_nonfinite(self.model.named_parameters())
        self.metrics.log(step, {"loss": loss, "grad_norm": grad_norm})
        self.metrics.finish(self.step, {}, "failed")
        raise NonFiniteError(
            f"step {step} was not taken: its loss is {loss}, its gradient norm {grad_norm}. {len(names)} parameters "
            "have gradients that are not finite" + (f", first of all {', '.join(names[:3])}" if names else "")
        )

    def _validate(self) -> bool:
        """True if some rank was told to stop meanwhile; the validation is then given up."""
        if not self.config.validation.enable:
            return False
        with self.timer.aside():
            result = evaluate(
                self.model,
                self.validation_loader,
                num_microbatches=self.num_validation_microbatches,
                max_batches=self.config.validation.steps,
                device=self.world.device,
                ranks=self.ranks,
                should_stop=lambda: self.stop.requested,
            )
        if result is None:
            return True
        loss, num_tokens = result
        self.metrics.log_validation(self.step, {"validation_loss": loss, "validation_tokens": num_tokens})
        return False

    @property
    def _saves(self) -> bool:
        return self.checkpointer is not None and not self.config.checkpoint.load_only

    def _is_save_due(self, step: int) -> bool:
        checkpoint = self.config.checkpoint
        return step % checkpoint.interval == 0 or (step == 1 and checkpoint.enable_first_step_checkpoint)

    def _save(self, is_last: bool) -> None:
        checkpoint = self.config.checkpoint
        model_only = is_last and checkpoint.last_save_model_only
        if not self._saves or (model_only and checkpoint.last_save_in_hf):
            return
        assert self.checkpointer is not None
        with self.timer.aside():
            dtype = _DTYPES[checkpoint.export_dtype] if model_only else None
            self.checkpointer.save(self.step, self._run_state(), model_only=model_only, dtype=dtype)

    def _save_seed(self) -> None:
        """The initial weights as step 0, from which a run on any number of ranks begins."""
        assert self.checkpointer is not None, "validated"
        if self.step > 0:
            raise ConfigError(
                f"there is a checkpoint of step {self.step} already: a seed would not be used",
                where="checkpoint.create_seed_checkpoint",
                mend="Name another job.dump_folder.",
            )
        self.checkpointer.save(0, self._run_state(), model_only=True)
        self.checkpointer.wait()

    def _write_outputs(self, is_done: bool) -> dict[str, str]:
        """Finish what is being written. Returns what was left behind, and where."""
        checkpoint = self.config.checkpoint
        if not self._saves:
            return {}
        assert self.checkpointer is not None
        self.checkpointer.wait()
        newest = self.dump_folder / checkpoint.folder / f"step-{self.step}"
        outputs = {"checkpoint": str(newest)} if newest.is_dir() else {}
        if is_done and checkpoint.last_save_in_hf:
            outputs["hugging face"] = f"{newest}-hf"
            model = self.config.model
            try:
                save_hf(
                    self.model,
                    outputs["hugging face"],
                    self.family,
                    self.spec,
                    dtype=_DTYPES[checkpoint.export_dtype],
                    tokenizer_dir=tokenizer_folder(model.tokenizer_path or model.hf_assets_path),
                    overwrite=True,
                )
            except ConfigError as error:  # the model was looked at before training: this is the disk
                raise NotExportedError(str(error)) from error
        return outputs


def _largest_divisor(number: int, at_most: int) -> int:
    return next(size for size in range(min(number, at_most), 0, -1) if number % size == 0)
