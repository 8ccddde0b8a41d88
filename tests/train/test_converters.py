"""Jobs with converters, through the whole program."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import titanmoe.converters.apply  # noqa: F401 - before the ranks are forked
from tests.parity.reference import random_model
from tests.parity.variants import VARIANTS
from tests.train.jobs import (
    TINY,
    assert_close,
    assert_one_line,
    assert_same_tensors,
    curve,
    run,
    tensors,
    train,
    write_job,
)
from titanmoe.models.family import FAMILIES

MODEL = {**TINY, "moe_intermediate_size": 32, "head_dim": 32}
FP8 = ("quantize.linear.float8", "quantize.grouped_mm.float8")
MX = ("quantize.linear.mx", "quantize.grouped_mm.mx")
PAGE = Path(__file__).parents[2] / "docs" / "low_precision.md"


def with_(names: tuple[str, ...], *, emulate: bool = True) -> tuple[str, ...]:
    return (f"--model.converters={','.join(names)}", *(f"--{name}.emulate" for name in names if emulate))


def losses(dump: Path) -> list[float]:
    return [loss for _, loss, _ in curve(dump)]


# Every family


def wide(options: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes rounded up to multiples of 32, and the built-in tokenizer's vocabulary."""
    sizes = {
        name: -(-value // 32) * 32
        for name, value in options.items()
        if type(value) is int and name.endswith(("_size", "_rank", "head_dim", "_size_mlp"))
    }
    return {**options, **sizes, "vocab_size": 2048, "initializer_range": 0.02}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns(family: str, tmp_path: Path) -> None:
    """Near to what it does in float32, and not the same."""
    model_type, options = next(iter(VARIANTS[family].values()))
    job = write_job(tmp_path)
    (tmp_path / "model" / "config.json").unlink()
    random_model(model_type, wide(options)).save_pretrained(tmp_path / "model")
    few = ("--training.steps=3", "--training.local_batch_size=2", "--training.global_batch_size=2")
    run(job, tmp_path / "plain", *few)
    expected = losses(tmp_path / "plain")
    has_experts = family not in ("qwen2", "llama3")
    for all_names in (FP8, MX):
        names = all_names if has_experts else all_names[:1]
        dump = tmp_path / names[0]
        outcome = run(job, dump, *few, *with_(names), "--model.print_after_conversion")
        for name in names:
            assert re.search(rf"{name}: ([1-9]\d*) of \1 ", outcome.out[0]), outcome.out[0]
        for line in lines_of_table(outcome.out[0]):
            name = line.split()[0].rpartition(".")[2]
            last = {"output": "computed by the loss", "gate": "always in float32"}.get(name, "emulated")
            assert line.endswith(last), outcome.out[0]
        assert len(losses(dump)) == 3 and losses(dump) != expected
        assert losses(dump) == pytest.approx(expected, rel=0.02)


def lines_of_table(text: str) -> list[str]:
    """Without the clock in front of each."""
    lines = [line[10:] for line in text.splitlines()]
    first = next(number for number, line in enumerate(lines) if line.startswith("module "))
    return [line for line in lines[first + 1 :] if re.match(r"(layers\.|output )", line)]


# Checkpoints


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"), MODEL)


# Where weights move, last bits that differ may double a block's scale, and runs part: not with this seed, and not where
# weights stand still.
SEED = "--debug.seed=6"
STILL = ("--optimizer.lr=1e-30", "--optimizer.weight_decay=0")
SAVING = ("--checkpoint.enable", "--checkpoint.interval=4", SEED)


@pytest.fixture(scope="module")
def whole(job: Path) -> dict[str, Path]:
    """Runs of eight steps that were never stopped."""
    dumps = {}
    for name, options in (("plain", ()), ("FP8", with_(FP8)), ("MXFP8", with_(MX))):
        dumps[name] = job.parent / f"whole-{name}"
        run(job, dumps[name], *SAVING, *options, "--training.steps=8")
    return dumps


@pytest.mark.parametrize(("name", "ranks"), [("FP8", 1), ("MXFP8", 1), ("MXFP8", 2)])
def test_a_resumed_run_is_the_one_that_was_not_stopped(
    job: Path, whole: dict[str, Path], name: str, ranks: int, tmp_path: Path
) -> None:
    options = (*SAVING, *with_({"FP8": FP8, "MXFP8": MX}[name]), f"--training.local_batch_size={4 // ranks}")
    run(job, tmp_path / "two", *options, "--training.steps=4", "--lr_scheduler.total_steps=8", ranks=ranks)
    outcome = run(job, tmp_path / "two", *options, "--training.steps=8", "--lr_scheduler.total_steps=8", ranks=ranks)
    assert "changed since the last run" not in outcome.out[0].replace("lr_scheduler.total_steps", "")
    if ranks == 1:
        expected = whole[name]
    else:
        expected = tmp_path / "one"
        run(job, expected, *options, "--training.steps=8", ranks=ranks)
        assert_close(expected, whole[name], rel=1e-3)
    assert curve(tmp_path / "two") == curve(expected)
    assert_same_tensors(tmp_path / "two", expected, 8)


def test_checkpoints_move_between_converted_and_plain_runs(job: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    """In both directions: the same tensors, and the loss goes on; what changed is told."""
    plain = tensors(whole["plain"], 4)
    assert {name: (value.dtype, value.shape) for name, value in tensors(whole["MXFP8"], 4).items()} == {
        name: (value.dtype, value.shape) for name, value in plain.items()
    }
    for first, then, line in (
        ((), with_(MX), 'model.converters: [] -> ["quantize.linear.mx", "quantize.grouped_mm.mx"]'),
        (with_(MX), (), 'model.converters: ["quantize.linear.mx", "quantize.grouped_mm.mx"] -> []'),
    ):
        dump = tmp_path / f"from-{len(first)}"
        run(job, dump, *SAVING, *first, "--training.steps=4", "--lr_scheduler.total_steps=8")
        outcome = run(job, dump, *SAVING, *then, "--training.steps=8", "--lr_scheduler.total_steps=8")
        assert outcome.out[0].count("changed since the last run") == 1
        assert f"changed since the last run: {line}" in outcome.out[0]
        before, after = ("plain", "MXFP8") if then else ("MXFP8", "plain")
        assert losses(dump)[:4] == losses(whole[before])[:4]
        assert losses(dump)[4:] != losses(whole[after])[4:]
        assert losses(dump) == pytest.approx(losses(whole["plain"]), rel=0.02)


def test_another_recipe_is_told(job: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    recipe = "--quantize.linear.mx.recipe_name=mxfp8_cublas_rceil"
    run(job, tmp_path, *SAVING, *with_(MX), "--training.steps=4")
    outcome = run(job, tmp_path, *SAVING, *with_(MX), recipe, "--training.steps=5")
    told = 'changed since the last run: quantize.linear.mx.recipe_name: "mxfp8_cublas" -> "mxfp8_cublas_rceil"'
    assert told in outcome.out[0]


def test_two_ranks_compute_what_one_does(job: Path, tmp_path: Path) -> None:
    options = (*with_(MX), *STILL, "--training.steps=8")
    run(job, tmp_path / "one", *options)
    run(job, tmp_path / "two", *options, "--training.local_batch_size=2", ranks=2)
    assert_close(tmp_path / "two", tmp_path / "one")


def test_hugging_face_folders_in_and_out(job: Path, tmp_path: Path) -> None:
    """With a rate of 0 what comes out is what went in, byte by byte, whatever computes."""
    from safetensors.torch import load_file

    out = ("--checkpoint.enable", "--checkpoint.last_save_in_hf", "--training.steps=1")
    run(job, tmp_path / "plain", *out)
    first = tmp_path / "plain" / "checkpoint" / "step-1-hf"
    again = ("--checkpoint.initial_load_in_hf", f"--checkpoint.initial_load_path={first}")
    run(job, tmp_path / "mx", *out, *again, *STILL, *with_(MX))
    second = tmp_path / "mx" / "checkpoint" / "step-1-hf"
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}
    assert (first / "config.json").read_bytes() == (second / "config.json").read_bytes()
    a, b = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) and a[name].dtype == b[name].dtype for name in a)


