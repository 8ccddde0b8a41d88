"""Text that a model goes on with."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from titanmoe.config.errors import ConfigError
from titanmoe.evaluation.decoding import decoding
from titanmoe.evaluation.sampling import Sampling
from titanmoe.models.decoder import Decoder

OnToken = Callable[[int, int], None]
"""Called with a prompt's place in the list and the token that was generated for it."""


@dataclass(frozen=True)
class Generated:
    """What follows a prompt.

    Attributes:
        tokens: without the token that ended it.
        finish_reason: "stop" if that was one of the stop tokens, "length" if there was no room for more.
    """

    tokens: list[int]
    finish_reason: Literal["stop", "length"]


@dataclass
class Speed:
    """Tokens and seconds; filled while generating.

    Attributes:
        prompt_tokens, prefill_seconds: what was read, and how long until the first token of every batch.
        new_tokens, decode_seconds: what was generated, first tokens and stop tokens included, and all the other time.
    """

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of all the time."""
        seconds = self.prefill_seconds + self.decode_seconds
        return self.new_tokens / seconds if seconds else 0.0


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    batch_size: int = 16,
    on_token: OnToken | None = None,
    speed: Speed | None = None,
) -> list[Generated]:
    """Go on with every prompt until a stop token, `max_new_tokens`, or the model's longest sequence.

    Args:
        model: any whole Decoder, converted or not, on the device that is to compute.
        prompts: token ids.
        sampling: greedy by default.
        batch_size: how many prompts are worked on together. Tokens do not depend on it, but for rounding.
        speed: is added to.

    Raises:
        ConfigError: an empty prompt, or one that leaves no room in the model's longest sequence.
    """
    assert max_new_tokens > 0 and batch_size > 0
    sampling, speed = sampling or Sampling(), speed or Speed()
    limit = model.spec.max_seq_len
    for place, prompt in enumerate(prompts):
        where = f"prompt {place + 1} of {len(prompts)}"
        if not prompt:
            raise ConfigError("is empty", where=where, mend="Give at least one token to go on from.")
        if len(prompt) >= limit:
            raise ConfigError(
                f"has {len(prompt):,} tokens; with the answer, the model takes at most {limit:,}",
                where=where,
                mend="Shorten it.",
            )
    results: list[Generated] = []
    for first in range(0, len(prompts), batch_size):
        places = range(first, min(first + batch_size, len(prompts)))
        batch = [prompts[place] for place in places]
        results += _batch(model, batch, places, max_new_tokens, sampling, frozenset(stop_ids), on_token, speed)
    return results


def _batch(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    places: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: frozenset[int],
    on_token: OnToken | None,
    speed: Speed,
) -> list[Generated]:
    """A row that is done goes on, unheard, until all are."""
    device = next(model.parameters()).device
    rooms = [min(max_new_tokens, model.spec.max_seq_len - len(prompt)) for prompt in prompts]
    num_steps = max(rooms)
    uniform_BT = sampling.draws(places, num_steps, device)
    answers: list[list[int]] = [[] for _ in prompts]
    reasons: list[Literal["stop", "length"] | None] = [None] * len(prompts)
    begin = time.perf_counter()
    with decoding(model, max(map(len, prompts)) + num_steps) as batch:
        logits_BV = batch.prefill(prompts, device)
        for step in range(num_steps):
            tokens_B = sampling.choose(logits_BV, uniform_BT[:, step])
            for row, token in enumerate(tokens_B.tolist()):
                if reasons[row] is not None:
                    continue
                speed.new_tokens += 1
                if token in stop_ids:
                    reasons[row] = "stop"
                    continue
                answers[row].append(token)
                if len(answers[row]) == rooms[row]:
                    reasons[row] = "length"
                if on_token is not None:
                    on_token(places[row], token)
            if step == 0:
                speed.prefill_seconds += time.perf_counter() - begin
                begin = time.perf_counter()
            if None not in reasons:
                break
            logits_BV = batch.step(tokens_B)
    speed.prompt_tokens += sum(map(len, prompts))
    speed.decode_seconds += time.perf_counter() - begin
    return [Generated(tokens, reason) for tokens, reason in zip(answers, reasons, strict=True) if reason is not None]
