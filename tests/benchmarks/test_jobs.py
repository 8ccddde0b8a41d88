"""Whole jobs beside each other: what is run, how figures come from its records, and the exit codes."""

from __future__ import annotations

import json
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from titanmoe.benchmarks import convergence, jobs, train
from titanmoe.benchmarks.low_precision import BASES, FORMATS, formats_for, job_options, without_backend
from titanmoe.config import ConfigError, JobConfig, load_config
from titanmoe.config.sections.quantize import CONVERTERS

JOB = "--job.config_file=debug_qwen3_moe.toml"
TINY = (
    "--model.flavor=debug_dense",
    "--training.local_batch_size=1",
    "--training.global_batch_size=1",
    "--training.seq_len=32",
    "--validation.enable=false",
)
MX = ("--model.converters=quantize.linear.mx", "--quantize.linear.mx.emulate")


class Runs:
    """In the place of `run_job`: remembers configs, and answers with records."""

    def __init__(self, *answers: list[dict[str, Any]]) -> None:
        self.configs: list[JobConfig] = []
        self.answers = answers

    def __call__(self, config: JobConfig) -> list[dict[str, Any]]:
        self.configs.append(config)
        return self.answers[(len(self.configs) - 1) % len(self.answers)]


def pretend(monkeypatch: pytest.MonkeyPatch, *answers: list[dict[str, Any]]) -> Runs:
    runs = Runs(*answers)
    monkeypatch.setattr(jobs, "run_job", runs)
    return runs


# ---- running one ---------------------------------------------------------------------------------------------------


def test_a_job_runs_as_configured_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("NGPU", "1")
    outputs = f"--job.dump_folder={tmp_path / 'outputs'}"
    absent = ("--checkpoint.enable", f"--checkpoint.initial_load_path={tmp_path / 'absent'}")  # not looked at
    config = load_config(None, [JOB, *TINY, *MX, outputs, "--training.steps=2", *absent])
    records = jobs.run_job(config)
    assert [record["step"] for record in records if "loss" in record] == [1, 2]
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_a_job_is_told_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGPU", "1")
    with pytest.raises(ConfigError, match=r"^model\.converters: "):
        jobs.run_job(load_config(None, [JOB, *TINY, "--model.converters=quantize.linear.typo"]))


def test_a_job_that_fails_is_told_with_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="exit code 1"):
        jobs.run_job(load_config(None, [JOB]))


# ---- train ---------------------------------------------------------------------------------------------------------


def speeds(*tokens_per_second: float) -> list[dict[str, Any]]:
    """Records of 8 steps, of which every second is logged."""
    steps = (1, 2, 4, 6, 8)
    return [
        {"step": step, "loss": 9.0 - step, "tokens_per_second": speed, "peak_memory_gib": step / 2}
        for step, speed in zip(steps, tokens_per_second, strict=True)
    ]


