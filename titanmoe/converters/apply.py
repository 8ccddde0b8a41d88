"""Applying converters to a model, and telling what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from torchao.quantization import quantize_

import titanmoe.converters.low_precision  # noqa: F401 - registers its converters
from titanmoe.config.errors import ConfigError
from titanmoe.config.job_config import JobConfig
from titanmoe.converters.converter import CONVERTERS, Converter
from titanmoe.converters.table import Row, render
from titanmoe.models.build import build_model
from titanmoe.models.decoder import Decoder, Output
from titanmoe.models.linear import Linear
from titanmoe.models.moe.experts import Experts

__all__ = ["convert", "render", "summarize"]


def convert(
    model: Decoder, names: Sequence[str], config: JobConfig, device: torch.device | str | None = None
) -> list[Row]:
    """Change `model` in place, before it is distributed. Its state_dict keeps its names, dtypes and types.

    Args:
        model: a model, or a part of one: settings are checked against the whole.
        names: converters, in this order; `config.model.converters` is not looked at.
        config: has the settings of each converter in the section of its name.
        device: where the model will compute; by default where its parameters are.

    Returns:
        What became of every product of the whole model, in order.

    Raises:
        ConfigError: a name that is none; a setting that names nothing; nothing converted, or something twice; no
            backend for the device.
    """
    parameter = next(model.parameters())
    device = parameter.device if device is None else torch.device(device)
    whole = build_model(model.spec, dtype=parameter.dtype)
    modules = {path: module for path, module in whole.named_modules() if path}
    rows = {path: row for path, module in modules.items() if (row := _as_it_was(path, module)) is not None}
    for name in names:
        if name not in CONVERTERS:
            raise ConfigError(f'"{name}" is no converter; they are {", ".join(CONVERTERS)}', where="model.converters")
        converter = CONVERTERS[name].from_job(config, device)
        chosen = _choose(converter, modules, rows, strict=config.quantize.strict)
        quantize_(model, converter, filter_fn=lambda _, path, chosen=chosen: path in chosen)
    return list(rows.values())


def _choose(converter: Converter, modules: dict[str, nn.Module], rows: dict[str, Row], strict: bool) -> set[str]:
    """The paths of the modules to change; what becomes of them, and why others stay, is noted in `rows`."""
    converter.check(modules)
    candidates = {path: module for path, module in modules.items() if converter.may_change(module)}
    obstacles = {path: converter.obstacle(path, module) for path, module in candidates.items()}
    chosen = {path for path, obstacle in obstacles.items() if not obstacle}
    for path, obstacle in obstacles.items():
        row = rows.get(path, Row(path, ""))
        if path in chosen and row.now:
            raise ConfigError(f"{path} is converted twice: it is {row.now} already", where="model.converters")
        if path in chosen:
            rows[path] = replace(
                row, now=f"{converter.name}: {converter.describe()}", backend=converter.backend_name, why=""
            )
        elif not row.now:
            rows[path] = replace(row, why=obstacle.strip("()"))
    unfit = {path: text for path, text in obstacles.items() if text and not text.startswith("(")}
    if not chosen or (strict and unfit):
        reasons = Counter(obstacle for obstacle in (unfit if chosen else obstacles).values())
        told = "; ".join(f"{count} of them: {reason.strip('()')}" for reason, count in reasons.items())
        raise ConfigError(
            f"{converter.name} leaves {len(unfit) if chosen else 'all'} of {len(candidates)} {converter.modules} as "
            f"they are{': ' + told if told else ''}",
            where="quantize.strict" if chosen else "model.converters",
        )
    return chosen


def _as_it_was(path: str, module: nn.Module) -> Row | None:
    """The row of a module that multiplies with a weight."""
    if isinstance(module, Experts):
        num_experts, dim, hidden_dim = module.down.shape
        return Row(path, f"{_dtype(module.down)} {num_experts} x ({2 * hidden_dim} x {dim}, {dim} x {hidden_dim})")
    if not isinstance(module, nn.Linear):
        return None
    why = "no converter for it is listed"
    if isinstance(module, Output):
        why = "the loss computes it in pieces"
    elif not isinstance(module, Linear):
        why = "a router computes in float32"
    return Row(path, f"{_dtype(module.weight)} {module.out_features} x {module.in_features}", why=why)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def summarize(rows: Sequence[Row]) -> list[str]:
    """One line for each converter: how many modules it changed, to what, and on which backend."""
    counts = Counter((row.now, row.backend) for row in rows if row.now)
    return [
        f"{now}; {count} module{'s' if count > 1 else ''}{f', backend {backend}' if backend else ''}"
        for (now, backend), count in counts.items()
    ]
