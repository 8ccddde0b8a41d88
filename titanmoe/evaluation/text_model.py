"""A model with its tokenizer: prompts in, text out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from titanmoe.checkpoint.hf_folder import GENERATION_CONFIG_NAME, read_json_object
from titanmoe.checkpoint.model_source import find_model
from titanmoe.checkpoint.progress import Progress
from titanmoe.config.errors import ConfigError
from titanmoe.data.chat_template import ChatTemplate, load_chat_template
from titanmoe.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from titanmoe.evaluation.generate import Generated, generate
from titanmoe.models.build import materialize
from titanmoe.models.decoder import Decoder

Prompt = str | list[dict[str, Any]]
"""A text to go on with, or the messages of a conversation to answer."""


@dataclass(frozen=True)
class TextModel:
    """Attributes:
    stop_ids: the tokens that end a text.
    template_file: a chat template in place of the tokenizer's.
    """

    model: Decoder
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    template_file: str | None = None

    @cached_property
    def template(self) -> ChatTemplate:
        return load_chat_template(self.tokenizer, self.template_file)

    @cached_property
    def turn_end_ids(self) -> frozenset[int]:
        """The special token with which the chat template ends what the assistant says, if it does."""
        conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
        text = ""
        with contextlib.suppress(ConfigError):  # it takes no such turn
            text = self.template.render(conversation).rstrip()
        with contextlib.suppress(ConfigError):  # what the assistant wrote cannot be told from the text: then it is this
            rendered = self.template.render_supervised(conversation)
            text = rendered.text[: rendered.supervised[-1][1]] if rendered.supervised else ""
        last = self.tokenizer.encode(text)[-1] if text else -1
        added = self.tokenizer.backend.get_added_tokens_decoder()
        return frozenset({last} if last in added and added[last].special else ())

    def encode(self, prompt: Prompt) -> list[int]:
        """
        Raises:
            ConfigError: not a text in Unicode; a conversation, for which there is no chat template, or one that refuses
                it.
        """
        text = prompt if isinstance(prompt, str) else self.template.render(prompt, add_generation_prompt=True)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"is not UTF-8: {error.reason}", where=f"prompt {text[:40]!r}") from error
        if not isinstance(prompt, str):
            return self.tokenizer.encode(text)
        begin = [self.tokenizer.bos_id] if self.tokenizer.adds_bos and self.tokenizer.bos_id is not None else []
        return [*begin, *self.tokenizer.encode(prompt)]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text, without special tokens."""
        return self.tokenizer.backend.decode(list(tokens), skip_special_tokens=True)

    def generate(self, prompts: Sequence[Prompt], **options: Any) -> list[Generated]:
        """See `generate`."""
        is_chat = any(not isinstance(prompt, str) for prompt in prompts)
        stop_ids = self.stop_ids | self.turn_end_ids if is_chat else self.stop_ids
        return generate(self.model, [self.encode(prompt) for prompt in prompts], stop_ids=stop_ids, **options)


def load_text_model(
    checkpoint: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    tokenizer: str | None = None,
    chat_template: str | None = None,
    config_file: str | Path | None = None,
    base: str | Path | None = None,
    on_progress: Progress | None = None,
) -> TextModel:
    """The model of a checkpoint, with its adapters if it has any, or of a folder in Hugging Face layout.

    Texts end with the tokenizer's end-of-sequence token, and those that generation_config.json names.

    Args:
        dtype: of every weight; adapters keep theirs, and routers compute in float32 in any case.
        tokenizer, config_file, base: see `export_hf`.
        chat_template: a file in place of the tokenizer's own.

    Raises:
        ConfigError: see `export_hf`; no tokenizer, or one of another model.
    """
    source = find_model(checkpoint, dtype, tokenizer, config_file, on_progress, base)
    folder = source.tokenizer_dir
    if folder is None:
        mend = "--tokenizer DIR names one; builtin is the embedded one."
        raise ConfigError("the folder has no tokenizer", where=str(checkpoint), mend=mend)
    words = load_tokenizer(str(folder))
    check_vocab(words, source.spec.vocab_size)
    stop_ids = frozenset({words.eos_id, *_end_ids(source.generation_config_dir or folder)})
    model = source.build()
    source.fill(materialize(model, "cpu" if source.dtype != dtype else device))
    for parameter in model.parameters():
        is_weight = parameter.dtype == source.dtype
        parameter.data = parameter.data.to(device, dtype if is_weight else parameter.dtype)
    return TextModel(model.to(device), words, stop_ids, chat_template)


def _end_ids(folder: Path) -> list[int]:
    file = folder / GENERATION_CONFIG_NAME
    found = read_json_object(file).get("eos_token_id") if file.is_file() else None
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(number) is int for number in ids):
        raise ConfigError(f"eos_token_id is {found!r}", where=str(file), mend="A token id, or a list of them.")
    return ids


def read_prompts(lines: Iterable[str], where: str) -> list[Prompt]:
    """Prompts of a JSONL file, whose lines are `{"prompt": text}` or `{"messages": [{"role", "content"}, ...]}`.

    Raises:
        ConfigError: a line is something else.
    """
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"is not valid JSON ({error})", where=f"{where}:{number}") from error
        value = value if isinstance(value, dict) else {}
        prompt = value.get("prompt", value.get("messages"))
        is_chat = isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)
        if not prompt or not (isinstance(prompt, str) or is_chat):
            mend = 'Each line is {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}.'
            raise ConfigError("has no prompt", where=f"{where}:{number}", mend=mend)
        prompts.append(prompt)
    return prompts


def as_chat(prompt: Prompt) -> Prompt:
    """A text as what a user says."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def read_prompt_file(path: str) -> list[Prompt]:
    """
    Raises:
        ConfigError: see `read_prompts`; the file cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return read_prompts(file, path)
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8, or nested too deeply"
        raise ConfigError(f"cannot be read: {reason}", where=path) from error
