"""Small adapted models, PEFT beside them, and the command that exports them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from titanmoe import cli
from titanmoe.checkpoint.adapter_config import AdapterSettings
from titanmoe.checkpoint.pretrained import family_of_spec, from_pretrained
from titanmoe.config.resolve import resolve
from titanmoe.converters.apply import convert
from titanmoe.models.adapters import is_adapter
from titanmoe.models.decoder import Decoder
from titanmoe.models.family import Family


def adapted(folder: Path, *options: str, dtype: torch.dtype = torch.float32) -> tuple[Decoder, Family, AdapterSettings]:
    """The model of a folder with adapters; options are those of `[lora]`. B is zero."""
    config = resolve([f"--lora.{option}" for option in options]).config
    model = from_pretrained(folder, dtype=dtype)
    convert(model, ["lora"], config)
    lora = config.lora
    settings = AdapterSettings(lora.rank, lora.alpha, lora.use_rslora, lora.use_dora)
    return model.eval(), family_of_spec(model.spec), settings


@torch.no_grad()
def randomise(model: nn.Module, is_chosen: Any = is_adapter, std: float = 0.2) -> None:
    """Give every chosen parameter values of its own; magnitudes stay near what they are."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if is_chosen(name):
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * noise)
            else:
                parameter.copy_(std * noise)


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found = model.eval()(tokens)
    return found if isinstance(found, Tensor) else found.logits


def peft_loads(base: nn.Module, folder: Path) -> nn.Module:
    """A base model with the adapter of a folder. PEFT only warns of tensors that it lacks or cannot place."""
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, folder)
    assert not [str(warning.message) for warning in caught if "adapter keys" in str(warning.message)], caught
    return model.eval()


def peft_makes(base: nn.Module, folder: Path, **options: Any) -> nn.Module:
    """An adapter of PEFT with values in all of its parameters, saved in the folder."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base, LoraConfig(**options))
    randomise(model, lambda name: "lora_" in name)
    model.save_pretrained(folder)
    return model.eval()


def run_export(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> str:
    """What `titanmoe export` tells: on stdout, or on stderr where another exit code is expected."""
    found = cli.main(["export", *map(str, args)])
    captured = capsys.readouterr()
    assert found == code, captured
    return captured.err if code else captured.out
