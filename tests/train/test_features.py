"""What a job can turn on, through the whole program."""

from __future__ import annotations

import gc
import gzip
import json
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import titanmoe
from tests.train.jobs import assert_close, curve, run, saved_steps, steps, train, write_job

TORCHTITAN = """
# torchtitan Config.toml
[job]
dump_folder = "./outputs"
description = "Qwen 3 MoE debug training"
print_config = false

[profiling]
enable_profiling = false
save_traces_folder = "profile_trace"
profile_freq = 100

[metrics]
log_freq = 1
disable_color_printing = false
enable_tensorboard = false
save_tb_folder = "tb"
enable_wandb = false

[model]
name = "qwen3"
flavor = "debugmodel_moe"
hf_assets_path = "./tests/assets/tokenizer"
# converters = ["float8"]

[optimizer]
name = "AdamW"
lr = 3e-4
eps = 1e-8

[lr_scheduler]
warmup_steps = 2

[training]
local_batch_size = 4
seq_len = 4096
max_norm = 1.0
steps = 10
dataset = "c4_test"

[parallelism]
data_parallel_replicate_degree = 1
data_parallel_shard_degree = -1
fsdp_reshard_after_forward = "default"
tensor_parallel_degree = 1
enable_async_tensor_parallel = false
expert_parallel_degree = 1
expert_tensor_parallel_degree = 1

[checkpoint]
enable = false
folder = "checkpoint"
interval = 500
last_save_model_only = false
export_dtype = "float16"
async_mode = "disabled"

[activation_checkpoint]
mode = "selective"
selective_ac_option = "op"

[compile]
enable = false
components = ["model", "loss"]

[quantize.linear.float8]
enable_fsdp_float8_all_gather = false
precompute_float8_dynamic_scale_for_fsdp = false
filter_fqns = ["output", "router.gate"]

[quantize.grouped_mm.float8]
fqns = ["experts"]
"""


@pytest.mark.parametrize(
    "smaller",
    [
        pytest.param(("--model.flavor=debug_moe",), id="debug_moe"),
        pytest.param((), id="debugmodel_moe", marks=pytest.mark.slow),  # 300 million parameters
    ],
)
def test_a_torchtitan_file_runs_unchanged(
    smaller: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen3_moe_debug.toml").write_text(TORCHTITAN)
    outcome = train(
        "--job.config_file=qwen3_moe_debug.toml",
        "--training.steps=2",
        "--training.seq_len=16",
        "--training.local_batch_size=1",
        *smaller,
    )
    assert outcome.codes == [0], outcome.told
    assert outcome.err == [""]
    for told in (
        "the builtin tokenizer is used",
        'read as "stdlib"',
        "No effect in a run, as quantize.linear.float8 is not in",
    ):
        assert outcome.out[0].count(told) == 1, outcome.out[0]
    losses = [loss for _, loss, _ in curve(tmp_path / "outputs")]
    assert len(losses) == 2 and 7 < losses[0] < 8.5
    resolved = titanmoe.load_config(tmp_path / "outputs" / "config.toml")
    assert resolved.training.seq_len == 16 and resolved.checkpoint.export_dtype == "float16"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("plain")
    job = write_job(folder)
    run(job, folder / "dump")
    return job, folder / "dump"


@pytest.mark.parametrize(
    "options",
    [
        ("--activation_checkpoint.mode=full",),
        ("--activation_checkpoint.mode=full", "--activation_checkpoint.early_stop"),
        ("--activation_checkpoint.mode=selective", "--activation_checkpoint.no_preserve_rng_state"),
        ("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"),
        ("--compile.enable",),
        ("--compile.enable", "--compile.backend=aot_eager", "--activation_checkpoint.mode=full"),
    ],
    ids=" ".join,
)
def test_recomputing_and_compiling_change_nothing(
    plain: tuple[Path, Path], options: tuple[str, ...], tmp_path: Path
) -> None:
    job, expected = plain
    run(job, tmp_path, *options)
    assert_close(tmp_path, expected)


def test_compiled_and_sharded(plain: tuple[Path, Path], tmp_path: Path) -> None:
    options = ("--compile.enable", "--compile.backend=aot_eager", "--training.local_batch_size=2")
    run(plain[0], tmp_path, *options, ranks=2)
    assert_close(tmp_path, plain[1])


@pytest.mark.parametrize(
    "option", ["--parallelism.fsdp_reshard_after_forward=never", "--optimizer.implementation=foreach"]
)
def test_other_ways_to_the_same_numbers(plain: tuple[Path, Path], option: str, tmp_path: Path) -> None:
    run(plain[0], tmp_path, option, "--training.local_batch_size=2", ranks=2)
    assert_close(tmp_path, plain[1])


@pytest.mark.parametrize("ranks", [1, 2])
def test_states_of_8_bits_beside_weights_in_bfloat16(plain: tuple[Path, Path], ranks: int, tmp_path: Path) -> None:
    """With AdamW's losses, but for rounding; the embedding is large enough to have such states."""
    options = ("--training.dtype=bfloat16", f"--training.local_batch_size={4 // ranks}")
    losses = {}
    for name in ("AdamW", "AdamW8bit"):
        run(plain[0], tmp_path / name, *options, f"--optimizer.name={name}", ranks=ranks)
        losses[name] = [loss for _, loss, _ in curve(tmp_path / name)]
    assert losses["AdamW8bit"] == pytest.approx(losses["AdamW"], rel=2e-2)
    assert losses["AdamW8bit"][-1] < losses["AdamW8bit"][0] - 0.05


@pytest.mark.parametrize("axis", ["expert", pytest.param("tensor", marks=pytest.mark.slow)])
def test_a_budget_of_memory_with_ranks_that_exchange(plain: tuple[Path, Path], axis: str, tmp_path: Path) -> None:
    """Their group is an input of the graphs, of which the compiler asks the size."""
    options = ("--compile.enable", "--activation_checkpoint.mode=memory_budget", "--training.steps=2")
    options += (f"--parallelism.{axis}_parallel_degree=2", "--training.local_batch_size=2")
    run(plain[0], tmp_path / "compiled", *options, ranks=2)
    run(plain[0], tmp_path / "plain", "--training.steps=2")
    assert_close(tmp_path / "compiled", tmp_path / "plain")


def test_the_same_run_twice_gives_the_same_bits(plain: tuple[Path, Path], tmp_path: Path) -> None:
    run(plain[0], tmp_path / "again")
    assert curve(tmp_path / "again") == curve(plain[1])
    run(plain[0], tmp_path / "deterministic", "--debug.deterministic")
    assert_close(tmp_path / "deterministic", plain[1])
    run(plain[0], tmp_path / "seed", "--debug.seed=1")
    assert curve(tmp_path / "seed")[0] != curve(plain[1])[0]


def test_what_a_run_leaves_behind(plain: tuple[Path, Path]) -> None:
    job, dump = plain
    assert {path.name for path in dump.iterdir()} == {"config.toml", "metrics.jsonl", "report.html"}
    config = titanmoe.load_config(dump / "config.toml")
    assert config == titanmoe.load_config(job, [f"--job.dump_folder={dump}"])
    record = steps(dump)[10]
    assert record["tokens_seen"] == 10 * 4 * 32
    assert record["expert_load_cv"] > 0 and record["tokens_per_second"] > 0 and record["mfu"] is None


def test_traces_and_tensorboard(plain: tuple[Path, Path], tmp_path: Path) -> None:
    options = ("--profiling.enable_profiling", "--profiling.profile_freq=4", "--profiling.profiler_warmup=1")
    options += ("--metrics.enable_tensorboard", "--training.local_batch_size=2", "--job.save_config_file=mine.toml")
    run(plain[0], tmp_path, *options, ranks=2)
    assert_close(tmp_path, plain[1])
    traces = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("profile_traces/*/*"))
    assert traces == [f"profile_traces/step-{step}/rank{rank}.json.gz" for step in (4, 8) for rank in (0, 1)]
    with gzip.open(tmp_path / traces[0]) as file:
        assert json.load(file)["traceEvents"]
    assert (tmp_path / "mine.toml").read_bytes() == (tmp_path / "config.toml").read_bytes()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    losses = [event.value for event in events.Scalars("loss")]
    assert losses == pytest.approx([loss for _, loss, _ in curve(tmp_path)])


