"""A model folder in Hugging Face layout: what is in it, from its small files and headers alone."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from titanmoe.checkpoint.safetensors_io import TensorInfo, read_header
from titanmoe.config.errors import ConfigError

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
GENERATION_CONFIG_NAME = "generation_config.json"
TOKENIZER_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def require_folder(path: str | Path) -> Path:
    """The folder, if it is one.

    Raises:
        ConfigError: there is no such folder; for a name that looks like a hub's, how to get a local copy.
    """
    folder = Path(os.path.expanduser(path))
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConfigError("is a file, not a model folder", where=str(path), mend="Name its folder.")
    mend = ""
    if _HUB_NAME.fullmatch(str(path)):
        mend = f"Nothing is downloaded here. Get a local copy with `hf download {path} --local-dir DIR` and name DIR."
    raise ConfigError("no such folder", where=str(path), mend=mend)


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        ConfigError: no folder, no config.json, or not a JSON object.
    """
    folder = require_folder(path)
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise ConfigError(f"the folder has no {CONFIG_NAME}", where=str(folder), mend=_only_contains(folder))
    return read_json_object(file)


def list_tensors(path: str | Path) -> dict[str, TensorInfo]:
    """Every tensor of the folder's safetensors files, from the index (if there is one) and the files' headers.

    Raises:
        ConfigError: no weights, weights in pickle format only, a file that the index names is missing or damaged, a
            file and the index disagree.
    """
    folder = require_folder(path)
    index_file = folder / INDEX_NAME
    if index_file.is_file():
        return _list_sharded(folder, index_file)
    if (folder / SINGLE_NAME).is_file():
        return read_header(folder / SINGLE_NAME)
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    if len(found) == 1:
        return read_header(folder / found[0])
    if found:
        raise ConfigError(
            f"{len(found)} safetensors files ({found[0]}, ...) without {INDEX_NAME} that says which belong together",
            where=str(folder),
            mend="Copy the index from where the files came from.",
        )
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in {".bin", ".pt", ".pth"})
    if pickles:
        raise ConfigError(
            f"only pickled weights ({pickles[0]}), which are never loaded: unpickling runs any code they contain",
            where=str(folder),
            mend="If you trust them, convert them: `AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)`.",
        )
    raise ConfigError("the folder has no weights (*.safetensors)", where=str(folder), mend=_only_contains(folder))


def _list_sharded(folder: Path, index_file: Path) -> dict[str, TensorInfo]:
    weight_map = read_json_object(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or {type(name) for name in weight_map.values()} != {str}:
        raise ConfigError("has no weight_map from tensor names to file names", where=str(index_file))
    tensors: dict[str, TensorInfo] = {}
    for file_name in sorted(set(weight_map.values())):
        promised = {key for key, name in weight_map.items() if name == file_name}
        if Path(file_name).name != file_name:
            raise ConfigError(f"names a file outside its own folder: {file_name}", where=str(index_file))
        if not (folder / file_name).is_file():
            raise ConfigError(
                f"the index names {file_name} for {len(promised)} tensors, and the folder does not have it",
                where=str(index_file),
                mend="The copy is incomplete: copy or download the missing file.",
            )
        header = read_header(folder / file_name)
        if missing := sorted(promised - header.keys()):
            raise ConfigError(
                f"the file lacks tensors that the index promises: {describe_keys(missing)}",
                where=str(folder / file_name),
                mend="File and index are of different copies: copy or download both again.",
            )
        # A tensor that the index forgot counts all the same; of two copies, the index says which.
        tensors.update((key, info) for key, info in header.items() if weight_map.get(key, file_name) == file_name)
    return tensors


def read_json_object(file: Path) -> dict[str, Any]:
    """
    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(file)) from error
    except ValueError as error:
        raise ConfigError(f"is not valid JSON ({error})", where=str(file)) from error
    if not isinstance(value, dict):
        raise ConfigError("does not hold a JSON object", where=str(file))
    return value


def describe_keys(keys: Iterable[str]) -> str:
    """A short text for many names: those that differ in numbers only become one, with a count.

    >>> describe_keys(["a.0.w", "a.1.w", "b"])
    'a.*.w (2, from a.0.w on), b'
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        groups[re.sub(r"(?<=\.)\d+(?=\.|$)", "*", key)].append(key)
    texts = [
        members[0] if len(members) == 1 else f"{group} ({len(members)}, from {members[0]} on)"
        for group, members in groups.items()
    ]
    shown = texts[:12]
    return ", ".join(shown) + (f", and {len(texts) - len(shown)} more kinds" if len(texts) > len(shown) else "")


def _only_contains(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir())
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    return f"It contains: {shown}." if names else "It is empty."
