"""What config.json says of a quantised checkpoint: its `quantization_config`, read as plain values.

    fp8                 DeepSeek's and Qwen's FP8: a scale per block (`weight_block_size`) or, without one, per tensor
    compressed-tensors  8-bit floats with a scale per tensor, output channel or block, by groups of modules
                        (https://github.com/vllm-project/compressed-tensors)
    fbgemm_fp8          Meta's FP8: a scale per output channel
    mxfp4               gpt-oss: 4-bit floats in blocks of 32 (OCP Microscaling Formats, version 1.0)

Which tensors are quantised is not read from here: the files' headers tell, tensor by tensor, so a layer that was left
in bfloat16 needs no entry. Lists such as `modules_to_not_convert` therefore play no part; compressed-tensors' `ignore`,
whose meaning is exact, is kept to find contradictions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from titanmoe.checkpoint.hf_folder import CONFIG_NAME, read_hf_config, require_folder
from titanmoe.config.errors import ConfigError

Strategy = Literal["tensor", "channel", "block"]

_WHERE = "config.json: quantization_config"
_SUPPORTED = (
    "Supported are fp8, fbgemm_fp8, mxfp4, and compressed-tensors of 8-bit floats (format float-quantized or "
    "naive-quantized). Use one of these, or the bfloat16 release of the same model."
)


@dataclass(frozen=True)
class Scheme:
    """What shares a scale: a matrix, an output channel, or a block of `block` rows and columns."""

    strategy: Strategy
    block: tuple[int, int] | None = None


@dataclass(frozen=True)
class Group:
    """The scheme of the modules that `targets` names: exact names, "re:" and a regex, or the class name "Linear"."""

    targets: tuple[str, ...]
    scheme: Scheme


@dataclass(frozen=True)
class Quantization:
    """How the quantised tensors of a checkpoint are to be read.

    Attributes:
        method: the `quant_method`.
        groups: the schemes of FP8 weights.
        ignore: names or "re:" regexes of modules that are said not to be quantised.
        byte_exponents: whether scales of dtype U8 are exponents (e8m0).
    """

    method: str
    groups: tuple[Group, ...] = ()
    ignore: tuple[str, ...] = ()
    byte_exponents: bool = False

    def ignores(self, module: str) -> bool:
        """Whether the config says that this module is not quantised."""
        return any(_names(entry, module) for entry in self.ignore)

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of a module with an FP8 weight: of the group that names it, else of one for all linear layers."""
        for group in self.groups:
            if any(_names(target, module) for target in group.targets):
                return group.scheme
        return next((group.scheme for group in self.groups if "Linear" in group.targets), None)


def parse_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """The quantisation that a parsed config.json names, at its top or in its `text_config`; None if it names none.

    Raises:
        ConfigError: a method or an option that is not supported, or a value of the wrong kind.
    """
    text_config = config.get("text_config")
    nested = text_config.get("quantization_config") if isinstance(text_config, Mapping) else None
    values = config.get("quantization_config") or nested
    if not values:
        return None
    if not isinstance(values, Mapping):
        raise ConfigError(f"is {values!r}, not an object", where=_WHERE)
    method = values.get("quant_method", "(none named)")
    if method == "fp8":
        return _parse_fp8(values)
    if method == "compressed-tensors":
        return _parse_compressed_tensors(values)
    if method == "fbgemm_fp8":
        return Quantization(method, (Group(("Linear",), Scheme("channel")),))
    if method == "mxfp4":
        return Quantization(method, byte_exponents=True)
    raise ConfigError(f"quant_method {method!r} is not supported", where=_WHERE, mend=_SUPPORTED)


def read_quantization(folder: str | Path) -> Quantization | None:
    """The quantisation that a folder's config.json names; None if there is no config.json.

    Raises:
        ConfigError: as `parse_quantization`, naming the folder; config.json is no JSON object.
    """
    folder = require_folder(folder)
    if not (folder / CONFIG_NAME).is_file():
        return None
    try:
        return parse_quantization(read_hf_config(folder))
    except ConfigError as error:
        raise ConfigError(error.what, where=f"{folder}: {error.where}", mend=error.mend) from error


