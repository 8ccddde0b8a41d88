"""The recipes in train_configs/, built at full size as one rank of their job, on the meta device and without others."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.ranks import pretend
from titanmoe.checkpoint.pretrained import choose_model
from titanmoe.config import JobConfig, load_config, validate
from titanmoe.config.sizes import accumulation_steps, degrees_of
from titanmoe.converters.apply import convert
from titanmoe.models.adapters import is_adapter
from titanmoe.models.build import build_model
from titanmoe.models.decoder import Decoder
from titanmoe.models.family import get_family
from titanmoe.ops.sharding import local_tensor
from titanmoe.parallel.limits import check_model_can_be_split
from titanmoe.parallel.mesh import Mesh
from titanmoe.parallel.shards import local_parameters
from titanmoe.trainer.build import DTYPES, spread

FP8_BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
FP8_CHANNELS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head", r"re:model\.layers\.(1|39|46)\."],
}
"""Of config.json, as these releases have it."""


@dataclass(frozen=True)
class Recipe:
    """What a recipe is for.

    Attributes:
        family, flavor: sizes of the model that it names.
        num_gpus, gpu_gb: machines that it says it is for.
        quantization: of config.json, beside the sizes.
    """

    family: str
    flavor: str
    num_gpus: int
    gpu_gb: int
    quantization: dict[str, Any] = field(default_factory=dict)


_QWEN3_30B = ("qwen3", "30B-A3B", 8, 80)
RECIPES = {
    "qwen3_30b_a3b_lora": Recipe(*_QWEN3_30B),
    "qwen3_30b_a3b_lora_fp8": Recipe(*_QWEN3_30B),
    "qwen3_30b_a3b_dora": Recipe(*_QWEN3_30B),
    "qwen3_30b_a3b_dora_fp8": Recipe(*_QWEN3_30B),
    "qwen3_235b_a22b_lora": Recipe("qwen3", "235B-A22B", 8, 80),
    "glm4_5_air_lora": Recipe("glm4_moe", "4.5-Air", 8, 80),
    "gpt_oss_20b_lora": Recipe("gpt_oss", "20b", 8, 80),
    "gpt_oss_120b_lora": Recipe("gpt_oss", "120b", 8, 80),
    "qwen3_32b_lora": Recipe("qwen3", "32B", 8, 80),
    "qwen2_5_72b_lora": Recipe("qwen2", "72B", 8, 80),
    "llama3_1_70b_lora": Recipe("llama3", "70B", 8, 80),
    "llama3_1_8b_qlora": Recipe("llama3", "8B", 1, 16),
    "qwen3_30b_a3b_qlora": Recipe("qwen3", "30B-A3B", 3, 24),
    "qwen3_coder_30b_a3b_fp8_lora": Recipe("qwen3", "Coder-30B-A3B", 1, 40, FP8_BLOCKS),
    "glm4_7_flash_fp8_lora": Recipe("glm4_moe_lite", "4.7-Flash", 1, 48, FP8_CHANNELS),
}


@dataclass(frozen=True)
class Built:
    """What a recipe comes to.

    Attributes:
        config: of the job.
        numel: of all parameters but adapters.
        adapters: numbers of every adapter, by name.
        weight_bytes: of what is frozen, on the first rank.
        learning_bytes: of adapters, their gradients and their state in the optimizer, on the first rank.
        gathered_bytes: of the two largest groups that FSDP gathers one after the other, there; none on one rank.
        input_bytes: of the inputs of layers, which full recomputation keeps, there.
        table: what converters say.
    """

    config: JobConfig
    numel: int
    adapters: dict[str, int]
    weight_bytes: int
    learning_bytes: int
    gathered_bytes: int
    input_bytes: int
    table: str

    @property
    def num_adapter_parameters(self) -> int:
        return sum(self.adapters.values())

    @property
    def gpu_bytes(self) -> int:
        """What the GPU has all the time; what a layer computes comes on top."""
        resident = 0 if self.config.training.enable_cpu_offload else self.weight_bytes + self.learning_bytes
        return resident + self.gathered_bytes + self.input_bytes


@contextmanager
def a_place_with(recipe: Recipe, config: JobConfig) -> Iterator[None]:
    """A current folder in which the model's folder is, with a config.json."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            assets = Path(str(config.model.hf_assets_path))
            assets.mkdir(parents=True)
            family = get_family(recipe.family)
            values = family.to_hf_config(family.flavor(recipe.flavor), "bfloat16")
            if recipe.quantization:
                values["quantization_config"] = recipe.quantization
            (assets / "config.json").write_text(json.dumps(values))
            yield
        finally:
            os.chdir(before)


@functools.cache
def build(name: str, *options: str) -> Built:
    """As one rank of the job builds it, but for values.

    Raises:
        ConfigError: the recipe is wrong, or the model cannot be spread so.
    """
    recipe, config = RECIPES[name], load_config(f"{name}.toml", options)
    with a_place_with(recipe, config):
        validate(config, recipe.num_gpus)
        model_name = config.model
        _, spec = choose_model(model_name.name, model_name.flavor, model_name.hf_assets_path, selection_bias=False)
    assert spec == get_family(recipe.family).flavor(recipe.flavor)
    degrees = degrees_of(config, recipe.num_gpus)
    check_model_can_be_split(spec, degrees)
    model = build_model(spec, dtype=DTYPES[config.training.dtype])
    numel = sum(parameter.numel() for parameter in model.parameters())
    conversion = convert(model, config.model.converters, config, torch.device("cpu"))
    adapters = {name: parameter.numel() for name, parameter in model.named_parameters() if is_adapter(name)}
    assert adapters.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    gathered = _gathered_bytes(model, config, recipe.num_gpus)
    with pretend(0, recipe.num_gpus):
        num_microbatches = accumulation_steps(config, recipe.num_gpus)
        spread(model, Mesh.build(torch.device("cpu"), degrees), config, num_microbatches)
        weight_bytes, learning_bytes = _resident_bytes(model, config)
    tokens = config.training.local_batch_size * config.training.seq_len // (degrees.cp * degrees.tp)
    input_bytes = len(spec.layers) * tokens * spec.dim * 2
    return Built(
        config, numel, adapters, weight_bytes, learning_bytes, gathered, input_bytes, "\n".join(conversion.table())
    )


def _resident_bytes(model: Decoder, config: JobConfig) -> tuple[int, int]:
    weight_bytes, learning_bytes = 0, 0.0
    for parameter in model.parameters():
        num_bytes = local_tensor(parameter).numel() * parameter.element_size()
        if not parameter.requires_grad:
            weight_bytes += num_bytes
        elif config.optimizer.name == "AdamW":
            learning_bytes += 4 * num_bytes
        else:  # a byte each for two moments, and a float32 scale of 256 of them
            learning_bytes += 2 * num_bytes + 2 * local_tensor(parameter).numel() * (1 + 4 / 256)
    return weight_bytes, round(learning_bytes)


def _gathered_bytes(model: Decoder, config: JobConfig, num_ranks: int) -> int:
    groups: dict[str, int] = {}
    compute = DTYPES[config.training.mixed_precision_param].itemsize
    for parameter in local_parameters(model, degrees_of(config, num_ranks)):
        itemsize = compute if parameter.dtype.is_floating_point else parameter.dtype.itemsize
        groups[parameter.group] = groups.get(parameter.group, 0) + parameter.num_padded(1) * itemsize
    return 0 if num_ranks == 1 else sum(sorted(groups.values())[-2:])
