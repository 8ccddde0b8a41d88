"""Groups, AdamW against its equations in float64, and the optimizers on sharded parameters."""

from __future__ import annotations

import importlib.util
import io
import logging
import shutil

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.ranks import run_ranks
from titanmoe.config.errors import ConfigError
from titanmoe.training.optimizer import build_optimizer, parameter_groups
from titanmoe.training.schedule import LearningRate

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(4, 2, 8, 16) * 0.1)
        self.down_bias = nn.Parameter(torch.zeros(4, 16))


class Tiny(nn.Module):
    """One parameter of every kind; `mixed` is large enough for 8-bit state on each of two ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 16)
        self.norm = nn.RMSNorm(16)
        self.linear = nn.Linear(16, 16)
        self.experts = Experts()
        self.mixed = nn.Linear(64, 128, bias=False)

    def set_gradients(self, step: int) -> None:
        for index, parameter in enumerate(self.parameters()):
            whole = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + index))
            if isinstance(parameter, DTensor):
                local = torch.distributed.tensor.distribute_tensor(whole, parameter.device_mesh, parameter.placements)
                parameter.grad = local
            else:
                parameter.grad = whole


def names_of(group: dict, model: nn.Module) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


def test_groups() -> None:
    model = Tiny()
    decayed, exempt = parameter_groups(model, 0.1)
    assert names_of(decayed, model) == {"embedding.weight", "linear.weight", "experts.gate_up", "mixed.weight"}
    assert names_of(exempt, model) == {"norm.weight", "linear.bias", "experts.down_bias"}
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)


def test_groups_hold_only_what_trains_and_none_is_empty() -> None:
    model = Tiny().requires_grad_(False)
    model.norm.weight.requires_grad_()
    (group,) = parameter_groups(model, 0.1)
    assert names_of(group, model) == {"norm.weight"}


def test_a_tied_parameter_counts_once() -> None:
    model = Tiny()
    model.output = nn.Linear(16, 11, bias=False)
    model.output.weight = model.embedding.weight
    decayed, _ = parameter_groups(model, 0.1)
    assert sum(parameter is model.embedding.weight for parameter in decayed["params"]) == 1


def test_nothing_to_train() -> None:
    with pytest.raises(ConfigError, match=r"no parameter of the model.* requires a gradient"):
        build_optimizer(Tiny().requires_grad_(False), name="AdamW", implementation="fused", **SETTINGS)


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match="unknown optimizer 'Adamw'"):
        build_optimizer(Tiny(), name="Adamw", implementation="fused", **SETTINGS)


def adamw_by_hand(start: Tensor, grads: list[Tensor], decay: float) -> Tensor:
    value, first, second = start.double(), 0.0, 0.0
    (beta1, beta2), lr = SETTINGS["betas"], SETTINGS["lr"]
    for step, grad in enumerate((grad.double() for grad in grads), start=1):
        first, second = beta1 * first + (1 - beta1) * grad, beta2 * second + (1 - beta2) * grad**2
        value = value * (1 - lr * decay)
        update = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + SETTINGS["eps"])
        value = value - lr * update
    return value


def train(model: Tiny, name: str, implementation: str, num_steps: int = 3) -> dict[str, Tensor]:
    optimizer = build_optimizer(model, name=name, implementation=implementation, **SETTINGS)
    rate = LearningRate(optimizer, warmup_steps=0, total_steps=num_steps, decay_ratio=0.0)
    for step in range(1, num_steps + 1):
        model.set_gradients(step)
        rate.set(step)
        optimizer.step()
    return {
        name: parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        for name, parameter in model.named_parameters()
    }


def by_hand() -> dict[str, Tensor]:
    model = Tiny()
    grads: list[list[Tensor]] = []
    for step in (1, 2, 3):
        model.set_gradients(step)
        grads.append([parameter.grad for parameter in model.parameters()])
    decayed = names_of(parameter_groups(model, 0.1)[0], model)
    return {
        name: adamw_by_hand(parameter.detach(), [row[index] for row in grads], 0.1 if name in decayed else 0.0)
        for index, (name, parameter) in enumerate(model.named_parameters())
    }


@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused"])
def test_adamw_follows_its_equations(implementation: str) -> None:
    trained = train(Tiny(), "AdamW", implementation)
    for name, want in by_hand().items():
        torch.testing.assert_close(trained[name].double(), want, rtol=0, atol=1e-6, msg=name)


def test_the_implementation_asked_for_is_used() -> None:
    flags = {
        implementation: build_optimizer(Tiny(), name="AdamW", implementation=implementation, **SETTINGS).defaults
        for implementation in ("for-loop", "foreach", "fused")
    }
    assert {name: (flag["foreach"], flag["fused"]) for name, flag in flags.items()} == {
        "for-loop": (False, False),
        "foreach": (True, False),
        "fused": (False, True),
    }


def _train_sharded(name: str, implementation: str) -> dict[str, Tensor]:
    model = Tiny()
    fully_shard(model.mixed, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("efsdp",)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))
    return train(model, name, implementation)


@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused"])
def test_adamw_on_two_meshes_equals_one_process(implementation: str) -> None:
    want = train(Tiny(), "AdamW", implementation)
    for result in run_ranks(_train_sharded, 2, "AdamW", implementation):
        for name, value in result.items():
            torch.testing.assert_close(value, want[name], rtol=1e-6, atol=1e-7, msg=name)


def test_adamw_8bit_follows_adamw(caplog: pytest.LogCaptureFixture) -> None:
    """Small tensors keep float32 state; the large one is within 8-bit rounding of its moments."""
    with caplog.at_level(logging.INFO, logger="titanmoe"):
        model = Tiny()
        trained = train(model, "AdamW8bit", "fused")
    assert "uncompiled" in caplog.text
    for name, want in by_hand().items():
        moved = float((want - dict(Tiny().named_parameters())[name].detach()).norm())
        error = float((trained[name].double() - want).norm())
        assert error < moved * (0.05 if name == "mixed.weight" else 1e-4), name


def test_adamw_8bit_keeps_bytes_and_resumes_exactly() -> None:
    def steps(model: Tiny, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for step in numbers:
            model.set_gradients(step)
            optimizer.step()

    whole = Tiny()
    optimizer = build_optimizer(whole, name="AdamW8bit", implementation="fused", **SETTINGS)
    steps(whole, optimizer, range(1, 3))
    assert optimizer.state[whole.mixed.weight]["exp_avg"].codes.dtype == torch.uint8
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), whole.state_dict()), file)
    steps(whole, optimizer, range(3, 5))

    file.seek(0)
    saved, weights = torch.load(file, weights_only=True)
    resumed = Tiny()
    resumed.load_state_dict(weights)
    optimizer = build_optimizer(resumed, name="AdamW8bit", implementation="fused", **SETTINGS)
    optimizer.load_state_dict(saved)
    steps(resumed, optimizer, range(3, 5))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_adamw_8bit_on_two_meshes_equals_one_process() -> None:
    want = train(Tiny(), "AdamW8bit", "fused")
    for result in run_ranks(_train_sharded, 2, "AdamW8bit", "fused"):
        for name, value in result.items():
            torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-5, msg=name)


def test_adamw_8bit_on_a_gpu_needs_triton_and_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    with torch.device("meta"):  # any device that is not a CPU
        model = Tiny()
    with pytest.raises(ConfigError, match="Triton and a C compiler was not found"):
        build_optimizer(model, name="AdamW8bit", implementation="fused", **SETTINGS)
