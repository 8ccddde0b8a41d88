"""A run small enough to save, damage and resume many times: a model, an optimizer, counters and a data position."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from titanmoe.checkpoint.checkpointer import Checkpointer
from titanmoe.checkpoint.run_state import RunState


class TinyModel(nn.Module):
    """Uneven shapes, a stacked expert weight, a frozen parameter, a persistent buffer and one that is not."""

    def __init__(self, width: int = 6, hidden: int = 10) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.layers = nn.ModuleDict({"0": nn.Linear(width, width), "1": nn.Linear(width, width, bias=False)})
        self.experts = nn.Parameter(torch.randn(3, width, hidden) * 0.1)
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.register_buffer("bias", torch.zeros(3))
        self.register_buffer("cache", torch.ones(2), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers.values():
            x = x + layer(x).tanh()
        return torch.einsum("bd,edh->bh", x, self.experts).square().mean()


class Dict:
    """A JSON state that is a dict."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def state_dict(self) -> dict[str, Any]:
        return dict(self.values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = dict(state)


def merge_lanes(states: list[dict[str, Any]]) -> dict[str, Any]:
    return {"lanes": {lane: position for state in states for lane, position in state["lanes"].items()}}


class TinyRun:
    """Owns the objects and trains them; `optimizer` makes one from parameters."""

    def __init__(
        self,
        optimizer: Callable[..., Any] = torch.optim.AdamW,
        *,
        seed: int = 1,
        shard: bool = False,
        make_model: Callable[[], nn.Module] = TinyModel,
    ) -> None:
        torch.manual_seed(seed)
        self.model = make_model()
        if shard:
            for layer in self.model.layers.values():
                fully_shard(layer)
            fully_shard(self.model)
        self.optimizer = optimizer([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        self.counters = Dict(step=0, tokens_seen=0)
        self.schedule = Dict(last_lr=0.1 + 0.2)
        self.data = Dict(lanes={})
        self.losses: list[float] = []

    def state(self) -> RunState:
        return RunState(
            self.model, [self.optimizer], self.counters, self.schedule, self.data, merge_data=merge_lanes, seed=3
        )

    def train(self, num_steps: int, rank: int = 0) -> None:
        for _ in range(num_steps):
            tokens = torch.randint(0, 7, (4,))  # from the global generator, so that its state matters
            loss = self.model(tokens)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.model.bias.add_(0.125)
            self.counters.values["step"] += 1
            self.counters.values["tokens_seen"] += 4
            self.data.values["lanes"][str(rank)] = self.counters.values["step"]
            self.losses.append(loss.item())


def all_tensors(run: TinyRun) -> dict[str, Tensor]:
    """Model and optimizer tensors, whole, as plain float copies: what must be equal after a round trip."""
    found = dict(run.model.state_dict())
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    for parameter, state in run.optimizer.state.items():
        found.update({f"{names[id(parameter)]}.{key}": value for key, value in state.items()})
    return {name: whole(tensor) for name, tensor in found.items()}


def whole(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        if isinstance(tensor, DTensor):
            local = tensor.to_local()
            if hasattr(local, "dequantize") and hasattr(local, "codes"):
                local = local.dequantize()
            tensor = DTensor.from_local(
                local, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
            ).full_tensor()
        elif hasattr(tensor, "codes"):
            tensor = tensor.dequantize()
        return tensor.detach().clone()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def save_steps(folder: Path, *steps: int, model_only: tuple[int, ...] = (), **options: Any) -> TinyRun:
    """Train to each of `steps` and save there; returns the run."""
    run = TinyRun()
    checkpointer = Checkpointer(folder, **options)
    for step in steps:
        run.train(step - run.counters.values["step"])
        checkpointer.save(step, run.state(), model_only=step in model_only)
    checkpointer.close()
    return run


def resume(folder: Path, run: TinyRun | None = None, step: int = -1, **options: Any) -> tuple[int | None, TinyRun]:
    """Load into a fresh run (of other values) and say which step came."""
    run = run or TinyRun(seed=99)
    checkpointer = Checkpointer(folder)
    loaded = checkpointer.load(run.state(), step, **options)
    checkpointer.close()
    return loaded, run
