"""A tokenizer's chat template: a conversation as text, and which of its characters are the assistant's.

Templates are code of whoever published the tokenizer. They run in jinja2's sandbox, which keeps them from attributes
that lead out of it, from changing what they are given and from ranges of more than 100,000 numbers; it cannot keep
loops inside loops from taking long. What they are given and how they are read follows `apply_chat_template` of
transformers: variables, filters, whitespace, `{% generation %}` blocks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from titanmoe.config.errors import ConfigError
from titanmoe.data.sources import Rendered
from titanmoe.data.tokenizer import Tokenizer, read_json

Message = Mapping[str, Any]

# Noncharacters of Unicode, reserved for the use inside a program: they stand where generation blocks begin and end.
_BEGIN, _END = "\ufdd0", "\ufdd1"


class ChatTemplate:
    """
    Args:
        text: the template.
        name: of the file it is from, for messages.
        variables: what it may name beside the messages, such as bos_token.
        special_tokens: one of them ends a turn: white space that a template writes after it is not supervised.
        clock: what `strftime_now` shows.

    Attributes:
        digest: the same for templates that render the same.
        has_blocks: whether generation blocks say what the assistant wrote.

    Raises:
        ConfigError: it is no template.
    """

    def __init__(
        self,
        text: str,
        name: str,
        variables: Mapping[str, str],
        special_tokens: Sequence[str] = (),
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        self.name, self.text = name, text
        self.digest = hashlib.sha256(repr((text, sorted(variables.items()))).encode()).hexdigest()[:16]
        self._variables, self._special_tokens = dict(variables), tuple(special_tokens)
        environment = _environment(clock)
        try:
            parsed = environment.parse(text)
            self.has_blocks = any(_BEGIN in each.data for each in parsed.find_all(nodes.TemplateData))
            self._template = environment.from_string(parsed)
        except Exception as error:  # an expression without names is computed here
            line = f", line {error.lineno} of the template" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise ConfigError(
                f"is no chat template: {error}",
                where=f"{name}{line}",
                mend="Mend it, or set data.chat_template to another.",
            ) from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of a conversation; with `add_generation_prompt`, up to where the assistant's next turn begins.

        Raises:
            ConfigError: the template fails, or refuses the conversation.
        """
        return re.sub(f"[{_BEGIN}{_END}]", "", self._render(messages, add_generation_prompt))

    def render_supervised(self, messages: Sequence[Message]) -> Rendered:
        """The text of a conversation, in which what the assistant's turns wrote is supervised.

        With generation blocks that is what they hold. Without, a turn is what it adds to the text of the messages
        before it and the prompt to go on, to the end of its last special token. Where others follow, a template may
        leave out how it began, its thoughts: then it is the rest, which must end as the turn does by itself.

        Raises:
            ConfigError: as `render`; or a turn changes otherwise, so that what it adds is not known.
        """
        if self.has_blocks:
            return self._read_blocks(self._render(messages, False))
        text = self.render(messages)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                begin = self.render(messages[:index], add_generation_prompt=True)
                alone = self.render(messages[: index + 1])
                end = self._find_end(text, begin, alone)
                if end is None:
                    raise ConfigError(
                        f"the chat template {self.name} writes messages[:{index + 1}] otherwise when others follow, or "
                        "after its own generation prompt: what the assistant wrote cannot be told from the text",
                        mend="Put {% generation %} and {% endgeneration %} around it in a copy of the template, and "
                        'set data.chat_template to that; or set data.loss_on = "all".',
                    )
                spans.append((len(begin), end))
        return Rendered(text, tuple(spans))

    def _find_end(self, text: str, begin: str, alone: str) -> int | None:
        """Where in the whole text a turn ends that begins after `begin`; None if that is not known.

        Args:
            alone: the text to the end of the turn, were it the last.
        """
        if not (text.startswith(begin) and alone.startswith(begin) and len(begin) < len(alone)):
            return None
        if text.startswith(alone):
            return self._end_of_turn(alone, len(begin))
        closing = next((token for token in self._special_tokens if alone.rstrip().endswith(token)), None)
        if closing is None:
            return None
        rest, found, _ = text[len(begin) :].partition(closing)
        return len(begin + rest + found) if found and alone.rstrip().endswith(rest + found) else None

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            text = self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
            text.encode()  # half of a surrogate pair, as JSON may hold, is no text
            return text
        except Exception as error:  # a template may do whatever Python allows, and fail as Python does
            raise ConfigError(
                f"the chat template {self.name} fails: {str(error) or type(error).__name__}",
                mend="Mend the conversation, or set data.chat_template to a template that takes it.",
            ) from error

    def _read_blocks(self, marked: str) -> Rendered:
        pieces = re.split(f"([{_BEGIN}{_END}])", marked)
        marks = pieces[1::2]
        if marks != [_BEGIN, _END] * (len(marks) // 2):
            raise ConfigError(
                f"the generation blocks of the chat template {self.name} are inside each other, or the conversation "
                "holds U+FDD0 or U+FDD1",
                mend="Write one block around each of the assistant's turns, and no such characters.",
            )
        borders, length = [], 0
        for text in pieces[::2]:
            length += len(text)
            borders.append(length)
        spans = zip(borders[0::2], borders[1::2], strict=False)
        return Rendered("".join(pieces[::2]), tuple((begin, end) for begin, end in spans if begin < end))

    def ends_turn(self, text: str) -> bool:
        """Whether a special token is the last of `text`, but for white space."""
        return text.rstrip().endswith(self._special_tokens)

    def _end_of_turn(self, text: str, begin: int) -> int:
        return len(text.rstrip()) if self.ends_turn(text[begin:]) else len(text)


def load_chat_template(
    tokenizer: Tokenizer, file: str | None = None, clock: Callable[[], datetime] = datetime.now
) -> ChatTemplate:
    """The chat template in `file`; by default the tokenizer's: chat_template.jinja or in tokenizer_config.json.

    Raises:
        ConfigError: there is none, it cannot be read, or it is no template.
    """
    config = tokenizer.folder / "tokenizer_config.json"
    names = read_json(config)
    path = Path(file) if file is not None else tokenizer.folder / "chat_template.jinja"
    if file is not None or path.is_file():
        name = str(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot be read: {error}", where=name, mend="Give a Jinja template as a file."
            ) from error
    else:
        name, given = str(config), names.get("chat_template")
        if isinstance(given, list):  # several, by name
            given = next((entry.get("template") for entry in given if entry.get("name") == "default"), None)
        if not isinstance(given, str):
            raise ConfigError(
                "the tokenizer has no chat template",
                where=str(tokenizer.folder),
                mend="Copy chat_template.jinja from an instruction-tuned model of the same tokenizer, or set "
                "data.chat_template to a file.",
            )
        text = given
    variables = {}
    for kind, number in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if number is not None:
            variables[f"{kind}_token"] = str(tokenizer.backend.id_to_token(number))
    for key, entry in names.items():
        token = entry.get("content") if isinstance(entry, dict) else entry
        if key.endswith("_token") and isinstance(token, str):
            variables[key] = token
    added = tokenizer.backend.get_added_tokens_decoder().values()
    return ChatTemplate(text, name, variables, [token.content for token in added if token.special], clock)


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}, as a mark at each end of what it holds."""

    tags = {"generation"}  # noqa: RUF012 (the type of the base class)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)]).set_lineno(line) for mark in (_BEGIN, _END))
        return [begin, *body, end]


def _environment(clock: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: clock().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own filter, neither escaped for HTML nor sorted."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
