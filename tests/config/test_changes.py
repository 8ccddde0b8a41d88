"""Which settings decide what is learned."""

from __future__ import annotations

import pytest

from titanmoe.config import load_config
from titanmoe.config.changes import changes, config_fingerprint, learning_settings


@pytest.mark.parametrize(
    "option",
    [
        "--job.description=again",
        "--job.dump_folder=elsewhere",
        "--training.steps=7",
        "--training.epochs=2",
        "--training.local_batch_size=1",
        "--training.dataloader.num_workers=2",
        "--metrics.log_freq=1",
        "--validation.enable",
        "--checkpoint.interval=3",
        "--profiling.enable_profiling",
        "--parallelism.data_parallel_replicate_degree=2",
        "--activation_checkpoint.mode=full",
        "--comm.init_timeout_seconds=9",
    ],
)
def test_what_does_not_matter(option: str) -> None:
    before, after = load_config(None), load_config(None, [option])
    assert before != after
    assert config_fingerprint(before) == config_fingerprint(after)
    assert changes(before, after) == []


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--optimizer.lr=0.1", "optimizer.lr: 0.0008 -> 0.1"),
        ("--model.flavor=debug_dense", 'model.flavor: "debug_moe" -> "debug_dense"'),
        ("--training.global_batch_size=64", "training.global_batch_size: -1 -> 64"),
        ("--training.dtype=bfloat16", 'training.dtype: "float32" -> "bfloat16"'),
        ("--lr_scheduler.decay_ratio=0.5", "lr_scheduler.decay_ratio: none -> 0.5"),
        ("--data.document_mask", "data.document_mask: false -> true"),
        ("--moe.aux_loss_coeff=0.1", "moe.aux_loss_coeff: 0.0 -> 0.1"),
        ("--debug.seed=3", "debug.seed: none -> 3"),
        ("--compile.enable", "compile.enable: false -> true"),
    ],
)
def test_what_matters(option: str, line: str) -> None:
    before, after = load_config(None), load_config(None, [option])
    assert config_fingerprint(before) != config_fingerprint(after)
    assert changes(before, after) == [line]


def test_keys_without_effect_do_not_matter() -> None:
    assert "model.print_after_conversion" not in learning_settings(load_config(None))
    assert "quantize.linear.float8.emulate" not in learning_settings(load_config(None))
