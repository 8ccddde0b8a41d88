"""The `titanmoe` command: one row per subcommand."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NoReturn

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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, where=self.prog, mend=f"`{self.prog} --help` lists the options.")


_LATER_FORMATS = ("peft", "peft-per-expert", "gguf")


def _export(args: Sequence[str]) -> int:
    """`titanmoe export`: what is going on is told on stdout; with --json on stderr, and stdout gets the figures."""
    parser = _Parser(
        "titanmoe export",
        description="Writes a checkpoint as a folder that other programs load, and compares it before it is there.",
        allow_abbrev=False,
        add_help=False,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a run's step-N folder, the run's folder, or a model folder")
    add("--output", required=True, metavar="DIR", help="the folder to write")
    add("--format", default="hf", choices=("hf", *_LATER_FORMATS), help="hf: Hugging Face layout (default)")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float8"), help="float8: e4m3, 128x128 blocks")
    add("--verify", action=argparse.BooleanOptionalAction, default=True, help="read back and compare (default: yes)")
    add("--overwrite", action="store_true", help="replace an earlier export")
    add("--tokenizer", metavar="DIR", help='instead of the checkpoint\'s own tokenizer; "builtin" is the embedded one')
    add("--config", metavar="FILE", help="the run's config.toml, if the checkpoint is no longer in the run's folder")
    add("--merge", action="store_true", help="merge adapters into the weights (not available yet)")
    add("--json", action="store_true", help="print figures as JSON")
    add("--help", "-h", action="store_true", help="this text")
    if wants_help(args):
        sys.stdout.write(parser.format_help())
        return EXIT_DONE
    options = parser.parse_args(list(args))
    if options.format in _LATER_FORMATS:
        raise ConfigError(f"--format {options.format} is not available yet", where=parser.prog, mend="hf is.")
    if options.merge:
        raise ConfigError("--merge is not available yet", where=parser.prog)

    import torch

    from titanmoe.checkpoint.export import export_hf
    from titanmoe.metrics.progress import progress_bar
    from titanmoe.metrics.terminal import configure_logging
    from titanmoe.training.errors import NotExportedError

    terminal = configure_logging(0, stream=sys.stderr if options.json else None)
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float8": torch.float8_e4m3fn}
    at_sigterm = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        summary = export_hf(
            options.checkpoint,
            options.output,
            dtype=dtypes[options.dtype],
            verify=options.verify,
            overwrite=options.overwrite,
            tokenizer=options.tokenizer,
            config_file=options.config,
            on_progress=progress_bar(terminal),
        )
    except NotExportedError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_FAILED
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; nothing was left behind\n")
        return EXIT_FAILED
    finally:
        terminal.clear_bar()
        signal.signal(signal.SIGTERM, at_sigterm)
    if options.json:
        figures = {"output": options.output, "dtype": options.dtype, "verified": options.verify, **asdict(summary)}
        sys.stdout.write(json.dumps(figures) + "\n")
    return EXIT_DONE


COMMANDS = (
    Command("config", "print the resolved job config, and explain it", _config),
    Command("export", "write a checkpoint as a folder that other programs load", _export),
)


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