# Two stages


def test_stages_convert_their_own_and_the_table_is_of_the_whole(
    job: Path, whole: dict[str, Path], tmp_path: Path
) -> None:
    options = (*with_(MX), SEED, "--training.steps=8", "--model.print_after_conversion")
    pipeline = (
        "--parallelism.pipeline_parallel_degree=2",
        "--quantize.linear.mx.filter_fqns=output,layers.1.attention",
    )
    one = run(job, tmp_path / "one", *options, pipeline[1])
    two = run(job, tmp_path / "two", *options, *pipeline, ranks=2)
    assert_close(tmp_path / "two", tmp_path / "one", rel=1e-3)
    assert losses(tmp_path / "one") != losses(whole["MXFP8"])
    assert lines_of_table(two.out[0]) == lines_of_table(one.out[0])
    assert '"layers.1.attention" is in filter_fqns' in two.out[0]
    assert "module " not in two.out[1]
    assert two.out[0].count("quantize.linear.mx: 4 of 8 linear layers in MXFP8") == 1


# Mistakes


@pytest.mark.parametrize(
    ("model", "args", "names"),
    [
        pytest.param(MODEL, with_(MX, emulate=False), "Set quantize.linear.mx.emulate = true", id="no hardware"),
        pytest.param(MODEL, with_(FP8[1:], emulate=False), "Set quantize.grouped_mm.float8.emulate", id="no FP8"),
        pytest.param(MODEL, ("--model.converters=float8",), "Did you mean quantize.linear.float8?", id="name"),
        pytest.param(MODEL, ("--model.converters=mx", "--experimental.custom_import=json"), "They are", id="late"),
        pytest.param(
            MODEL, ("--model.converters=quantize.linear.mx,quantize.linear.mx",), "is there 2 times", id="twice"
        ),
        pytest.param(
            MODEL,
            (*with_(MX), "--quantize.linear.mx.filter_fqns=attention.wk,attention.wv"),
            'Did you mean "attention.k_proj"?',
            id="torchtitan's names",
        ),
        pytest.param(
            MODEL, (*with_(MX), "--quantize.grouped_mm.mx.fqns=shared_experts"), 'Did you mean "experts"?', id="fqns"
        ),
        pytest.param(MODEL, (*with_(MX), "--quantize.grouped_mm.mx.fqns="), "the list is empty", id="empty"),
        pytest.param(
            TINY,
            (*with_(MX), "--quantize.strict"),
            "change 4 of the 8 linear layers: 4 stay (16 x 32: not all multiples of 32)",
            id="fit",
        ),
        pytest.param(
            MODEL,
            (*with_(FP8), "--quantize.linear.float8.backend=scaled_mm"),
            "quantize.linear.float8.emulate: is on, but",
            id="emulate and a backend",
        ),
        pytest.param(
            MODEL,
            (*with_(FP8), "--quantize.linear.float8.recipe_name=columnwise"),
            "quantize.linear.float8.recipe_name",
            id="recipe",
        ),
    ],
)
def test_mistakes_end_with_2_and_leave_nothing(
    model: dict[str, Any], args: tuple[str, ...], names: str, tmp_path: Path
) -> None:
    outcome = run(write_job(tmp_path, model), tmp_path / "dump", *args, code=2)
    assert_one_line(outcome.err[0], names)
    assert not (tmp_path / "dump").exists()


