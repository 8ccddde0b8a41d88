"""Document sources: where text comes from. Each is a read-only list of documents with a fingerprint."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import logging
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

from titanmoe.config.errors import ConfigError
from titanmoe.data.files import files_digest, find_files

logger = logging.getLogger("titanmoe.data")

Split = Literal["train", "validation"]

SMALLEST_PIECE_BYTES = 8 << 10


@dataclass(frozen=True)
class Rendered:
    """A document that has its special tokens written in it, and of which only part is to be learnt.

    Attributes:
        supervised: (begin, end) of the ranges of characters to learn, in order.
    """

    text: str
    supervised: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.text)


Document = str | Rendered


class DocumentSource(Protocol):
    """Documents that can be read by index, in any order, by any number of processes.

    Attributes:
        fingerprint: the same in every process that reads the same documents; compared when a run is resumed.
    """

    fingerprint: str

    def __len__(self) -> int:
        """Number of documents, empty ones included."""
        ...

    def __getitem__(self, index: int) -> Document:
        """Document `index`; an empty one is to be skipped. Raises ConfigError if it is broken."""
        ...


def open_source(dataset: str, path: str | None, split: Split, text_key: str = "text") -> DocumentSource:
    """Open the documents that `training.dataset` or `validation.dataset` names.

    Args:
        dataset: "stdlib", "text", "json" or "parquet".
        path: file, directory (searched recursively) or glob; None for `stdlib`.
        split: which part of `stdlib`; other sources are what their path holds.
        text_key: the column of JSON and Parquet rows that holds the text.

    Raises:
        ConfigError: unknown dataset, missing or superfluous path, or broken or empty files.
    """
    section = "training" if split == "train" else "validation"
    if dataset == "stdlib":
        if path is not None:
            raise ConfigError(
                f"dataset 'stdlib' takes no path, but {path!r} was given",
                where=f"{section}.dataset_path",
                mend=f"Remove it, or set {section}.dataset to text, json or parquet.",
            )
        return open_stdlib(split)
    if dataset not in ("text", "json", "parquet"):
        raise ConfigError(
            f"unknown dataset {dataset!r}",
            where=f"{section}.dataset",
            mend="Known: stdlib, text, json, parquet.",
        )
    if path is None:
        raise ConfigError(
            f"dataset {dataset!r} needs a path",
            where=f"{section}.dataset_path",
            mend="Give a file, a directory or a glob, or use dataset 'stdlib', which needs none.",
        )
    if dataset == "text":
        return open_text(path)
    from titanmoe.data.arrow_source import ArrowSource

    return ArrowSource(path, dataset, text_key)


class TextSource:
    """Text files as documents, read when asked for.

    A file is one document, unless it is larger than `piece_bytes`: then it is cut, at the next line end (else the next
    space), into documents of about that size. Otherwise one large file would fill every sequence of a batch with the
    same text, and one lane long after the others have ended.

    Attributes:
        piece_bytes: 8 KiB, or a thousandth of all files, whichever is larger. It depends on nothing but the files, so
            that their documents are the same in every run.
    """

    def __init__(self, files: Sequence[Path], fingerprint: str) -> None:
        sizes = [file.stat().st_size for file in files]
        self.files = list(files)
        self.piece_bytes = max(SMALLEST_PIECE_BYTES, sum(sizes) // 1024)
        self.fingerprint = f"{fingerprint}-{self.piece_bytes}"
        # documents[i] is the number of documents in files 0 to i
        self._documents = list(itertools.accumulate(max(1, -(-size // self.piece_bytes)) for size in sizes))

    def __len__(self) -> int:
        return self._documents[-1]

    def __getitem__(self, index: int) -> str:
        number = bisect.bisect_right(self._documents, index)
        piece = index - (self._documents[number - 1] if number else 0)
        path = self.files[number]
        try:
            with path.open("rb") as file:
                begin = _cut(file, piece * self.piece_bytes)
                end = _cut(file, (piece + 1) * self.piece_bytes)
                file.seek(begin)
                content = file.read(end - begin)
        except OSError as error:
            raise ConfigError(
                f"cannot be read: {error.strerror}", where=str(path), mend="Make it readable, or remove it."
            ) from error
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"is not UTF-8 text: byte {begin + error.start} is {content[error.start]:#04x}",
                where=str(path),
                mend="Convert it (iconv -t UTF-8), or remove it.",
            ) from error


def _cut(file: BinaryIO, target: int) -> int:
    """Where to cut a file: behind the first line end, else space, else character, at or shortly after `target`."""
    if target == 0:
        return 0
    file.seek(target)
    ahead = file.read(1024)
    for mark in (b"\n", b" "):
        if (found := ahead.find(mark)) >= 0:
            return target + found + 1
    return target + next((at for at, byte in enumerate(ahead) if byte & 0xC0 != 0x80), 0)


def open_text(path: str) -> TextSource:
    """The .txt and .md files of a directory, those of a glob, or one file of any name.

    Raises:
        ConfigError: there are none, or all are empty.
    """
    files = find_files(path, (".txt", ".md"))
    if all(file.stat().st_size == 0 for file in files):
        raise ConfigError("all files are empty", where=path, mend="Give files that hold text.")
    source = TextSource(files, f"text-{files_digest(files)}")
    if len(source) > len(files):
        logger.info(
            "%s: %d file(s) cut into %d documents of at most about %d KiB",
            path,
            len(files),
            len(source),
            source.piece_bytes // 1024,
        )
    return source


def open_stdlib(split: Split) -> TextSource:
    """The source files of the standard library of the Python that runs this, in sorted order.

    Tests are left out, since many distributions do not ship them. A hash of its name puts about one file in twenty
    into the validation split.

    Raises:
        ConfigError: this Python has no source files.
    """
    root, names = stdlib_files(split)
    files = []
    digest = hashlib.sha256()
    for name in names:
        try:
            text = (root / name).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        files.append(root / name)
        digest.update(f"{name}\0{len(text)}\0{text}".encode())
    if not files:
        raise ConfigError(
            "the standard library's source files are not there",
            where=str(root),
            mend="Use a Python that ships them, or another dataset (text, json, parquet).",
        )
    if len(files) < len(names):
        skipped = len(names) - len(files)
        logger.info("stdlib %s: skipped %d of %d files, not UTF-8 or not readable", split, skipped, len(names))
    return TextSource(files, f"stdlib-{split}-{digest.hexdigest()[:16]}")


def stdlib_files(split: Split) -> tuple[Path, list[str]]:
    """The folder of the standard library, and the names in it of the source files of one part, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    return root, [name for name in _stdlib_names(root) if _stdlib_split(name) == split]


def _stdlib_names(root: Path) -> list[str]:
    left_out = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in left_out]
        names += [Path(folder, name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    return sorted(names)


def _stdlib_split(name: str) -> Split:
    return "validation" if hashlib.sha256(name.encode()).digest()[0] % 20 == 0 else "train"
