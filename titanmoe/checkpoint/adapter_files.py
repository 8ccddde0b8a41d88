"""A folder with an adapter, as PEFT writes it: adapter_config.json and adapter_model.safetensors. Nothing is unpickled.

Whatever made it, its values are given as parameters of a model here: of the model's rank, and times the model's scale.
"""

from __future__ import annotations

import logging
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isclose, prod, sqrt
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from titanmoe.checkpoint.adapter_config import PER_EXPERT, AdapterSettings, whole_shapes
from titanmoe.checkpoint.adapter_names import MAGNITUDE, PREFIX, A, B, is_of_experts, layouts, pieces_by_name
from titanmoe.checkpoint.hf_folder import describe_keys, read_json_object, require_folder
from titanmoe.checkpoint.row_source import Files, PlainSource
from titanmoe.checkpoint.safetensors_io import DTYPES, TensorInfo, read_header
from titanmoe.config.errors import ConfigError
from titanmoe.config.sections.lora import LoRA
from titanmoe.models.family import Family
from titanmoe.models.keys import Piece
from titanmoe.models.spec import DecoderSpec

logger = logging.getLogger("titanmoe.checkpoint")

T = TypeVar("T")

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
        self._check_ranks_of_modules()
        self._check_scale()
        self._check_ranks()
        if self.layout == PER_EXPERT:
            self._put_gates_and_ups_together()

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
        if config.get("init_lora_weights", True) not in (True, False, "gaussian", "eva", "orthogonal"):
            what = f"init_lora_weights = {config['init_lora_weights']!r} changes the weights that adapters are added to"
            raise ConfigError(what, where=where, mend="Convert it to a plain LoRA when PEFT saves it.")

    def _check_scale(self) -> None:
        """That of modules without an alpha of their own must be the model's."""
        config, settings = self.config, self._settings
        rank, alpha = _rank_and_alpha(config, self.path)
        if not isclose(_scale(config, rank, alpha), settings.scale_of(settings.rank), rel_tol=1e-6):
            kind = "lora_alpha / sqrt(r)" if config.get("use_rslora") else "lora_alpha / r"
            of_linears = (parts for name, parts in self._parts.items() if not is_of_experts(name))
            largest = max((part.rank for parts in of_linears for part in parts), default=rank)
            raise ConfigError(
                f"the adapter's {kind} is {_scale(config, rank, alpha):g}, "
                f"the model's is {settings.scale_of(settings.rank):g}",
                where=str(self.path / CONFIG_NAME),
                mend=f"Set lora.rank = {largest}, lora.alpha = {_alpha_with(config, rank, alpha, largest):g} "
                f"and lora.use_rslora = {str(bool(config.get('use_rslora'))).lower()}.",
            )

    def _check_ranks_of_modules(self) -> None:
        """A and B of a module must have one rank; of linear layers, that which the config says."""
        mend = "It is not as PEFT wrote it: get the adapter anew."
        rank, _ = _rank_and_alpha(self.config, self.path)
        ranks: dict[str, int] = {}
        for name, parts in self._parts.items():
            for part in parts if _rank_dim(name) is not None else ():
                module, where = part.info.key.rpartition(".lora_")[0], f"{part.info.path}: {part.info.key}"
                if ranks.setdefault(module, part.rank) != part.rank:
                    what = f"is of rank {part.rank}, and the other factor of the module is of rank {ranks[module]}"
                    raise ConfigError(what, where=where, mend=mend)
                if is_of_experts(name):
                    continue
                said = _of_module(self.config, "rank_pattern", _module_of(part.info.key, name, self.layout), rank)
                if part.rank != said:
                    raise ConfigError(f"is of rank {part.rank}, {CONFIG_NAME} says {said}", where=where, mend=mend)

    def _choose_layout(
        self, family: Family, infos: Mapping[str, TensorInfo]
    ) -> tuple[str, dict[str, tuple[str, Piece]]]:
        """The layout most of whose keys are there: its name, and parameter and piece of every key."""
        found = {
            layout: {
                piece.file_key: (name, piece)
                for name, pieces in pieces_by_name(rules, self._shapes).items()
                for piece in pieces
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
                mend="lora.target_modules must name what the adapter has, and the base model must be the same. "
                "Routers, embeddings and outputs have no adapters here.",
            )
        return layout, found[layout]

    def _part(self, info: TensorInfo, name: str, piece: Piece) -> _Part:
        if DTYPES.get(info.dtype) not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(f"is of dtype {info.dtype}", where=f"{info.path}: {info.key}")
        rank, factor = _rank_in_file(info, name, piece, self._shapes[name]), 1.0
        if not rank:
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
            theirs = max(part.rank for name in names for part in self._parts[name])
            apart = of_experts and self.layout == PER_EXPERT and not self._share_a
            if apart:
                theirs *= 2
            if ours != theirs:
                both = " (gate and up have an A each)" if apart else ""
                raise ConfigError(
                    f"the adapter has rank {theirs}{both}, the model {ours}",
                    where=str(self.path),
                    mend=f"Set {key} = {theirs}.",
                )

    @cached_property
    def _share_a(self) -> bool:
        """Whether gate and up of every expert have the same A."""
        stacked = [parts for name, parts in self._parts.items() if name.endswith("gate_up_lora_a")]
        return _are_equal((gate.info, up.info) for parts in stacked for gate, up in _pairs(parts))

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

    def log_changes(self) -> None:
        """Tell what the config of a run cannot, or what files lack."""
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


def base_of_adapter(folder: Path) -> Path:
    """The folder of the model that an adapter says it is for.

    Raises:
        ConfigError: it names none, or one that is not here.
    """
    name = _read_config(folder).get("base_model_name_or_path")
    if not isinstance(name, str) or not name or not Path(name).is_dir():
        raise ConfigError(
            f"the adapter is for {name or 'a model that it does not name'}, which is no folder here",
            where=str(folder / CONFIG_NAME),
            mend="Name the model's folder with --base.",
        )
    return Path(name)


def lora_section(folder: Path, family: Family, spec: DecoderSpec) -> LoRA:
    """`[lora]` for a model that is to have a folder's adapter: what it has, and with which ranks.

    Raises:
        ConfigError: not what PEFT writes, or nothing in it is of this model.
    """
    config, infos = _read_config(folder), read_header(_weights_file(folder))
    rank, alpha = _rank_and_alpha(config, folder)
    whole = {name: shape for name, shape in whole_shapes(spec).items() if "lora_" in name}
    ranks: dict[str, int] = {}  # the largest in files, by the name of A
    for layout, rules in layouts(family).items():
        of_layout: dict[str, int] = {}
        # Where one of two weights of experts is adapted, it has the other's key: which it is, its shape tells.
        for absent in (".down_lora_", ".gate_up_lora_", "none"):
            shapes = {name: shape for name, shape in whole.items() if absent not in name}
            by_name = pieces_by_name(rules, shapes)
            found = {
                name: [_rank_in_file(infos.get(piece.file_key), name, piece, shapes[name]) for piece in pieces]
                for name, pieces in by_name.items()
            }
            there = {name for name in found if all(found[name])}
            of_layout |= {a: max(found[a]) for a in there if a.endswith("a") and f"{a[:-1]}b" in there}
        if layout == PER_EXPERT:
            stacked = ([infos[p.file_key] for p in by_name[a]] for a in of_layout if a.endswith("gate_up_lora_a"))
            share_a = _are_equal(pair for of_layer in stacked for pair in _pairs(of_layer))
            of_layout = {a: of_layout[a] * (1 if share_a or not is_of_experts(a) else 2) for a in of_layout}
        ranks = max(ranks, of_layout, key=len)
    if not ranks:
        what = f"has no adapter of a model of family {family.name!r}: {describe_keys(infos)}"
        raise ConfigError(what, where=str(folder))
    of_experts = [ranks[name] for name in ranks if is_of_experts(name)]
    largest = max((ranks[name] for name in ranks if not is_of_experts(name)), default=rank)
    return LoRA(
        rank=largest,
        alpha=_alpha_with(config, rank, alpha, largest),
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        target_modules=tuple(
            re.sub(r"_lora_a$", "_proj", name) if is_of_experts(name) else name.removesuffix(".lora_a")
            for name in ranks
        ),
        expert_rank=max(of_experts, default="scaled"),
    )


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


def _rank_and_alpha(config: Mapping[str, Any], folder: Path) -> tuple[int, float]:
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    where = str(folder / CONFIG_NAME)
    if not _is_count(rank) or not _is_finite(alpha):
        raise ConfigError("r or lora_alpha is missing, or not a number", where=where)
    if alpha <= 0:
        raise ConfigError(f"lora_alpha is {alpha}, and must be above zero", where=where)
    for key, is_valid in (("rank_pattern", _is_count), ("alpha_pattern", _is_finite)):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(is_valid(value) for value in pattern.values()):
            raise ConfigError(f"{key} is not an object of numbers by pattern", where=where)
    return rank, float(alpha)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _rank_in_file(info: TensorInfo | None, name: str, piece: Piece, shape: tuple[int, ...]) -> int:
    """The rank of a file tensor (1 if it has none) that fills a piece of a parameter; 0 if that has other sizes."""
    if info is None:
        return 0
    rank, rank_dim = 1, _rank_dim(name)
    if rank_dim is not None:
        of_slice = shape[len(piece.at) :]
        rank = prod(info.shape) * of_slice[rank_dim] // prod(of_slice)
        shape = (*shape[:rank_dim], rank, *shape[len(shape) + rank_dim + 1 :])
    return rank if piece.shape(shape) == info.shape else 0


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


def _alpha_with(config: Mapping[str, Any], rank: int, alpha: float, other_rank: int) -> float:
    """What gives another rank the same scale."""
    return _scale(config, rank, alpha) * (sqrt(other_rank) if config.get("use_rslora") else other_rank)


def _scale_of_module(config: Mapping[str, Any], module: str, rank: int) -> float:
    return _scale(config, rank, _of_module(config, "alpha_pattern", module, config["lora_alpha"]))


def _of_module(config: Mapping[str, Any], key: str, module: str, usual: T) -> T:
    """What a module has. The first pattern that matches the end of its name counts (peft.utils.get_pattern_key)."""
    for pattern, value in (config.get(key) or {}).items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", module) is not None
        except re.error as error:
            raise ConfigError(f"{pattern!r} is no pattern: {error}", where=f"{CONFIG_NAME}: {key}") from error
        if matches:
            found: T = value
            return found
    return usual


def _pairs(of_layer: Sequence[T]) -> Iterator[tuple[T, T]]:
    """Gate and up of each expert: rules name all gates before all ups."""
    middle = len(of_layer) // 2
    return zip(of_layer[:middle], of_layer[middle:], strict=True)


def _are_equal(pairs: Iterable[tuple[TensorInfo, TensorInfo]]) -> bool:
    with Files() as files:
        return all(
            gate.shape == up.shape
            and torch.equal(*(PlainSource(info).rows(files, 0, info.shape[0]) for info in (gate, up)))
            for gate, up in pairs
        )
