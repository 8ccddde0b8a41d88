"""Defaults < base < TOML < command line; where values came from; what is said about keys without effect."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from titanmoe.config import ConfigError, JobConfig, load_config, resolve

# The keys that torchtitan's TOML for its small Qwen3-MoE sets, with the low-precision sections of its other TOMLs.
TORCHTITAN_TOML = """
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
enable_tensorboard = false

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
context_parallel_degree = 1
expert_parallel_degree = 1
expert_tensor_parallel_degree = 1
pipeline_parallel_schedule = "Interleaved1F1B"

[checkpoint]
enable = false
folder = "checkpoint"
interval = 10
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
fqns = ["layers"]

[validation]
enable = false
dataset = "c4_validation"
freq = 5
steps = 10
"""


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(**texts: str) -> None:
    for name, text in texts.items():
        Path(f"{name}.toml").write_text(text)


def test_without_anything_the_defaults_hold():
    resolved = resolve([])
    assert resolved.config == JobConfig() == load_config(None)
    assert set(resolved.origins.values()) == {"default"}
    assert load_config(None).job.config_file is None


def test_later_wins():
    write(
        grand="[training]\nsteps = 1\nseq_len = 16\nlocal_batch_size = 2\n[compile]\ncomponents = ['model', 'loss']",
        parent="base = 'grand.toml'\n[training]\nseq_len = 32\n[compile]\ncomponents = ['loss']",
        child="base = 'parent.toml'\n[training]\nlocal_batch_size = 4",
    )
    resolved = resolve(["--training.local-batch-size", "8", "--job.config_file=child.toml"])
    training = resolved.config.training
    assert (training.steps, training.seq_len, training.local_batch_size) == (1, 32, 8)
    assert resolved.config.compile.components == ("loss",), "lists replace"
    assert resolved.config.job.config_file == "child.toml"
    origins = {key: resolved.origins[f"training.{key}"] for key in ("steps", "seq_len", "local_batch_size", "gc_freq")}
    assert origins == {
        "steps": "grand.toml",
        "seq_len": "parent.toml",
        "local_batch_size": "command line",
        "gc_freq": "default",
    }


def test_the_last_config_file_wins():
    write(one="[training]\nsteps = 1", two="[training]\nsteps = 2")
    assert resolve(["--job.config_file=one.toml", "--job.config-file", "two.toml"]).config.training.steps == 2
    assert load_config("one.toml").training.steps == 1
    assert load_config("one.toml").job.config_file == "one.toml"
    assert load_config(Path("one.toml"), ["--job.config_file=two.toml"]).training.steps == 2
    assert load_config("one.toml", ["--job.config_file=none"]).training.steps == 10000


def test_a_toml_written_for_torchtitan_runs():
    write(debug=TORCHTITAN_TOML)
    resolved = resolve(["--job.config_file=debug.toml"])
    config = resolved.config
    assert (config.model.flavor, config.training.seq_len, config.optimizer.lr) == ("debugmodel_moe", 4096, 3e-4)
    assert config.model.hf_assets_path is None
    assert config.training.dataset == config.validation.dataset == "stdlib"
    notes = "\n".join(resolved.notes)
    for line in (
        'model.hf_assets_path = "./tests/assets/tokenizer" (debug.toml) is not here: the builtin tokenizer is used',
        'training.dataset = "c4_test" (debug.toml) is read as "stdlib"',
        'validation.dataset = "c4_validation" (debug.toml) is read as "stdlib"',
        'quantize.linear.float8.filter_fqns = ["output", "router.gate"] (debug.toml)',
        'quantize.grouped_mm.float8.fqns = ["layers"] (debug.toml)',
    ):
        assert line in notes
    assert len(resolved.notes) == 5, "one line per reason"
    assert config.parallelism.pipeline_parallel_schedule == "Interleaved1F1B"


def test_torchtitans_tokenizer_and_data_are_used_where_they_exist():
    Path("tests/assets/tokenizer").mkdir(parents=True)
    write(debug=TORCHTITAN_TOML + 'dataset_path = "val"\n')
    resolved = resolve(["--job.config_file=debug.toml", "--training.dataset_path=c4"])
    assert resolved.config.model.hf_assets_path == "./tests/assets/tokenizer"
    assert (resolved.config.training.dataset, resolved.config.training.dataset_path) == ("json", "c4")
    assert (resolved.config.validation.dataset, resolved.config.validation.dataset_path) == ("json", "val")


def test_torchtitans_c4_is_never_downloaded():
    assert resolve(["--training.dataset=c4", "--training.dataset_path=/c4"]).config.training.dataset == "json"
    with pytest.raises(ConfigError, match="nothing is downloaded") as caught:
        resolve(["--training.dataset=c4"])
    assert "training.dataset_path" in caught.value.mend


def test_keys_at_their_default_need_no_note():
    assert resolve(["--fault_tolerance.group_size=0", "--training.dataloader.no_persistent_workers"]).notes == ()
    (note,) = resolve(["--training.dataloader.persistent_workers"]).notes
    assert note == (
        "No effect, as workers live as long as the run here: "
        "training.dataloader.persistent_workers = true (command line)"
    )


def test_load_config_logs_the_notes(caplog):
    with caplog.at_level(logging.WARNING, logger="titanmoe"):
        load_config(None, ["--fault_tolerance.group_size=2"])
    assert "fault_tolerance.group_size = 2 (command line)" in caplog.text


def test_all_mistakes_of_all_files_are_told_together():
    write(
        parent="[training]\nsequence_len = 3\n[traning]\nsteps = 1\n",
        child="base = 'parent.toml'\n[training]\ndtype = 'half'\n[[compile]]\nenable = true\n",
    )
    with pytest.raises(ConfigError) as error:
        resolve(["--job.config_file=child.toml", "--optimizer.lr=fast"])
    text = str(error.value)
    assert text.startswith("5 mistakes in the job config:\n")
    for part in (
        "command line, --optimizer.lr: ",
        "parent.toml, training.sequence_len: unknown key",
        "parent.toml, [traning]: unknown section",
        "child.toml, training.dtype: ",
        "child.toml, compile: this is a section: [compile]",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = 3", "bad.toml, steps: unknown key\n  Did you mean training.steps"),
        ("training = 3", "bad.toml, training: this is a section"),
        ("[training.steps]\na = 1", "bad.toml, training.steps: a section was given"),
        ("[quantize.linear.fp8]\na = 1", "bad.toml, [quantize.linear.fp8]: unknown section"),
        ('"training.steps" = 3', "bad.toml, training.steps: a name in quotes"),
        ("[training]\nsteps = 2026-01-01", "the date 2026-01-01 was given, but it must be a whole number"),
    ],
)
def test_tables_and_keys_in_the_wrong_place(text, message):
    write(bad=text)
    with pytest.raises(ConfigError) as error:
        load_config("bad.toml")
    assert message in str(error.value)


def test_a_single_mistake_is_raised_as_it_is():
    with pytest.raises(ConfigError) as error:
        resolve(["--training.steps=0"])
    assert error.value.where == "command line, --training.steps"


def test_config_file_inside_a_file_is_named_as_useless():
    write(a="[job]\nconfig_file = 'b.toml'\ndescription = 'kept'")
    resolved = resolve([], "a.toml")
    assert resolved.config.job.config_file == "a.toml" and resolved.config.job.description == "kept"
    assert resolved.notes[0].startswith("job.config_file in a.toml has no effect")


class TestStepsAndEpochs:
    def test_in_one_layer_they_contradict_each_other(self):
        with pytest.raises(ConfigError, match=r"training.steps = 3 and training.epochs = 2.0 are both set"):
            resolve(["--training.steps=3", "--training.epochs=2"])
        write(both="[training]\nsteps = 10000\nepochs = 1")
        with pytest.raises(ConfigError) as error:
            load_config("both.toml")
        assert error.value.where == "both.toml"

    def test_the_later_layer_wins(self):
        write(steps="[training]\nsteps = 3", epochs="[training]\nepochs = 2")
        training = load_config("steps.toml", ["--training.epochs=0.5"]).training
        assert (training.steps, training.epochs) == (10000, 0.5)
        training = load_config("epochs.toml", ["--training.steps=7"]).training
        assert (training.steps, training.epochs) == (7, None)

    def test_unset_epochs_contradict_nothing(self):
        assert load_config(None, ["--training.steps=7", "--training.epochs=none"]).training.steps == 7


def test_a_config_cannot_be_changed_by_accident():
    config = JobConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.training.steps = 3  # type: ignore[misc]
