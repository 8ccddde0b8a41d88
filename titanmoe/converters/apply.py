"""Applying converters to a model, and telling what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization import quantize_

import titanmoe.converters.frozen
import titanmoe.converters.lora
import titanmoe.converters.low_precision  # noqa: F401 - registers its converters
from titanmoe.config.errors import ConfigError
from titanmoe.config.job_config import JobConfig
from titanmoe.config.validate import check_converters
from titanmoe.converters.converter import CONVERTERS, Converter
from titanmoe.converters.table import Row, render
from titanmoe.models.build import build_model
from titanmoe.models.decoder import Decoder, Output
from titanmoe.models.linear import Linear
from titanmoe.models.moe.experts import Experts
from titanmoe.ops.grouped_mm import PlainGroupedProduct


@dataclass(frozen=True)
class Conversion:
    """What became of a model.

    Attributes:
        rows: every product of the whole model, in order.
        summary: a line for each converter.
    """

    rows: tuple[Row, ...]
    summary: tuple[str, ...]

    def table(self) -> list[str]:
        return render(self.rows)

    def __str__(self) -> str:
        return "\n".join([*self.summary, *self.table()])


def convert(
    model: Decoder, names: Sequence[str], config: JobConfig, device: torch.device | str | None = None
) -> Conversion:
    """Change `model` in place, before it is distributed. Its state_dict keeps its names, dtypes and types.

    Args:
        model: a model, or a part of one: settings are checked against the whole, and so is what is told.
        names: converters, in this order; `config.model.converters` is not looked at.
        config: has the settings of each converter in the section of its name.
        device: where the model will compute; by default where its parameters are.

    Raises:
        ConfigError: a name that is none, or there twice; a setting that names nothing; nothing converted, or something
            twice; no backend for the device. The model is then as it was.
    """
    check_converters(names, config, CONVERTERS)
    parameter = next(model.parameters())
    device = parameter.device if device is None else torch.device(device)
    whole = build_model(model.spec, dtype=parameter.dtype)
    modules = dict(whole.named_modules()) | dict(model.named_modules())
    del modules[""]
    rows = {path: row for path, module in modules.items() if (row := _as_it_was(path, module)) is not None}
    choices, summary = [], []
    for name in names:
        converter = CONVERTERS[name].from_job(config, device)
        chosen, line = _choose(converter, modules, rows, config.quantize.strict)
        choices.append((converter, chosen))
        summary.append(line)
    for converter, chosen in choices:
        for part, paths in converter.parts(chosen):
            quantize_(model, part, filter_fn=lambda _, path, paths=paths: path in paths)
        converter.finish(model)
    return Conversion(tuple(rows[path] for path in modules if path in rows), tuple(summary))


def _choose(
    converter: Converter, modules: Mapping[str, nn.Module], rows: dict[str, Row], strict: bool
) -> tuple[set[str], str]:
    """The paths of the modules to change, and a line about them. What becomes of all is noted in `rows`."""
    candidates = {path: module for path, module in modules.items() if converter.may_change(module)}
    if not candidates:
        raise ConfigError(
            f"{converter.name} is for {converter.modules}, and this model has none",
            where="model.converters",
            mend="Take it out of the list.",
        )
    converter.check(modules)
    unwanted = {path: why for path, module in candidates.items() if (why := converter.unwanted(path, module))}
    wanted = {path: module for path, module in candidates.items() if path not in unwanted}
    misfits = {path: why for path, module in wanted.items() if (why := converter.misfit(module))}
    chosen = wanted.keys() - misfits.keys()
    inside = {path for path in chosen for outer in accumulate(path.split(".")[:-1], "{}.{}".format) if outer in chosen}
    assert not inside, f"{converter.name} would change modules and what is in them: {sorted(inside)}"
    told = _count(misfits.values())
    if not chosen:
        told = _count([*misfits.values(), *unwanted.values()])
        raise ConfigError(
            f"{converter.name} would change none of the {len(candidates)} {converter.modules}: {told}",
            where="model.converters",
            mend="Take it out of the list, or change its settings.",
        )
    if strict and misfits:
        raise ConfigError(
            f"{converter.name} would change {len(chosen)} of the {len(candidates)} {converter.modules}: {told}",
            where="quantize.strict",
            mend="Set it to false to accept this, or leave those out in the converter's settings.",
        )
    results = {path: part.result for part, paths in converter.parts(chosen) for path in paths}
    for path in candidates:
        row = rows.get(path, Row(path, ""))
        if path in chosen and row.now and not converter.goes_on_top:
            raise ConfigError(
                f"{converter.name} would convert {path} a second time: it is {row.now} already",
                where="model.converters",
                mend="Name in the settings of each converter what is for it.",
            )
        if path in chosen:
            now = f"{row.now} + {results[path]}" if row.now else results[path]
            rows[path] = replace(row, now=now, backend=row.backend or converter.backend_of(modules[path]), why="")
        elif not row.now:
            rows[path] = replace(row, why=unwanted.get(path) or misfits[path])
    described = converter.describe([path for path in candidates if path in chosen], modules)
    line = f"{converter.name}: {len(chosen)} of {len(candidates)} {converter.modules}{described}"
    return chosen, f"{line}; {told}" if told else line


def _count(reasons: Iterable[str]) -> str:
    return "; ".join(f"{count} stay ({why})" for why, count in Counter(reasons).items())


def _as_it_was(path: str, module: nn.Module) -> Row | None:
    """The row of a module that multiplies with a weight."""
    if isinstance(module, Experts):
        was = f"{_stored_as(module, 'down')} {module.spec.num_experts} x 3 x {module.spec.hidden_dim} x {module.dim}"
        is_plain = isinstance(module.down_product, PlainGroupedProduct)
    elif isinstance(module, nn.Linear):
        was = f"{_stored_as(module, 'weight')} {module.out_features} x {module.in_features}"
        is_plain = not isinstance(module, Linear) or module.product is F.linear
    else:
        return None
    if not is_plain:
        return Row(path, was, now="converted")
    why = "no converter for it is listed"
    if isinstance(module, Output):
        why = "computed by the loss"
    elif isinstance(module, nn.Linear) and not isinstance(module, Linear):
        why = "always in float32"
    return Row(path, was, why=why)


def _stored_as(module: nn.Module, name: str) -> str:
    if isinstance(module, (Linear, Experts)) and name in module.stored:
        return module.stored[name].format.name
    return str(getattr(module, name).dtype).removeprefix("torch.")