def test_speedups_are_ratios_of_medians_after_the_first_quarter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The first two tell of steps in which things are built.
    answers = [
        speeds(1, 1, 300, 200, 400),
        speeds(9, 9, 100, 150, 125),
        speeds(1, 1, 100, 100, 100),
        speeds(9, 9, 50, 40, 60),
    ]
    runs = pretend(monkeypatch, *answers)
    assert train.main([JOB, *TINY, *MX, "--steps", "8", "--rounds", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    job, plain = report["results"]
    assert job["converters"] == ["quantize.linear.mx"] and plain["converters"] == []
    assert job["tokens_per_second"] == {"median": 200.0, "min": 100.0, "max": 300.0}
    assert job["speedup"]["median"] == pytest.approx((300 / 125 + 100 / 50) / 2)
    assert plain["speedup"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert (job["peak_memory_gib"], job["last_losses"]) == (4.0, [1.0, 1.0])
    assert [config.model.converters for config in runs.configs] == [("quantize.linear.mx",), ()] * 2
    for config in runs.configs:
        assert (config.training.steps, config.metrics.log_freq, config.validation.enable) == (8, 2, False)
        assert config.training.seq_len == 32


def test_a_job_can_be_compared_with_other_converters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = pretend(monkeypatch, speeds(1, 1, 2, 2, 2), speeds(1, 1, 1, 1, 1))
    assert train.main([JOB, *MX, "--steps", "8", "--rounds", "1", "--against=quantize.linear.float8"]) == 0
    assert [config.model.converters for config in runs.configs] == [
        ("quantize.linear.mx",),
        ("quantize.linear.float8",),
    ]
    table = capsys.readouterr().out
    assert "2.00x (2.00 to 2.00)" in table and "quantize.linear.float8" in table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--against: both jobs have no converters"),
        ((*MX, "--steps", "1"), "--steps: "),
        ((*MX, "--family=qwen3"), "--family"),
        ((*MX, "--modle.name=x"), "--modle.name: unknown key"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str) -> None:
    assert train.main([JOB, *options]) == 2
    assert message in capsys.readouterr().err


# ---- convergence ---------------------------------------------------------------------------------------------------


def losses(offset: float, validation: float, num_steps: int = 30) -> list[dict[str, Any]]:
    """Of the last 20 steps, the mean is 4 + offset."""
    records: list[dict[str, Any]] = [{"step": 0, "validation_loss": 9.0, "validation_tokens": 1}]
    records += [{"step": step, "loss": 8.0 if step <= 10 else 4.0 + offset} for step in range(1, num_steps + 1)]
    return [*records, {"step": num_steps, "validation_loss": validation, "validation_tokens": 1}]


@pytest.mark.parametrize(
    ("mx", "code"),
    [
        (losses(0.03, 5.04), 0),
        (losses(0.05, 5.0), 1),
        (losses(0.0, 5.06), 1),
        (losses(0.0, 4.94), 1),
    ],
)
def test_formats_must_learn_as_well_as_plain_products(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mx: list[dict[str, Any]], code: int
) -> None:
    pretend(monkeypatch, losses(0.0, 5.0), losses(0.01, 5.0), mx)
    assert convergence.main(["--steps", "30", "--json"]) == code
    report = json.loads(capsys.readouterr().out)
    plain, fp8, mxfp8 = report["runs"]
    assert (report["within_tolerance"], fp8["within_tolerance"], mxfp8["within_tolerance"]) == (
        not code,
        True,
        not code,
    )
    assert plain["training_loss"] == pytest.approx(4.0) and plain["difference"]["training_loss"] == 0.0
    assert fp8["training_loss"] == pytest.approx(4.01)
    assert fp8["difference"]["training_loss"] == pytest.approx(0.0025)
    assert mxfp8["difference"]["validation_loss"] == pytest.approx(mx[-1]["validation_loss"] / 5.0 - 1)
    assert len(mxfp8["losses"]) == 30 and mxfp8["validation_losses"].keys() == {"0", "30"}


def test_what_is_trained_to_see_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    runs = pretend(monkeypatch, losses(0.0, 5.0), losses(0.01, 5.0), losses(0.05, 5.0))
    picture = tmp_path / "picture.svg"
    assert convergence.main(["--steps", "30", "--output", str(picture), "--training.seq_len=64"]) == 1
    plain, fp8, mx = runs.configs
    assert plain.model.converters == ()
    assert set(fp8.model.converters) == {"quantize.linear.float8", "quantize.grouped_mm.float8"}
    assert set(mx.model.converters) == {"quantize.linear.mx", "quantize.grouped_mm.mx"}
    assert fp8.quantize.linear.float8.recipe_name == "rowwise"
    assert mx.quantize.linear.mx.recipe_name == "mxfp8_cublas_rceil"
    for config in runs.configs:
        assert (config.training.steps, config.training.seq_len, config.metrics.log_freq) == (30, 64, 1)
        assert (config.model.flavor, config.training.mixed_precision_param) == ("debug_moe", "bfloat16")
    table = capsys.readouterr().out
    assert "4.0500 (+1.25%)" in table and table.splitlines()[-1].split()[-3] == "NO"
    drawn = ElementTree.parse(picture).getroot()
    assert len([each for each in drawn.iter() if each.tag.endswith("polyline")]) == 3
    words = [each.text for each in drawn.iter() if each.tag.endswith("text")]
    assert "MXFP8, validation 5.0000" in words


def test_bases_are_compared_under_adapters(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A base is trained and written first, and each job begins with it."""
    folders = []

    def run(config: JobConfig, folder: Path | None = None) -> list[dict[str, Any]]:
        folders.append(folder)
        configs.append(config)
        return losses(0.0, 5.0) if "quantize.frozen.nf4" not in config.model.converters else losses(0.05, 5.0)

    configs: list[JobConfig] = []
    monkeypatch.setattr(jobs, "run_job", run)
    assert convergence.main(["--frozen", "--steps", "30", "--json", "--lora.rank=4"]) == 1
    base, *others = configs
    assert folders[0] is not None and folders[1:] == [None] * len(others)
    assert base.model.converters == () and base.training.dataset == "stdlib" and base.checkpoint.last_save_in_hf
    for config in others:
        assert config.model.hf_assets_path == f"{folders[0]}/checkpoint/step-30-hf"
        assert config.checkpoint.initial_load_in_hf and config.training.dataset == "stdlib_docs"
        assert (config.model.converters[-1], config.lora.rank) == ("lora", 4)
    report = json.loads(capsys.readouterr().out)
    found = {run["name"]: (run["within_tolerance"], run["emulated"]) for run in report["runs"]}
    assert found.keys() == {"bfloat16", *BASES}
    assert found["FP8, native"] == (True, ["quantize.frozen.float8"]) and found["NF4"] == (False, [])
    configs.clear()
    convergence.main(["--frozen", "--steps", "30", "--model.hf_assets_path=/models/base"])
    assert [config.model.hf_assets_path for config in configs] == ["/models/base"] * len(others)


def test_a_job_that_begins_with_weights_still_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(
        jobs.subprocess, "run", lambda command, **_: written.append(Path(command[-1].partition("=")[2]).read_text())
    )
    begins = ("--checkpoint.enable", "--checkpoint.initial_load_in_hf", "--model.hf_assets_path=/models/base")
    with pytest.raises(AttributeError):  # nothing came back
        jobs.run_job(load_config(None, [JOB, *begins]))
    assert "load_only = true" in written[0] and "initial_load_in_hf = true" in written[0]


def test_a_job_without_validation_cannot_be_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert convergence.main(["--validation.enable=false"]) == 2
    assert capsys.readouterr().err.startswith("error: validation.enable: is off")


# ---- formats -------------------------------------------------------------------------------------------------------


def test_formats_are_made_of_the_converters_that_there_are() -> None:
    import torch

    products = {name for name in CONVERTERS if name.startswith(("quantize.linear.", "quantize.grouped_mm."))}
    assert {converter for recipes in FORMATS.values() for converter in recipes} == products
    assert formats_for(["linear"]) == list(FORMATS)
    assert formats_for(["grouped_mm"]) == [name for name in FORMATS if name != "fp8_tensorwise"]
    missing = without_backend("mxfp8", ["grouped_mm"], torch.device("cpu"))
    assert list(missing) == ["quantize.grouped_mm.mx"] and missing["quantize.grouped_mm.mx"]
    config = load_config(None, job_options("mxfp8", ["grouped_mm"], missing))
    assert config.model.converters == ("quantize.grouped_mm.mx",)
    assert config.quantize.grouped_mm.mx.emulate and not config.quantize.linear.mx.emulate
    for name in FORMATS:  # every recipe is one
        load_config(None, job_options(name, ["linear", "grouped_mm"]))