def test_dead_experts_are_counted_over_the_window(plain: tuple[Path, Path], tmp_path: Path) -> None:
    """An expert that got a token in any step since the last log is not dead."""
    sparse = ("--training.local_batch_size=1", "--training.global_batch_size=1", "--training.seq_len=2")
    run(plain[0], tmp_path / "each", *sparse)
    run(plain[0], tmp_path / "window", *sparse, "--metrics.log_freq=5")
    each, window = steps(tmp_path / "each"), steps(tmp_path / "window")
    assert list(window) == [1, 5, 10]
    assert window[10]["dead_experts"] < min(each[step]["dead_experts"] for step in range(6, 11))
    assert window[10]["expert_load_cv"] == each[10]["expert_load_cv"]
    pair = ("--training.global_batch_size=2", "--training.seq_len=2")
    run(plain[0], tmp_path / "one", "--training.local_batch_size=2", *pair)
    run(plain[0], tmp_path / "two", "--training.local_batch_size=1", *pair, ranks=2)
    of_one, of_two = ([r["dead_experts"] for r in steps(tmp_path / name).values()] for name in ("one", "two"))
    assert of_one == of_two


def test_epochs_end_where_the_data_does(plain: tuple[Path, Path], tmp_path: Path) -> None:
    outcome = run(plain[0], tmp_path / "one", "--training.epochs=1")
    run(plain[0], tmp_path / "four", "--training.epochs=1", "--training.local_batch_size=1", ranks=4)
    last = max(steps(tmp_path / "one"))
    assert f"1 epochs of this data are {last} steps" in outcome.out[0]
    assert_close(tmp_path / "four", tmp_path / "one")


# From Python


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]


def test_two_trainers_in_one_process(plain: tuple[Path, Path], tmp_path: Path) -> None:
    job, expected = plain
    before = handlers()
    for name in ("first", "second"):
        config = titanmoe.load_config(job, [f"--job.dump_folder={tmp_path / name}", "--checkpoint.enable"])
        assert titanmoe.Trainer(config).train() is True
        assert curve(tmp_path / name) == curve(expected)
        assert saved_steps(tmp_path / name) == [10]
        assert handlers() == before
        assert not dist.is_initialized()
        assert gc.isenabled()


def test_a_trainer_that_cannot_be_built_gives_everything_back(plain: tuple[Path, Path], tmp_path: Path) -> None:
    before = handlers()
    options = [f"--job.dump_folder={tmp_path / 'dump'}", "--checkpoint.enable", "--checkpoint.load_step=3"]
    with pytest.raises(titanmoe.ConfigError):
        titanmoe.Trainer(titanmoe.load_config(plain[0], options))
    assert handlers() == before and not dist.is_initialized()


def test_a_trainer_in_a_thread(plain: tuple[Path, Path], tmp_path: Path) -> None:
    job, expected = plain
    results = []

    def work() -> None:
        torch.set_num_threads(1)
        results.append(titanmoe.Trainer(titanmoe.load_config(job, [f"--job.dump_folder={tmp_path}"])).train())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [True]
    assert curve(tmp_path) == curve(expected)