def _parse_fp8(values: Mapping[str, Any]) -> Quantization:
    if (experts := values.get("expert_dtype", "fp8")) != "fp8":
        raise ConfigError(f"expert_dtype {experts!r} is not supported", where=_WHERE, mend=_SUPPORTED)
    if (scale_format := values.get("scale_fmt")) not in (None, "float", "ue8m0"):
        raise ConfigError(f"scale_fmt {scale_format!r} is not supported (float, ue8m0)", where=_WHERE)
    block = values.get("weight_block_size")
    scheme = Scheme("tensor") if block is None else Scheme("block", _block(block, "weight_block_size"))
    return Quantization("fp8", (Group(("Linear",), scheme),), byte_exponents=scale_format == "ue8m0")


def _parse_compressed_tensors(values: Mapping[str, Any]) -> Quantization:
    groups = values.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ConfigError("has no config_groups that say how weights are quantised", where=_WHERE)
    sparsity = values.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise ConfigError(f"sparse weights ({sparsity['format']}) are not supported", where=_WHERE, mend=_SUPPORTED)
    parsed = []
    for name, group in groups.items():
        key = f"config_groups.{name}"
        if not isinstance(group, Mapping):
            raise ConfigError(f"{key} is {group!r}, not an object", where=_WHERE)
        if group.get("weights") is not None:
            scheme = _compressed_tensors_scheme(group, group.get("format") or values.get("format"), key)
            parsed.append(Group(_patterns(group.get("targets"), f"{key}.targets"), scheme))
    return Quantization("compressed-tensors", tuple(parsed), _patterns(values.get("ignore") or (), "ignore"))


def _compressed_tensors_scheme(group: Mapping[str, Any], format_name: Any, key: str) -> Scheme:
    weights = group["weights"]
    if not isinstance(weights, Mapping):
        raise ConfigError(f"{key}.weights is {weights!r}, not an object", where=_WHERE)
    kind = (weights.get("type"), weights.get("num_bits"), weights.get("symmetric", True))
    if format_name not in ("float-quantized", "naive-quantized") or kind != ("float", 8, True):
        symmetry = "" if kind[2] else "asymmetric "
        what = f"{key}: {symmetry}{kind[1]}-bit {kind[0]} weights (format {format_name}) are not supported"
        raise ConfigError(what, where=_WHERE, mend=_SUPPORTED)
    strategy = weights.get("strategy")
    if strategy not in ("tensor", "channel", "block"):
        what = f"{key}: strategy {strategy!r} is not supported (tensor, channel, block)"
        raise ConfigError(what, where=_WHERE, mend=_SUPPORTED)
    if strategy == "block":
        return Scheme("block", _block(weights.get("block_structure"), f"{key}.weights.block_structure"))
    return Scheme(cast(Strategy, strategy))


def _block(value: Any, key: str) -> tuple[int, int]:
    """Rows and columns of a block: [128, 128], or "128x128" as older files have it."""
    sizes = value.split("x") if isinstance(value, str) else value
    if isinstance(sizes, Sequence) and len(sizes) == 2 and all(re.fullmatch(r"[1-9]\d*", str(size)) for size in sizes):
        return int(sizes[0]), int(sizes[1])
    raise ConfigError(f"{key} is {value!r}, not two positive integers", where=_WHERE)


def _patterns(value: Any, key: str) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(entry, str) for entry in value):
        raise ConfigError(f"{key} is {value!r}, not a list of names", where=_WHERE)
    for entry in value:
        try:
            re.compile(entry.removeprefix("re:") if entry.startswith("re:") else "")
        except re.error as error:
            raise ConfigError(f"{key}: {entry!r} is not a regex ({error})", where=_WHERE) from error
    return tuple(value)


def _names(entry: str, module: str) -> bool:
    """Whether an entry of `targets` or `ignore` names the module; regexes need to match its beginning only."""
    if entry.startswith("re:"):
        return re.match(entry.removeprefix("re:"), module) is not None
    return entry == module
