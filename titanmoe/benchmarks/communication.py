"""What travels in one training step: python -m titanmoe.benchmarks.communication [--json] [--section.key=value ...].

Trains a few steps with the given job config, on the CPU, on ranks that it starts itself. In the second step it counts
every collective, by kind and axis of the mesh, and every operation for which a host would wait for its device, and
compares both with the formulas of `titanmoe.parallel.volumes`. Exit code 1 says that they differ.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titanmoe.config import ConfigError, JobConfig, help_text, resolve, validate, wants_help
from titanmoe.config.pipeline import microbatch_size
from titanmoe.config.sizes import Degrees, accumulation_steps, degrees_of

if TYPE_CHECKING:
    from titanmoe.models.decoder import Decoder
    from titanmoe.parallel.stages import Stages
    from titanmoe.parallel.volumes import Rows, Step

SAME, DIFFERENT, MISTAKE = 0, 1, 2
_NAME = "python -m titanmoe.benchmarks.communication"
_NUM_STEPS, _COUNTED_STEP = 3, 2  # the first and the last are logged
_SECONDS = 600
_ITEM_BYTES = {"float32": 4, "bfloat16": 2}

_ON_HOST, _ON_CPU, _NO_KERNEL = "on the host", "on a CPU only", "on a CPU, or in float32"
_NO_WAITS = {
    "training.step.num_supervised": _ON_HOST,
    "parallel.world.sum_over_ranks": _ON_HOST,
    "trainer.run._train_step": _ON_CPU,
    "training.gradients.clip_gradients": _ON_CPU,
    "ops.permute.sort_by_expert": _ON_CPU,
    "ops.permute.regroup_by_expert": _ON_CPU,
    "ops.permute._slots": _ON_CPU,
    "ops.linear_cross_entropy.linear_cross_entropy": _ON_CPU,
    "ops.linear_cross_entropy._check_labels": _ON_CPU,
    "ops.grouped_mm.expert_rows": _NO_KERNEL,
    "ops.low_rank_rows._Pieces": _ON_CPU,
    "ops.frozen.rows_times_frozen": "on a CPU, or with large experts",
    "ops.attention._each_document": _NO_KERNEL,
}
"""Places that read values although no device is waited for, and why."""


def main(args: Sequence[str] | None = None) -> int:
    args = sys.argv[1:] if args is None else args
    if wants_help(args):
        usage = f"{_NAME} [--ranks N] [--json] [--job.config_file FILE] [--section.key=value ...]"
        more = "--ranks N (default 2) is for jobs whose data_parallel_shard_degree is -1; the others say it themselves."
        sys.stdout.write(help_text(f"{usage}\n\n{__doc__}\n{more}"))
        return SAME
    parser = argparse.ArgumentParser(prog=_NAME, allow_abbrev=False)
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(args)
    try:
        config = resolve(rest).config
        report = measure(config, _num_ranks(config, options.ranks))
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return MISTAKE
    print(json.dumps(report, indent=2) if options.json else _table(report))
    return SAME if report["equal"] else DIFFERENT


def _num_ranks(config: JobConfig, given: int | None) -> int:
    if given is not None or config.parallelism.data_parallel_shard_degree == -1:
        return given or 2
    section = config.parallelism
    return math.prod(
        (
            section.data_parallel_replicate_degree,
            section.data_parallel_shard_degree,
            section.context_parallel_degree,
            section.tensor_parallel_degree,
            section.pipeline_parallel_degree,
        )
    )


def measure(config: JobConfig, num_ranks: int) -> dict[str, Any]:
    """Run the job on so many ranks; what was counted and what the formulas say, as JSON knows it.

    Raises:
        ConfigError: a mistake in the config.
    """
    from titanmoe.checkpoint.pretrained import choose_model
    from titanmoe.models.build import build_model
    from titanmoe.parallel.stages import plan_stages

    with tempfile.TemporaryDirectory() as folder:
        config = _bare(config, folder)
        validate(config, num_ranks)
        counted = _run(config, num_ranks, Path(folder))
    model = config.model
    has_bias = config.moe.bias_update_rate > 0
    _, spec = choose_model(model.name, model.flavor, model.hf_assets_path, selection_bias=has_bias)
    degrees, step = degrees_of(config, num_ranks), _step(config, num_ranks)
    whole = build_model(spec)
    if model.converters:
        from titanmoe.converters.apply import convert  # imports torchao, which takes its time

        convert(whole, model.converters, config)
    stages = plan_stages(spec, config.parallelism, config.training.seq_len) if degrees.pp > 1 else None
    ranks = [_compare(whole, degrees, stages, step, rank, counted) for rank in range(num_ranks)]
    return {
        "benchmark": "communication",
        "model": f"{model.name} {model.flavor}",
        "layout": {name: size for name, size in degrees.named().items() if size > 1},
        "step": asdict(step),
        "equal": all(rank["equal"] for rank in ranks),
        "ranks": ranks,
    }


def _bare(config: JobConfig, folder: str) -> JobConfig:
    """The same training without all that is beside it: saving, validation, compilation, traces.

    Raises:
        ConfigError: what is recomputed is left to the compiler.
    """
    if config.activation_checkpoint.mode == "memory_budget":
        raise ConfigError(
            "the compiler chooses what is recomputed, and nothing is compiled here",
            where="activation_checkpoint.mode",
            mend="Choose another mode.",
        )
    return replace(
        config,
        job=replace(config.job, dump_folder=folder),
        training=replace(config.training, steps=_NUM_STEPS, epochs=None),
        checkpoint=type(config.checkpoint)(),
        compile=replace(config.compile, enable=False),
        profiling=replace(config.profiling, enable_profiling=False),
        validation=replace(config.validation, enable=False),
        metrics=type(config.metrics)(log_freq=_NUM_STEPS),
    )


def _step(config: JobConfig, num_ranks: int) -> Step:
    from titanmoe.parallel.volumes import Step

    training, recompute = config.training, config.activation_checkpoint
    batch = microbatch_size(config)
    return Step(
        batch=batch,
        seq_len=training.seq_len,
        num_microbatches=accumulation_steps(config, num_ranks) * training.local_batch_size // batch,
        param_bytes=_ITEM_BYTES[training.mixed_precision_param],
        reduce_bytes=_ITEM_BYTES[training.mixed_precision_reduce],
        reshard=config.parallelism.fsdp_reshard_after_forward,
        recompute=recompute.mode,
        recompute_option=recompute.selective_ac_option,
        stops_early=recompute.early_stop,
        has_balance_loss=config.moe.aux_loss_coeff > 0,
        sums_counts=config.moe.bias_update_rate > 0,
    )


# ---- counting ------------------------------------------------------------------------------------------------------


def _run(config: JobConfig, num_ranks: int, folder: Path) -> list[dict[str, Any]]:
    """What each rank counted: `collectives`, `waits`, and `choices` (of every MoE layer, the tokens of each expert)."""
    import titanmoe.trainer  # noqa: F401 - before the ranks are forked, so that they need not

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("fork")
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
    processes = [
        context.Process(target=_rank_main, args=(config, rank, env, folder), daemon=True) for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_SECONDS)
    for process in processes:
        process.kill()
    results = []
    for rank, process in enumerate(processes):
        process.join()
        path = folder / f"counted-{rank}.json"
        if not path.exists():
            messages = (folder / f"output-{rank}").read_text()
            raise RuntimeError(f"rank {rank} ended with exit code {process.exitcode}:\n{messages}")
        results.append(json.loads(path.read_text()))
        if "mistake" in results[-1]:
            raise ConfigError(results[-1]["mistake"])
    return results


def _rank_main(config: JobConfig, rank: int, env: dict[str, str], folder: Path) -> None:
    output = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        # No GPU: several ranks cannot share one, and gloo counts as well.
        os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank), CUDA_VISIBLE_DEVICES="")
        try:
            result = _count(config)
        except ConfigError as error:
            result = {"mistake": str(error)}
        (folder / f"counted-{rank}.json").write_text(json.dumps(result))
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _count(config: JobConfig) -> dict[str, Any]:
    import torch

    from titanmoe.benchmarks.counting import Counts, counting
    from titanmoe.trainer import Trainer

    torch.set_num_threads(1)

    class Counter(Trainer):
        """Counts in one of the steps."""

        counts: Counts

        def _train_step(self) -> bool:
            if self.step + 1 != _COUNTED_STEP:
                return super()._train_step()
            with counting() as self.counts:
                return super()._train_step()

    trainer = Counter(config)
    sum_choices = trainer.balance.step
    choices: list[torch.Tensor] = []

    def keep_choices(is_logged: bool) -> Any:
        if trainer.step + 1 == _COUNTED_STEP:
            choices.extend(layer.router.num_tokens_per_expert_E.clone() for _, layer in trainer.model.moe_layers())
        return sum_choices(is_logged)

    trainer.balance.step = keep_choices  # type: ignore[method-assign]
    trainer.train()
    counts = trainer.counts
    collectives = [
        {"kind": kind, "ranks": ranks, "calls": num_calls, "bytes": str(counts.sent[kind, ranks])}
        for (kind, ranks), num_calls in counts.calls.items()
    ]
    return {"collectives": collectives, "waits": counts.waits, "choices": [counts_E.tolist() for counts_E in choices]}


# ---- comparing -----------------------------------------------------------------------------------------------------


def _compare(
    model: Decoder,
    degrees: Degrees,
    stages: Stages | None,
    step: Step,
    rank: int,
    counted: list[dict[str, Any]],
) -> dict[str, Any]:
    """One rank's counts beside the formulas. Axes of the same ranks cannot be told apart, and share a row."""
    from titanmoe.parallel.volumes import axes_of, num_host_waits, step_traffic

    axes = axes_of(degrees, rank)
    found: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    expected: dict[tuple[str, tuple[int, ...]], list[Any]] = {}
    for entry in counted[rank]["collectives"]:
        if len(entry["ranks"]) > 1:
            found[entry["kind"], tuple(entry["ranks"])] = entry
    for traffic in step_traffic(model, degrees, step, rank, stages=stages, rows=_rows(degrees, rank, counted)):
        expected.setdefault((traffic.kind, axes[traffic.axis]), []).append(traffic)
    rows = []
    for key in sorted(found.keys() | expected.keys()):
        parts, entry = expected.get(key, []), found.get(key, {"calls": 0, "bytes": "0"})
        names = {part.axis for part in parts} or {name for name, ranks in axes.items() if ranks == key[1]}
        num_bytes, by_formula = Fraction(entry["bytes"]), sum((part.num_bytes for part in parts), Fraction())
        num_calls, calls_by_formula = entry["calls"], sum(part.num_calls for part in parts)
        rows.append(
            {
                "kind": key[0],
                "axis": ", ".join(sorted(names)) or "unknown",
                "ranks": key[1],
                "calls": num_calls,
                "calls_by_formula": calls_by_formula,
                "bytes": _number(num_bytes),
                "bytes_by_formula": _number(by_formula),
                "equal": (num_calls, num_bytes) == (calls_by_formula, by_formula),
                "parts": _merged(parts),
            }
        )
    waits = {place: count for place, count in counted[rank]["waits"].items() if place not in _NO_WAITS}
    others = {place: count for place, count in counted[rank]["waits"].items() if place in _NO_WAITS}
    num_waits, waits_by_formula = sum(waits.values()), num_host_waits(model, degrees, step, rank, stages=stages)
    return {
        "rank": rank,
        "equal": all(row["equal"] for row in rows) and num_waits == waits_by_formula,
        "collectives": rows,
        "waits": num_waits,
        "waits_by_formula": waits_by_formula,
        "waits_in": waits,
        "no_waits_in": others,
    }


