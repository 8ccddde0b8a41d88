"""`manifest.json`: what a checkpoint folder must contain. Written last; without a valid one a step does not exist."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from titanmoe.checkpoint.adapter_config import AdapterSettings
from titanmoe.checkpoint.base_model import BaseModel
from titanmoe.checkpoint.files import retrying, sha256_of_file, write_whole

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1

_PLAIN_NAME = re.compile(r"[\w.-]+")


class ManifestError(Exception):
    """Why a folder is not a valid checkpoint, in words that complete 'skipped step 7: ...'."""


@dataclass(frozen=True)
class FileRecord:
    """A file of a checkpoint: its size in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str

    @staticmethod
    def of(content: bytes) -> FileRecord:
        return FileRecord(len(content), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`.

    Attributes:
        step: optimizer steps taken when it was saved.
        world_size: ranks that saved it.
        mesh: sizes of the mesh axes by name.
        config_hash: hash of the resolved config of the run that saved it.
        model_only: no optimizer, counters or data position: weights to start from, not a run to resume.
        versions: versions of the software that saved it, by package.
        files: every other file of the folder, by name.
        base: the model that the adapters are for, if nothing else of a model is here.
        adapters: the settings of adapters that their tensors do not tell; None if there are none.
    """

    step: int
    world_size: int
    mesh: Mapping[str, int]
    config_hash: str
    model_only: bool
    versions: Mapping[str, str]
    files: Mapping[str, FileRecord]
    base: BaseModel | None = None
    adapters: AdapterSettings | None = None
    format_version: int = field(default=FORMAT_VERSION)

    @property
    def num_bytes(self) -> int:
        return sum(record.size for record in self.files.values())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into the folder: temporary file, fsync, rename, fsync of the folder."""
    content = asdict(manifest)
    write_whole(folder / MANIFEST_NAME, json.dumps({**content, "sha256": _checksum(content)}, indent=1).encode())


def read_manifest(folder: Path, step: int) -> Manifest:
    """Read the manifest of a step and check that every file it names is there with its size.

    Raises ManifestError with the reason if the step is not valid. Contents are checked by `check_contents`.
    """
    try:
        manifest = _parse(retrying(lambda: (folder / MANIFEST_NAME).read_bytes(), f"reading {folder / MANIFEST_NAME}"))
    except FileNotFoundError:
        if not any(folder.iterdir()):
            raise ManifestError("the folder is empty") from None
        raise ManifestError("no manifest.json, so its save was interrupted") from None
    except OSError as error:
        raise ManifestError(f"manifest.json cannot be read ({error.strerror})") from None
    if manifest.step != step:
        raise ManifestError(f"its manifest.json belongs to step {manifest.step}")
    for name, record in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise ManifestError(f"{name} is missing ({error.strerror})") from None
        if size != record.size:
            raise ManifestError(f"{name} has {size} bytes, its manifest says {record.size}")
    return manifest


def check_contents(folder: Path, manifest: Manifest, part: int = 0, num_parts: int = 1) -> str | None:
    """Compare checksums of this part's share of the files; returns what is wrong, or None.

    The files are dealt so that every part reads about as many bytes.
    """
    loads = [0] * num_parts
    for name, record in sorted(manifest.files.items(), key=lambda item: (-item[1].size, item[0])):
        owner = loads.index(min(loads))
        loads[owner] += record.size
        if owner != part:
            continue
        path = folder / name
        try:
            found = retrying(lambda path=path: sha256_of_file(path), f"reading {path}")  # type: ignore[misc]
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != record.sha256:
            return f"the checksum of {name} differs from its manifest's: the file was damaged after it was written"
    return None


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _parse(text: bytes) -> Manifest:
    """The manifest in `text`. Raises ManifestError if it is not one, of this version, as it was written."""
    try:
        content = json.loads(text)
        checksum = content.pop("sha256")
        version = content["format_version"]
    except (ValueError, TypeError, AttributeError, KeyError):
        raise ManifestError("its manifest.json is garbled") from None
    if version != FORMAT_VERSION:
        raise ManifestError(f"it has checkpoint format {version!r}, this version of titanmoe reads {FORMAT_VERSION}")
    if checksum != _checksum(content):
        raise ManifestError("its manifest.json does not match its own checksum")
    try:
        files = {name: FileRecord(**record) for name, record in content.pop("files").items()}
        base = content.pop("base", None)
        adapters = content.pop("adapters", None)
        manifest = Manifest(
            **content,
            files=files,
            base=None if base is None else BaseModel(**base),
            adapters=None if adapters is None else AdapterSettings(**adapters),
        )
    except (TypeError, AttributeError, KeyError):
        raise ManifestError("its manifest.json lacks fields") from None
    for name in manifest.files:
        if not _PLAIN_NAME.fullmatch(name):
            raise ManifestError(f"its manifest.json names a file outside the folder ({name!r})")
    return manifest
