"""JSON and Parquet files as documents, through `datasets`: memory-mapped Arrow, so any size in constant memory.

The first reading converts the files to Arrow in the cache of `datasets` (HF_DATASETS_CACHE); later ones, of the same
files with the same times of change, open that. Nothing is fetched from the network and no code of the data's is run.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from titanmoe.config.errors import ConfigError
from titanmoe.data.files import files_digest, find_files

logger = logging.getLogger("titanmoe.data")

ENDINGS = {
    "json": tuple(name + packed for name in (".json", ".jsonl") for packed in ("", ".gz", ".zst")),
    "parquet": (".parquet",),
}
_TEXT_KEY = "data.text_key"


class ArrowColumn:
    """One column of the rows of JSON (lines, or a list of objects) or Parquet files.

    Args:
        path: file, directory or glob, as `find_files` reads it.
        kind: "json" or "parquet".
        setting: the config's name for `key`, for messages.

    Raises:
        ConfigError: no files or rows, a file that cannot be read as `kind`, or no such column.
    """

    def __init__(self, path: str, kind: str, key: str, setting: str) -> None:
        found = find_files(path, ENDINGS[kind])
        files = [file for file in found if file.stat().st_size > 0]
        if not files:
            raise ConfigError("all files are empty", where=path, mend="Give files with at least one row.")
        if len(files) < len(found):
            logger.info("%s: %d of %d files are empty", path, len(found) - len(files), len(found))
        table = _read(path, kind, files, key if setting == _TEXT_KEY else None)
        self._path, self._key = path, key
        if key not in table.column_names:
            columns = ", ".join(map(repr, table.column_names))
            raise ConfigError(
                f"no column {key!r}; there are {columns}",
                where=path,
                mend=f"Set {setting} to the right one.",
            )
        self._column = table.column(key)
        if len(self._column) == 0:
            raise ConfigError("no rows", where=path, mend="Give files with at least one row.")
        self.fingerprint = f"{kind}-{files_digest(files, (key, str(len(self._column))))}"

    def __len__(self) -> int:
        return len(self._column)

    def where(self, index: int) -> str:
        """Where row `index` is, for messages."""
        return f"{self._path}, row {index} (counted from 0, over all files in sorted order)"

    def __getitem__(self, index: int) -> Any:
        try:
            return self._column[index].as_py()
        except UnicodeDecodeError as error:
            raise self._bad_row(index, f"is not UTF-8 ({error.reason})") from error

    def _bad_row(self, index: int, what: str) -> ConfigError:
        return ConfigError(
            f"row {index} (counted from 0, over all files in sorted order) {what} in column {self._key!r}",
            where=self._path,
            mend="Mend or remove the row; an empty string is skipped.",
        )


class ArrowSource(ArrowColumn):
    """One document per row: the string in column `text_key`.

    Raises:
        ConfigError: as ArrowColumn, and for a column that holds no text; from indexing, a row that has no text.
    """

    def __init__(self, path: str, kind: str, text_key: str) -> None:
        super().__init__(path, kind, text_key, _TEXT_KEY)
        column_type = str(self._column.type)
        if column_type not in ("string", "large_string", "string_view"):
            raise ConfigError(
                f"column {text_key!r} holds {column_type}, not text",
                where=path,
                mend="Set data.text_key to a column of strings.",
            )

    def __getitem__(self, index: int) -> str:
        text = super().__getitem__(index)
        if text is None:
            raise self._bad_row(index, "has no text")
        return text


def _read(path: str, kind: str, files: list[Path], text_key: str | None) -> Any:
    """The rows of all files as one memory-mapped pyarrow.Table; `text_key` is looked at to name a broken row."""
    import datasets
    from datasets.packaged_modules.json.json import JsonConfig

    # A *, ? or [ in a name is a pattern to `datasets`, unless it stands in brackets.
    names = ["".join(f"[{c}]" if c in "*?[" else c for c in str(file.absolute())) for file in files]
    # Some versions turn a chunk's texts into quoted JSON where one row of it holds a number, and recognise logs of
    # agents by their column names: neither may happen to a training text.
    unwanted = {"on_mixed_types": None, "parse_agent_traces": False}
    options = {name: value for name, value in unwanted.items() if name in JsonConfig.__dataclass_fields__}
    logger.info("reading %d %s file(s) of %s", len(files), kind, path)
    try:
        with _quiet():
            if kind == "json":
                return datasets.Dataset.from_json(names, **options).data.table
            return datasets.Dataset.from_parquet(names).data.table
    except Exception as error:  # datasets lets through whatever gzip, zstandard, pandas, pyarrow and fsspec raise
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, MemoryError):
            raise
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT):
            raise ConfigError(
                str(cause),
                where=path,
                mend="The rows are converted once, into about the size of the uncompressed files: "
                "set HF_DATASETS_CACHE to a folder with room that you may write to.",
            ) from error
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        where, what = _find_broken(kind, files, text_key) or (path, reason)
        raise ConfigError(
            f"cannot be read as {kind}: {what}",
            where=where,
            mend="Rows must be objects with the same columns, each of one type. A file may be cut off or of another "
            "format: make it anew, or leave it out.",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and error lines of `datasets`, of which each rank would print its own."""
    import datasets

    bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def _find_broken(kind: str, files: list[Path], text_key: str | None) -> tuple[str, str] | None:
    """File (and line) and reason of the first thing that cannot be read, if reading the files anew finds one."""
    for file in files:
        if kind == "parquet":
            import pyarrow
            import pyarrow.parquet

            try:
                pyarrow.parquet.read_metadata(file)
            except (OSError, pyarrow.ArrowException) as error:
                return str(file), str(error)
        elif file.suffix != ".zst":
            line = 0
            try:
                with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
                    if lines.read(1) == b"[":
                        continue
                    lines.seek(0)
                    for line, text in enumerate(lines, start=1):
                        row = json.loads(text) if text.strip() else {}
                        if not isinstance(row, dict):
                            return f"{file}:{line}", "not a JSON object"
                        if text_key and not isinstance(row.get(text_key, ""), (str, type(None))):
                            return f"{file}:{line}", f"{text_key!r} is not a string"
            except json.JSONDecodeError as error:
                return f"{file}:{line + (line == 0)}", str(error)
            except UnicodeDecodeError:
                return f"{file}:{line}", "not UTF-8"
            except (OSError, EOFError) as error:
                return str(file), str(error)
    return None
