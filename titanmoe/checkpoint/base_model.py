"""The frozen model that a run's adapters are for: checkpoints refer to it by its folder and a checksum."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from titanmoe.checkpoint.hf_folder import list_tensors, require_folder
from titanmoe.config.errors import ConfigError

_WINDOW_BYTES = 1 << 16
_NUM_WINDOWS = 64


@dataclass(frozen=True)
class BaseModel:
    """Attributes:
    path: the folder, in Hugging Face layout.
    checksum: see `checksum_of`.
    """

    path: str
    checksum: str

    @staticmethod
    def of(folder: str | Path) -> BaseModel:
        """
        Raises:
            ConfigError: no folder with weights.
        """
        path = require_folder(folder).resolve()
        return BaseModel(str(path), checksum_of(path))

    def check(self, found: BaseModel) -> None:
        """
        Raises:
            ConfigError: `found` has other weights, wherever they are.
        """
        if found.checksum != self.checksum:
            raise ConfigError(
                f"holds other weights than those that the adapters were trained on ({self.path})",
                where=found.path,
                mend="Name the base model that the run began with.",
            )


def checksum_of(folder: Path) -> str:
    """A SHA-256 of the folder's safetensors: names and sizes of the files, their headers, and 64 windows of 64 KiB of
    each, evenly spaced. Another model differs in any of them; a single changed number may be missed.

    All of the files would take as long as loading them.
    """
    infos = list_tensors(folder).values()
    digest = hashlib.sha256()
    for path in sorted({info.path for info in infos}):
        start = min(info.start for info in infos if info.path == path)
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                digest.update(f"{path.name} {size}\n".encode())
                digest.update(file.read(start))
                step = max(_WINDOW_BYTES, (size - start) // _NUM_WINDOWS)
                for position in range(start, size, step):
                    file.seek(position)
                    digest.update(file.read(_WINDOW_BYTES))
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return digest.hexdigest()
