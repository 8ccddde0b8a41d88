"""What the model is fed and how it learns: data, batches, optimizer, schedule, validation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from titanmoe.config.keys import key

DatasetName = Literal["stdlib", "text", "json", "parquet", "chat", "stdlib_docs", "c4", "c4_test", "c4_validation"]

EMBEDDED_DATASETS = ("stdlib", "stdlib_docs")


@dataclass(frozen=True, kw_only=True)
class DataLoader:
    """How batches are prepared beside the training step."""

    num_workers: int = key(0, at_least=0)
    """0 prepares batches between steps; otherwise a thread in the background holds `num_workers * prefetch_factor` of
    them ready."""

    persistent_workers: bool = key(False, inert="workers live as long as the run here")
    """Keep workers from one epoch to the next."""

    pin_memory: bool = False
    """Put batches in page-locked memory, from which copies to a GPU overlap with computation."""

    prefetch_factor: int | None = key(None, at_least=1)
    """Batches held ready per worker; with `none`, 2. Needs `num_workers` of at least 1."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """How documents become sequences."""

    text_key: str = "text"
    """Column or JSON key that holds the text of a document."""

    shuffle: bool = True
    """Shuffle the documents, anew in every epoch; otherwise they come in the order of the files."""

    document_mask: bool = False
    """Restrict attention to the tokens of the same document, and restart positions with each document. Always done
    with conversations."""

    append_eos: bool = True
    """End every document with the tokenizer's end-of-text token. Conversations end as the chat template writes it."""

    messages_key: str = "messages"
    """Column or JSON key that holds the messages of a conversation."""

    chat_template: str | None = None
    """File with a Jinja chat template, instead of the tokenizer's own."""

    loss_on: Literal["assistant", "all"] = "assistant"
    """Which tokens of a conversation are learnt: what the assistant's turns wrote, end-of-turn token included, or all
    of them."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Batches, precision and the length of the run."""

    dataset: DatasetName = "stdlib"
    """What to train on: the embedded `stdlib` (source files of Python's standard library), or local `text`, `json`
    (JSON lines) or `parquet` files at `training.dataset_path`; or conversations: `chat` (JSON or Parquet files with
    messages, at that path) or the embedded `stdlib_docs` (questions on the standard library). torchtitan's `c4`,
    `c4_test` and `c4_validation` mean `json` where a path is given; without one, the test data means `stdlib`, and `c4`
    is refused."""

    dataset_path: str | None = None
    """File or directory of the data. Not used with `stdlib` and `stdlib_docs`."""

    local_batch_size: int = key(8, at_least=1)
    """Sequences that one data-parallel rank computes at a time."""

    global_batch_size: int = key(-1, at_least=1, also=(-1,))
    """Sequences per optimizer step over all ranks; reached by accumulating gradients. -1 means
    `local_batch_size` times the data-parallel degree, that is no accumulation."""

    seq_len: int = key(2048, at_least=2)
    """Tokens per sequence."""

    max_norm: float = key(1.0, more_than=0, also=(math.inf,))
    """Scale gradients down to this norm, taken over all parameters, where it is larger; `inf` never does."""

    steps: int = key(10000, at_least=1)
    """Number of optimizer steps."""

    epochs: float | None = key(None, more_than=0)
    """Number of passes over the data, instead of `training.steps`; may be a fraction."""

    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory, and update parameters there. A layer's parameters
    are on the device while it runs."""

    dtype: Literal["bfloat16", "float32"] = "float32"
    """Format in which parameters are stored and updated. With `float32` and a lower `mixed_precision_param`,
    parameters are float32 masters that are cast for each computation."""

    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Format in which parameters and activations are computed."""

    mixed_precision_reduce: Literal["float32", "bfloat16"] = "float32"
    """Format in which gradients are summed over ranks."""

    gc_freq: int = key(50, at_least=1)
    """Steps between Python garbage collections, which happen at no other time, so that no rank waits for another."""

    gc_debug: bool = key(False, later="reporting garbage collection in detail")
    """Collect garbage at every step and report what was found."""

    dataloader: DataLoader = DataLoader()
    """How training batches are prepared."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The optimizer. Weight decay is not applied to norms and biases."""

    name: Literal["AdamW", "AdamW8bit"] = "AdamW"
    """AdamW, or torchao's AdamW with its two moments in 8 bits."""

    lr: float = key(8e-4, at_least=0)
    """Learning rate at its peak."""

    beta1: float = key(0.9, at_least=0, less_than=1)
    """Decay of the mean of gradients."""

    beta2: float = key(0.95, at_least=0, less_than=1)
    """Decay of the mean of squared gradients."""

    eps: float = key(1e-8, more_than=0)
    """Added to the denominator of an update."""

    weight_decay: float = key(0.1, at_least=0)
    """Fraction of a weight, times the learning rate, taken off at every step."""

    implementation: Literal["for-loop", "foreach", "fused"] = "fused"
    """How an update is computed: parameter by parameter, in lists, or in one kernel. The numbers agree closely."""

    early_step_in_backward: bool = key(False, later="updating each parameter during the backward pass")
    """Update each parameter as soon as its gradient is known."""


@dataclass(frozen=True, kw_only=True)
class LRScheduler:
    """Warm-up, then a stable phase at the peak, then decay."""

    warmup_steps: int = key(200, at_least=0)
    """Steps over which the learning rate rises linearly from nothing to `optimizer.lr`."""

    total_steps: int | None = key(None, at_least=1)
    """Steps that the whole schedule spans; with `none`, the steps of the run."""

    decay_ratio: float | None = key(None, more_than=0, at_most=1)
    """Part of the schedule that decays, at its end. With `none`, decay begins right after the warm-up."""

    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the decay."""

    min_lr_factor: float = key(0.0, at_least=0, at_most=1)
    """Learning rate at the end, as a fraction of `optimizer.lr`."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Loss on data that is not trained on."""

    enable: bool = False
    """Measure the validation loss during training."""

    dataset: DatasetName = "stdlib"
    """What to validate on, as `training.dataset`; `stdlib` and `stdlib_docs` here are the part that is held
    out of training."""

    dataset_path: str | None = None
    """File or directory of the data. Not used with `stdlib` and `stdlib_docs`."""

    local_batch_size: int = key(8, at_least=1)
    """Sequences that one data-parallel rank computes at a time."""

    seq_len: int = key(2048, at_least=2)
    """Tokens per sequence."""

    freq: int = key(10, at_least=1)
    """Validate after every n-th step; also before the first and after the last."""

    steps: int = key(-1, at_least=1, also=(-1,))
    """Batches per validation; -1 is the whole validation set, once."""

    dataloader: DataLoader = DataLoader()
    """How validation batches are prepared."""
