"""`config.toml` in the folder of a run: the resolved config it was last started with."""

from __future__ import annotations

import logging
from pathlib import Path

from titanmoe.checkpoint.files import write_whole
from titanmoe.config.changes import changes
from titanmoe.config.errors import ConfigError
from titanmoe.config.job_config import JobConfig
from titanmoe.config.render import to_toml
from titanmoe.config.resolve import resolve

logger = logging.getLogger("titanmoe")

CONFIG_NAME = "config.toml"


def write_config(folder: Path, config: JobConfig, also_as: str | None = None) -> None:
    """Make the folder and write `config.toml` into it, and a copy of another name.

    Raises:
        ConfigError: it cannot be written.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in filter(None, (CONFIG_NAME, also_as)):
            write_whole(folder / name, to_toml(config).encode())
    except OSError as error:
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise ConfigError(
            f"cannot write into {folder}: {error.strerror}",
            where="job.dump_folder",
            mend="Name a folder that can be written and has room.",
        ) from error


def log_changes(folder: Path, config: JobConfig) -> None:
    """Name the settings that decide what is learned and differ from those the run was last started with."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        return
    try:
        before = resolve(file=str(path)).config
    except ConfigError as error:
        logger.info("changes since the last run are not known, as its config cannot be read: %s", error)
        return
    for line in changes(before, config):
        logger.info("changed since the last run: %s", line)
