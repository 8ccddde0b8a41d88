"""What is the job: JobConfig dataclasses, TOML files, the command line, validation. Imports no torch."""

from __future__ import annotations

from titanmoe.config.command_line import wants_help
from titanmoe.config.errors import ConfigError
from titanmoe.config.job_config import JobConfig
from titanmoe.config.render import help_text, to_explained_toml, to_toml
from titanmoe.config.resolve import Resolved, load_config, resolve
from titanmoe.config.validate import validate, validate_keys

__all__ = [
    "ConfigError",
    "JobConfig",
    "Resolved",
    "help_text",
    "load_config",
    "resolve",
    "to_explained_toml",
    "to_toml",
    "validate",
    "validate_keys",
    "wants_help",
]
