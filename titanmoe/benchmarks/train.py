"""Training speed beside transformers: python -m titanmoe.benchmarks.train [--lora] [--json].

With --lora all but adapters is frozen, beside transformers with PEFT, and beside titanmoe when it trains all weights.
With --job.config_file FILE it is that of a job beside the same one without its converters instead: see `train_job`.

Both train the same model (weights written once to a Hugging Face folder) on the same batches of Python source text,
with the same dtype, optimizer and threads; see `train_worker`. They take turns, and the ratio is the median over the
rounds. The losses of both are printed, so that one can see that they compute the same thing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titanmoe.benchmarks import train_job
from titanmoe.benchmarks.turns import Worker, ratio, summarize
from titanmoe.config import ConfigError

if TYPE_CHECKING:
    from titanmoe.models.spec import DecoderSpec

WORKER = "titanmoe.benchmarks.train_worker"
_OURS, _ALL_WEIGHTS = "titanmoe", "titanmoe full"


def main(args: Sequence[str] | None = None) -> int:
    args = sys.argv[1:] if args is None else args
    if any(arg.startswith("--job.") for arg in args):
        return train_job.main(args)
    options = _parse(args)
    try:
        report = _report(options)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(json.dumps(report, indent=2) if options.json else _table(report))
    return 0


def _report(options: argparse.Namespace) -> dict[str, Any]:
    """
    Raises:
        ConfigError: `--lora` has a mistake, or there is no such device.
    """
    import torch

    from titanmoe.benchmarks.device_timing import pick_device

    device = pick_device(options.device).type
    spec = _spec(options)
    tokens_per_step = options.batch * options.seq_len
    results = []
    with tempfile.TemporaryDirectory() as folder:
        _prepare(folder, options)
        for dtype in options.dtype:
            rounds = _compete(folder, dtype, device, options)
            for system, result in rounds.items():
                rate = tokens_per_step / result["seconds"]["median"]
                adapts = options.lora is not None and system != _ALL_WEIGHTS
                flops = _flops_per_token(spec, options.seq_len, _lora_options(options, dtype) if adapts else None)
                result |= {
                    "tokens_per_second": rate,
                    "flops_per_token": flops,
                    "gflops": rate * flops / 1e9,
                    "share_of_matmul_rate": rate * flops / 1e9 / result["matmul_gflops"],
                }
                results.append({"system": system, "dtype": dtype, **result})
    return {
        "benchmark": "train",
        "model": f"{options.family} {options.flavor}",
        "layers": len(spec.layers),
        "lora": options.lora,
        "batch": options.batch,
        "seq_len": options.seq_len,
        "threads": options.threads,
        "compile": options.compile,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
        "results": results,
    }


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m titanmoe.benchmarks.train",
        description=__doc__.splitlines()[0],
        epilog="With --job.config_file FILE, options are those of a job: give it together with --help.",
    )
    parser.add_argument("--family", default="qwen3")
    parser.add_argument("--flavor", default="bench_60M", help="size of the model; see docs/models.md")
    parser.add_argument("--layers", type=int, help="only so many of them, as where all have no place")
    parser.add_argument(
        "--lora", nargs="*", metavar="KEY=VALUE", help="train adapters alone; keys are those of [lora], as in rank=16"
    )
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=2, help="sequences per step")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads of each")
    parser.add_argument("--steps", type=int, default=3, help="steps per round and contender")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", nargs="*", default=["transformers"], choices=["transformers"])
    parser.add_argument("--compile", action="store_true", help="each layer of all contenders, with torch.compile")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="by default a GPU if there is one")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(args)


def _spec(options: argparse.Namespace) -> DecoderSpec:
    from titanmoe.models.family import get_family

    spec = get_family(options.family).flavor(options.flavor)
    return replace(spec, layers=spec.layers[: options.layers])


def _flops_per_token(spec: DecoderSpec, seq_len: int, lora: Sequence[str] | None) -> int:
    """Of a step that trains adapters of these settings, or, without any, all weights."""
    from titanmoe.config import load_config
    from titanmoe.converters.apply import convert
    from titanmoe.metrics.flops import training_flops_per_token
    from titanmoe.models.build import build_model

    model = build_model(spec)
    if lora is not None:
        convert(model, ["lora"], load_config(None, lora))
    return training_flops_per_token(model, seq_len)


def _lora_options(options: argparse.Namespace, dtype: str) -> list[str]:
    return [
        "--model.converters=lora",
        f"--lora.dtype={dtype}",
        *(f"--lora.{setting}" for setting in options.lora or ()),
    ]


def _prepare(folder: str, options: argparse.Namespace) -> None:
    """Write the checkpoint, the adapter, and the batches that all contenders read."""
    import torch
    from safetensors.torch import save_file

    from titanmoe.checkpoint.adapter_config import AdapterSettings
    from titanmoe.checkpoint.adapters import save_adapter
    from titanmoe.checkpoint.pretrained import save_pretrained
    from titanmoe.config import load_config
    from titanmoe.converters.apply import convert
    from titanmoe.data.loader import DataLoader
    from titanmoe.data.sources import open_source
    from titanmoe.data.tokenizer import load_tokenizer
    from titanmoe.models.build import build_model, init_weights
    from titanmoe.models.family import get_family

    model = build_model(_spec(options), device="cpu")
    init_weights(model, seed=0)
    save_pretrained(model, Path(folder) / "model", tokenizer="builtin")
    if options.lora is not None:
        config = load_config(None, _lora_options(options, "float32"))
        convert(model, ["lora"], config)
        settings = AdapterSettings.of(config.lora)
        save_adapter(model, Path(folder) / "adapter", get_family(options.family), settings, verify=False)
    loader = DataLoader(
        open_source("stdlib", None, "train"),
        load_tokenizer(None),
        seq_len=options.seq_len,
        lanes=range(options.batch),
        num_lanes=options.batch,
        local_batch_size=options.batch,
        seed=0,
        shuffle=True,
    )
    batches = [next(loader) for _ in range(options.steps * (options.rounds + 2))]
    tokens = torch.stack([torch.cat((batch.tokens_BS, batch.labels_BS[:, -1:]), dim=1) for batch in batches])
    save_file({"tokens": tokens}, Path(folder) / "batches.safetensors")


def _compete(folder: str, dtype: str, device: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    systems = [_OURS, *([] if options.lora is None else [_ALL_WEIGHTS]), *options.against]
    job = {
        "checkpoint": str(Path(folder) / "model"),
        "batches": str(Path(folder) / "batches.safetensors"),
        "dtype": dtype,
        "device": device,
        "threads": options.threads,
        "steps": options.steps,
        "compiles": options.compile,
        "lora": _lora_options(options, dtype),
    }
    adapter = "" if options.lora is None else str(Path(folder) / "adapter")
    env = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    workers = {}
    seconds: dict[str, list[float]] = {system: [] for system in systems}
    losses: dict[str, list[float]] = {system: [] for system in systems}
    try:
        for system in systems:
            own = {"system": system.partition(" ")[0], "adapter": "" if system == _ALL_WEIGHTS else adapter}
            workers[system] = Worker(WORKER, {**job, **own}, env)
        for number in range(options.rounds):
            for system, worker in workers.items():
                answer = worker.run()
                seconds[system].append(min(answer["seconds"]))
                losses[system] += answer["losses"]
            print(f"{dtype}: round {number + 1} of {options.rounds}", file=sys.stderr)
    finally:
        for worker in workers.values():
            worker.close()
    return {
        system: {
            "matmul_gflops": worker.info["matmul_gflops"],
            "seconds": summarize(seconds[system]),
            "times_titanmoe_is_faster": ratio(seconds[system], seconds[_OURS]),
            "losses": losses[system],
        }
        for system, worker in workers.items()
    }


def _table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['model']}, {report['batch']} x {report['seq_len']} tokens, {report['threads']} threads, "
        f"{report['device']}, torch {report['torch']}",
        "",
        f"{'dtype':10}{'system':14}{'tokens/s':>10}{'GFLOP/s':>10}{'of matmul':>11}{'titanmoe':>13}{'last loss':>11}",
    ]
    for result in report["results"]:
        faster = result["times_titanmoe_is_faster"]["median"]
        lines.append(
            f"{result['dtype']:10}{result['system']:14}{result['tokens_per_second']:10,.0f}{result['gflops']:10,.0f}"
            f"{result['share_of_matmul_rate']:11.0%}{faster:12.2f}x{result['losses'][-1]:11.4f}"
        )
    return "\n".join([*lines, *_savings(report["results"])])


def _savings(results: Sequence[dict[str, Any]]) -> list[str]:
    """What a step with adapters saves of a step that trains all weights: a line for each dtype."""
    ours = {result["dtype"]: result for result in results if result["system"] == _OURS}
    lines = []
    for full in (result for result in results if result["system"] == _ALL_WEIGHTS):
        dtype, time = full["dtype"], 1 / full["times_titanmoe_is_faster"]["median"]
        flops = ours[dtype]["flops_per_token"] / full["flops_per_token"]
        lines.append(f"{dtype}: adapters take {time:.2f} of the time of a full step, for {flops:.2f} of its FLOPs")
    return ["", *lines] if lines else []


if __name__ == "__main__":
    sys.exit(main())