def _rows(degrees: Degrees, rank: int, counted: list[dict[str, Any]]) -> list[Rows]:
    """Which rows leave and reach `rank`, from what the routers of all ranks chose."""
    from titanmoe.parallel.mesh import EXPERT, EXPERT_TENSOR
    from titanmoe.parallel.volumes import Rows, axes_of

    group = axes_of(degrees, rank)[EXPERT]
    place = group.index(rank)
    layers = []
    for layer in range(len(counted[rank]["choices"])):
        # By rank of the group: how many rows it has for the experts of each.
        sent = []
        for other in group:
            together = axes_of(degrees, other)[EXPERT_TENSOR]  # these send the rows of all of them
            choices = [counted[each]["choices"][layer] for each in together]
            choices_E = [sum(numbers) for numbers in zip(*choices, strict=True)]
            size = len(choices_E) // len(group)
            sent.append([sum(choices_E[size * owner : size * (owner + 1)]) for owner in range(len(group))])
        own = sent[place][place]
        layers.append(Rows(sum(sent[place]) - own, sum(row[place] for row in sent) - own))
    return layers


def _merged(parts: Sequence[Any]) -> list[dict[str, Any]]:
    """Parts that differ only in the layer, added up."""
    merged: dict[str, dict[str, Any]] = {}
    for part in parts:
        what = part.what.replace("the experts of layer", "experts of layer")
        what = what.rpartition(" layer ")[0] + " layers" if what.rpartition(" ")[2].isdigit() else what
        entry = merged.setdefault(what, {"what": what, "axis": part.axis, "calls": 0, "bytes": Fraction()})
        entry["calls"] += part.num_calls
        entry["bytes"] += part.num_bytes
    return [entry | {"bytes": _number(entry["bytes"])} for entry in merged.values()]


