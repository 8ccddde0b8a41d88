"""The keys of converters: what contradicts itself, what has no effect, and what is told of a change."""

from __future__ import annotations

import pytest

from titanmoe.config import ConfigError, load_config, resolve, validate_keys
from titanmoe.config.changes import changes, config_fingerprint
from titanmoe.config.sections.quantize import CONVERTERS
from titanmoe.converters.apply import CONVERTERS as REGISTERED


def listed(*names: str) -> str:
    return f"--model.converters={','.join(names)}"


def test_every_name_of_the_config_is_registered() -> None:
    assert {name for name in REGISTERED if name.startswith(("quantize.", "lora"))} == set(CONVERTERS)


@pytest.mark.parametrize(
    ("args", "where", "message"),
    [
        ([listed("float8")], "model.converters", "Did you mean quantize.linear.float8?"),
        ([listed("quantize.grouped_mm.mxfp8")], "model.converters", "Did you mean quantize.grouped_mm.mx?"),
        ([listed("@@@")], "model.converters", "\n  They are quantize.linear.float8, quantize.linear.mx, "),
        ([listed(CONVERTERS[1], CONVERTERS[0], CONVERTERS[1])], "model.converters", "is there 2 times"),
        (
            [listed(CONVERTERS[1]), "--quantize.linear.mx.emulate", "--quantize.linear.mx.backend=torchao"],
            "quantize.linear.mx.emulate",
            'is on, but quantize.linear.mx.backend = "torchao"',
        ),
        (
            [listed(CONVERTERS[0]), "--quantize.linear.float8.enable_fsdp_float8_all_gather"],
            "quantize.linear.float8.enable_fsdp_float8_all_gather",
            "not supported yet",
        ),
    ],
)
def test_mistakes_are_found_without_a_model(args: list[str], where: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate_keys(load_config(None, args))
    assert error.value.where == where
    assert message in str(error.value)


@pytest.mark.parametrize(
    "args",
    [
        [listed(*CONVERTERS)],
        [listed("my.noise"), "--experimental.custom_import=my_noise"],
        [listed(CONVERTERS[1]), "--quantize.linear.mx.emulate", "--quantize.linear.mx.backend=emulated"],
        ["--quantize.linear.mx.emulate", "--quantize.linear.mx.backend=torchao"],  # not listed
        ["--quantize.linear.float8.enable_fsdp_float8_all_gather"],
    ],
)
def test_no_mistakes(args: list[str]) -> None:
    validate_keys(load_config(None, args))


def test_settings_of_what_is_not_listed_have_no_effect_and_say_so() -> None:
    settings = ["--quantize.linear.mx.emulate", "--quantize.grouped_mm.mx.fqns=layers.1"]
    assert resolve(settings).notes == (
        "No effect in a run, as quantize.linear.mx is not in model.converters: "
        "quantize.linear.mx.emulate = true (command line)",
        "No effect in a run, as quantize.grouped_mm.mx is not in model.converters: "
        'quantize.grouped_mm.mx.fqns = ["layers.1"] (command line)',
    )
    assert resolve([*settings, listed("quantize.linear.mx", "quantize.grouped_mm.mx")]).notes == ()
    plain, set_ = load_config(None), load_config(None, settings)
    assert config_fingerprint(plain) == config_fingerprint(set_) and not changes(plain, set_)


def test_what_is_told_of_a_change() -> None:
    """A converter that comes or goes is a line; its settings are told where it was and is there."""
    mx = listed("quantize.linear.mx")
    rceil = "--quantize.linear.mx.recipe_name=mxfp8_cublas_rceil"
    plain, floor, ceil = load_config(None), load_config(None, [mx]), load_config(None, [mx, rceil])
    assert changes(plain, ceil) == ['model.converters: [] -> ["quantize.linear.mx"]']
    assert changes(ceil, plain) == ['model.converters: ["quantize.linear.mx"] -> []']
    assert changes(floor, ceil) == ['quantize.linear.mx.recipe_name: "mxfp8_cublas" -> "mxfp8_cublas_rceil"']
    assert len({config_fingerprint(config) for config in (plain, floor, ceil)}) == 3
