from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest

from tests.metrics.streams import FakeTTY, plain, screen, terminal
from titanmoe.metrics.console import Console, RunInfo

RUN = RunInfo(
    model="qwen3 debug_moe",
    num_parameters=8_123_456,
    num_active_parameters=2_345_678,
    device="CPU",
    num_devices=2,
    mesh="dp_shard 2",
    global_batch_size=8,
    seq_len=256,
    num_steps=400,
    data="stdlib",
    dump_folder="outputs",
    extra={"precision": "float32"},
)
VALUES = {
    "loss": 7.12345,
    "grad_norm": 1.5,
    "lr": 3e-4,
    "tokens_per_second": 12_345.0,
    "tflops": 0.1234,
    "mfu": None,
    "peak_memory_gib": 1.25,
    "data_seconds": 0.02,
    "step_seconds": 0.2,
    "expert_load_cv": 0.456,
    "dead_experts": 3.0,
}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_whole_run_in_a_file():
    stream, clock = io.StringIO(), Clock()
    console = Console(terminal(stream), clock)
    console.start(RUN)
    console.progress(1)
    console.log(1, VALUES)
    console.log(400, {**VALUES, "loss": math.nan, "grad_norm": 123456.0, "tflops": 312.0, "dead_experts": 0})
    console.log_validation(400, {"validation_loss": 6.5})
    clock.now = 65
    console.finish(400, {"checkpoint": "outputs/checkpoint/step-400"})
    assert (
        stream.getvalue()
        == """\
12:00:00  titanmoe trains qwen3 debug_moe
          parameters  8.12M total, 2.35M active per token
          devices     2 x CPU
          mesh        dp_shard 2
          batch       8 x 256 tokens = 2,048 tokens per step
          length      400 steps = 819k tokens
          data        stdlib
          precision   float32
          outputs     outputs
12:00:00    step     loss  grad norm        lr   tok/s  TFLOP/s    memory  data  load cv  dead
12:00:00       1   7.1235     1.5000  3.00e-04   12.3k    0.123   1.2 GiB   10%     0.46     3
12:00:00     400      nan   1.23e+05  3.00e-04   12.3k      312   1.2 GiB   10%     0.46     0
12:00:00     400   6.5000  validation
12:00:00  done at step 400
          time        400 steps in 1 min 05 s, 12.6k tokens/s with all pauses
          loss        nan
          validation  6.5000
          checkpoint  outputs/checkpoint/step-400
"""
    )


def test_a_dense_model_with_a_known_peak_has_other_columns():
    stream = io.StringIO()
    console = Console(terminal(stream), Clock())
    console.log(1, {"loss": 1.0, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 1e4, "tflops": 1.0, "mfu": 0.4})
    header, line = stream.getvalue().splitlines()
    assert header == "12:00:00    step     loss  grad norm        lr   tok/s  TFLOP/s    MFU    memory"
    assert line == "12:00:00       1   1.0000     1.0000  1.00e-03   10.0k        1  40.0%         -"


def test_a_narrow_terminal_drops_columns_but_a_file_does_not():
    stream = FakeTTY()
    Console(terminal(stream, columns=80), Clock()).log(1, VALUES)
    header, line = plain(stream.getvalue()).splitlines()
    assert header == "12:00:00    step     loss  grad norm        lr   tok/s    memory  data  load cv"
    assert len(header) == len(line) <= 80
    narrow = io.StringIO()
    Console(terminal(narrow, columns=80), Clock()).log(1, VALUES)
    assert "TFLOP/s" in narrow.getvalue()


def test_colours_and_the_bar_on_a_terminal():
    stream, clock = FakeTTY(), Clock()
    console = Console(terminal(stream, columns=100), clock)
    console.start(RUN)
    console.progress(1)
    clock.now = 10
    console.progress(101)
    console.log(101, VALUES)
    text = stream.getvalue()
    assert "\x1b[36m 7.1235\x1b[0m" in text
    assert "\x1b[33m   3\x1b[0m" in text
    # 100 steps took 10 s, so the 299 others take 30 s; the speed is known from the next bar on.
    assert screen(text)[-1] == f" 25%  {'━' * 10}{'─' * 30}  101/400  0:30 left"
    clock.now = 20
    console.progress(201)
    assert screen(stream.getvalue())[-1] == f" 50%  {'━' * 20}{'─' * 20}  201/400  12.3k tok/s  0:20 left"
    console.finish(201, {}, status="stopped")
    lines = screen(stream.getvalue())
    assert lines[-1] == "" and "12:00:00  stopped at step 201" in lines
    assert sum("left" in line for line in lines) == 0, "no bar stays behind"


def test_the_bar_is_drawn_ten_times_a_second_at_most_and_always_at_the_end():
    stream, clock = FakeTTY(), Clock()
    console = Console(terminal(stream), clock)
    console.start(RUN)
    clock.now = 1
    for step in range(1, 400):
        clock.now += 0.01
        console.progress(step)
    assert 30 <= stream.getvalue().count("\x1b[2K") <= 45
    console.progress(400)
    assert "400/400" in screen(stream.getvalue())[-1]


@pytest.mark.parametrize(
    ("columns", "bar"),
    [
        (60, f" 50%  {'━' * 10}{'─' * 10}  201/400  12.3k tok/s  0:20 left"),
        (44, " 50%  201/400  12.3k tok/s  0:20 left"),
        (30, " 50%  201/400  0:20 left"),
        (18, " 50%  0:20 left"),
        (10, " 50%"),
        (3, " 5"),
    ],
)
def test_the_bar_fits_any_width(columns, bar):
    stream, clock = FakeTTY(), Clock()
    console = Console(terminal(stream, columns=columns), clock)
    console.start(RUN)
    console.progress(1)
    console.log(1, VALUES)
    clock.now = 20
    console.progress(201)
    shown = screen(stream.getvalue())[-1]
    assert shown == bar and len(shown) < columns


def test_the_header_comes_again_on_a_terminal_only():
    for stream, headers in ((FakeTTY(), 3), (io.StringIO(), 1)):
        console = Console(terminal(stream), Clock())
        for step in range(1, 61):
            console.log(step, VALUES)
        assert plain(stream.getvalue()).count("grad norm") == headers


def test_a_resumed_run_says_so_and_a_dense_model_has_one_count():
    stream = io.StringIO()
    run = replace(RUN, num_parameters=6 * 10**8, num_active_parameters=6 * 10**8, first_step=41)
    Console(terminal(stream), Clock()).start(run)
    assert "parameters  600M\n" in stream.getvalue()
    assert "length      400 steps = 819k tokens, 360 of them left: resuming at step 41\n" in stream.getvalue()


def test_a_validation_before_the_first_step():
    stream = io.StringIO()
    console = Console(terminal(stream), Clock())
    console.log_validation(0, {"validation_loss": 8.25})
    console.log(1, VALUES)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "12:00:00  validation loss at step 0: 8.2500"
    assert "grad norm" in lines[1] and len(lines) == 3
