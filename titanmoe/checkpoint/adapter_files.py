"""A folder with an adapter, as PEFT writes it: adapter_config.json and adapter_model.safetensors. Nothing is unpickled.

Whatever made it, its values are given as parameters of a model here: of the model's rank, and times the model's scale.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import isclose, prod, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titanmoe.checkpoint.adapter_config import AdapterSettings
from titanmoe.checkpoint.adapter_names import MAGNITUDE, PREFIX, A, B, is_of_experts, layouts
from titanmoe.checkpoint.hf_folder import describe_keys, read_json_object, require_folder
from titanmoe.checkpoint.row_source import Files, PlainSource
from titanmoe.checkpoint.safetensors_io import DTYPES, TensorInfo, read_header
from titanmoe.config.errors import ConfigError
from titanmoe.models.family import Family
from titanmoe.models.keys import Piece, pieces_of

logger = logging.getLogger("titanmoe.checkpoint")

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"

# Of PEFT's options, those that change what an adapter computes, beside what is read here, and what they are without.
_PLAIN = {
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
}


@dataclass(frozen=True)
class _Part:
    """A file tensor, the slice of a parameter that it fills from rank `first_rank` on, and what it is multiplied by."""

    info: TensorInfo
    piece: Piece
    rank: int
    first_rank: int = 0
    factor: float = 1.0


class AdapterFolder:
    """An adapter in files, each of whose tensors fills a parameter, or a slice of one, exactly once.

    Args:
        path: the folder.
        family: whose names the files have.
        shapes: of every parameter that adapters of the model have: the whole ones', by name.
        settings: of the model.

    Raises:
        ConfigError: no such folder or not what PEFT writes; an option that is not supported; ranks, alpha or kind are
            not the model's; tensors that are missing, or that the model has no place for.
    """

    def __init__(
        self, path: str | Path, family: Family, shapes: Mapping[str, tuple[int, ...]], settings: AdapterSettings
    ) -> None:
        self.path = require_folder(path)
        self._shapes = shapes
        self._settings = settings
        self.config = _read_config(self.path)
        self._check_kind()
        infos = read_header(_weights_file(self.path))
        self._infos = infos
        self.layout, pieces = self._choose_layout(family, infos)
        self._parts: dict[str, list[_Part]] = defaultdict(list)
        for key, (name, piece) in pieces.items():
            self._parts[name].append(self._part(infos[key], name, piece))
        self._check_ranks()
        if self.layout == "peft-per-expert":
            self._put_gates_and_ups_together()
        self._log_changes()

    def value(self, name: str, files: Files) -> Tensor:
        """A whole parameter in float32. Ranks that the files lack are zero in B, and NaN in A: any values will do."""
        filler = torch.nan if name.endswith("lora_a") else 0.0
        whole = torch.full(self._shapes[name], filler)
        rank_dim = _rank_dim(name)
        for part in self._parts[name]:
            into = whole[part.piece.at]
            if rank_dim is not None:
                into = into.narrow(rank_dim, part.first_rank, part.rank)
            num_rows = prod(part.info.shape[:-1])
            found = PlainSource(part.info).rows(files, 0, num_rows).float()
            if not found.isfinite().all():
                raise ConfigError("has values that are not finite", where=f"{part.info.path}: {part.info.key}")
            in_order = part.piece.in_file_order(into)
            in_order.copy_(found.view(in_order.shape) * part.factor)
        return whole

    def _check_kind(self) -> None:
        where, config, settings = str(self.path / CONFIG_NAME), self.config, self._settings
        if config.get("peft_type", "LORA") != "LORA":
            raise ConfigError(f"is an adapter of type {config['peft_type']}, not LORA", where=where)
        for key, plain in _PLAIN.items():
            if config.get(key, plain) not in (plain, None, False, [], {}):
                raise ConfigError(f"{key} = {config[key]!r} is not supported", where=where)
        if bool(config.get("use_dora")) != settings.use_dora:
            here = str(bool(config.get("use_dora"))).lower()
            raise ConfigError(f"the adapter has use_dora {here}", where=where, mend=f"Set lora.use_dora = {here}.")
        if config.get("init_lora_weights", True) not in (True, False, "gaussian", "eva"):
            what = f"init_lora_weights = {config['init_lora_weights']!r} changes the weights that adapters are added to"
            raise ConfigError(what, where=where, mend="Convert it to a plain LoRA when PEFT saves it.")
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
            raise ConfigError("r or lora_alpha is missing", where=where)
        if not isclose(_scale(config, rank, alpha), settings.scale_of(settings.rank), rel_tol=1e-6):
            kind = "lora_alpha / sqrt(r)" if config.get("use_rslora") else "lora_alpha / r"
            raise ConfigError(
                f"the adapter's {kind} is {_scale(config, rank, alpha):g}, "
                f"the model's is {settings.scale_of(settings.rank):g}",
                where=where,
                mend=f"Set lora.rank = {rank}, lora.alpha = {float(alpha):g} "
                f"and lora.use_rslora = {str(bool(config.get('use_rslora'))).lower()}.",
            )

    def _choose_layout(
        self, family: Family, infos: Mapping[str, TensorInfo]
    ) -> tuple[str, dict[str, tuple[str, Piece]]]:
        """The layout most of whose keys are there: its name, and parameter and piece of every key."""
        found = {
            layout: {
                piece.file_key: (name, piece)
                for name, shape in self._shapes.items()
                for piece in pieces_of(rules, name, shape)
            }
            for layout, rules in layouts(family).items()
        }
        layout = max(found, key=lambda layout: len(found[layout].keys() & infos.keys()))
        lines = []
        if unknown := infos.keys() - found[layout].keys():
            lines.append(f"in the files only ({len(unknown)}): {describe_keys(sorted(unknown))}")
        if missing := [key for key in found[layout] if key not in infos]:
            lines.append(f"in the model only ({len(missing)}): {describe_keys(missing)}")
        if lines:
            raise ConfigError(
                "the adapter is not one of this model\n  " + "\n  ".join(lines),
                where=str(self.path),
                mend="lora.target_modules must name what the adapter has, and the base model must be the same.",
            )
        return layout, found[layout]

    def _part(self, info: TensorInfo, name: str, piece: Piece) -> _Part:
        shape, rank_dim = self._shapes[name], _rank_dim(name)
        if DTYPES.get(info.dtype) not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(f"is of dtype {info.dtype}", where=f"{info.path}: {info.key}")
        rank, factor = 1, 1.0
        if rank_dim is not None:
            of_slice = shape[len(piece.at) :]
            per_rank = prod(of_slice) // of_slice[rank_dim]
            rank = prod(info.shape) // per_rank
            shape = (*shape[:rank_dim], rank, *shape[len(shape) + rank_dim + 1 :])
        if piece.shape(shape) != info.shape:
            raise ConfigError(
                f"is {list(info.shape)}, and the model has {list(piece.shape(self._shapes[name]))} for it",
                where=f"{info.path}: {info.key}",
            )
        if name.endswith("lora_b"):
            theirs = _scale_of_module(self.config, _module_of(info.key, name, self.layout), rank)
            factor = theirs / self._settings.scale_of(self._shapes[name][-1])
            # Else a factor of one would round differently than none.
            factor = 1.0 if isclose(factor, 1.0, rel_tol=1e-6) else factor
        return _Part(info, piece, rank, factor=factor)

    def _check_ranks(self) -> None:
        """The largest rank must be the model's, of linears and of experts."""
        for of_experts, key in ((False, "lora.rank"), (True, "lora.expert_rank")):
            names = [name for name in self._parts if is_of_experts(name) == of_experts and name.endswith("lora_b")]
            if not names:
                continue
            ours = self._shapes[names[0]][-1]
            ranks = {part.rank for name in names for part in self._parts[name]}
            accepted = {max(ranks)}
            if of_experts and self.layout == "peft-per-expert" and not self._share_a:
                accepted = {2 * max(ranks)}
            if ours not in accepted:
                theirs = next(iter(accepted))
                value = f'"{theirs}"' if of_experts else str(theirs)
                both = " (gate and up have an A each)" if accepted != {max(ranks)} else ""
                raise ConfigError(
                    f"the adapter has rank {theirs}{both}, the model {ours}",
                    where=str(self.path),
                    mend=f"Set {key} = {value}.",
                )

    @cached_property
    def _share_a(self) -> bool:
        """Whether gate and up of every expert have the same A."""
        stacked = [parts for name, parts in self._parts.items() if name.endswith("gate_up_lora_a")]
        with Files() as files:
            return all(_equal(gate, up, files) for parts in stacked for gate, up in _pairs(parts))

    def _put_gates_and_ups_together(self) -> None:
        """Files have an A for gate and one for up, and a model has one for both.

        Where they are the same, one of them is taken. Otherwise they follow each other, and B has zeros where gate
        would be multiplied with the A of up.
        """
        for name, parts in self._parts.items():
            if name.endswith("gate_up_lora_a"):
                if self._share_a:
                    self._parts[name] = [pair[0] for pair in _pairs(parts)]
                else:
                    self._parts[name] = [
                        part for gate, up in _pairs(parts) for part in (gate, replace(up, first_rank=gate.rank))
                    ]
            elif name.endswith("gate_up_lora_b") and not self._share_a:
                ranks = {part.piece.at: part.rank for part in parts}
                self._parts[name] = [
                    replace(part, first_rank=ranks[(part.piece.at[0], 0)]) if part.piece.at[1] == 1 else part
                    for part in parts
                ]

    def _log_changes(self) -> None:
        scaled = [part.info.key for parts in self._parts.values() for part in parts if part.factor != 1.0]
        if scaled:
            text = "%s: alphas of their own, which the config cannot name, are multiplied into B of %s"
            logger.info(text, self.path, describe_keys(scaled))
        lacking = [
            name
            for name, parts in self._parts.items()
            if name.endswith("lora_b") and any(part.rank + part.first_rank < self._shapes[name][-1] for part in parts)
        ]
        if lacking:
            logger.info("%s: of a smaller rank, filled up with zeros: %s", self.path, describe_keys(lacking))


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG_NAME).is_file():
        raise ConfigError(f"the folder has no {CONFIG_NAME}", where=str(folder), mend="Name a folder that PEFT wrote.")
    return read_json_object(folder / CONFIG_NAME)


