"""Generated texts on stdout: as they come where one is written to a terminal, else at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from titanmoe.evaluation.generate import Generated, Speed
from titanmoe.evaluation.text_model import Prompt, TextModel
from titanmoe.metrics.terminal import Terminal


class Writer:
    """
    Args:
        terminal: for a bar, and how fast it was.
        streams: whether a single text may be written as it comes.
    """

    def __init__(
        self, model: TextModel, prompts: Sequence[Prompt], max_new_tokens: int, terminal: Terminal, streams: bool
    ) -> None:
        self.model, self.prompts, self.terminal = model, prompts, terminal
        self.streams = streams and len(prompts) == 1 and sys.stdout.isatty()
        self._most, self._count = max_new_tokens * len(prompts), 0
        self._tokens: list[int] = []
        self._written = ""

    def on_token(self, place: int, token: int) -> None:
        """See `generate`."""
        self._count += 1
        if not self.streams:
            self.terminal.progress_bar(self._count / self._most, f"{self._count} tokens", "", "")
            return
        self._tokens.append(token)
        text = self.model.decode(self._tokens)
        if not text.endswith("\ufffd"):  # else a character of which some bytes are still to come
            self._write(text)

    def finish(self, results: Sequence[Generated], speed: Speed, as_json: bool) -> None:
        texts = [self.model.decode(result.tokens) for result in results]
        each = zip(self.prompts, results, texts, strict=True)
        if as_json:
            rows = [{"prompt": prompt, "text": text, **asdict(result)} for prompt, result, text in each]
            figures = {"results": rows, **asdict(speed), "tokens_per_second": speed.tokens_per_second}
            sys.stdout.write(json.dumps(figures) + "\n")
            return
        if self.streams:
            self._write(texts[0] + "\n")
        elif len(texts) == 1:
            sys.stdout.write(texts[0] + "\n")
        else:
            for number, (_, result, text) in enumerate(each, start=1):
                sys.stdout.write(f"--- {number} ({len(result.tokens)} tokens, {result.finish_reason})\n{text}\n")
        sys.stdout.flush()
        seconds = speed.prefill_seconds + speed.decode_seconds
        self.terminal.line(
            f"{speed.prompt_tokens} tokens read, {speed.new_tokens} generated in {seconds:.2f} s: "
            f"{speed.tokens_per_second:.1f} tokens/s"
        )

    def _write(self, text: str) -> None:
        sys.stdout.write(text[len(self._written) :])
        sys.stdout.flush()
        self._written = text
