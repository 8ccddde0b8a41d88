"""From a folder's tensors to the weights in them: every quantised tensor with its scales, the others as they are.

Tensors are paired by name, whatever files they are in, from the headers alone. How scales are laid out comes from
config.json: a shape can mean several things, so it is only ever compared with what the config says.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from math import prod

from titanmoe.checkpoint.hf_folder import describe_keys
from titanmoe.checkpoint.quantization import Quantization, Scheme
from titanmoe.checkpoint.quantized_rows import QuantizedSource, ScaleGrid
from titanmoe.checkpoint.row_source import PlainSource, RowSource
from titanmoe.checkpoint.safetensors_io import TensorInfo
from titanmoe.config.errors import ConfigError

logger = logging.getLogger("titanmoe.checkpoint")

_SCALE_SUFFIXES = ("_scale_inv", "_scale")
_SCALE = re.compile(r"(?P<weight>.+(weight|_proj))_scale(_inv)?")
_ACTIVATION_SCALE = re.compile(r".*[._]((input|output|activation)_scale(_inv|_ub)?|[qkv]_scale|kv_scale)")
_BLOCKS, _BLOCK_SCALES = "_blocks", "_scales"
_MXFP4_BLOCK = 32
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
_DAMAGED = "Weight and scale are of different copies, or damaged: copy or download both files again."


def sources_of(infos: Mapping[str, TensorInfo], quantization: Quantization | None) -> dict[str, RowSource]:
    """What each weight of the files is read from, by key, in the order of `infos`.

    Scales have no entries of their own. A weight of MXFP4 blocks goes by the blocks' key, with the shape of its
    values. Scales of activations are dropped, with one line.

    Args:
        quantization: what config.json says (`parse_quantization`).

    Raises:
        ConfigError: a weight without its scale, a scale without its weight, a scale of another shape or dtype than
            the config asks for, codes that are not supported, or that the config says are not there.
    """
    for info in infos.values():
        if info.dtype.startswith(("F4", "F6_")):
            raise _error(info, f"packed {info.dtype[1]}-bit floats ({info.dtype}) are not supported")
    if quantization is None:
        for info in infos.values():
            if info.dtype.startswith("F8_"):
                what = (
                    f"holds {info.dtype} codes, and config.json has no quantization_config that says how to scale them"
                )
                raise _error(info, what, "Copy the config.json that belongs to these files.")
        return {key: PlainSource(info) for key, info in infos.items()}
    dropped = [key for key in infos if _ACTIVATION_SCALE.fullmatch(key)]
    if dropped:
        logger.info("Scales of activations, not needed, dropped: %s", describe_keys(dropped))
    infos = {key: info for key, info in infos.items() if key not in set(dropped)}
    sources = _pair_blocks(infos) if quantization.method == "mxfp4" else _pair_weights(infos, quantization)
    num_quantized = sum(isinstance(source, QuantizedSource) for source in sources.values())
    logger.info("Quantised (%s): %d of %d tensors", quantization.method, num_quantized, len(sources))
    return sources


def _pair_weights(infos: Mapping[str, TensorInfo], quantization: Quantization) -> dict[str, RowSource]:
    """FP8 weights `X` with their `X_scale_inv` or `X_scale`."""
    sources: dict[str, RowSource] = {}
    for key, info in infos.items():
        if match := _SCALE.fullmatch(key):
            _check_scaled(info, infos.get(match["weight"]))
        elif info.dtype == "F8_E4M3":
            sources[key] = _fp8_source(info, infos, quantization)
        elif info.dtype.startswith("F8_") or info.dtype == "I8":
            kind = "int8" if info.dtype == "I8" else info.dtype
            raise _error(info, f"{kind} weights are not supported: only F8_E4M3", "Use another release of the model.")
        else:
            sources[key] = PlainSource(info)
    return sources


def _check_scaled(scale: TensorInfo, weight: TensorInfo | None) -> None:
    if weight is None:
        raise _error(scale, "is a scale, and no file has the weight that it belongs to", _DAMAGED)
    if weight.dtype in ("F64", "F32", "F16", "BF16"):
        what = f"is a scale, but its weight is not quantised: {weight.key} is {weight.dtype} in {weight.path.name}"
        raise _error(scale, what, _DAMAGED)


def _fp8_source(info: TensorInfo, infos: Mapping[str, TensorInfo], quantization: Quantization) -> QuantizedSource:
    module = info.key.removesuffix(".weight")
    scheme = quantization.scheme_of(module)
    if quantization.ignores(module):
        raise _error(info, "is FP8, though quantization_config.ignore lists its module as not quantised")
    if scheme is None:
        targets = ", ".join(target for group in quantization.groups for target in group.targets) or "none"
        what = f"is FP8, but no group of quantization_config is for its module (targets: {targets})"
        raise _error(info, what, "A target is a module's name, `re:` and a regex, or Linear.")
    if len(info.shape) < 2:
        raise _error(info, f"is FP8 of shape {list(info.shape)}; only matrices and stacks of matrices can be")
    scale = _scale_of(info, infos)
    dtypes = (*_SCALE_DTYPES, "U8") if quantization.byte_exponents else _SCALE_DTYPES
    if scale.dtype not in dtypes:
        raise _error(scale, f"is a scale of dtype {scale.dtype}; expected is one of {', '.join(dtypes)}")
    outputs_last = quantization.method == "fbgemm_fp8" and module == info.key
    layouts = _layouts(info, scheme, outputs_last=outputs_last)
    if scale.shape not in layouts:
        expected = " or ".join(str(list(shape)) for shape in layouts)
        per = f"{scheme.strategy} of {list(scheme.block)}" if scheme.block else scheme.strategy
        what = (
            f"is a scale of shape {list(scale.shape)}; a weight of shape {list(info.shape)} with a scale per {per}, as "
            f"quantization_config says, has {expected}"
        )
        raise _error(scale, what)
    return QuantizedSource(info, info.shape, scale, layouts[scale.shape])


def _scale_of(info: TensorInfo, infos: Mapping[str, TensorInfo]) -> TensorInfo:
    names = [info.key + suffix for suffix in _SCALE_SUFFIXES]
    found = [infos[name] for name in names if name in infos]
    if len(found) == 1:
        return found[0]
    if found:
        raise _error(info, f"is FP8 and has two scales: {' and '.join(names)}", _DAMAGED)
    module = info.key.rpartition(".")[0] + "."
    beside = [key for key in infos if key.startswith(module) and key != info.key]
    what = f"is FP8, and no file has its scale: {' or '.join(names)} (beside it: {describe_keys(beside) or 'nothing'})"
    raise _error(info, what, _DAMAGED)


def _layouts(info: TensorInfo, scheme: Scheme, *, outputs_last: bool) -> dict[tuple[int, ...], ScaleGrid]:
    """The shapes that the scales of an FP8 weight may have, and what each means.

    A weight is (..., outputs, inputs) unless `outputs_last`, or unless its scales, by dims of size 1, say otherwise.
    """
    *lead, rows, columns = info.shape
    all_rows = prod(info.shape[:-1])
    # Gate above up in one tensor: made of two weights, it may keep their scales apart.
    half = rows // 2 if rows % 2 == 0 and info.key.removesuffix(".weight").endswith("gate_up_proj") else 0
    layouts: dict[tuple[int, ...], ScaleGrid] = {}

    def put(grid: ScaleGrid, *shapes: tuple[int, ...]) -> None:
        """A scale of each of these shapes, after the weight's leading dims, means this grid."""
        layouts.update(((*lead, *shape), grid) for shape in shapes)

    if scheme.strategy == "tensor":
        layouts[()] = layouts[(1,)] = ScaleGrid(all_rows, all_rows, columns)
        put(ScaleGrid(rows, rows, columns), (), (1,), (1, 1))
        if half:
            put(ScaleGrid(half, half, columns), (2,), (2, 1))
    elif scheme.strategy == "channel" and outputs_last:
        put(ScaleGrid(rows, rows, 1), (1, columns), (columns, 1), (columns,))
    elif scheme.strategy == "channel":
        if lead:
            put(ScaleGrid(rows, rows, 1), (1, columns))
        put(ScaleGrid(all_rows, 1, columns), (rows, 1), (rows,))
    else:
        assert scheme.block is not None, "a block strategy has a block"
        block_rows, block_columns = scheme.block
        num_columns = -(-columns // block_columns)
        if half:
            put(ScaleGrid(half, block_rows, block_columns), (-(-half // block_rows) * 2, num_columns))
        # Last: where both have the same shape, blocks are those of the tensor as it is stored.
        put(ScaleGrid(rows, block_rows, block_columns), (-(-rows // block_rows), num_columns))
    return layouts


def _pair_blocks(infos: Mapping[str, TensorInfo]) -> dict[str, RowSource]:
    """MXFP4 `X_blocks` (..., G, 16), two values a byte, with their `X_scales` (..., G)."""
    sources: dict[str, RowSource] = {}
    for key, info in infos.items():
        if key.endswith(_BLOCK_SCALES):
            if key.removesuffix(_BLOCK_SCALES) + _BLOCKS not in infos:
                raise _error(info, "are scales, and no file has the blocks that they belong to", _DAMAGED)
        elif key.endswith(_BLOCKS):
            sources[key] = _mxfp4_source(info, infos.get(key.removesuffix(_BLOCKS) + _BLOCK_SCALES))
        elif info.dtype.startswith("F8_") or info.dtype == "I8":
            raise _error(info, f"is {info.dtype} in a checkpoint that quantization_config says is mxfp4")
        else:
            sources[key] = PlainSource(info)
    return sources


def _mxfp4_source(blocks: TensorInfo, scales: TensorInfo | None) -> QuantizedSource:
    if scales is None:
        name = blocks.key.removesuffix(_BLOCKS) + _BLOCK_SCALES
        raise _error(blocks, f"are MXFP4 blocks, and no file has their scales: {name}", _DAMAGED)
    if blocks.dtype != "U8":
        raise _error(blocks, f"are MXFP4 blocks of dtype {blocks.dtype}; expected is U8")
    if len(blocks.shape) < 3 or blocks.shape[-1] != _MXFP4_BLOCK // 2:
        raise _error(blocks, f"are MXFP4 blocks of shape {list(blocks.shape)}; expected is (..., outputs, blocks, 16)")
    if scales.dtype not in ("U8", "F8_E8M0"):
        raise _error(scales, f"are MXFP4 scales of dtype {scales.dtype}; expected is U8 or F8_E8M0")
    if scales.shape != blocks.shape[:-1]:
        what = f"are MXFP4 scales of shape {list(scales.shape)}; blocks of {list(blocks.shape)} have one each"
        raise _error(scales, what)
    *lead, num_blocks, _ = blocks.shape
    grid = ScaleGrid(prod(lead), 1, _MXFP4_BLOCK)
    return QuantizedSource(blocks, (*lead, num_blocks * _MXFP4_BLOCK), scales, grid)


def _error(info: TensorInfo, what: str, mend: str = "") -> ConfigError:
    return ConfigError(what, where=f"{info.path}: {info.key}", mend=mend)
