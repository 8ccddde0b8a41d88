"""What a converter is.

A converter is a torchao config and a handler: `register_quantize_module_handler(Config)` registers a function that
changes one module, and torchao's `quantize_` calls it for the modules of a model that the config wants. Values in a
state_dict stay plain tensors with the names that they had. A user's own converter is written as those here are; an
example is in docs/low_precision.md.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import ClassVar, TypeVar

import torch
from torch import nn
from torchao.core.config import AOBaseConfig

from titanmoe.config.errors import ConfigError
from titanmoe.config.job_config import JobConfig
from titanmoe.models.decoder import Decoder


class Converter(AOBaseConfig):
    """Base of converters.

    Attributes:
        name: that in `model.converters`.
        modules: what the modules that it may change are called, for people.
        goes_on_top: whether it adds to what an earlier converter made of a module.
    """

    name: ClassVar[str]
    modules: ClassVar[str] = "modules"
    goes_on_top: ClassVar[bool] = False

    @classmethod
    def from_job(cls, config: JobConfig, device: torch.device) -> Converter:
        """The converter as the job config has it, for a model that will be on `device`.

        Raises:
            ConfigError: it cannot work there.
        """
        return cls()

    @abstractmethod
    def may_change(self, module: nn.Module) -> bool:
        """Whether it is a kind of module that this converter is for. No such module has another one in it."""

    def check(self, modules: Mapping[str, nn.Module]) -> None:
        """
        Args:
            modules: all of the whole model, by path.

        Raises:
            ConfigError: a setting names something that is not there.
        """

    def unwanted(self, path: str, module: nn.Module) -> str:
        """Why the user has a module that may be changed stay as it is; "" if it is wanted."""
        return ""

    def misfit(self, module: nn.Module) -> str:
        """Why a module that is wanted cannot be changed; "" if it can. With `quantize.strict` it is an error."""
        return ""

    @property
    def result(self) -> str:
        """What modules become, in a word, for the table."""
        return self.name

    @property
    def backend_name(self) -> str:
        """What computes, where there is a choice."""
        return ""

    def backend_of(self, module: nn.Module) -> str:
        """The same for one module, where it is not that of all."""
        return self.backend_name

    def describe(self, paths: Collection[str], modules: Mapping[str, nn.Module]) -> str:
        """What modules become, for the line that says how many of them there are: " in MXFP8", say.

        Args:
            paths: theirs.
            modules: all of the whole model, by path, as they were.
        """
        return ""

    def parts(self, paths: Collection[str]) -> Iterable[tuple[Converter, Collection[str]]]:
        """What the modules at these paths are changed by: converters like this one, and the paths for each."""
        yield self, paths

    def finish(self, model: Decoder) -> None:
        """What is to be done to a model, or a part of one, when all of its modules are changed."""


CONVERTERS: dict[str, type[Converter]] = {}
"""By name. Filled by `@converter` where modules are imported, and not changed otherwise."""

AnyConverter = TypeVar("AnyConverter", bound=type[Converter])


def converter(name: str) -> Callable[[AnyConverter], AnyConverter]:
    """Give a `Converter` its name in `model.converters`.

    Raises:
        ConfigError: another one has it.
    """

    def register(cls: AnyConverter) -> AnyConverter:
        other = CONVERTERS.get(name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(
                f'there is a converter "{name}" already, {other.__qualname__} of {other.__module__}',
                where=f"{cls.__qualname__} of {cls.__module__}",
                mend="Give it another name.",
            )
        cls.name = name
        CONVERTERS[name] = cls
        return cls

    return register