def _weights_file(folder: Path) -> Path:
    if not (folder / WEIGHTS_NAME).is_file():
        mend = "Name a folder that PEFT wrote."
        if (folder / "adapter_model.bin").is_file():
            mend = "Pickled weights are never loaded: save it with `save_pretrained(NEW, safe_serialization=True)`."
        raise ConfigError(f"the folder has no {WEIGHTS_NAME}", where=str(folder), mend=mend)
    return folder / WEIGHTS_NAME


def _rank_dim(name: str) -> int | None:
    """Which dim of an adapter's parameter is the rank, from the last."""
    return {"a": -2, "b": -1}.get(name.rpartition("lora_")[2])


def _module_of(key: str, name: str, layout: str) -> str:
    """What PEFT matches its patterns with: a module's name, or a stacked parameter's."""
    module = key.removeprefix(PREFIX)
    for ending in (A, B, MAGNITUDE):
        module = module.removesuffix(f".{ending}")
    if layout == "peft" and is_of_experts(name):
        kind = "gate_up_proj" if "gate_up" in name.rpartition(".")[2] else "down_proj"
        module = f"{module.removesuffix('.base_layer')}.{kind}"
    return module


def _scale(config: Mapping[str, Any], rank: int, alpha: float) -> float:
    return alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def _scale_of_module(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The scale of a module. The first pattern that matches the end of its name counts (peft.utils.get_pattern_key)."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", module) is not None
        except re.error as error:
            raise ConfigError(f"{pattern!r} is no pattern: {error}", where=f"{CONFIG_NAME}: alpha_pattern") from error
        if matches:
            alpha = value
            break
    return _scale(config, rank, alpha)


def _pairs(parts: list[_Part]) -> list[tuple[_Part, _Part]]:
    """Gate and up of each expert: rules name them in this order."""
    of_expert = defaultdict(list)
    for part in parts:
        of_expert[part.piece.at].append(part)
    return [(gate, up) for gate, up in of_expert.values()]


def _equal(gate: _Part, up: _Part, files: Files) -> bool:
    if gate.info.shape != up.info.shape:
        return False
    rows = [PlainSource(part.info).rows(files, 0, part.info.shape[0]) for part in (gate, up)]
    return torch.equal(*rows)
