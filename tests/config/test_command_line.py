"""Command-line options in all the ways they can be written, and arguments that are none."""

from __future__ import annotations

import pytest

from titanmoe.config import wants_help
from titanmoe.config.command_line import parse_command_line
from titanmoe.config.schema import Schema

SCHEMA = Schema.of_job_config()


def parse(*args: str) -> dict:
    options, errors = parse_command_line(args, SCHEMA)
    assert not errors, errors
    return {option.key.path: option.value for option in options}


def messages(*args: str) -> list[str]:
    return [str(error) for error in parse_command_line(args, SCHEMA)[1]]


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--training.seq_len=64"], {"training.seq_len": 64}),
        (["--training.seq_len", "64"], {"training.seq_len": 64}),
        (["--training.seq-len=64"], {"training.seq_len": 64}),
        (["--lr-scheduler.warmup-steps", "3"], {"lr_scheduler.warmup_steps": 3}),
        (["--checkpoint.load_step", "-1"], {"checkpoint.load_step": -1}),
        (["--training.dataloader.num_workers=2"], {"training.dataloader.num_workers": 2}),
        (["--compile.enable"], {"compile.enable": True}),
        (["--compile.no_enable"], {"compile.enable": False}),
        (["--compile.no-enable"], {"compile.enable": False}),
        (["--compile.enable=false"], {"compile.enable": False}),
        (["--compile.enable", "false"], {"compile.enable": False}),
        (["--compile.enable", "--training.steps=1"], {"compile.enable": True, "training.steps": 1}),
        (["--training.steps=1", "--training.steps=2"], {"training.steps": 2}),
        (["--compile.enable", "--compile.no_enable"], {"compile.enable": False}),
        (["--job.description=a=b"], {"job.description": "a=b"}),
        (["--job.description", ""], {"job.description": ""}),
        (["--model.converters="], {"model.converters": []}),
        (["--job.config-file=a.toml", "--job.config_file", "b.toml"], {"job.config_file": "b.toml"}),
        (["--experimental.custom_import=a-b"], {"experimental.custom_import": "a-b"}),
        ([], {}),
    ],
)
def test_ways_to_write_an_option(args, wanted):
    assert parse(*args) == wanted


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--training.sequence_len=1"], ["--training.sequence_len: unknown key", "Did you mean training.seq_len?"]),
        (["--steps=3"], ["--steps: unknown key", "training.steps"]),
        (["--training"], ["--training: this is a section", "seq_len"]),
        (["--training.seq_len"], ["--training.seq_len: has no value"]),
        (["--training.seq_len", "--compile.enable"], ["--training.seq_len: has no value"]),
        (["--compile.no_enable=true"], ["takes no value", "--compile.enable=false"]),
        (["--training.no_steps"], ["--training.no_steps: unknown key"]),
        (["qwen3.toml"], ['"qwen3.toml" is not an option', "Did you mean --job.config_file=qwen3.toml?"]),
        (["training.steps=3"], ["is not an option", "Did you mean --training.steps=3?"]),
        (["-x"], ['"-x" is not an option', "--section.key=value"]),
        (["--"], ["unknown key"]),
        (["--job.description=\udcff"], ["not valid UTF-8"]),
        (["--compile.components=a,,b"], ["--compile.components: the list", "empty entry"]),
    ],
)
def test_arguments_that_are_no_option(args, wanted):
    (message,) = messages(*args)
    assert message.startswith("command line")
    assert all(part in message for part in wanted), message


def test_an_unknown_key_takes_its_value_along_and_all_mistakes_are_told():
    assert len(messages("--foo.bar", "3", "--baz.qux=4", "--compile.enable")) == 2


def test_help_is_wanted_anywhere():
    assert wants_help(["--training.steps=3", "--help"]) and wants_help(["-h"])
    assert not wants_help(["--job.description=--help"])
