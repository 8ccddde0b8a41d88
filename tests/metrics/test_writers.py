from __future__ import annotations

import json
import logging
import math
import sys
import types

import pytest

from titanmoe.config.errors import ConfigError
from titanmoe.metrics.records import KEYS, read_records
from titanmoe.metrics.writers import JsonlWriter, TensorBoardWriter, WandbWriter


@pytest.fixture
def messages():
    """What the package's logger said; it does not propagate, so pytest's caplog cannot see it."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("titanmoe")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


def write(path, steps, resumed_step=0, cut=""):
    writer = JsonlWriter(path, resumed_step)
    for step in steps:
        writer.log(step, {"loss": 10.0 / step})
    writer.close()
    with path.open("a") as file:
        file.write(cut)


def steps_in(path):
    records, damaged = read_records(path)
    assert not damaged
    return [record["step"] for record in records]


def test_a_record_has_the_contracts_keys_first_and_in_order(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.log(10, {"step_seconds": 0.5, "lr": 1e-3, "loss": 2.5, "tokens_seen": 4096})
    # Flushed at once: readable before the file is closed.
    line = path.read_text()
    assert line.endswith("\n") and list(json.loads(line)) == ["step", *KEYS, "step_seconds"]
    assert json.loads(line) | {"x": 0} == dict.fromkeys(KEYS) | {
        "step": 10, "loss": 2.5, "lr": 1e-3, "tokens_seen": 4096, "step_seconds": 0.5, "x": 0
    }  # fmt: skip
    writer.log_validation(10, {"validation_loss": 2.75, "validation_tokens": 100})
    writer.close()
    assert json.loads(path.read_text().splitlines()[1]) == {
        "step": 10,
        "validation_loss": 2.75,
        "validation_tokens": 100,
    }


def test_values_survive_bit_for_bit(tmp_path):
    loss = 1 / 3 + 1e-16
    write(tmp_path / "m.jsonl", [])
    writer = JsonlWriter(tmp_path / "m.jsonl", 1)
    writer.log(1, {"loss": loss})
    writer.close()
    JsonlWriter(tmp_path / "m.jsonl", 1).close()
    assert read_records(tmp_path / "m.jsonl")[0][0]["loss"] == loss


def test_values_that_are_not_finite_are_null_and_named(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.log(3, {"loss": math.nan, "grad_norm": math.inf, "lr": 1e-3, "mfu": None})
    writer.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    record = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=refuse)
    assert record["loss"] is None and record["grad_norm"] is None and record["lr"] == 1e-3
    assert record["nonfinite"] == ["loss", "grad_norm"]


@pytest.mark.parametrize("cut", ["", '{"step": 8, "lo', '{"step": 8, "loss": 1.25}', "\n\n", "\0\0\0\0"])
def test_resume_leaves_every_step_once(tmp_path, cut, messages):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8), cut=cut)
    write(path, range(6, 11), resumed_step=5)
    assert steps_in(path) == list(range(1, 11))
    assert path.read_bytes().count(b"\n") == 10
    damaged = cut not in ("", "\n\n", '{"step": 8, "loss": 1.25}')
    assert any("dropped unreadable lines 8" in message for message in messages) == damaged
    assert not list(tmp_path.glob("*.tmp"))


def test_resume_at_the_last_step_keeps_all_even_without_a_final_newline(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3], cut='{"step": 4, "loss": 1.0}')
    write(path, [5], resumed_step=4)
    assert steps_in(path) == [1, 2, 3, 4, 5]


def test_a_damaged_line_in_the_middle_is_dropped_and_named(tmp_path, messages):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1}\n[1, 2]\n{"loss": 3}\n{"step": 2, "loss": 1}\n')
    write(path, [3], resumed_step=2)
    assert steps_in(path) == [1, 2, 3]
    assert any("unreadable lines 2, 3" in message for message in messages)


def test_a_fresh_run_moves_the_earlier_file_aside(tmp_path, messages):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    write(path, [1])
    assert steps_in(path) == [1] and steps_in(tmp_path / "metrics.previous.jsonl") == [1, 2]
    assert any("metrics.previous.jsonl" in message for message in messages)


def test_resuming_into_an_empty_folder_just_starts(tmp_path):
    write(tmp_path / "metrics.jsonl", [11], resumed_step=10)
    assert steps_in(tmp_path / "metrics.jsonl") == [11]


def test_an_unwritable_place_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write metrics") as caught:
        JsonlWriter(tmp_path / "file" / "metrics.jsonl")
    assert "job.dump_folder" in caught.value.mend
    with pytest.raises(ConfigError, match="cannot write TensorBoard"):
        TensorBoardWriter(tmp_path / "file" / "tb")


def test_tensorboard_hides_the_steps_that_are_run_again(tmp_path):
    for resumed, steps in ((0, range(1, 8)), (5, range(6, 9))):
        writer = TensorBoardWriter(tmp_path, resumed)
        for step in steps:
            writer.log(step, {"loss": step + resumed / 10, "mfu": None})
        writer.log_validation(steps[-1], {"validation_loss": 4.0})
        writer.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, round(event.value, 3)) for event in events.Scalars("loss")] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0), (6, 6.5), (7, 7.5), (8, 8.5)
    ]  # fmt: skip
    assert sorted(events.Tags()["scalars"]) == ["loss", "validation_loss"]


def test_missing_packages_end_the_run_at_startup(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="enable_wandb") as caught:
        WandbWriter(tmp_path, {})
    assert "pip install wandb" in caught.value.mend
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="enable_tensorboard"):
        TensorBoardWriter(tmp_path)


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict]] = []
        self.finished = False

    def log(self, values, step):
        if step == 3:
            raise ConnectionError("service gone")
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    module = types.ModuleType("wandb")
    module.Error = type("Error", (Exception,), {})
    module.run = FakeRun()

    def init(**arguments):
        module.arguments = arguments
        return module.run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_wandb_gets_the_config_and_the_values(tmp_path, wandb):
    writer = WandbWriter(tmp_path, {"seed": 1})
    writer.log(1, {"loss": 2.0, "mfu": None})
    writer.log_validation(1, {"validation_loss": 3.0})
    writer.close()
    assert wandb.arguments == {"project": "titanmoe", "dir": str(tmp_path), "config": {"seed": 1}}
    assert wandb.run.logged == [(1, {"loss": 2.0}), (1, {"validation_loss": 3.0})] and wandb.run.finished


def test_wandb_that_fails_while_training_is_named_once_and_left_alone(tmp_path, wandb, messages):
    writer = WandbWriter(tmp_path, {})
    for step in range(1, 6):
        writer.log(step, {"loss": 1.0})
    writer.close()
    assert [step for step, _ in wandb.run.logged] == [1, 2]
    assert messages == ["Weights & Biases failed at step 3 and is off from here on: service gone"]


def test_wandb_that_cannot_start_is_the_users_mistake(tmp_path, wandb):
    def init(**arguments):
        raise wandb.Error("no API key")

    wandb.init = init
    with pytest.raises(ConfigError, match="no API key"):
        WandbWriter(tmp_path, {})
