"""The files that a path in a config means, and a short name for what they are."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from titanmoe.config.errors import ConfigError


def find_files(path: str, endings: Sequence[str]) -> list[Path]:
    """The files that `path` means, sorted: a file as it is, a directory's files of these endings, or a glob's.

    Raises:
        ConfigError: there are none.
    """
    given = Path(path)
    if given.is_file():
        return [given]
    listed = ", ".join(endings)
    if given.is_dir():
        files = sorted(file for file in given.rglob("*") if file.is_file() and file.name.endswith(tuple(endings)))
        what, mend = "the directory holds no files of this kind", f"Files are looked up by their ending: {listed}."
    else:
        files = sorted(Path(name) for name in glob.glob(path, recursive=True) if os.path.isfile(name))
        what, mend = "no such file or directory", f"Give a file, a directory or a glob ({listed}) on this machine."
    if not files:
        raise ConfigError(what, where=path, mend=mend)
    return files


def files_digest(files: Sequence[Path], extra: Iterable[str] = ()) -> str:
    """Hash of the files' names (below their common folder) and sizes: cheap, and the same on another machine."""
    root = os.path.commonpath([file.absolute().parent for file in files])
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{os.path.relpath(file.absolute(), root)}\0{file.stat().st_size}\0".encode())
    for item in extra:
        digest.update(f"{item}\0".encode())
    return digest.hexdigest()[:16]
