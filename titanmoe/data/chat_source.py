"""Conversations as documents: rows with `messages`, checked, and rendered with the tokenizer's chat template.

A message is {"role": ..., "content": ...}; content is a string or a list of {"type": "text", "text": ...}. Its other
keys (reasoning_content, tool_calls, name, ...) reach the template as they are. Keys without a value are taken for
absent, because in columns of Arrow every row has all keys.
"""

from __future__ import annotations

import logging
from datetime import datetime
from typing import Any, Literal

from titanmoe.config.errors import ConfigError
from titanmoe.data.chat_rows import Rows, StdlibRows, open_rows
from titanmoe.data.chat_template import ChatTemplate, Message, load_chat_template
from titanmoe.data.sources import Rendered, Split
from titanmoe.data.tokenizer import Tokenizer

logger = logging.getLogger("titanmoe.data")

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

# What `strftime_now` shows a template in training, whatever the day: the tokens of a resumed run must be the same. It
# is the day that the templates of Llama 3 name where there is no clock.
TODAY = datetime(2024, 7, 26)


class ChatSource:
    """A DocumentSource of conversations, as text with special tokens.

    Args:
        assistant_only: supervise what the assistant's turns wrote, to the end-of-turn token; otherwise everything.

    Raises:
        ConfigError: from indexing, with the file and line: the row is no conversation, or not one for the template;
            with `assistant_only`, it has no turn of the assistant.
    """

    def __init__(self, rows: Rows, template: ChatTemplate, assistant_only: bool) -> None:
        self._rows, self._template, self._assistant_only = rows, template, assistant_only
        supervised = "assistant" if assistant_only else "all"
        self.fingerprint = f"{rows.fingerprint}-{template.digest}-{supervised}"

    def __len__(self) -> int:
        return len(self._rows)

    def messages(self, index: int) -> list[Message]:
        """The conversation of a row, checked."""
        return check_messages(self._rows[index])

    def __getitem__(self, index: int) -> Rendered:
        try:
            messages = self.messages(index)
            if not self._assistant_only:
                text = self._template.render(messages)
                return Rendered(text, ((0, len(text)),))
            if not any(message["role"] == "assistant" for message in messages):
                raise ConfigError(
                    "no message is the assistant's: there is nothing to learn",
                    mend='Remove the conversation, or set data.loss_on = "all".',
                )
            return self._template.render_supervised(messages)
        except ConfigError as error:
            raise ConfigError(error.what, where=error.where or self._rows.where(index), mend=error.mend) from error


def open_chat(
    dataset: Literal["chat", "stdlib_docs"],
    path: str | None,
    split: Split,
    tokenizer: Tokenizer,
    *,
    template: str | None = None,
    loss_on: Literal["assistant", "all"] = "assistant",
    messages_key: str = "messages",
) -> ChatSource:
    """Open the conversations that `training.dataset` or `validation.dataset` names.

    Args:
        path: of `chat`: a JSON or Parquet file, a directory or a glob of them.
        split: which part of `stdlib_docs`.
        template: a file that replaces the tokenizer's chat template.

    Raises:
        ConfigError: broken or empty files, a broken template, or a first conversation that it does not take.
    """
    rows: Rows
    if dataset == "stdlib_docs":
        rows = StdlibRows(split)
    else:
        assert path is not None, "validated"
        rows = open_rows(path, messages_key)
    chat_template = load_chat_template(tokenizer, template, clock=lambda: TODAY)
    if "strftime_now" in chat_template.text:
        logger.info("%s shows the date: in training it is always %s", chat_template.name, TODAY.date())
    source = ChatSource(rows, chat_template, loss_on == "assistant")
    first = source[0]
    if loss_on == "assistant":
        if not first.supervised and any(each["content"] for each in source.messages(0) if each["role"] == "assistant"):
            raise ConfigError(
                "the generation blocks of the chat template hold nothing that the assistant wrote",
                where=chat_template.name,
                mend='Mend them, or set data.loss_on = "all".',
            )
        begin, end = first.supervised[-1] if first.supervised else (0, 0)
        if not chat_template.ends_turn(first.text[begin:end]):
            logger.warning(
                "%s ends the assistant's turn without a special token: nothing here teaches the model to stop",
                chat_template.name,
            )
    return source


def check_messages(row: Any) -> list[Message]:
    """The messages of a row as a template wants them: contents as strings, no keys without a value.

    Raises:
        ConfigError: it is not a list of messages; the error does not say where.
    """
    mend = 'A conversation is a list of {"role": ..., "content": "..."}; see docs/data.md.'
    if not isinstance(row, list) or not row:
        raise ConfigError("there are no messages" if not row else f"the messages are a {_kind(row)}", mend=mend)
    messages: list[Message] = []
    for number, given in enumerate(row):
        if not isinstance(given, dict):
            raise ConfigError(f"messages[{number}] is a {_kind(given)}, not an object", mend=mend)
        try:
            message = _without_none(given)
        except RecursionError as error:
            raise ConfigError(f"messages[{number}] is nested too deeply", mend=mend) from error
        role = message.get("role")
        if role not in ROLES:
            raise ConfigError(f"messages[{number}] has the role {role!r}", mend=f"Known roles: {', '.join(ROLES)}.")
        content = message.get("content", "" if "tool_calls" in message else None)
        if isinstance(content, list) and all(_is_text(part) for part in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise ConfigError(f"the content of messages[{number}] is a {_kind(content)}, not text", mend=mend)
        messages.append({**message, "content": content})
    return messages


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", int: "number", float: "number", bool: "boolean"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
