"""The `titanmoe` command: one row per subcommand."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from titanmoe.config import (
    ConfigError,
    help_text,
    resolve,
    to_explained_toml,
    to_toml,
    validate_keys,
    wants_help,
)

EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR = 0, 1, 2


@dataclass(frozen=True)
class Command:
    """A subcommand. `run` gets the arguments after its name, imports what it needs, and returns an exit code."""

    name: str
    summary: str
    run: Callable[[Sequence[str]], int]


def _config(args: Sequence[str]) -> int:
    """`titanmoe config`: the resolved TOML on stdout, notes on stderr."""
    if wants_help(args):
        usage = "titanmoe config [--explain] [--job.config_file FILE] [--section.key=value ...]\n\n" + (
            "Prints the resolved config as TOML; with --explain, also what each key means and where its value is from."
        )
        sys.stdout.write(help_text(usage, width=shutil.get_terminal_size((100, 24)).columns))
        return EXIT_DONE
    resolved = resolve([arg for arg in args if arg != "--explain"])
    validate_keys(resolved.config)
    for note in resolved.notes:
        sys.stderr.write(f"note: {note}\n")
    sys.stdout.write(to_explained_toml(resolved) if "--explain" in args else to_toml(resolved.config))
    return EXIT_DONE


COMMANDS = (Command("config", "print the resolved job config, and explain it", _config),)


def main(args: Sequence[str] | None = None) -> int:
    """Runs a subcommand; a user's mistake ends in one message on stderr and exit code 2."""
    args = sys.argv[1:] if args is None else args
    try:
        code = _dispatch(args)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USER_ERROR
    except BrokenPipeError:
        # Whoever read the output has left. Python would flush stdout again at exit and complain; give it a sink.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _dispatch(args: Sequence[str]) -> int:
    names = [command.name for command in COMMANDS]
    if not args or args[0] in ("--help", "-h"):
        width = max(map(len, names))
        rows = "".join(f"  {command.name:<{width}}  {command.summary}\n" for command in COMMANDS)
        text = f"usage: titanmoe COMMAND [--help] ...\n\n{rows}"
        (sys.stdout if args else sys.stderr).write(text)
        return EXIT_DONE if args else EXIT_USER_ERROR
    for command in COMMANDS:
        if command.name == args[0]:
            return command.run(args[1:])
    raise ConfigError(f'there is no command "{args[0]}"', where="titanmoe", mend=f"Commands: {', '.join(names)}.")


if __name__ == "__main__":
    sys.exit(main())
