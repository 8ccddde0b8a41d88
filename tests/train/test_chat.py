"""Whole jobs on conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.chat_templates import GENERATION
from tests.train.jobs import assert_close, assert_one_line, curve, run, steps, train, validations, write_job
from tests.train.test_resume import CONTEXT, EXPERT, PIPELINE, SAVE, assert_resumed_exactly

TURN = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job on forty conversations of one or two turns, of which a few are too long for its 64 tokens."""
    rows: list[Any] = []
    for number in range(40):
        talk = [{"role": "user", "content": f"def f{number}(x):"}, {"role": "assistant", "content": "return x"}]
        talk += [] if number % 3 else [{"role": "user", "content": "twice"}, {"role": "assistant", "content": "2 * x"}]
        talk[1]["content"] += " + 1" * (number % 7) * (10 if number % 13 == 6 else 1)
        rows.append(talk)
    write_talks(tmp_path / "talks.jsonl", rows)
    return write_job(tmp_path)


def write_talks(file: Path, talks: list[Any]) -> None:
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))


def on_talks(folder: Path) -> tuple[str, ...]:
    return ("--training.dataset=chat", f"--training.dataset_path={folder}/talks.jsonl", "--training.seq_len=64")


def test_every_layout_learns_the_same(job: Path, tmp_path: Path) -> None:
    options = (*on_talks(tmp_path), "--validation.enable", "--validation.dataset=chat", "--validation.seq_len=64")
    options += (f"--validation.dataset_path={tmp_path}/talks.jsonl", "--validation.freq=5")
    outcome = run(job, tmp_path / "one", *options)
    assert "of more than seq_len + 1 = 65 tokens" in outcome.told
    losses = [loss for _, loss, _ in curve(tmp_path / "one")]
    assert losses[-1] < losses[0] - 1
    layouts = {"fsdp, ep": ("--training.local_batch_size=2", EXPERT), "cp": (CONTEXT,)}
    layouts["pp"] = ("--training.local_batch_size=2", PIPELINE)
    for name, layout in layouts.items():
        run(job, tmp_path / name, *options, *layout, ranks=2)
        assert_close(tmp_path / name, tmp_path / "one")
        assert validations(tmp_path / name) == pytest.approx(validations(tmp_path / "one"), rel=1e-5)


def test_validation_needs_something_to_learn(job: Path, tmp_path: Path) -> None:
    """Every conversation is longer than a sequence: a loss of zero would look like the best there ever was."""
    options = (*on_talks(tmp_path), "--validation.enable", "--validation.dataset=chat", "--validation.seq_len=4")
    options += (f"--validation.dataset_path={tmp_path}/talks.jsonl", "--training.steps=2")
    outcome = train("--job.config_file", job, f"--job.dump_folder={tmp_path / 'out'}", *options)
    assert outcome.codes == [2]
    assert_one_line(outcome.err[0], "no token of the validation data is learned from")


def test_resume_is_bit_for_bit(job: Path, tmp_path: Path) -> None:
    options = (*SAVE, *on_talks(tmp_path), "--training.local_batch_size=2", "--training.dataloader.num_workers=2")
    assert_resumed_exactly(job, tmp_path, 2, options, last=20)


def test_ranks_and_batches_without_anything_to_learn(job: Path, tmp_path: Path) -> None:
    """With one conversation per epoch for four lanes, three have ended from the start; then all say nothing."""
    options = (*on_talks(tmp_path), "--training.epochs=1")
    write_talks(tmp_path / "talks.jsonl", [TURN])
    run(job, tmp_path / "one", *options)
    run(job, tmp_path / "two", *options, "--training.local_batch_size=2", ranks=2)
    assert curve(tmp_path / "one")[0][1] > 5
    assert_close(tmp_path / "two", tmp_path / "one")

    (tmp_path / "blocks.jinja").write_text(GENERATION.replace("message.content + '<|im_end|>'", "message.content"))
    write_talks(tmp_path / "talks.jsonl", [[TURN[0], {"role": "assistant", "content": ""}]] * 8)
    silent = (*on_talks(tmp_path), f"--data.chat_template={tmp_path}/blocks.jinja", "--training.steps=2")
    run(job, tmp_path / "silent", *silent)
    assert [record["loss"] for record in steps(tmp_path / "silent").values()] == [0.0, 0.0]
    assert [record["grad_norm"] for record in steps(tmp_path / "silent").values()] == [0.0, 0.0]


def test_what_is_wrong_is_named(job: Path, tmp_path: Path) -> None:
    write_talks(tmp_path / "talks.jsonl", [TURN] * 3 + [TURN[:1]] + [TURN] * 4)
    outcome = train(
        f"--job.config_file={job}",
        f"--job.dump_folder={tmp_path}/dump",
        *on_talks(tmp_path),
        "--training.local_batch_size=2",
        ranks=2,
    )
    assert outcome.codes == [2, 2], outcome.told
    assert_one_line(outcome.err[0], f"{tmp_path}/talks.jsonl:4: no message is the")
    outcome = train(f"--job.config_file={job}", "--training.dataset=stdlib_docs", "--training.steps=1")
    assert outcome.codes == [2] and "is embedded and has no path" in outcome.told
    outcome = train(f"--job.config_file={job}", *on_talks(tmp_path), "--data.chat_template=absent.jinja")
    assert outcome.codes == [2]
    assert_one_line(outcome.err[0], "absent.jinja")
