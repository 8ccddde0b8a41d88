"""What the banner tells of a run, and what its rates are made from."""

from __future__ import annotations

import torch

from titanmoe.config import load_config
from titanmoe.converters.apply import convert
from titanmoe.metrics.console import RunInfo
from titanmoe.metrics.describe import describe_run, work_per_token
from titanmoe.metrics.flops import training_flops_per_token
from titanmoe.models.build import build_model
from titanmoe.models.decoder import Decoder
from titanmoe.models.families.qwen3 import FAMILY

CPU = torch.device("cpu")
CONFIG = load_config(None, ["--model.converters=lora", "--activation_checkpoint.mode=full"])


def _model() -> Decoder:
    return build_model(FAMILY.flavor("debug_moe"))


def _described(model: Decoder) -> RunInfo:
    sizes = dict(num_devices=1, global_batch_size=8, num_steps=3, first_step=1)
    return describe_run(CONFIG, "qwen3", model, {"dp_shard": 1}, CPU, **sizes)


def test_a_run_says_how_much_is_trained_if_it_is_not_all() -> None:
    model = _model()
    assert "trained" not in _described(model).extra
    convert(model, ["lora"], CONFIG)
    run = _described(model)
    # 4 layers x (16 x (inputs + outputs) of q, k, v, o + 16 experts x 8 x those of gate and up, and of down)
    num_trained = 4 * (16 * (2 * 512 + 2 * 384) + 16 * 8 * ((256 + 256) + (128 + 256)))
    assert num_trained == 573_440 and run.extra["trained"] == "573k parameters"
    assert run.num_parameters == _described(_model()).num_parameters


def test_rates_count_what_is_computed() -> None:
    model, frozen = _model(), _model()
    convert(frozen, ["lora"], CONFIG)
    everything, adapters = (work_per_token(CONFIG, each, CPU, 1) for each in (model, frozen))
    assert adapters.flops_per_token == training_flops_per_token(frozen, CONFIG.training.seq_len)
    assert adapters.flops_per_token < everything.flops_per_token
    assert everything.hardware_flops_per_token > everything.flops_per_token
    assert adapters.hardware_flops_per_token > adapters.flops_per_token
