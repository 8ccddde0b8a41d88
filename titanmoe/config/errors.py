"""The one exception for mistakes a user can mend."""

from __future__ import annotations


class ConfigError(Exception):
    """A mistake in what the user gave us: a config, a path, a file, a checkpoint.

    Commands print it without a traceback and exit with code 2. Everything else that goes wrong is a bug
    or an accident of the machine and keeps its traceback (exit code 1).

    Args:
        what: what is wrong, with the value that was given.
        where: the file, key, tensor or line it concerns.
        mend: what to do about it; the nearest valid name, a formula with its numbers, a command.
    """

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        self.what, self.where, self.mend = what, where, mend
        super().__init__(what, where, mend)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  {self.mend}" if self.mend else text
