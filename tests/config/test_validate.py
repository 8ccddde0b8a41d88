"""Keys that contradict each other, the number of ranks, or the disk."""

from __future__ import annotations

import pytest

from titanmoe.config import ConfigError, load_config, validate, validate_keys
from titanmoe.config.sizes import (
    accumulation_steps,
    degrees_of,
    global_batch_size,
    tokens_per_step,
)

REPLICATE = "--parallelism.data_parallel_replicate_degree"
SHARD = "--parallelism.data_parallel_shard_degree"
LOCAL, GLOBAL = "--training.local_batch_size", "--training.global_batch_size"


@pytest.mark.parametrize(
    ("args", "world_size", "degrees"),
    [
        ([], 1, (1, 1)),
        ([], 8, (1, 8)),
        ([f"{REPLICATE}=2"], 8, (2, 4)),
        ([f"{REPLICATE}=4", f"{SHARD}=2"], 8, (4, 2)),
        ([f"{REPLICATE}=4", f"{SHARD}=1"], 4, (4, 1)),
    ],
)
def test_degrees(args, world_size, degrees):
    config = load_config(None, args)
    found = degrees_of(config, world_size)
    assert (found.dp_replicate, found.dp_shard) == degrees
    assert found.num_data_ranks == found.num_ranks == world_size
    validate(config, world_size)


@pytest.mark.parametrize(
    ("args", "world_size", "message"),
    [
        ([f"{REPLICATE}=3"], 8, "= 3 * -1 * 1 * 1 * 1 does not fit 8 ranks"),
        ([f"{REPLICATE}=2"], 1, "= 2 * -1 * 1 * 1 * 1 does not fit 1 ranks"),
        ([f"{SHARD}=4"], 8, "= 1 * 4 * 1 * 1 * 1 does not fit 8 ranks"),
        ([f"{REPLICATE}=2", f"{SHARD}=4"], 4, "NGPU=8"),
    ],
)
def test_degrees_that_do_not_fit(args, world_size, message):
    with pytest.raises(ConfigError) as error:
        validate(load_config(None, args), world_size)
    assert message in str(error.value)
    assert "data_parallel_replicate_degree * data_parallel_shard_degree * tensor_parallel_degree" in str(error.value)


@pytest.mark.parametrize(
    ("args", "world_size", "message"),
    [
        (["--parallelism.expert_parallel_degree=3"], 8, "8 is not a multiple of 3 * 1"),
        (["--parallelism.expert_parallel_degree=2"], 1, "1 is not a multiple of 2 * 1"),
        (["--parallelism.expert_parallel_degree=8", f"{REPLICATE}=2"], 8, "4 is not a multiple of 8 * 1"),
    ],
)
def test_experts_are_shared_by_ranks_that_share_shards(args, world_size, message):
    with pytest.raises(
        ConfigError,
        match="\\* expert_tensor_parallel_degree must divide data_parallel_shard_degree \\* "
        "context_parallel_degree \\* tensor_parallel_degree",
    ) as error:
        validate(load_config(None, args), world_size)
    assert message in str(error.value)


def test_sequences_that_cannot_be_cut():
    cut = "--parallelism.context_parallel_degree=2"
    with pytest.raises(ConfigError, match="must divide seq_len: 33 is not a multiple of 2 \\* 1") as error:
        validate(load_config(None, [cut, "--training.seq_len=33"]), 2)
    assert error.value.where == "training.seq_len"
    validation = ["--validation.enable", "--validation.dataset=stdlib", "--validation.seq_len=35"]
    with pytest.raises(ConfigError, match="35 is not a multiple of 2 \\* 1") as error:
        validate(load_config(None, [cut, *validation]), 2)
    assert error.value.where == "validation.seq_len"


@pytest.mark.parametrize("etp", [3, 4])
def test_an_expert_is_split_like_its_layer_or_not_at_all(etp):
    args = ["--parallelism.tensor_parallel_degree=2", f"--parallelism.expert_tensor_parallel_degree={etp}"]
    with pytest.raises(ConfigError, match=f"{etp} is neither tensor_parallel_degree = 2 nor 1"):
        validate(load_config(None, args), 4)


@pytest.mark.parametrize(
    ("args", "world_size", "total", "accumulation"),
    [
        ([f"{LOCAL}=4"], 2, 8, 1),
        ([f"{LOCAL}=4", f"{GLOBAL}=32"], 2, 32, 4),
        ([f"{LOCAL}=3", f"{GLOBAL}=3"], 1, 3, 1),
    ],
)
def test_batch_sizes(args, world_size, total, accumulation):
    config = load_config(None, [*args, "--training.seq_len=10"])
    assert global_batch_size(config, world_size) == total
    assert accumulation_steps(config, world_size) == accumulation
    assert tokens_per_step(config, world_size) == 10 * total


@pytest.mark.parametrize(("total", "nearest"), [(20, 16), (3, 8), (30, 32)])
def test_a_global_batch_that_cannot_be_dealt(total, nearest):
    with pytest.raises(ConfigError) as error:
        validate(load_config(None, [f"{LOCAL}=4", f"{GLOBAL}={total}"]), 2)
    assert f"{total} is not a multiple of 4 * 2 = 8" in str(error.value)
    assert f"The nearest is {nearest};" in str(error.value)


