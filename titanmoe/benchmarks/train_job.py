"""Training speed of a job beside the same job without its converters, or with others.

Both run as they would be trained, on as many processes as NGPU says, but without validation and checkpoints. They take
turns, and the speedup is the median over the rounds. A round's figures are medians over the steps after its first
quarter, in which kernels are built and memory is found.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from titanmoe.benchmarks.turns import aligned, ratio, spread, summarize
from titanmoe.config import ConfigError, JobConfig, help_text, resolve, wants_help

DONE, MISTAKE = 0, 2
_NAME = "python -m titanmoe.benchmarks.train"
_LOGS = 4


def main(args: Sequence[str]) -> int:
    if wants_help(args):
        usage = f"""{_NAME} --job.config_file FILE [--section.key=value ...] [--json]

{__doc__}
--steps N        of training in each round (default 20); training.steps is not looked at
--rounds N       (default 3)
--against NAMES  converters of the job to compare with, comma-separated; none by default"""
        sys.stdout.write(help_text(usage))
        return DONE
    parser = argparse.ArgumentParser(prog=_NAME, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", default="")
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(args)
    try:
        if options.steps < 2:
            raise ConfigError("the first step is no measure of the others", where="--steps", mend="Give at least 2.")
        if options.rounds < 1:
            raise ConfigError("nothing would be measured", where="--rounds", mend="Give at least 1.")
        configs = [resolve([*rest, *more]).config for more in ((), (f"--model.converters={options.against}",))]
        report = _compare([_bare(config, options.steps) for config in configs], options.rounds)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return MISTAKE
    print(json.dumps(report, indent=1) if options.json else _table(report))
    return DONE


def _bare(config: JobConfig, num_steps: int) -> JobConfig:
    """So many steps, and nothing beside them but the log, which makes a host wait for its device."""
    return replace(
        config,
        training=replace(config.training, steps=num_steps, epochs=None),
        validation=replace(config.validation, enable=False),
        metrics=type(config.metrics)(log_freq=max(1, num_steps // _LOGS)),
    )


def _compare(configs: Sequence[JobConfig], num_rounds: int) -> dict[str, Any]:
    """
    Raises:
        ConfigError: both jobs are the same, or one of them has a mistake.
    """
    import torch

    from titanmoe.benchmarks.device_timing import describe_machine, pick_device
    from titanmoe.benchmarks.jobs import run_job

    job = configs[0]
    names = [", ".join(config.model.converters) or "no converters" for config in configs]
    if names[0] == names[1]:
        raise ConfigError(
            f"both jobs have {names[0]}",
            where="--against",
            mend="Set model.converters, or name others to compare with.",
        )
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(num_rounds):
        for name, config in zip(names, configs, strict=True):
            rounds[name].append(_figures(run_job(config), config.metrics.log_freq))
        print(f"round {number + 1} of {num_rounds}", file=sys.stderr)
    seconds = {name: [1 / each["tokens_per_second"] for each in of_rounds] for name, of_rounds in rounds.items()}
    return {
        "benchmark": "train",
        "model": f"{job.model.name} {job.model.flavor}",
        "steps": job.training.steps,
        "dtype": job.training.mixed_precision_param,
        "ranks": int(os.environ.get("NGPU") or 1),
        **describe_machine(pick_device()),
        "torch": torch.__version__,
        "results": [
            {
                "converters": list(config.model.converters),
                "tokens_per_second": summarize([each["tokens_per_second"] for each in rounds[name]]),
                "peak_memory_gib": max(each["peak_memory_gib"] for each in rounds[name]),
                "speedup": ratio(seconds[names[1]], seconds[name]),
                "last_losses": [each["loss"] for each in rounds[name]],
            }
            for name, config in zip(names, configs, strict=True)
        ],
    }


def _figures(records: Sequence[dict[str, Any]], log_freq: int) -> dict[str, float]:
    """Of one round. A record tells of the steps since the one before."""
    records = [record for record in records if "loss" in record]
    speeds = [record["tokens_per_second"] for record in records if record["step"] > log_freq]
    return {
        "tokens_per_second": statistics.median(speeds),
        "peak_memory_gib": records[-1]["peak_memory_gib"],
        "loss": records[-1]["loss"],
    }


def _table(report: dict[str, Any]) -> str:
    title = (
        f"{report['model']}, {report['dtype']}, {report['steps']} steps, {report['ranks']} processes, "
        f"{report['device']}, torch {report['torch']}"
    )
    cells = [
        {
            "converters": ", ".join(result["converters"]) or "none",
            "tokens/s": f"{result['tokens_per_second']['median']:,.0f}",
            "peak GiB": f"{result['peak_memory_gib']:.2f}",
            "speedup (rounds)": "" if result is report["results"][-1] else spread(result["speedup"]),
            "last loss": f"{result['last_losses'][-1]:.4f}",
        }
        for result in report["results"]
    ]
    return "\n".join([title, "", *aligned(cells)])
