"""What a converter is.

A converter is a torchao config and a handler: `register_quantize_module_handler(Config)` registers a function that
changes one module, and torchao's `quantize_` calls it for the modules of a model that the config wants. Values in a
state_dict stay plain tensors with the names that they had. A user's own converter is written as those here are:

    @converter("my.noise")
    @dataclass(frozen=True)
    class Noise(Converter):
        ...

    @register_quantize_module_handler(Noise)
    def _(module, config): ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
from torch import nn
from torchao.core.config import AOBaseConfig

from titanmoe.config.job_config import JobConfig


class Converter(AOBaseConfig):
    """Base of converters.

    Attributes:
        name: that in `model.converters`; also that of its section in the job config, if it has one.
        modules: what the modules that it may change are called, for people.
    """

    name: ClassVar[str]
    modules: ClassVar[str] = "modules"

    @property
    def backend_name(self) -> str:
        """What computes, where there is a choice."""
        return ""

    @classmethod
    def from_job(cls, config: JobConfig, device: torch.device) -> Converter:
        """The converter as the job config has it, for a model that will be on `device`.

        Raises:
            ConfigError: it cannot work there.
        """
        return cls()

    def may_change(self, module: nn.Module) -> bool:
        """Whether it is a kind of module that this converter is for."""
        return True

    def check(self, paths: dict[str, nn.Module]) -> None:
        """
        Args:
            paths: every module of the whole model, by its path.

        Raises:
            ConfigError: a setting names something that is not there.
        """

    def obstacle(self, path: str, module: nn.Module) -> str:
        """Why a module that may be changed stays as it is; "" if it does not.

        A reason in brackets is the user's own wish, and no obstacle to `quantize.strict`.
        """
        return ""

    def describe(self) -> str:
        """What products become, such as "MXFP8, emulated"."""
        return self.name


CONVERTERS: dict[str, type[Converter]] = {}
"""By name. Filled by `@converter` where modules are imported, and not changed otherwise."""

AnyConverter = TypeVar("AnyConverter", bound=type[Converter])


def converter(name: str) -> Callable[[AnyConverter], AnyConverter]:
    """Give a `Converter` its name in `model.converters`."""

    def register(cls: AnyConverter) -> AnyConverter:
        assert name not in CONVERTERS, name
        cls.name = name
        CONVERTERS[name] = cls
        return cls

    return register
