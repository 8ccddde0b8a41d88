"""Where conversations come from: JSON lines, what `datasets` reads, and the documentation of the standard library."""

from __future__ import annotations

import hashlib
import json
from array import array
from pathlib import Path
from typing import Any, Protocol

from titanmoe.config.errors import ConfigError
from titanmoe.data.files import files_digest, find_files
from titanmoe.data.sources import Split
from titanmoe.data.stdlib_docs import stdlib_docs


class Rows(Protocol):
    """Conversations as they were found, by index.

    Attributes:
        fingerprint: the same in every process that reads the same rows.
    """

    fingerprint: str

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, index: int) -> Any:
        """What row `index` holds as messages. Raises ConfigError if it cannot be read."""
        ...

    def where(self, index: int) -> str:
        """Where row `index` is: the file and line, if they are known."""
        ...


def open_rows(path: str, messages_key: str) -> Rows:
    """The rows of JSON lines, read as they are, or of whatever else `datasets` reads as a table.

    Raises:
        ConfigError: there are no files or rows, files of both kinds, or a table that cannot be read.
    """
    from titanmoe.data.arrow_source import ENDINGS, ArrowColumn

    files = find_files(path, ENDINGS["json"] + ENDINGS["parquet"])
    kinds = {"parquet" if file.name.endswith(ENDINGS["parquet"]) else "json" for file in files}
    if len(kinds) > 1:
        raise ConfigError("there are JSON and Parquet files", where=path, mend="Give those of one kind, by a glob.")
    if kinds == {"json"} and not any(file.suffix in (".gz", ".zst") or _holds_list(file) for file in files):
        return JsonLines(path, files, messages_key)
    return ArrowColumn(path, kinds.pop(), messages_key, setting="data.messages_key")


def _holds_list(file: Path) -> bool:
    with file.open("rb") as content:
        return content.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


class JsonLines:
    """The value of one key in each line of JSON files; rows need not have the same keys, nor values of one type.

    Raises:
        ConfigError: there are no lines; from indexing, a line that is not an object with that key.
    """

    def __init__(self, path: str, files: list[Path], key: str) -> None:
        self._files, self._key = files, key
        self._rows = array("q")  # number of the file, where the line begins in it, number of the line
        for number, file in enumerate(files):
            begin = 0
            with file.open("rb") as lines:
                for line, text in enumerate(lines, start=1):
                    if not text.isspace():
                        self._rows.extend((number, begin, line))
                    begin += len(text)
        if not self._rows:
            raise ConfigError("all files are empty", where=path, mend="Give files with at least one row.")
        self.fingerprint = f"chat-{files_digest(files, (key, str(len(self))))}"

    def __len__(self) -> int:
        return len(self._rows) // 3

    def where(self, index: int) -> str:
        number, _, line = self._rows[3 * index : 3 * index + 3]
        return f"{self._files[number]}:{line}"

    def __getitem__(self, index: int) -> Any:
        number, begin, _ = self._rows[3 * index : 3 * index + 3]
        try:
            with self._files[number].open("rb") as file:
                file.seek(begin)
                row = json.loads(file.readline())
        except (OSError, RecursionError, ValueError) as error:  # ValueError: not JSON, or not UTF-8
            raise ConfigError(
                f"cannot be read as JSON: {error}", where=self.where(index), mend="Mend or remove the line."
            ) from error
        if not isinstance(row, dict) or self._key not in row:
            found = f"there are {', '.join(map(repr, row))}" if isinstance(row, dict) else "it is no object"
            raise ConfigError(
                f"no key {self._key!r}; {found}",
                where=self.where(index),
                mend="Set data.messages_key to the key that holds the messages, or mend the line.",
            )
        return row[self._key]


class StdlibRows:
    """A question and its answer for each documented function, method and class of the standard library."""

    def __init__(self, split: Split) -> None:
        self._docs = stdlib_docs(split)
        digest = hashlib.sha256(repr(self._docs).encode()).hexdigest()[:16]
        self.fingerprint = f"stdlib_docs-{split}-{digest}"

    def __len__(self) -> int:
        return len(self._docs)

    def where(self, index: int) -> str:
        return f"stdlib_docs, {self._docs[index].signature}"

    def __getitem__(self, index: int) -> Any:
        doc = self._docs[index]
        return [{"role": "user", "content": doc.question}, {"role": "assistant", "content": doc.answer}]
