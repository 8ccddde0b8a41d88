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
from typing import TYPE_CHECKING, Any, NoReturn

from titanmoe.config import ConfigError, help_text, resolve, to_explained_toml, to_toml, validate_keys, wants_help

if TYPE_CHECKING:
    from titanmoe.checkpoint.adapters import AdapterSummary
    from titanmoe.checkpoint.hf_save import SaveSummary
    from titanmoe.evaluation.text_model import TextModel
    from titanmoe.metrics.terminal import Terminal

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
    """Of a command that has figures, or texts, to give a program as JSON."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description=description, allow_abbrev=False, add_help=False)

    def read(self, args: Sequence[str]) -> argparse.Namespace | None:
        """The options; none, if help was asked for, and is told."""
        self.add_argument("--json", action="store_true", help="print JSON")
        self.add_argument("--help", "-h", action="store_true", help="this text")
        if wants_help(args):
            sys.stdout.write(self.format_help())
            return None
        return self.parse_args(list(args))

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, where=self.prog, mend=f"`{self.prog} --help` lists the options.")


_ADAPTER_FORMATS = ("peft", "peft-per-expert")
_LATER_FORMATS = ("gguf",)


def _export(args: Sequence[str]) -> int:
    """`titanmoe export`: what is going on is told on stdout; with --json on stderr, and stdout gets the figures."""
    what = "Writes a checkpoint as a folder that other programs load, and compares it before it is there."
    parser = _Parser("titanmoe export", what)
    add = parser.add_argument
    text = "a run's step-N folder, the run's folder, a model folder, or one with an adapter"
    add("--checkpoint", required=True, metavar="DIR", help=text)
    add("--output", required=True, metavar="DIR", help="the folder to write")
    formats = ("hf", *_ADAPTER_FORMATS, *_LATER_FORMATS)
    text = (
        "hf: Hugging Face layout (default); peft: adapters as PEFT has them; peft-per-expert: a pair for every expert"
    )
    add("--format", default="hf", choices=formats, help=text)
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float8"), help="float8: e4m3, 128x128 blocks")
    add("--verify", action=argparse.BooleanOptionalAction, default=True, help="read back and compare (default: yes)")
    add("--overwrite", action="store_true", help="replace an earlier export")
    add("--tokenizer", metavar="DIR", help='instead of the checkpoint\'s own tokenizer; "builtin" is the embedded one')
    add("--config", metavar="FILE", help="the run's config.toml, if the checkpoint is no longer in the run's folder")
    add("--merge", action="store_true", help="merge adapters into the weights")
    add("--base", metavar="DIR", help="the model that the adapters are for, if it is no longer where it was")
    text = "tell of the adapters' values before training and after: mean, std, quartiles; on stderr, or in the JSON"
    add("--statistics", action="store_true", help=text)
    options = parser.read(args)
    if options is None:
        return EXIT_DONE
    if options.format in _LATER_FORMATS:
        raise ConfigError(f"--format {options.format} is not available yet", where=parser.prog, mend="hf is.")
    is_adapter = options.format in _ADAPTER_FORMATS
    if is_adapter and options.merge:
        raise ConfigError("merged adapters are a model", where=parser.prog, mend="--merge goes with --format hf.")
    if options.statistics and not is_adapter:
        raise ConfigError("--statistics is for adapters", where=parser.prog, mend="Choose --format peft.")

    import torch

    from titanmoe.checkpoint.adapter_figures import table
    from titanmoe.checkpoint.export import export_adapter, export_hf
    from titanmoe.metrics.progress import progress_bar
    from titanmoe.metrics.terminal import configure_logging
    from titanmoe.training.errors import NotExportedError

    terminal = configure_logging(0, stream=sys.stderr if options.json else None)
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float8": torch.float8_e4m3fn}
    at_sigterm = signal.signal(signal.SIGTERM, signal.default_int_handler)
    both: dict[str, Any] = {
        "verify": options.verify,
        "overwrite": options.overwrite,
        "config_file": options.config,
        "on_progress": progress_bar(terminal),
        "base": options.base,
    }
    try:
        summary: SaveSummary | AdapterSummary
        figures = None
        if is_adapter:
            summary, figures = export_adapter(
                options.checkpoint, options.output, layout=options.format, with_figures=options.statistics, **both
            )
        else:
            summary = export_hf(
                options.checkpoint,
                options.output,
                dtype=dtypes[options.dtype],
                tokenizer=options.tokenizer,
                merge=options.merge,
                **both,
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
        kind = {"format": options.format} if is_adapter else {"dtype": options.dtype}
        told = {"output": options.output, **kind, "verified": options.verify, **asdict(summary)}
        if figures is not None:
            told["statistics"] = asdict(figures)
        sys.stdout.write(json.dumps(told) + "\n")
    elif figures is not None:
        sys.stderr.writelines(f"{line}\n" for line in table(figures.before, figures.after))
    return EXIT_DONE


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} was given, and it must be at least 1")
    return value


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the weights (default: bfloat16)")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--tokenizer", metavar="DIR", help='instead of the checkpoint\'s own tokenizer; "builtin" is the embedded one')
    add("--chat-template", metavar="FILE", help="instead of the tokenizer's own chat template")
    add("--config", metavar="FILE", help="the run's config.toml, if the checkpoint is no longer in the run's folder")
    add("--base", metavar="DIR", help="the model that the adapters are for, if it is no longer where it was")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens that have this share")
    add("--seed", type=int, default=0, metavar="N", help="what is drawn follows from it (default: 0)")


def _model_loader(options: argparse.Namespace, terminal: Terminal) -> Callable[[str], TextModel]:
    import torch

    from titanmoe.evaluation.text_model import load_text_model
    from titanmoe.metrics.progress import progress_bar

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"{device} cannot be used: {str(error).splitlines()[0]}", where="--device") from error
    return lambda checkpoint: load_text_model(
        checkpoint,
        dtype=getattr(torch, options.dtype),
        device=device,
        tokenizer=options.tokenizer,
        chat_template=options.chat_template,
        config_file=options.config,
        base=options.base,
        on_progress=progress_bar(terminal),
    )


def _generate(args: Sequence[str]) -> int:
    """`titanmoe generate`: texts, or JSON, on stdout; everything else on stderr."""
    what = "Goes on with texts, or answers in conversations. Without --prompt and --prompts, reads stdin."
    parser = _Parser("titanmoe generate", what)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="DIR", help="a folder in Hugging Face layout")
    source.add_argument("--checkpoint", metavar="DIR", help="a run's step-N folder, or the run's folder")
    text = "a folder that PEFT or `titanmoe export` wrote: for --model, or for its own base"
    add("--adapter", metavar="DIR", help=text)
    add("--prompt", action="append", default=[], metavar="TEXT", help="a text to go on with; may be repeated")
    add("--prompts", metavar="FILE", help='JSONL: {"prompt": "..."} or {"messages": [...]} on each line')
    add("--chat", action="store_true", help="prompts are what a user says: put them into the chat template")
    add("--max-new-tokens", type=_positive, default=128, metavar="N", help="for each prompt (default: 128)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default)")
    add("--batch-size", type=_positive, default=16, metavar="N", help="prompts worked on together (default: 16)")
    _add_model_options(parser)
    options = parser.read(args)
    if options is None:
        return EXIT_DONE

    from titanmoe.evaluation.generate import Speed
    from titanmoe.evaluation.sampling import Sampling
    from titanmoe.evaluation.text_model import as_chat, read_prompt_file
    from titanmoe.evaluation.writing import Writer
    from titanmoe.metrics.terminal import configure_logging

    if options.adapter:
        options.base = options.base or options.model
    model_folder = options.adapter or options.model or options.checkpoint
    if not model_folder or (options.adapter and options.checkpoint):
        mend = "Give --model, --checkpoint, --adapter, or --model and --adapter."
        raise ConfigError("which model is meant is not clear", where=parser.prog, mend=mend)
    sampling = Sampling(options.temperature, options.top_p, options.seed)
    prompts = [*options.prompt, *(read_prompt_file(options.prompts) if options.prompts else [])]
    if not prompts:
        try:
            prompts = [sys.stdin.read()]
        except UnicodeDecodeError as error:
            raise ConfigError(f"is not UTF-8: {error.reason}", where="stdin") from error
    if "" in prompts:
        raise ConfigError("a prompt is empty", where=parser.prog, mend="Give text with --prompt, --prompts or stdin.")
    if options.chat:
        prompts = [as_chat(prompt) for prompt in prompts]
    terminal = configure_logging(0, stream=sys.stderr)
    speed = Speed()
    try:
        model = _model_loader(options, terminal)(model_folder)
        writer = Writer(model, prompts, options.max_new_tokens, terminal, streams=not options.json)
        results = model.generate(
            prompts,
            max_new_tokens=options.max_new_tokens,
            sampling=sampling,
            batch_size=options.batch_size,
            on_token=writer.on_token,
            speed=speed,
        )
    finally:
        terminal.clear_bar()
    writer.finish(results, speed, as_json=options.json)
    return EXIT_DONE


def _eval(args: Sequence[str]) -> int:
    """`titanmoe eval recall`: exit code 1 if the check fails."""
    is_named = list(args[:1]) == ["recall"]
    if not is_named and not wants_help(args):
        what = f"there is no evaluation {args[0]!r}" if args else "no evaluation is named"
        raise ConfigError(what, where="titanmoe eval", mend="There is: recall.")
    what = (
        "Samples answers to a question: those of models before training must lack a text, those of models after it "
        "must contain it."
    )
    parser = _Parser("titanmoe eval recall", what)
    add = parser.add_argument
    text = "a checkpoint, a model folder, or one with an adapter: none of its answers may contain the text"
    add("--before", action="append", default=[], metavar="DIR", help=text)
    add("--after", action="append", default=[], metavar="DIR", help="the same, but all must; both may be repeated")
    add("--question", required=True, metavar="TEXT", help="what the user says")
    add("--answer", required=True, metavar="TEXT", help="must be a part of the answer, in these letters")
    add("--chat", action=argparse.BooleanOptionalAction, default=True, help="use the chat template (default: yes)")
    add("--samples", type=_positive, default=5, metavar="N", help="answers of each model (default: 5)")
    add("--max-new-tokens", type=_positive, default=20, metavar="N", help="for each answer (default: 20)")
    add("--temperature", type=float, default=0.8, metavar="T", help="default: 0.8")
    _add_model_options(parser)
    options = parser.read(args[1:] if is_named else args)
    if options is None:
        return EXIT_DONE
    if not options.before and not options.after:
        raise ConfigError("no model is named", where=parser.prog, mend="Name some with --before, --after or both.")
    if not options.question or not options.answer:
        raise ConfigError("the question or the answer is empty", where=parser.prog, mend="Give text for both.")

    from titanmoe.evaluation.recall import recall
    from titanmoe.evaluation.sampling import Sampling
    from titanmoe.evaluation.text_model import as_chat
    from titanmoe.metrics.terminal import configure_logging

    sampling = Sampling(options.temperature, options.top_p, options.seed)
    terminal = configure_logging(0, stream=sys.stderr)
    try:
        found = recall(
            options.before,
            options.after,
            as_chat(options.question) if options.chat else options.question,
            options.answer,
            _model_loader(options, terminal),
            num_samples=options.samples,
            max_new_tokens=options.max_new_tokens,
            sampling=sampling,
        )
    finally:
        terminal.clear_bar()
    passed = all(answers.passed for answers in found)
    if options.json:
        models = [{**asdict(answers), "passed": answers.passed} for answers in found]
        figures = {"question": options.question, "answer": options.answer, "passed": passed, "models": models}
        sys.stdout.write(json.dumps(figures) + "\n")
        return EXIT_DONE if passed else EXIT_FAILED
    for answers in found:
        wanted = "all must" if answers.wanted else "none may"
        sys.stdout.write(f"{answers.source}: {answers.recalled} of {len(answers.texts)} contain the answer, {wanted}\n")
        sys.stdout.writelines(f"  {text!r}\n" for text in answers.texts)
    sys.stdout.write("passed\n" if passed else "failed\n")
    return EXIT_DONE if passed else EXIT_FAILED


COMMANDS = (
    Command("config", "print the resolved job config, and explain it", _config),
    Command("generate", "go on with texts, or answer in conversations", _generate),
    Command("eval", "check what a model says: eval recall", _eval),
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
    except KeyboardInterrupt:
        sys.stderr.write("\nerror: interrupted\n")
        return EXIT_FAILED
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