def test_two_ranks_tell_a_mistake_once(job: Path, tmp_path: Path) -> None:
    """Also where it is only on one of them: a stage of a pipeline."""
    args = ("--parallelism.pipeline_parallel_degree=2", *with_(MX), "--quantize.linear.mx.filter_fqns=layers.2")
    outcome = run(job, tmp_path / "dump", *args, ranks=2, code=2)
    for err in outcome.err:
        assert_one_line(err, '"layers.2" matches none of the ')
    assert not (tmp_path / "dump").exists()


# torchtitan's files


@pytest.mark.parametrize(
    ("family", "converters", "sections"),
    [
        (
            "llama4",
            MX,
            '[quantize.linear.mx]\nfilter_fqns = ["output", "router.gate"]\n'
            '[quantize.grouped_mm.mx]\nfqns = ["experts"]\n',
        ),
        (
            "deepseek_v3",
            FP8,
            "[quantize.linear.float8]\nenable_fsdp_float8_all_gather = false\n"
            'precompute_float8_dynamic_scale_for_fsdp = false\nfilter_fqns = ["output", "router.gate"]\n'
            '[quantize.grouped_mm.float8]\nfqns = ["experts"]\n',
        ),
    ],
)
def test_torchtitans_settings(
    family: str, converters: tuple[str, ...], sections: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of its debug models, once their converters are listed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.toml").write_text(
        f'[model]\nname = "{family}"\nflavor = "debugmodel"\nhf_assets_path = "./tests/assets/tokenizer"\n'
        f'[training]\ndataset = "c4_test"\nseq_len = 16\nlocal_batch_size = 1\nsteps = 1\n{sections}'
    )
    outcome = train("--job.config_file=job.toml", *with_(converters))
    assert outcome.codes == [0], outcome.told
    assert "No effect" not in outcome.out[0]
    assert all(re.search(rf"{name}: (\d+) of \1 ", outcome.out[0]) for name in converters), outcome.out[0]


# A user's own


def test_the_converter_on_the_page(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of docs/low_precision.md, with the options that it is said to be used with."""
    page = PAGE.read_text()
    (source,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "@converter(" in block)
    (command,) = (line for line in page.splitlines() if "--experimental.custom_import" in line and "run_train" in line)
    name = re.findall(r"--experimental\.custom_import=(\w+)", command)[0]
    (tmp_path / f"{name}.py").write_text(source)
    options = [word for word in command.split() if word.startswith("--") and "config_file" not in word]

    def arrange(rank: int) -> None:
        import sys

        sys.path.insert(0, str(tmp_path))
        os.chdir(tmp_path)

    plain, noisy = (tmp_path / "plain", tmp_path / "noisy")
    run(job, plain, "--training.steps=3")
    outcome = run(job, noisy, "--training.steps=3", "--model.print_after_conversion", *options, before=arrange)
    assert "my.noise: 8 of 8 linear layers" in outcome.out[0]
    assert len([line for line in lines_of_table(outcome.out[0]) if "my.noise" in line]) == 4
    assert losses(noisy) != losses(plain)
    assert losses(noisy) == pytest.approx(losses(plain), rel=0.05)
    run(job, tmp_path / "again", "--training.steps=3", *options, before=arrange)
    assert losses(tmp_path / "again") == losses(noisy)
