"""Building a job, in order: processes, data, model, optimizer, checkpoint."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import torch

from titanmoe.checkpoint.adapter_config import AdapterSettings
from titanmoe.checkpoint.adapters import load_adapter
from titanmoe.checkpoint.base_model import BaseModel
from titanmoe.checkpoint.checkpointer import Checkpointer
from titanmoe.checkpoint.hf_load import load_hf_weights
from titanmoe.checkpoint.hf_save import check_exportable
from titanmoe.checkpoint.pretrained import choose_model
from titanmoe.checkpoint.run_config import log_changes, write_config
from titanmoe.checkpoint.run_state import RunState
from titanmoe.config.changes import config_fingerprint
from titanmoe.config.errors import ConfigError
from titanmoe.config.job_config import JobConfig
from titanmoe.config.pipeline import microbatch_size
from titanmoe.config.sizes import degrees_of, global_batch_size
from titanmoe.config.validate import validate
from titanmoe.data.chat_source import ChatSource, open_chat
from titanmoe.data.loader import DataLoader, merge_states
from titanmoe.data.packing import Batch
from titanmoe.data.sources import DocumentSource, open_source
from titanmoe.data.tokenizer import check_vocab, load_tokenizer
from titanmoe.metrics.progress import progress_bar
from titanmoe.metrics.terminal import current_terminal
from titanmoe.models.build import build_model, init_weights, materialize
from titanmoe.models.decoder import Decoder
from titanmoe.models.spec import num_experts
from titanmoe.ops.backends import choose_grouped_kernel
from titanmoe.ops.grouped_mm import PlainGroupedProduct
from titanmoe.parallel.fsdp import init_magnitudes
from titanmoe.parallel.host_memory import move_buffers
from titanmoe.parallel.limits import check_model_can_be_split
from titanmoe.parallel.mesh import Mesh
from titanmoe.parallel.parallelize import parallelize
from titanmoe.parallel.pipeline import Pipeline
from titanmoe.parallel.ranks import Ranks
from titanmoe.parallel.stages import Stages, plan_stages
from titanmoe.parallel.world import close_world, init_world, max_over_ranks, world_size_from_env
from titanmoe.training.balance import ExpertBalance
from titanmoe.training.determinism import set_deterministic, set_seed
from titanmoe.training.optimizer import build_optimizer
from titanmoe.training.schedule import LearningRate
from titanmoe.training.step import PipelinedStep, PlainStep, Step
from titanmoe.training.stop import StopRequest

logger = logging.getLogger("titanmoe")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PATIENCE = timedelta(hours=1)  # for the others, where one rank may read or write much


class _Closable(Protocol):
    def close(self) -> None: ...


Closable = TypeVar("Closable", bound=_Closable)


class Job:
    """All that one process of a training job needs to run.

    What can be looked at alone is looked at before the processes meet; then data, model, optimizer and checkpoint are
    built, in this order. From then on an error on one rank is raised on all of them.

    Args:
        config: the whole job.
        stop: what tells the job to stop; one that listens to signals by default.

    Raises:
        ConfigError: a mistake in the config, the data, the tokenizer or a checkpoint.
    """

    def __init__(self, config: JobConfig, stop: StopRequest | None = None) -> None:
        validate(config, world_size_from_env())
        self.config = config
        _import(config.experimental.custom_import)
        model = config.model
        self.family, self.spec = choose_model(
            model.name, model.flavor, model.hf_assets_path, selection_bias=config.moe.bias_update_rate > 0
        )
        check_model_can_be_split(self.spec, degrees_of(config, world_size_from_env()))
        is_pipelined = config.parallelism.pipeline_parallel_degree > 1
        self.stages = plan_stages(self.spec, config.parallelism, config.training.seq_len) if is_pipelined else None
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
        self.pipeline_group = self.mesh.pipeline.get_group() if degrees.pp > 1 else None
        self.global_batch_size = global_batch_size(config, self.world.size)
        self.lanes_per_rank = self.global_batch_size // degrees.num_data_ranks
        at_once = microbatch_size(config)
        self.num_microbatches = self.lanes_per_rank // at_once

        self.loader = self.ranks.on_each(partial(self._build_loader, "train", at_once))
        self.num_steps = self._count_steps()
        if config.validation.enable:
            # Any size that divides the lanes will do: only the sum over all of them is reported.
            at_once = _largest_divisor(self.lanes_per_rank, config.validation.local_batch_size)
            self.num_validation_microbatches = self.lanes_per_rank // at_once
            self.validation_loader = self.ranks.on_each(partial(self._build_loader, "validation", at_once))
        self.model, self.compute = self._build_model()
        self.optimizer = self.ranks.on_each(  # a stage of a pipeline may have nothing to train
            partial(
                build_optimizer,
                self.model,
                name=config.optimizer.name,
                lr=config.optimizer.lr,
                betas=(config.optimizer.beta1, config.optimizer.beta2),
                eps=config.optimizer.eps,
                weight_decay=config.optimizer.weight_decay,
                implementation=config.optimizer.implementation,
            )
        )
        self.schedule = LearningRate(
            self.optimizer,
            warmup_steps=config.lr_scheduler.warmup_steps,
            total_steps=config.lr_scheduler.total_steps or self.num_steps,
            decay_ratio=config.lr_scheduler.decay_ratio,
            decay_type=config.lr_scheduler.decay_type,
            min_lr_factor=config.lr_scheduler.min_lr_factor,
        )
        self.balance = ExpertBalance(self.model, config.moe.bias_update_rate, self.world.device)
        self.step = self.tokens_seen = 0
        self.checkpointer = self._build_checkpointer()
        if not self._load():
            init_magnitudes(self.model)
        self.first_step = self.step + 1
        self.ranks.on_first(partial(write_config, self.dump_folder, config, config.job.save_config_file))

    def _open_source(self, split: Literal["train", "validation"]) -> DocumentSource:
        data, section = self.config.data, self.config.training if split == "train" else self.config.validation
        if section.dataset == "chat" or section.dataset == "stdlib_docs":
            return open_chat(
                section.dataset,
                section.dataset_path,
                split,
                self.tokenizer,
                template=data.chat_template,
                loss_on=data.loss_on,
                messages_key=data.messages_key,
            )
        return open_source(section.dataset, section.dataset_path, split, data.text_key)

    def _build_loader(self, split: Literal["train", "validation"], local_batch_size: int) -> DataLoader:
        """As many lanes for validation as for training, so that neither depends on the number of ranks."""
        config, is_training = self.config, split == "train"
        section = config.training if is_training else config.validation
        source = self._open_source(split)
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
                whole_documents=isinstance(source, ChatSource),
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

    def _build_model(self) -> tuple[Decoder, Step]:
        """What this rank has of the model, and what computes with it. The rest of it stays on the meta device."""
        config, stages, rank = self.config, self.stages, self.mesh.pipeline_rank
        dtype = DTYPES[config.training.dtype]
        if config.checkpoint.last_save_in_hf:
            check_exportable(build_model(self.spec, dtype=dtype), self.family, self.spec)
        self.whole = build_model(self.spec, dtype=dtype)
        self._convert(self.whole)
        model = self.whole if stages is None else self.whole.view(stages.on(rank))
        parts = spread(model, self.mesh, config, self.num_microbatches, stages)
        materialize(model, "cpu" if config.training.enable_cpu_offload else self.world.device)
        move_buffers(model, self.world.device)
        init_weights(model, self.seed)
        for _, layer in model.moe_layers():
            layer.router.force_balance = config.debug.moe_force_load_balance
            layer.router.aux_loss_weight = config.moe.aux_loss_coeff / self.global_batch_size
        if stages is None or self.pipeline_group is None:
            return model, PlainStep(model, self.world.device)
        for line in stages.describe():
            self.ranks.log(logging.INFO, line)
        seq_len, degrees = config.training.seq_len, self.mesh.degrees
        pipeline: Pipeline[Batch] = Pipeline(
            parts,
            stages,
            self.pipeline_group,
            schedule=config.parallelism.pipeline_parallel_schedule,
            file=config.parallelism.pipeline_parallel_schedule_csv or "",
            num_microbatches=self.num_microbatches,
            hidden_shape=(microbatch_size(config), seq_len // (degrees.cp * degrees.tp), self.spec.dim),
            dtype=DTYPES[config.training.mixed_precision_param],
            device=self.world.device,
        )
        return model, PipelinedStep(model, pipeline, self.world.device, num_parts=degrees.tp)

    def _convert(self, model: Decoder) -> None:
        """Choose what multiplies, and apply the converters; the model is on the meta device."""
        self.ranks.on_each(partial(self._choose_grouped_kernel, model))
        config = self.config.model
        if not config.converters:
            return
        from titanmoe.converters.apply import convert  # imports torchao, which takes its time

        conversion = self.ranks.on_each(partial(convert, model, config.converters, self.config, self.world.device))
        tells_all = config.print_after_conversion or "lora" in config.converters
        for line in [*conversion.summary, *(conversion.table() if tells_all else [])]:
            self.ranks.log(logging.INFO, line)

    def _choose_grouped_kernel(self, model: Decoder) -> None:
        if not num_experts(self.spec):
            return
        kernel, failure = choose_grouped_kernel(self.world.device, self.config.moe.grouped_mm_backend)
        if failure and self.config.quantize.strict:
            raise ConfigError(
                f"torch.nn.functional.grouped_mm does not work here: {failure}",
                where="quantize.strict",
                mend='Set it to false, or moe.grouped_mm_backend = "loop": one product per expert, which is slower.',
            )
        if failure:
            self.ranks.log(logging.WARNING, "one product per expert, as grouped_mm does not work here: %s", failure)
        for _, layer in model.moe_layers():
            layer.experts.gate_up_product = PlainGroupedProduct(kernel)
            layer.experts.down_product = PlainGroupedProduct(kernel)

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
                adapters=AdapterSettings.of(self.config.lora) if "lora" in self.config.model.converters else None,
                base=self._base(),
            )
        )

    def _base(self) -> BaseModel | None:
        """Where the frozen weights are from, if adapters are all that is trained and there are files of the others."""
        if "lora" not in self.config.model.converters or not self.config.checkpoint.initial_load_in_hf:
            return None
        return self.ranks.on_first(partial(BaseModel.of, self._weights_folder()))

    def _weights_folder(self) -> str:
        """The safetensors to begin with."""
        folder = self.config.checkpoint.initial_load_path or self.config.model.hf_assets_path
        assert folder is not None, "validated"
        return folder

    def _load(self) -> bool:
        """Resume from the newest checkpoint, or begin with the seed, or with the weights that the config names.

        Returns:
            Whether adapters were loaded, too.
        """
        if self.checkpointer is None:
            return False
        has_adapters = self._load_saved(self.checkpointer)
        if self.checkpointer.base is not None:
            self._load_weights()  # steps have the adapters only; what is wrong with them is told before this long read
        return has_adapters

    def _load_saved(self, checkpointer: Checkpointer) -> bool:
        """As `_load`, but for the base that steps refer to."""
        checkpoint = self.config.checkpoint
        excluded = checkpoint.exclude_from_loading
        if checkpointer.load(self._run_state(), checkpoint.load_step, exclude=excluded) is not None:
            self.ranks.on_first(partial(log_changes, self.dump_folder, self.config))
            return "model" not in excluded
        has_adapters = self._load_first(checkpointer)
        if checkpoint.initial_adapter_path is None:
            return has_adapters
        settings = AdapterSettings.of(self.config.lora)
        load_adapter(self.model, checkpoint.initial_adapter_path, self.family, settings)
        return True

    def _load_first(self, checkpointer: Checkpointer) -> bool:
        """What a run begins with. Returns whether that has adapters."""
        checkpoint = self.config.checkpoint
        path, seed = checkpoint.initial_load_path, self.dump_folder / checkpoint.folder / "step-0"
        if self.ranks.on_first(seed.is_dir):
            checkpointer.load_model(seed, self.model)
            return True
        if checkpoint.initial_load_in_hf:
            if checkpointer.base is None:
                self._load_weights()
            return False
        if path is None:
            return False
        if checkpoint.initial_load_model_only:
            checkpointer.load_model(path, self.model)
        else:
            checkpointer.load_from(path, self._run_state(), exclude=checkpoint.exclude_from_loading)
            return "model" not in checkpoint.exclude_from_loading
        return True

    def _load_weights(self) -> None:
        terminal = current_terminal()
        bar = partial(progress_bar(terminal), "read") if self.world.rank == 0 else None
        try:
            load_hf_weights(self.model, self._weights_folder(), self.family, on_progress=bar)
        finally:
            terminal.clear_bar()

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


def spread(
    model: Decoder, mesh: Mesh, config: JobConfig, num_microbatches: int, stages: Stages | None = None
) -> list[Decoder]:
    """Parallelise as the config says, what this rank has of a model; see `parallelize`."""
    compiles = config.compile.enable and "model" in config.compile.components
    return parallelize(
        model,
        mesh,
        param_dtype=DTYPES[config.training.mixed_precision_param],
        reduce_dtype=DTYPES[config.training.mixed_precision_reduce],
        accumulates=num_microbatches > 1,
        reshard_after_forward=config.parallelism.fsdp_reshard_after_forward,
        recompute=config.activation_checkpoint,
        compile_backend=config.compile.backend if compiles else None,
        cpu_offload=config.training.enable_cpu_offload,
        parts=[] if stages is None else [stages.parts[stage] for stage in stages.of(mesh.pipeline_rank)],
    )


def _import(name: str) -> None:
    """The user's own module, if there is one."""
    if name:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f'"{name}" cannot be imported: {error}',
                where="experimental.custom_import",
                mend="Give a module's dotted name; its folder must be in PYTHONPATH, or the current one.",
            ) from error


def _largest_divisor(number: int, at_most: int) -> int:
    return next(size for size in range(min(number, at_most), 0, -1) if number % size == 0)
