"""What a checkpoint keeps of a run, and how it is taken out of live objects and put back.

Tensors are named `model.<name>` and `optimizer.<parameter name>.<state>`, so that any layout finds its own.
Everything else is JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from titanmoe.checkpoint.model_tensors import model_tensors


class JsonState(Protocol):
    """An object whose state is a JSON-able dict: string keys, lists, numbers, strings, booleans, None."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class RunState:
    """The parts of a run, as the trainer owns them.

    Attributes:
        model: parameters and persistent buffers are kept; plain tensors (equal on every rank that has them) or
            DTensors. Ranks may have different ones.
        optimizers: states are kept by parameter name. Hyperparameters are not: they come from the config.
        train_state: counters (step, tokens seen, ...), equal on every rank.
        lr_scheduler: equal on every rank.
        data: position in the data; every rank gives its own and gets back all of them merged.
        merge_data: makes one dict of every rank's, in rank order.
        seed: random numbers start from it, the step and the rank when a run resumes on another number of ranks.
    """

    model: nn.Module
    optimizers: Sequence[Optimizer]
    train_state: JsonState
    lr_scheduler: JsonState | None
    data: JsonState | None
    merge_data: Callable[[list[dict[str, Any]]], dict[str, Any]]
    seed: int = 0


def named_model_tensors(model: nn.Module, trained_only: bool = False) -> dict[str, Tensor]:
    """Parameters and persistent buffers as `model.<name>`; with `trained_only`, without parameters that are frozen."""
    return {
        f"model.{name}": tensor
        for name, tensor in model_tensors(model).items()
        if not trained_only or tensor.requires_grad or not isinstance(tensor, nn.Parameter)
    }


def optimizer_tensors(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Optimizer states as `optimizer.<parameter name>.<state>`; none for parameters that were never stepped."""
    found = {}
    for name, parameter, optimizer in _named_parameters(model, optimizers):
        for key, value in optimizer.state.get(parameter, {}).items():
            assert isinstance(value, Tensor), f"optimizer state {key} of {name} is a {type(value).__name__}"
            found[f"optimizer.{name}.{key}"] = value
    return found


def materialize_optimizers(model: nn.Module, optimizers: Sequence[Optimizer], stored: Collection[str]) -> list[str]:
    """Give parameters the (zero) state that their first step would make, if the checkpoint has states for them.

    Optimizers create states in their first step, so one step is taken with zero gradients at learning rate zero, which
    moves no parameter. Returns the names of parameters that are trained now and have no state in the checkpoint.
    """
    prefixes = {name.rpartition(".")[0] for name in stored if name.startswith("optimizer.")}
    fresh, waiting = [], []
    for name, parameter, optimizer in _named_parameters(model, optimizers):
        if f"optimizer.{name}" not in prefixes:
            fresh.append(name)
        elif not optimizer.state.get(parameter):
            waiting.append(parameter)
    if waiting:
        _step_of_nothing(optimizers, waiting)
    return fresh


def check_json(value: Any, where: str) -> None:
    """Raise TypeError, naming the place, if `value` would not come back from JSON as it is."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}, which is not a string")
            check_json(item, f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_json(item, f"{where}[{index}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise TypeError(f"{where} is a {type(value).__name__}, which JSON cannot keep")


def _named_parameters(model: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[tuple[str, Tensor, Optimizer]]:
    names = {id(tensor): name for name, tensor in model_tensors(model).items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert id(parameter) in names, f"an optimizer holds a tensor {tuple(parameter.shape)} not of the model"
                yield names[id(parameter)], parameter, optimizer


def _step_of_nothing(optimizers: Sequence[Optimizer], parameters: Sequence[Tensor]) -> None:
    chosen = {id(parameter) for parameter in parameters}
    everything = [
        parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
    ]
    gradients = [parameter.grad for parameter in everything]
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    try:
        for parameter in everything:
            parameter.grad = torch.zeros_like(parameter) if id(parameter) in chosen else None
        # torchao compiles its step; for one step of zeros that would only cost time.
        with torch.compiler.set_stance("force_eager"):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    rate = group["lr"]
                    group["lr"] = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
                optimizer.step()
    finally:
        for parameter, gradient in zip(everything, gradients, strict=True):
            parameter.grad = gradient
        for optimizer, saved in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, saved, strict=True):
                group["lr"] = rate
