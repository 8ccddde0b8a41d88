"""Does low precision learn as well: python -m titanmoe.benchmarks.convergence [--steps N] [--output PICTURE] [--json].

Trains one job plainly, with FP8 and with MXFP8 products (linear layers and experts), on the same data from the same
weights; emulated where the hardware has no such products. With --frozen, trains adapters on a base in bfloat16 and on
the same in FP8, MXFP8 and NF4. Compares the mean training loss of the last 20 steps and the last validation loss. Exit
code 1 says that one differs from the plain job's by more than 1%.

The job is the debug mixture of experts, computed in bfloat16, unless --job.config_file names another; any of its keys
can be set. With --frozen, it learns the standard library's documentation, and its base, unless model.hf_assets_path
names one, is the same model after as many steps on the library's source files.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titanmoe.benchmarks.turns import aligned
from titanmoe.config import ConfigError, JobConfig, help_text, resolve, wants_help

if TYPE_CHECKING:
    from titanmoe.ops.backends import Kind

CLOSE, FAR, MISTAKE = 0, 1, 2
TOLERANCE = 0.01
_NAME = "python -m titanmoe.benchmarks.convergence"
_DEFAULT_JOB = ("--job.config_file=debug_qwen3_moe.toml", "--training.mixed_precision_param=bfloat16")
_FROZEN_JOB = (
    "--job.config_file=debug_qwen3_moe_chat.toml",
    "--training.mixed_precision_param=bfloat16",
    "--training.dtype=bfloat16",
    "--checkpoint.enable",
    "--checkpoint.initial_load_in_hf",
)
_LAST_STEPS = 20
_FORMATS = {"FP8": "fp8_rowwise", "MXFP8": "mxfp8"}
_KINDS: tuple[Kind, ...] = ("linear", "grouped_mm")


def main(args: Sequence[str] | None = None) -> int:
    args = sys.argv[1:] if args is None else args
    if wants_help(args):
        usage = f"{_NAME} [--steps N] [--frozen] [--output FILE.svg] [--json] [--section.key=value ...]"
        sys.stdout.write(help_text(f"{usage}\n\n{__doc__}\n--steps N (default 200) is training.steps."))
        return CLOSE
    parser = argparse.ArgumentParser(prog=_NAME, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--frozen", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(args)
    try:
        steps = f"--training.steps={options.steps}"
        report = (
            compare_bases([*rest, steps]) if options.frozen else compare([*_DEFAULT_JOB, *rest, steps], _products())
        )
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return MISTAKE
    if options.output is not None:
        options.output.write_text(_picture(report), encoding="utf-8")
    print(json.dumps(report, indent=1) if options.json else _table(report))
    return CLOSE if report["within_tolerance"] else FAR


Contender = tuple[str, Sequence[str], Sequence[str]]
"""A name, what turns a job into one of its kind, and converters that are emulated."""


def _products() -> list[Contender]:
    from titanmoe.benchmarks.device_timing import pick_device
    from titanmoe.benchmarks.low_precision import job_options, without_backend

    contenders: list[Contender] = [("plain", ["--model.converters="], [])]
    for name, format in _FORMATS.items():
        missing = list(without_backend(format, _KINDS, pick_device()))
        contenders.append((name, job_options(format, _KINDS, missing), missing))
    return contenders


def compare_bases(options: Sequence[str]) -> dict[str, Any]:
    """Train adapters on a base in bfloat16, and in each format. Arguments and mistakes as of `compare`."""
    from titanmoe.benchmarks.jobs import run_job
    from titanmoe.benchmarks.low_precision import BASES

    contenders: list[Contender] = [("bfloat16", ["--model.converters=lora"], [])]
    for name, (converter, *settings) in BASES.items():
        emulated = [setting.replace("native", "emulated") for setting in settings]
        is_emulated = [converter] if emulated != settings else []
        contenders.append((name, [f"--model.converters={converter},lora", *emulated], is_emulated))
    config = resolve([*_FROZEN_JOB, *options]).config
    if config.model.hf_assets_path is not None:
        return compare([*_FROZEN_JOB, *options], contenders)
    steps = config.training.steps
    with tempfile.TemporaryDirectory() as folder:
        print(f"base: {steps} steps", file=sys.stderr)
        saved = ("--checkpoint.enable", "--checkpoint.last_save_model_only", "--checkpoint.last_save_in_hf")
        run_job(resolve([*_DEFAULT_JOB, *saved, f"--training.steps={steps}"]).config, Path(folder))
        base = f"--model.hf_assets_path={folder}/checkpoint/step-{steps}-hf"
        return compare([*_FROZEN_JOB, base, *options], contenders)


def compare(options: Sequence[str], contenders: Sequence[Contender]) -> dict[str, Any]:
    """Train a job in all ways, and compare each with the first.

    Args:
        options: of the job, as on the command line.

    Raises:
        ConfigError: a mistake in them.
    """
    import torch

    from titanmoe.benchmarks.device_timing import describe_machine, pick_device
    from titanmoe.benchmarks.jobs import run_job

    runs: list[dict[str, Any]] = []
    for name, given, emulated in contenders:
        config = _observed(resolve([*options, *given]).config)
        print(f"{name}: {config.training.steps} steps", file=sys.stderr)
        run = _losses(run_job(config))
        differences = {
            key: run[key] / runs[0][key] - 1 if runs else 0.0 for key in ("training_loss", "validation_loss")
        }
        is_close = all(abs(difference) <= TOLERANCE for difference in differences.values())
        runs.append(
            {
                "name": name,
                "converters": config.model.converters,
                "emulated": list(emulated),
                "difference": differences,
                "within_tolerance": is_close,
                **run,
            }
        )
    return {
        "benchmark": "convergence",
        "model": f"{config.model.name} {config.model.flavor}",
        "dataset": config.training.dataset,
        "steps": config.training.steps,
        "last_steps": min(_LAST_STEPS, config.training.steps),
        "dtype": config.training.mixed_precision_param,
        "ranks": int(os.environ.get("NGPU") or 1),
        **describe_machine(pick_device()),
        "torch": torch.__version__,
        "tolerance": TOLERANCE,
        "within_tolerance": all(run["within_tolerance"] for run in runs),
        "runs": runs,
    }


def _observed(config: JobConfig) -> JobConfig:
    """The job with every step in its records, and nothing else.

    Raises:
        ConfigError: it does not validate.
    """
    if not config.validation.enable:
        raise ConfigError("is off, and validation losses are to be compared", where="validation.enable")
    return replace(config, metrics=type(config.metrics)(log_freq=1))


def _losses(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    training = [(record["step"], record["loss"]) for record in records if "loss" in record]
    validation = [(record["step"], record["validation_loss"]) for record in records if "validation_loss" in record]
    return {
        "training_loss": statistics.fmean(loss for _, loss in training[-_LAST_STEPS:]),
        "validation_loss": validation[-1][1],
        "losses": [loss for _, loss in training],
        "validation_losses": dict(validation),
    }


def _picture(report: dict[str, Any]) -> str:
    from titanmoe.metrics.chart import Series
    from titanmoe.metrics.picture import picture

    series = [
        Series(f"{run['name']}, validation {run['validation_loss']:.4f}", list(enumerate(run["losses"], start=1)))
        for run in report["runs"]
    ]
    return picture("Training loss", series)


def _table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['model']}, {report['steps']} steps in {report['dtype']}, {report['device']}, torch {report['torch']}",
        f"training loss: mean of the last {report['last_steps']} steps; in brackets, beside the first",
        "",
    ]
    cells = [
        {"": run["name"]}
        | {
            key.replace("_", " "): f"{run[key]:.4f} ({run['difference'][key]:+.2%})"
            for key in ("training_loss", "validation_loss")
        }
        | {f"within {report['tolerance']:.0%}": "yes" if run["within_tolerance"] else "NO"}
        | {"emulated": ", ".join(run["emulated"])}
        for run in report["runs"]
    ]
    return "\n".join([*lines, *aligned(cells)])


if __name__ == "__main__":
    sys.exit(main())
