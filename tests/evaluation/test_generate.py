"""Generated tokens against transformers, and where they end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.evaluation.test_decoding import random_model
from tests.models.kinds import KINDS
from tests.parity import reference
from tests.parity.variants import VARIANTS
from titanmoe import ConfigError, from_pretrained
from titanmoe.evaluation.generate import Speed, generate
from titanmoe.evaluation.sampling import Sampling

PROMPTS = [[5, 3, 8], [1], [9] * 12, [4, 4, 2, 2, 7]]


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("qwen3", "moe"),
        ("llama3", "llama3_rope"),
        ("deepseek_v3", "v3"),
        ("glm4_moe_lite", "plain"),
        ("gpt_oss", "like_the_release"),
        ("llama4", "like_scout"),
        ("mixtral", "window"),
    ],
)
def test_greedy_tokens_are_those_of_transformers(family: str, variant: str, tmp_path: Path) -> None:
    model_type, options = VARIANTS[family][variant]
    theirs = reference.random_model(model_type, options).eval()
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path, dtype=torch.float32)
    prompts = [reference.some_tokens(ours.spec.vocab_size, 1, length, length)[0].tolist() for length in (3, 17, 9)]
    found = generate(ours, prompts, max_new_tokens=20)
    for prompt, answer in zip(prompts, found, strict=True):
        tokens = torch.tensor([prompt])
        expected = theirs.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert answer.tokens == expected[0, len(prompt) :].tolist()
        assert answer.finish_reason == "length"


def test_samples_depend_neither_on_the_batch_nor_on_what_else_is_asked() -> None:
    model, sampling = random_model(KINDS["grouped-query"]), Sampling(1.5, 0.9, seed=4)
    together = generate(model, PROMPTS, max_new_tokens=12, sampling=sampling)
    assert generate(model, PROMPTS, max_new_tokens=12, sampling=sampling, batch_size=3) == together
    assert generate(model, PROMPTS[:1], max_new_tokens=12, sampling=sampling) == together[:1]
    assert generate(model, PROMPTS, max_new_tokens=12, sampling=replace(sampling, seed=5)) != together
    twice = generate(model, [PROMPTS[0]] * 2, max_new_tokens=12, sampling=sampling)
    assert twice[0] == together[0] and twice[1] != twice[0]


def test_it_ends_at_stop_tokens() -> None:
    model = random_model(KINDS["dense"])
    endless = generate(model, PROMPTS, max_new_tokens=15)
    stop = endless[0].tokens[4]
    heard: dict[int, list[int]] = {place: [] for place in range(len(PROMPTS))}
    speed = Speed()
    found = generate(
        model,
        PROMPTS,
        max_new_tokens=15,
        stop_ids={stop},
        on_token=lambda place, token: heard[place].append(token),
        speed=speed,
        batch_size=3,
    )
    for answer, without_end in zip(found, endless, strict=True):
        tokens = without_end.tokens
        ends = stop in tokens
        assert answer.tokens == (tokens[: tokens.index(stop)] if ends else tokens)
        assert answer.finish_reason == ("stop" if ends else "length")
    assert found[0].finish_reason == "stop" and len(found[0].tokens) <= 4
    assert list(heard.values()) == [answer.tokens for answer in found]
    stopped = sum(answer.finish_reason == "stop" for answer in found)
    assert speed.new_tokens == sum(len(answer.tokens) for answer in found) + stopped
    assert speed.prompt_tokens == sum(map(len, PROMPTS)) and speed.tokens_per_second > 0


def test_it_ends_at_the_longest_sequence_of_the_model() -> None:
    model = random_model(replace(KINDS["dense"], max_seq_len=14))
    found = generate(model, PROMPTS, max_new_tokens=10)
    assert [len(answer.tokens) for answer in found] == [10, 10, 2, 9]
    assert {answer.finish_reason for answer in found} == {"length"}


@pytest.mark.parametrize(("prompt", "message"), [([], "is empty"), ([1] * 14, "14 tokens; .* at most 14")])
def test_wrong_prompts(prompt: list[int], message: str) -> None:
    model = random_model(replace(KINDS["dense"], max_seq_len=14))
    with pytest.raises(ConfigError, match=message) as raised:
        generate(model, [[1], prompt], max_new_tokens=3)
    assert raised.value.where == "prompt 2 of 2"
