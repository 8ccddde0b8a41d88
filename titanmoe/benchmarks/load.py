"""Speed of loading weights beside plain reading of the same files: python -m titanmoe.benchmarks.load [--json].

Writes a synthetic checkpoint with the widths of Qwen3-30B-A3B, then takes turns: the files are dropped from the page
cache and read in large pieces into one small buffer, dropped again and loaded with `from_pretrained`, into fresh
memory. Which of the two comes first alternates, as the machine below a virtual one may have a cache of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titanmoe.benchmarks.turns import ratio

if TYPE_CHECKING:
    from titanmoe.models.spec import DecoderSpec

_DIM, _HIDDEN, _MAX_EXPERTS, _MAX_VOCAB = 2048, 768, 128, 151_936
_SHARD_BYTES = 1 << 30
_READ_BYTES = 16 << 20
_FP8_BLOCK = 128
_FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [_FP8_BLOCK, _FP8_BLOCK]}


def main(args: Sequence[str] | None = None) -> int:
    options = _parse(args)
    import torch

    from titanmoe.checkpoint.pretrained import from_pretrained

    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        num_tensors = _write_checkpoint(folder, options.gigabytes, options.layout)
        files = sorted(folder.glob("*.safetensors"))
        num_bytes = sum(file.stat().st_size for file in files)
        seconds: dict[str, list[float]] = {"read": [], "load": []}
        is_cold = []
        actions = {"read": lambda: _read_plainly(files), "load": lambda: from_pretrained(folder)}
        for number in range(options.rounds):
            for contender in ("read", "load") if number % 2 == 0 else ("load", "read"):
                is_cold.append(_drop_from_cache(files))
                seconds[contender].append(_seconds(actions[contender]))
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    report = {
        "benchmark": "load",
        "layout": options.layout,
        "gigabytes": num_bytes / 1e9,
        "num_files": len(files),
        "num_tensors": num_tensors,
        "cold": all(is_cold),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "seconds_read": seconds["read"],
        "seconds_load": seconds["load"],
        "gb_per_second_read": num_bytes / 1e9 / statistics.median(seconds["read"]),
        "gb_per_second_load": num_bytes / 1e9 / statistics.median(seconds["load"]),
        "load_of_read_rate": ratio(seconds["read"], seconds["load"]),
    }
    print(json.dumps(report, indent=2) if options.json else _table(report))
    return 0


def _parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m titanmoe.benchmarks.load", description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the checkpoint, about")
    parser.add_argument("--folder", help="on the file system to measure; by default that of temporary files")
    parser.add_argument("--layout", default="per-expert", choices=["per-expert", "stacked", "fp8"])
    parser.add_argument("--rounds", type=int, default=6, help="even, so that each comes first as often")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(args)


def _spec(num_bytes: float) -> DecoderSpec:
    """A quarter of the bytes, in bfloat16, for embedding and output, the rest for layers of up to 128 experts."""
    from titanmoe.models.spec import DecoderSpec, GroupedQuery, LayerSpec, MoE, Rope, Router

    vocab_size = min(_MAX_VOCAB, max(1, int(num_bytes / 4 / (2 * 2 * _DIM))))
    num_experts = max(1, round((num_bytes - vocab_size * 4 * _DIM) / (2 * 3 * _HIDDEN * _DIM)))
    num_layers = -(-num_experts // _MAX_EXPERTS)
    attention = GroupedQuery(32, 4, 128, Rope(128, 1e6), qk_norm=True)
    experts = MoE(-(-num_experts // num_layers), 1, _HIDDEN, Router(score="softmax", normalize=True))
    layers = (LayerSpec(attention, experts),) * num_layers
    return DecoderSpec(dim=_DIM, vocab_size=vocab_size, layers=layers, family="qwen3")


def _write_checkpoint(folder: Path, gigabytes: float, layout: str) -> int:
    """Write config.json, shards of 1 GiB and their index; return the number of tensors. Values are noise."""
    import torch

    from titanmoe.checkpoint.hf_folder import CONFIG_NAME, INDEX_NAME
    from titanmoe.checkpoint.safetensors_io import TensorWriter
    from titanmoe.models.build import build_model
    from titanmoe.models.common_rules import STACKED_EXPERTS
    from titanmoe.models.families.qwen3 import FAMILY
    from titanmoe.models.keys import map_keys

    spec = _spec(gigabytes * 1e9 * (2 if layout == "fp8" else 1))
    shapes = {name: tuple(tensor.shape) for name, tensor in build_model(spec).state_dict().items()}
    layouts = [STACKED_EXPERTS, FAMILY.rules] if layout == "stacked" else [FAMILY.rules]
    shards: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    for key, (name, piece) in map_keys(layouts, shapes)[0].items():
        if sum(dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in shards[-1]) > _SHARD_BYTES:
            shards.append([])
        shape = piece.shape(shapes[name])
        if layout == "fp8" and key.endswith("_proj.weight"):
            shards[-1].append((key, torch.float8_e4m3fn, shape))
            blocks = tuple(-(-size // _FP8_BLOCK) for size in shape)
            shards[-1].append((key + "_scale_inv", torch.bfloat16, blocks))
        else:
            shards[-1].append((key, torch.bfloat16, shape))
    largest = max(torch.Size(shape).numel() for shard in shards for _, _, shape in shard)
    noise = {torch.bfloat16: torch.rand(largest, dtype=torch.bfloat16)}
    if layout == "fp8":
        noise[torch.float8_e4m3fn] = noise[torch.bfloat16].to(torch.float8_e4m3fn)
    weight_map = {}
    for number, shard in enumerate(shards):
        shard.sort(key=lambda entry: -entry[1].itemsize)
        path = folder / f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        writer = TensorWriter(path, shard)
        for key, dtype, shape in shard:
            writer.write(key, noise[dtype][: torch.Size(shape).numel()].view(shape))
            weight_map[key] = path.name
        writer.close()
    config = FAMILY.to_hf_config(spec, "bfloat16")
    if layout == "fp8":
        config["quantization_config"] = _FP8_CONFIG
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return len(weight_map)


def _drop_from_cache(files: Sequence[Path]) -> bool:
    """Drop the files from the system's page cache; whether they are gone (not every system or file system can)."""
    is_gone = hasattr(os, "posix_fadvise")
    for file in files:
        descriptor = os.open(file, os.O_RDWR)
        try:
            os.fsync(descriptor)
            if is_gone:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                is_gone = not _is_cached(descriptor)
        finally:
            os.close(descriptor)
    return is_gone


