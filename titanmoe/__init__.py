"""titanmoe: pretrain and fine-tune Mixture-of-Experts language models from one TOML file.

The names below are the public library. Each is imported on first use, so that `import titanmoe` imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titanmoe.checkpoint.pretrained import from_pretrained, load_adapter, save_adapter, save_pretrained
    from titanmoe.config import ConfigError, JobConfig, load_config
    from titanmoe.converters.apply import convert
    from titanmoe.trainer import Trainer
    from titanmoe.training.loss import causal_lm_loss

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "JobConfig",
    "Trainer",
    "__version__",
    "causal_lm_loss",
    "convert",
    "from_pretrained",
    "load_adapter",
    "load_config",
    "save_adapter",
    "save_pretrained",
]

_HOME_OF = {
    "ConfigError": "titanmoe.config",
    "JobConfig": "titanmoe.config",
    "Trainer": "titanmoe.trainer",
    "causal_lm_loss": "titanmoe.training.loss",
    "convert": "titanmoe.converters.apply",
    "from_pretrained": "titanmoe.checkpoint.pretrained",
    "load_adapter": "titanmoe.checkpoint.pretrained",
    "load_config": "titanmoe.config",
    "save_adapter": "titanmoe.checkpoint.pretrained",
    "save_pretrained": "titanmoe.checkpoint.pretrained",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'titanmoe' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value  # the next access does not come here again
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
