from __future__ import annotations

import pytest
import torch

from titanmoe.metrics.throughput import StepTimer, Work, peak_memory_gib

CPU = torch.device("cpu")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_figures_over_steps_between_logs():
    clock = Clock()
    timer = StepTimer(Work(2e9, 3e9, peak_flops=1e13, num_devices=2), CPU, clock)
    for _ in range(4):
        with timer.data():
            clock.now += 0.5
        clock.now += 1.5
        timer.step(1000)
    values = timer.read()
    assert values["tokens_per_second"] == pytest.approx(4000 / 8)
    assert values["tokens_per_second_per_device"] == pytest.approx(250)
    assert values["tflops"] == pytest.approx(250 * 2e9 / 1e12)
    assert values["mfu"] == pytest.approx(250 * 2e9 / 1e13)
    assert values["hfu"] == pytest.approx(250 * 3e9 / 1e13)
    assert values["data_seconds"] == pytest.approx(0.5)
    assert values["step_seconds"] == pytest.approx(2.0)


def test_each_read_starts_anew_and_leaves_validation_out():
    clock = Clock()
    timer = StepTimer(Work(1e9, 1e9), CPU, clock)
    timer.step(10)
    clock.now += 1
    timer.read()
    with timer.aside():
        clock.now += 1000
    clock.now += 2
    timer.step(10)
    values = timer.read()
    assert values["tokens_per_second"] == pytest.approx(5)
    assert values["step_seconds"] == pytest.approx(2)


def test_unknown_peak_gives_no_utilisation():
    timer = StepTimer(Work(1e9, 1e9, peak_flops=None), CPU, Clock())
    timer.step(1)
    values = timer.read()
    assert values["mfu"] is None and values["hfu"] is None


def test_time_in_a_failing_data_wait_is_counted():
    clock = Clock()
    timer = StepTimer(Work(1e9, 1e9), CPU, clock)
    with pytest.raises(StopIteration), timer.data():
        clock.now += 3
        raise StopIteration
    timer.step(1)
    assert timer.read()["data_seconds"] == pytest.approx(3)


def test_reading_without_a_step_is_a_bug():
    with pytest.raises(AssertionError, match="at least one step"):
        StepTimer(Work(1e9, 1e9), CPU, Clock()).read()


def test_cpu_peak_memory_is_the_resident_set_in_gib():
    with open("/proc/self/status") as file:
        kib = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    assert peak_memory_gib(CPU) == pytest.approx(kib / 2**20, rel=0.05)


@pytest.mark.gpu
def test_gpu_peak_memory_is_what_the_allocator_reserved():
    device = torch.device("cuda")
    block = torch.empty(2**30, dtype=torch.uint8, device=device)
    assert peak_memory_gib(device) >= 1.0
    del block