def _number(number: Fraction) -> int | float:
    return number.numerator if number.denominator == 1 else float(number)


def _table(report: dict[str, Any]) -> str:
    layout = ", ".join(f"{name} {size}" for name, size in report["layout"].items()) or "one process"
    step = report["step"]
    lines = [
        f"{report['model']}, {layout}; per rank and optimizer step of {step['num_microbatches']} x {step['batch']} x "
        f"{step['seq_len']} tokens",
        "",
    ]
    ranks_per_stage = len(report["ranks"]) // report["layout"].get("pp", 1)
    shown = [rank for rank in report["ranks"] if rank["rank"] % ranks_per_stage == 0 or not rank["equal"]]
    for rank in shown:
        title = f"rank {rank['rank']}"
        lines.append(f"{title:38}{'axis':24}{'calls':>7}{'formula':>9}{'bytes sent':>15}{'formula':>15}")
        for row in rank["collectives"]:
            verdict = "equal" if row["equal"] else "DIFFERENT"
            lines.append(
                f"{row['kind']:38}{row['axis']:24}{row['calls']:7,}{row['calls_by_formula']:9,}{row['bytes']:15,}"
                f"{row['bytes_by_formula']:15,}  {verdict}"
            )
            lines += [
                f"  {part['what']:36}{part['axis']:24}{'':7}{part['calls']:9,}{'':15}{part['bytes']:15,}"
                for part in row["parts"]
            ]
        verdict = "equal" if rank["waits"] == rank["waits_by_formula"] else "DIFFERENT"
        lines.append(
            f"{'host waits for its device':62}{rank['waits']:7,}{rank['waits_by_formula']:9,}{'':30}  {verdict}"
        )
        lines += [f"  {place:60}{count:7,}" for place, count in rank["waits_in"].items()]
        lines += [
            f"  {f'{place}: {_NO_WAITS[place]}':60}{f'({count})':>8}" for place, count in rank["no_waits_in"].items()
        ]
        lines.append("")
    if len(shown) < len(report["ranks"]):
        lines.append(f"{len(report['ranks']) - len(shown)} more ranks: equal to their formulas.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