@pytest.mark.parametrize(
    ("args", "where", "message"),
    [
        (["--checkpoint.keep_latest_k=1"], "checkpoint.keep_latest_k", "would leave none"),
        (["--model.name=auto"], "model.hf_assets_path", "not set"),
        (["--training.dataset_path=x"], "training.dataset_path", "has no path"),
        (["--training.dataset=text"], "training.dataset_path", "needs a path"),
        (["--validation.enable", "--validation.dataset=json"], "validation.dataset_path", "needs a path"),
        (["--training.dataloader.prefetch_factor=2"], "training.dataloader.prefetch_factor", "num_workers"),
        (
            ["--validation.enable", "--validation.dataloader.prefetch_factor=2"],
            "validation.dataloader.prefetch_factor",
            "num_workers",
        ),
        (
            ["--activation_checkpoint.selective_ac_option=0"],
            "activation_checkpoint.selective_ac_option",
            '"0" was given',
        ),
        (
            ["--activation_checkpoint.selective_ac_option=ops"],
            "activation_checkpoint.selective_ac_option",
            'must be "op" or a whole number',
        ),
        (["--activation_checkpoint.mode=memory_budget"], "activation_checkpoint.mode", "the model is not compiled"),
        (
            ["--activation_checkpoint.mode=memory_budget", "--compile.enable", "--compile.components=loss"],
            "activation_checkpoint.mode",
            "the model is not compiled",
        ),
        (["--compile.enable", "--compile.components="], "compile.components", "empty"),
        (["--checkpoint.initial_load_path=x"], "checkpoint.initial_load_path", "checkpoint.enable is off"),
        (["--checkpoint.initial_load_in_hf"], "checkpoint.initial_load_in_hf", "checkpoint.enable is off"),
        (["--checkpoint.enable", "--checkpoint.initial_adapter_path=x"], "checkpoint.initial_adapter_path", "needs"),
        (
            ["--checkpoint.enable", "--checkpoint.initial_load_in_hf"],
            "checkpoint.initial_load_in_hf",
            "neither checkpoint.initial_load_path nor model.hf_assets_path",
        ),
        (
            [
                "--checkpoint.enable",
                "--checkpoint.initial_load_in_hf",
                "--checkpoint.initial_load_path=x",
                "--checkpoint.no_initial_load_model_only",
            ],
            "checkpoint.initial_load_in_hf",
            "hold only the model",
        ),
        (["--checkpoint.create_seed_checkpoint"], "checkpoint.create_seed_checkpoint", "checkpoint.enable = true"),
        (
            ["--checkpoint.enable", "--checkpoint.create_seed_checkpoint", "--checkpoint.load_only"],
            "checkpoint.create_seed_checkpoint",
            "load_only",
        ),
        (
            ["--profiling.enable_profiling", "--profiling.profile_freq=3"],
            "profiling.profile_freq",
            "3 is less than 3 + 1 = 4",
        ),
    ],
)
def test_contradictions(args, where, message):
    with pytest.raises(ConfigError) as error:
        validate_keys(load_config(None, args))
    assert error.value.where == where
    assert message in error.value.what


@pytest.mark.parametrize(
    "args",
    [
        ["--checkpoint.keep_latest_k=0"],
        ["--checkpoint.keep_latest_k=2"],
        ["--validation.dataset=json"],  # validation is off
        ["--activation_checkpoint.selective_ac_option=3"],
        ["--activation_checkpoint.selective_ac_option=op"],
        ["--activation_checkpoint.mode=full", "--activation_checkpoint.selective_ac_option=x"],
        ["--activation_checkpoint.mode=memory_budget", "--compile.enable"],
        ["--training.dataloader.prefetch_factor=2", "--training.dataloader.num_workers=1"],
        ["--profiling.enable_profiling", "--profiling.profile_freq=4"],
        ["--checkpoint.enable", "--checkpoint.create_seed_checkpoint"],
    ],
)
def test_what_is_allowed(args):
    validate(load_config(None, args), 1)


def test_a_seed_checkpoint_is_made_by_one_rank():
    with pytest.raises(ConfigError, match="by one rank, not by 2"):
        validate(load_config(None, ["--checkpoint.enable", "--checkpoint.create_seed_checkpoint"]), 2)


@pytest.mark.parametrize("key", ["model.hf_assets_path", "model.tokenizer_path", "checkpoint.initial_load_path"])
def test_directories_must_exist(key, tmp_path):
    def config(path):
        return load_config(None, ["--checkpoint.enable", f"--job.dump_folder={tmp_path}", f"--{key}={path}"])

    with pytest.raises(ConfigError, match='gone" does not exist') as error:
        validate(config(tmp_path / "gone"), 1)
    assert error.value.where == key
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match='file" is not a directory'):
        validate(config(tmp_path / "file"), 1)
    validate(config(tmp_path), 1)
    validate_keys(config(tmp_path / "gone"))  # says nothing of this machine's disk


def test_the_builtin_tokenizer_is_no_directory():
    validate(load_config(None, ["--model.tokenizer_path=builtin"]), 1)


def test_a_run_that_resumes_does_not_need_its_first_weights(tmp_path):
    args = [
        "--checkpoint.enable",
        f"--job.dump_folder={tmp_path}",
        f"--checkpoint.initial_load_path={tmp_path / 'gone'}",
    ]
    (tmp_path / "checkpoint" / "step-10").mkdir(parents=True)
    validate(load_config(None, args), 1)
