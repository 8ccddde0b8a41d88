"""Running a job: the step, the loop, validation, saving."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict

import torch
import torch.distributed as dist

from titanmoe.checkpoint.adapter_config import AdapterSettings
from titanmoe.checkpoint.hf_save import save_hf
from titanmoe.checkpoint.pretrained import tokenizer_folder
from titanmoe.config.errors import ConfigError
from titanmoe.metrics.describe import describe_run, work_per_token
from titanmoe.metrics.expert_load import load_summary
from titanmoe.metrics.logger import Metrics, build_metrics
from titanmoe.metrics.throughput import StepTimer
from titanmoe.parallel.world import (
    set_timeout,
    sum_over_ranks,
)
from titanmoe.trainer.build import DTYPES, Job
from titanmoe.training.determinism import GarbageCollection
from titanmoe.training.errors import NonFiniteError, NotExportedError, StoppedUnsavedError
from titanmoe.training.gradients import clip_gradients, count_nonfinite
from titanmoe.training.profiling import Profiler
from titanmoe.training.step import evaluate, num_supervised, read_batches

logger = logging.getLogger("titanmoe")


class Trainer(Job):
    """One training job, as one of its processes sees it.

    `train()` runs the loop and closes everything, however it ends: the process group is destroyed and the signals are
    given back.
    """

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

    def _run(self) -> bool:
        config = self.config
        self.metrics = self._closing(self.ranks.on_each(self._build_metrics))
        self.metrics.start(
            describe_run(
                config,
                self.family.name,
                self.whole,
                self.mesh.describe(),
                self.world.device,
                num_devices=self.world.size,
                global_batch_size=self.global_batch_size,
                num_steps=self.num_steps,
                first_step=self.first_step,
            )
        )
        self.timer = StepTimer(
            work_per_token(config, self.whole, self.world.device, self.world.size), self.world.device
        )
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
            num_supervised(batches) if self.mesh.counts_data else 0, int(self.stop.requested), int(error is not None)
        )
        if num_failed:
            self.ranks.share_error(error)
        loss = self.compute.accumulate(batches, max(num_tokens, 1))
        dist.all_reduce(loss)
        grad_norm = clip_gradients(
            self.model.parameters(),
            training.max_norm,
            pipeline=self.pipeline_group,
            copies=self.model.copied_parameters(),
        )
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
            scalars = {"loss": loss, "grad_norm": grad_norm.to(device)} | (load_summary(*counts) if counts else {})
            read = torch.stack(list(scalars.values())).tolist()  # one transfer for all of them
            values = dict(zip(scalars, read, strict=True)) | {"lr": lr, "tokens_seen": self.tokens_seen}
            self.metrics.log(step, values | self.timer.read())
        self.metrics.progress(step)
        return num_stopping > 0

    def _require_finite(self, step: int, loss: float, grad_norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        found = self.ranks.gather(count_nonfinite(self.model.named_parameters()))
        names = list(dict.fromkeys(name for names in found for name in names))
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
                self.compute,
                self.validation_loader,
                num_microbatches=self.num_validation_microbatches,
                max_batches=self.config.validation.steps,
                counts_data=self.mesh.counts_data,
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
            dtype = DTYPES[checkpoint.export_dtype] if model_only else None
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
                    dtype=DTYPES[checkpoint.export_dtype],
                    tokenizer_dir=tokenizer_folder(model.tokenizer_path or model.hf_assets_path),
                    overwrite=True,
                    adapters=AdapterSettings.of(self.config.lora) if "lora" in model.converters else None,
                )
            except ConfigError as error:  # the model was looked at before training: this is the disk
                raise NotExportedError(str(error)) from error
        return outputs

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