def _is_cached(descriptor: int) -> bool:
    """Whether a byte in the middle of the file can be had without reading it from the disk; if unknown, yes."""
    try:
        os.preadv(descriptor, [bytearray(1)], os.fstat(descriptor).st_size // 2, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:  # a file system that cannot tell
        return True
    return True


def _read_plainly(files: Sequence[Path]) -> None:
    buffer = memoryview(bytearray(_READ_BYTES))
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _seconds(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    result = action()
    seconds = time.perf_counter() - begin
    del result  # a model, whose memory is given back outside the time taken
    return seconds


def _table(report: dict[str, Any]) -> str:
    share = report["load_of_read_rate"]
    cache = "dropped from the page cache" if report["cold"] else "NOT dropped from the page cache: not possible here"
    return "\n".join(
        [
            f"{report['gigabytes']:.2f} GB, {report['layout']}: {report['num_tensors']:,} tensors in "
            f"{report['num_files']} files, {cache} before each turn; {report['cores']} cores, torch {report['torch']}",
            f"plain reads    {report['gb_per_second_read']:6.2f} GB/s (median of {len(report['seconds_read'])})",
            f"from_pretrained{report['gb_per_second_load']:6.2f} GB/s",
            f"ratio, round by round: {share['median']:.0%} ({share['min']:.0%} to {share['max']:.0%})",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
