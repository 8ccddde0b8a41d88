"""Choosing the next token.

Shape suffixes: B batch, V vocabulary, T tokens to generate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titanmoe.config.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_p: the share of probability from which is drawn: the smallest set of the most likely tokens that has at
            least this much (nucleus sampling, Holtzman et al., arXiv 1904.09751).
        seed: what the numbers drawn follow from, together with a prompt's place in the list of prompts: they depend
            neither on the other prompts nor on the device.

    Raises:
        ConfigError: a number out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"{self.temperature} was given", where="temperature", mend="0 is greedy; else above 0.")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"{self.top_p} was given", where="top-p", mend="Above 0, and at most 1 (all tokens).")
        if not 0 <= self.seed < 1 << 32:
            raise ConfigError(f"{self.seed} was given", where="seed", mend="A whole number from 0 to 2^32 - 1.")

    def draws(self, rows: Sequence[int], num_tokens: int, device: torch.device) -> Tensor:
        """uniform_BT: in [0, 1), for the prompts at these places in the list."""
        generators = [torch.Generator().manual_seed(self.seed * 1_000_003 + row) for row in rows]
        return torch.stack([torch.rand(num_tokens, generator=generator) for generator in generators]).to(device)

    def choose(self, logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
        """tokens_B, int64."""
        if self.temperature == 0.0:
            return logits_BV.argmax(dim=-1)
        below_most_BV = logits_BV.float() - logits_BV.amax(dim=-1, keepdim=True).float()
        temperature = max(self.temperature, torch.finfo(torch.float32).tiny)
        probabilities_BV = (below_most_BV / temperature).softmax(dim=-1)
        sorted_BV, token_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
        end_BV = sorted_BV.cumsum(dim=-1)
        # A token is in the nucleus if those before it have less than top_p; the first one always is.
        num_kept_B1 = (end_BV[:, :-1] < self.top_p).sum(dim=-1, keepdim=True) + 1
        total_B1 = end_BV.gather(1, num_kept_B1 - 1)
        place_B1 = torch.searchsorted(end_BV, uniform_B[:, None] * total_B1, right=True)
        return token_BV.gather(1, torch.minimum(place_B1, num_kept_B1 - 1))[:, 0]
