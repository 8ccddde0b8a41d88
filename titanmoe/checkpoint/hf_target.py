"""The folder that an export becomes: what it may replace, its small files, and how it takes its place."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch.distributed as dist

from titanmoe.checkpoint.adapter_files import CONFIG_NAME as ADAPTER_CONFIG_NAME
from titanmoe.checkpoint.adapter_files import WEIGHTS_NAME as ADAPTER_WEIGHTS_NAME
from titanmoe.checkpoint.files import sync_folder, write_whole
from titanmoe.checkpoint.hf_folder import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    TOKENIZER_NAMES,
    read_json_object,
)
from titanmoe.config.errors import ConfigError
from titanmoe.data.tokenizer import load_tokenizer
from titanmoe.parallel.ranks import Ranks
from titanmoe.training.errors import NotExportedError

logger = logging.getLogger("titanmoe.checkpoint")


def write_folder(
    target: Path,
    what: str,
    ranks: Ranks,
    prepare: Callable[[Path | None], None],
    write: Callable[[Path | None], None],
    find_difference: Callable[[Path | None], str] | None,
) -> bool:
    """Make a folder that is there whole, or not at all: written beside its place, compared, and renamed.

    Every rank calls each function in turn. The one that writes gives them the folder to write, the others None.

    Args:
        target: its place, absolute.
        what: is written, "model" or "adapter".
        prepare: checks the target, makes the folder, and writes what is small.
        find_difference: what is wrong with the folder, "" if nothing; None if it is not compared.

    Returns:
        Whether this rank wrote it.

    Raises:
        ConfigError: the disk is full or fails, or one of the functions says so.
        NotExportedError: there is a difference.
        In any case nothing is left behind.
    """
    temporary = target.parent / f".{target.name}.{uuid4().hex[:8]}.tmp"
    folder = temporary if not dist.is_initialized() or dist.get_rank() == 0 else None
    new_parents = [parent for parent in target.parents if not parent.exists()]
    try:
        ranks.on_all(lambda: prepare(folder))
        ranks.on_all(lambda: write(folder))
        found = [""] if find_difference is None else ranks.on_all(lambda: find_difference(folder))
        if any(found):
            text = f"{target}: what was written is not the {what}: {next(filter(None, found))}"
            raise NotExportedError(f"{text}\n  Nothing was left behind.")
        ranks.on_all(lambda: take_place(folder, target) if folder else None)
    except OSError as error:
        raise ConfigError(
            f"writing the {what} failed: {error.strerror}",
            where=str(error.filename or target),
            mend="Nothing was left behind. Free some space, or choose another folder.",
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in new_parents:
                with suppress(OSError):  # it holds the target, or was made by somebody else meanwhile
                    parent.rmdir()
    return folder is not None


def check_target(target: Path, overwrite: bool, num_bytes: int) -> None:
    """Whether a folder of this many bytes can be written to the (absolute) path.

    Raises:
        ConfigError: it is in use, its place cannot be written to, or there is too little space.
    """
    if target.exists() and not target.is_dir():
        raise ConfigError("is a file, not a folder", where=str(target))
    present = sorted(file.name for file in target.iterdir()) if target.is_dir() else []
    if present and not overwrite:
        raise ConfigError(
            f"the folder is not empty ({present[0]})",
            where=str(target),
            mend="Name a new one, or ask to overwrite it (overwrite=True, --overwrite).",
        )
    if foreign := [name for name in present if not _is_of_an_export(name)]:
        raise ConfigError(
            f"the folder holds files that are not of a model export ({foreign[0]}), which are never deleted",
            where=str(target),
            mend="Name a new folder, or move them away.",
        )
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir():
        raise ConfigError("is a file, not a folder", where=str(parent))
    if not os.access(parent, os.W_OK):
        raise ConfigError("the folder cannot be written to", where=str(parent), mend="Name another one.")
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        sizes = f"the weights take {num_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        raise ConfigError(f"too little space: {sizes}", where=str(target))


def _is_of_an_export(name: str) -> bool:
    known = {CONFIG_NAME, GENERATION_CONFIG_NAME, INDEX_NAME, SINGLE_NAME, *TOKENIZER_NAMES}
    known |= {ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME}
    return name in known or (name.startswith("model-") and name.endswith(".safetensors"))


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files.

    Raises:
        ConfigError: there are none.
    """
    names = [name for name in TOKENIZER_NAMES if (source / name).is_file()]
    if not names:
        raise ConfigError("the folder has no tokenizer (tokenizer.json)", where=str(source))
    for name in names:
        write_whole(folder / name, (source / name).read_bytes())


def copy_generation_config(source: Path, folder: Path) -> dict[str, Any]:
    """Copy generation_config.json, or make it from the tokenizer where there is none.

    Returns:
        The ids that config.json holds too (some readers look for them there, and take the model class's defaults where
        they are missing), from generation_config.json or else from the config.json in `source`.

    Raises:
        ConfigError: one of these files holds no JSON object.
    """
    if (source / GENERATION_CONFIG_NAME).is_file():
        values = read_json_object(source / GENERATION_CONFIG_NAME)
        write_whole(folder / GENERATION_CONFIG_NAME, (source / GENERATION_CONFIG_NAME).read_bytes())
    else:
        values = _token_ids(source)
        write_json(folder / GENERATION_CONFIG_NAME, values)
    others = read_json_object(source / CONFIG_NAME) if (source / CONFIG_NAME).is_file() else {}
    ids = {key: others.get(key) if values.get(key) is None else values[key] for key in _IDS}
    return {key: number for key, number in ids.items() if number is not None}


_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _token_ids(folder: Path) -> dict[str, int]:
    """Where generation begins, ends and is padded, as far as the tokenizer says it."""
    try:
        tokenizer = load_tokenizer(str(folder))
    except ConfigError as error:
        logger.info("%s names no token that ends a text: %s", GENERATION_CONFIG_NAME, error)
        return {}
    ids = zip(_IDS, (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id), strict=True)
    return {key: number for key, number in ids if number is not None}


def take_place(temporary: Path, target: Path) -> None:
    """Put the finished folder where the target is to be. Between two renames, an old target is beside it, whole."""
    if not target.exists() or not any(target.iterdir()):
        temporary.replace(target)
    else:
        old = target.with_name(f"{temporary.name}.old")
        target.replace(old)
        try:
            temporary.replace(target)
        except OSError:
            old.replace(target)
            raise
        shutil.rmtree(old)
    sync_folder(target.parent)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())
