"""From defaults, TOML files and the command line to one JobConfig."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titanmoe.config.command_line import COMMAND_LINE, parse_command_line
from titanmoe.config.errors import ConfigError
from titanmoe.config.files import BASE, find_config_file, read_with_bases
from titanmoe.config.job_config import JobConfig
from titanmoe.config.schema import Schema
from titanmoe.config.sections.quantize import CONVERTERS
from titanmoe.config.values import convert, to_toml_value

DEFAULT = "default"
CONFIG_FILE = "job.config_file"

_TORCHTITAN_TOKENIZER = "./tests/assets/tokenizer"
_TORCHTITAN_DATASETS = ("c4", "c4_test", "c4_validation")


@dataclass(frozen=True)
class Resolved:
    """A config and how it came about.

    Args:
        config: the whole job.
        origins: dotted key -> "default", the path of a TOML file, or "command line".
        notes: one line each, to be printed: keys that have no effect here, values that were replaced.
    """

    config: JobConfig
    origins: Mapping[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Setting:
    """The value of a key and the layer it came from; layers are numbered from the defaults (0) upwards."""

    value: Any
    origin: str
    layer: int


@dataclass(frozen=True)
class _Layer:
    """What one TOML file or the command line sets."""

    origin: str
    values: Mapping[str, Any]


def resolve(args: Sequence[str] = (), file: str | None = None) -> Resolved:
    """Defaults < base files < TOML file < command line.

    Args:
        args: command-line options; the last `--job.config_file` among them replaces `file`.
        file: a TOML file, as a path or as a bare name in train_configs; None for none.

    Raises:
        ConfigError: anything wrong with the files or the options. All unknown keys and bad values are told at once.
    """
    schema = Schema.of_job_config()
    options, errors = parse_command_line(args, schema)
    typed: dict[str, Any] = {}
    for option in options:
        _convert_into(typed, schema, option.key.path, option.value, f"{COMMAND_LINE}, {option.written}", errors)
    file = typed.get(CONFIG_FILE, file)
    notes: list[str] = []
    layers = _read_layers(file, schema, errors, notes) if file is not None else []
    _raise_all(errors)

    settings = {key.path: _Setting(key.default, DEFAULT, 0) for key in schema.keys.values()}
    for number, layer in enumerate([*layers, _Layer(COMMAND_LINE, typed)], start=1):
        settings |= {path: _Setting(value, layer.origin, number) for path, value in layer.values.items()}
    if file is not None and settings[CONFIG_FILE].layer == 0:
        settings[CONFIG_FILE] = _Setting(file, "argument of load_config", 0)
    _choose_steps_or_epochs(settings)
    notes += _replace_torchtitan_assets(settings)
    notes += _name_keys_without_effect(settings, schema)
    compiles = settings["compile.enable"].value and "model" in settings["compile.components"].value
    if settings["compile.enable"].value and not compiles:
        notes.append("compile.components leaves the model out: nothing is compiled, as the loss is one operation here")
    config = _build(JobConfig, "", {path: setting.value for path, setting in settings.items()}, schema)
    return Resolved(config, {path: setting.origin for path, setting in settings.items()}, tuple(notes))


def load_config(file: str | Path | None, args: Sequence[str] = ()) -> JobConfig:
    """The config of a TOML file (None for none) changed by command-line options, for use from Python. Logs the notes.

    Raises:
        ConfigError: as `resolve`.
    """
    resolved = resolve(args, None if file is None else str(file))
    for note in resolved.notes:
        logging.getLogger("titanmoe").warning(note)
    return resolved.config


def _read_layers(file: str, schema: Schema, errors: list[ConfigError], notes: list[str]) -> list[_Layer]:
    layers = []
    for toml in read_with_bases(find_config_file(file)):
        values: dict[str, Any] = {}
        _flatten(toml.tables, "", toml.path, schema, values, errors)
        if values.pop(CONFIG_FILE, None) is not None:
            notes.append(f'{CONFIG_FILE} in {toml.path} has no effect; {BASE} = "..." inherits from another file')
        layers.append(_Layer(str(toml.path), values))
    return layers


def _flatten(
    table: Mapping[str, Any],
    prefix: str,
    file: Path,
    schema: Schema,
    values: dict[str, Any],
    errors: list[ConfigError],
) -> None:
    """Collects the keys of a TOML table, dotted, into `values`, and what is wrong with them into `errors`."""
    for name, value in table.items():
        path = prefix + name
        where = f"{file}, {path}"
        if "." in name:
            errors.append(ConfigError("a name in quotes with dots", where=where, mend=f"Write {path} without quotes."))
        elif path in schema.sections:
            if isinstance(value, dict):
                _flatten(value, path + ".", file, schema, values, errors)
            else:
                errors.append(ConfigError(f"this is a section: [{path}], not a key or a list", where=where))
        elif path in schema.keys:
            _convert_into(values, schema, path, value, where, errors)
        elif isinstance(value, dict):
            errors.append(ConfigError("unknown section", where=f"{file}, [{path}]", mend=schema.suggest_section(path)))
        else:
            errors.append(ConfigError("unknown key", where=where, mend=schema.suggest_key(path)))


def _convert_into(
    values: dict[str, Any], schema: Schema, path: str, value: Any, where: str, errors: list[ConfigError]
) -> None:
    try:
        values[path] = convert(value, schema.keys[path], where)
    except ConfigError as error:
        errors.append(error)


def _raise_all(errors: Sequence[ConfigError]) -> None:
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ConfigError(f"{len(errors)} mistakes in the job config:\n" + "\n".join(str(error) for error in errors))


def _choose_steps_or_epochs(settings: dict[str, _Setting]) -> None:
    """Both say how long the run is, so that the later layer wins; in one layer they contradict each other."""
    steps, epochs = settings["training.steps"], settings["training.epochs"]
    if epochs.value is None or steps.layer == 0:
        return
    if steps.layer == epochs.layer:
        raise ConfigError(
            f"training.steps = {steps.value} and training.epochs = {epochs.value} are both set",
            where=steps.origin,
            mend="Both say how long the run is: set one of them.",
        )
    if steps.layer > epochs.layer:
        settings["training.epochs"] = _Setting(None, DEFAULT, 0)
    else:
        settings["training.steps"] = _Setting(JobConfig().training.steps, DEFAULT, 0)


def _replace_torchtitan_assets(settings: dict[str, _Setting]) -> list[str]:
    """Puts what is built in here in the place of the tokenizer and data in torchtitan's own test directory."""
    notes = []
    assets = settings["model.hf_assets_path"]
    if assets.value == _TORCHTITAN_TOKENIZER and not Path(assets.value).exists():
        settings["model.hf_assets_path"] = dataclasses.replace(assets, value=None)
        shown = f'model.hf_assets_path = "{assets.value}" ({assets.origin})'
        notes.append(f"{shown} is not here: the builtin tokenizer is used")
    for section in ("training", "validation"):
        dataset = settings[f"{section}.dataset"]
        if dataset.value in _TORCHTITAN_DATASETS:
            has_path = settings[f"{section}.dataset_path"].value is not None
            if dataset.value == "c4" and not has_path:
                raise ConfigError(
                    'the dataset "c4" is fetched from a hub by torchtitan; nothing is downloaded here',
                    where=f"{dataset.origin}, {section}.dataset",
                    mend=f"Set {section}.dataset_path to local files of it (JSON lines).",
                )
            ours = "json" if has_path else "stdlib"
            settings[f"{section}.dataset"] = dataclasses.replace(dataset, value=ours)
            notes.append(f'{section}.dataset = "{dataset.value}" ({dataset.origin}) is read as "{ours}"')
    return notes


def _name_keys_without_effect(settings: Mapping[str, _Setting], schema: Schema) -> list[str]:
    """One line per reason for the keys that are set although they have no effect here."""
    by_reason: dict[str, list[str]] = {}
    unused = set(CONVERTERS).difference(settings["model.converters"].value)
    for path, key in schema.keys.items():
        section = path.rpartition(".")[0]
        reason = f"No effect, as {key.limits.inert}" if key.limits.inert else ""
        if section in unused:
            reason = f"No effect in a run, as {section} is not in model.converters"
        if reason and settings[path].value != key.default:
            shown = f"{path} = {to_toml_value(settings[path].value)} ({settings[path].origin})"
            by_reason.setdefault(reason, []).append(shown)
    return [f"{reason}: {', '.join(shown)}" for reason, shown in by_reason.items()]


def _build(cls: type, prefix: str, values: Mapping[str, Any], schema: Schema) -> Any:
    built = {}
    for field in dataclasses.fields(cls):
        path = prefix + field.name
        section = schema.sections.get(path)
        built[field.name] = _build(section, path + ".", values, schema) if section else values[path]
    return cls(**built)
