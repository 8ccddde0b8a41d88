"""The benchmarks of products: what is timed, in which order, and that the figures belong together."""

from __future__ import annotations

import json
import statistics
from types import ModuleType
from typing import Any

import pytest
import torch

from titanmoe.benchmarks import device_timing, grouped_mm, linear, moe_layer, products
from titanmoe.benchmarks.products import Size
from titanmoe.config import ConfigError
from titanmoe.ops.emulated import EmulatedKernels

CPU = ("--device", "cpu", "--rounds", "1")
GROUPED = ("--m", "50", "--n", "64", "--k", "32", "--g", "3")
LINEAR = ("--m", "24", "--n", "64", "--k", "32")
LAYER = ("--tokens", "20", "--experts", "8")
COMMANDS = [(grouped_mm, GROUPED), (linear, LINEAR), (moe_layer, LAYER)]


@pytest.fixture(autouse=True)
def _one_call_and_a_small_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_timing, "_TURN_SECONDS", 0.0)
    small = torch.ones(64, 64)
    monkeypatch.setattr(products, "plain_product", lambda device, dtype: (lambda: small @ small, 2 * 64**3))


def report(capsys: pytest.CaptureFixture[str], command: ModuleType, *options: str) -> dict[str, Any]:
    assert command.main([*CPU, "--json", *options]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(("command", "sizes"), COMMANDS)
def test_figures_belong_together(
    capsys: pytest.CaptureFixture[str], command: ModuleType, sizes: tuple[str, ...]
) -> None:
    found = report(capsys, command, *sizes, "--emulate")
    usual = {"fp8_rowwise", "mxfp8"} | ({"fp8_tensorwise"} if command is linear else set())
    assert found["backends"].keys() == usual
    assert {backend for each in found["backends"].values() for backend in each.values()} == {"emulated"}
    for row in found["rows"]:
        assert row["left_out"] == {} and row["products"].keys() == usual | {"bf16"}
        plain = row["products"]["bf16"]["seconds"]["median"]
        for product in row["products"].values():
            seconds = product["seconds"]["median"]
            assert product["seconds"] == {"median": seconds, "min": seconds, "max": seconds}  # of a single round
            assert product["speedup"]["median"] == pytest.approx(plain / seconds)
            assert product["tflops"] == pytest.approx(row["flops"] / seconds / 1e12)
            assert product["share_of_matmul_rate"] == pytest.approx(product["tflops"] / row["matmul_tflops"])


def test_several_rounds_give_the_median_of_their_ratios() -> None:
    seconds = {"bf16": [1.0, 4.0, 3.0], "mxfp8": [2.0, 2.0, 1.0]}
    found = products.figures(seconds, flops=6 * 10**12, matmul_rate=4e12)
    assert found["matmul_tflops"] == 4.0
    assert found["products"]["mxfp8"]["speedup"] == {"median": 2.0, "min": 0.5, "max": 3.0}
    assert found["products"]["bf16"]["tflops"] == 2.0
    assert found["products"]["bf16"]["share_of_matmul_rate"] == 0.5


def test_flops_are_those_of_the_products_that_are_computed(capsys: pytest.CaptureFixture[str]) -> None:
    """2 M N K for each of output, gradient of the input and, if they learn, gradient of the weights."""
    one = {grouped_mm: 2 * 50 * 64 * 32, linear: 2 * 24 * 64 * 32}
    for command, sizes in COMMANDS[:2]:
        for options, num_products, weights in (((), 3, "trainable"), (("--frozen",), 2, "frozen")):
            (row,) = report(capsys, command, *sizes, *options)["rows"]
            assert (row["flops"], row["weights"]) == (num_products * one[command], weights)
    trainable, frozen = report(capsys, moe_layer, *LAYER)["rows"]
    # 20 tokens of 256 through 8 of 8 experts of 3 matrices of 768; a router for 8.
    experts, router = 20 * 8 * 3 * 2 * 256 * 768, 20 * 2 * 256 * 8
    assert trainable["size"] == {"tokens": 20, "dim": 256, "hidden": 768, "experts": 8, "top_k": 8}
    assert trainable["flops"] == 3 * (experts + router)
    assert frozen["flops"] == 2 * experts + 3 * router


@pytest.mark.parametrize(("command", "sizes"), COMMANDS[:2])
def test_frozen_weights_get_no_gradient_and_are_quantised_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: ModuleType, sizes: tuple[str, ...]
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("a gradient of weights")

    quantized = []
    quantize = EmulatedKernels.quantize_weights

    def counted(self: EmulatedKernels, w: Any, along: Any) -> Any:
        quantized.append(along)
        return quantize(self, w, along)

    monkeypatch.setattr(EmulatedKernels, "quantize_weights", counted)
    monkeypatch.setattr(EmulatedKernels, "weight_gradient", refuse)
    report(capsys, command, *sizes, "--emulate", "--formats", "mxfp8", "--frozen")
    assert quantized == ["in", "out"]
    with pytest.raises(RuntimeError, match="a gradient of weights"):
        report(capsys, command, *sizes, "--emulate")


def test_a_layer_is_timed_with_experts_that_learn_and_frozen_ones(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = []
    compute = EmulatedKernels.weight_gradient

    def counted(self: EmulatedKernels, dy: Any, x: Any, offsets: Any) -> Any:
        gradients.append(offsets is not None)
        return compute(self, dy, x, offsets)

    monkeypatch.setattr(EmulatedKernels, "weight_gradient", counted)
    trainable, frozen = report(capsys, moe_layer, *LAYER, "--emulate", "--formats", "mxfp8")["rows"]
    assert (trainable["weights"], frozen["weights"]) == ("trainable", "frozen")
    # Two calls to warm up, one to see how long it takes, one that is timed; two products in each.
    assert gradients == [True] * 8
    for name in ("bf16", "mxfp8"):
        times = frozen["products"][name]["seconds"]["median"], trainable["products"][name]["seconds"]["median"]
        assert frozen["products"][name]["of_trainable"]["median"] == pytest.approx(times[0] / times[1])
        assert frozen["products"][name]["peak_bytes"] is None  # a CPU does not tell
    assert trainable["group_rows"] == {"min": 20, "max": 20}  # 8 of 8


def test_frozen_experts_in_few_bits(capsys: pytest.CaptureFixture[str]) -> None:
    trainable, frozen = report(capsys, moe_layer, *LAYER, "--formats", "--bases", "FP8", "NF4")["rows"]
    assert trainable["products"].keys() == {"bf16"} and frozen["products"].keys() == {"bf16", "FP8", "NF4"}
    assert frozen["products"]["NF4"]["experts"] == "dequantised in pieces"
    assert frozen["products"]["NF4"]["speedup"]["median"] > 0
    assert moe_layer.main([*CPU, *LAYER, "--formats", "--bases", "FP8, native"]) == 2
    assert "this is a cpu device" in capsys.readouterr().err


def test_a_model_s_layer_has_its_sizes_and_an_uneven_router(capsys: pytest.CaptureFixture[str]) -> None:
    spec = moe_layer.PRESETS["cpu"]
    trainable, _ = report(capsys, moe_layer, "--tokens", "64")["rows"]
    assert trainable["size"]["experts"] == spec.num_experts == 16
    rows = trainable["group_rows"]
    assert rows["min"] < 64 * 8 / 16 * 0.8 < 64 * 8 / 16 * 1.2 < rows["max"]


@pytest.mark.parametrize(("command", "sizes"), COMMANDS)
def test_formats_without_hardware_are_left_out_unless_they_are_to_be_emulated(
    capsys: pytest.CaptureFixture[str], command: ModuleType, sizes: tuple[str, ...]
) -> None:
    found = report(capsys, command, *sizes, "--formats", "mxfp8")
    assert found["backends"] == {}
    for row in found["rows"]:
        assert list(row["products"]) == ["bf16"]
        assert "cpu device" in row["left_out"]["mxfp8"] and "--emulate" in row["left_out"]["mxfp8"]


@pytest.mark.parametrize(("command", "sizes"), COMMANDS)
def test_the_table_says_what_is_emulated(
    capsys: pytest.CaptureFixture[str], command: ModuleType, sizes: tuple[str, ...]
) -> None:
    assert command.main([*CPU, *sizes, "--emulate", "--formats", "mxfp8"]) == 0
    table = capsys.readouterr().out
    for words in ("mxfp8 (emulated)", "says nothing about its speed", "of matmul", "trainable"):
        assert words in table
    assert ("of trainable" in table) == (command is moe_layer)
    assert "peak GiB" not in table
    assert command.main([*CPU, *sizes, "--formats", "mxfp8"]) == 0
    assert "mxfp8 left out: " in capsys.readouterr().out


def test_features_that_a_format_cannot_have(capsys: pytest.CaptureFixture[str]) -> None:
    odd = ("--m", "24", "--n", "48", "--k", "40", "--g", "2", "--emulate")
    (row,) = report(capsys, grouped_mm, *odd)["rows"]
    assert list(row["products"]) == ["bf16"]
    assert row["left_out"] == {
        "fp8_rowwise": "40 features: not a multiple of 16",
        "mxfp8": "48 and 40 features: not a multiple of 32",
    }


@pytest.mark.parametrize(("command", "rows"), [(grouped_mm, "--m"), (linear, "--m"), (moe_layer, "--tokens")])
def test_presets_for_gpus_are_refused_on_a_cpu(
    capsys: pytest.CaptureFixture[str], command: ModuleType, rows: str
) -> None:
    assert command.main([*CPU, "--preset", "qwen3_30b_a3b"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --preset: the sizes of qwen3_30b_a3b are for a GPU")
    with pytest.raises(SystemExit) as stop:
        command.main([*CPU, rows, "0"])
    assert stop.value.code == 2


def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert grouped_mm.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err == "error: --device: torch finds no GPU here\n"


def test_presets() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for presets in (grouped_mm.PRESETS, linear.PRESETS, moe_layer.PRESETS):
        names = list(presets)
        assert products.choose_preset(None, names, cpu, False) == names[0] == "cpu"
        assert products.choose_preset(None, names, cuda, False) == names[1]
        assert products.choose_preset(names[2], names, cpu, True) == names[2]
        with pytest.raises(ConfigError):
            products.choose_preset(names[2], names, cpu, False)
    # torchao's tables.
    assert {(size.n, size.k) for size in grouped_mm.PRESETS["llama4"]} == {(8192, 5120)}
    assert {(size.n, size.k) for size in grouped_mm.PRESETS["deepseek_v3"]} == {(2048, 7168)}
    assert {size.g for size in grouped_mm.PRESETS["llama4"]} == {1, 2, 4, 8, 16}
    for name, experts in moe_layer.PRESETS.items():
        if name not in ("cpu", "llama4", "deepseek_v3"):
            spec = moe_layer.layer_spec(experts)[1].feed_forward
            dim = moe_layer.layer_spec(experts)[0]
            gate_up_and_down = {(2 * spec.hidden_dim, dim), (dim, spec.hidden_dim)}
            assert {(size.n, size.k) for size in grouped_mm.PRESETS[name]} == gate_up_and_down
            assert {size.g for size in grouped_mm.PRESETS[name]} == {spec.num_experts}


def test_dims_that_are_given_take_the_place_of_the_preset_s(capsys: pytest.CaptureFixture[str]) -> None:
    rows = report(capsys, grouped_mm, "--m", "8", "16", "--n", "32", "--k", "16")["rows"]
    assert [Size(**row["size"]) for row in rows] == [Size(8, 32, 16, 8), Size(16, 32, 16, 8)]


def test_groups_are_as_uneven_as_a_router_makes_them() -> None:
    assert grouped_mm.group_sizes(10, 4, is_even=True) == [3, 3, 2, 2]
    sizes = grouped_mm.group_sizes(100_000, 128, is_even=False)
    assert sum(sizes) == 100_000 and sizes == grouped_mm.group_sizes(100_000, 128, is_even=False)
    spread = statistics.pstdev(sizes) / statistics.fmean(sizes)
    # Of a log-normal variable: sqrt(exp(0.5 ** 2) - 1) = 0.53.
    assert 0.4 < spread < 0.7


def test_contenders_take_turns() -> None:
    calls: list[str] = []
    contenders = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = device_timing.seconds_in_turn(contenders, 2, torch.device("cpu"))
    assert {name: len(of_rounds) for name, of_rounds in seconds.items()} == {"a": 2, "b": 2}
    assert "".join(calls) == "aaa" + "bbb" + "ab" + "ab"  # each warms up twice and is timed once


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("command", "sizes"),
    [
        (grouped_mm, ("--m", "1000", "--n", "512", "--k", "256", "--g", "4")),
        (linear, ("--m", "512", "--n", "512", "--k", "256")),
        (moe_layer, ("--preset", "cpu")),
    ],
)
def test_on_a_gpu(capsys: pytest.CaptureFixture[str], command: ModuleType, sizes: tuple[str, ...]) -> None:
    assert command.main(["--device", "cuda", "--rounds", "2", "--json", *sizes]) == 0
    found = json.loads(capsys.readouterr().out)
    for row in found["rows"]:
        assert 0 < row["products"]["bf16"]["seconds"]["median"] < 1
        if command is moe_layer:
            assert row["products"]["bf16"]["peak_bytes"] > 3 * 16 * 768 * 256 * 2  # the weights
