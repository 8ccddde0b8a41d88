"""A checkpoint of every family, made by transformers, is trained through the whole program and read by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from tests.parity.reference import random_model
from tests.parity.variants import VARIANTS
from tests.train.jobs import assert_close, run, write_job
from titanmoe.checkpoint.pretrained import spec_of_hf_folder
from titanmoe.models.family import FAMILIES
from titanmoe.models.spec import num_experts


@pytest.mark.parametrize("family", FAMILIES)
def test_from_transformers_to_transformers(family: str, tmp_path: Path) -> None:
    """Two ranks, with experts dealt and recomputation, equal one process; what is left behind loads and has learned."""
    model_type, options = next(iter(VARIANTS[family].values()))
    # The built-in tokenizer's vocabulary, and weights as small as real ones.
    options = {**options, "vocab_size": 2048, "initializer_range": 0.02}
    job = write_job(tmp_path)
    (tmp_path / "model" / "config.json").unlink()
    random_model(model_type, options).save_pretrained(tmp_path / "model")
    args = (
        "--checkpoint.enable",
        "--checkpoint.initial_load_in_hf",
        "--checkpoint.last_save_in_hf",
        "--checkpoint.export_dtype=float32",
        "--training.steps=8",
        "--data.document_mask",
        "--debug.seed=3",  # with which no token is so near a tie of two experts that last bits decide
    )
    run(job, tmp_path / "one", *args)
    two = ["--training.local_batch_size=2", "--activation_checkpoint.mode=full"]
    if any(number % 2 == 0 for number in num_experts(spec_of_hf_folder(tmp_path / "model")[1])):
        two.append("--parallelism.expert_parallel_degree=2")
    run(job, tmp_path / "two", *args, *two, ranks=2)
    assert_close(tmp_path / "two", tmp_path / "one")
    folder = tmp_path / "two" / "checkpoint" / "step-8-hf"
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (tmp_path / "model", folder)
    )
    assert type(before) is type(after)
    moved = [(old - new).abs().max() > 0 for old, new in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved)
