"""What a person reads while a model trains: a banner, a table that grows by a line per log, a bar, a summary."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from titanmoe.metrics.records import Value
from titanmoe.metrics.terminal import Terminal
from titanmoe.metrics.units import format_clock, format_count, format_duration

_LINES_PER_HEADER = 25
_SECONDS_PER_BAR = 0.1


@dataclass(frozen=True)
class Column:
    """One column of the table. An optional one is left out if its value is unknown at the first logged step."""

    key: str
    title: str
    width: int
    format: Callable[[float], str]
    optional: bool = False


_COLUMNS = (
    Column("step", "step", 6, lambda value: str(int(value))),
    Column("loss", "loss", 7, lambda value: f"{value:.4f}"),
    Column("grad_norm", "grad norm", 9, lambda value: f"{value:.4f}" if value < 1e4 else f"{value:.2e}"),
    Column("lr", "lr", 8, lambda value: f"{value:.2e}"),
    Column("tokens_per_second", "tok/s", 6, format_count),
    Column("tflops", "TFLOP/s", 7, lambda value: f"{value:.3g}" if value < 100 else f"{value:.0f}"),
    Column("mfu", "MFU", 5, lambda value: f"{100 * value:.1f}%", optional=True),
    Column("peak_memory_gib", "memory", 8, lambda value: f"{value:.1f} GiB"),
    Column("data_fraction", "data", 4, lambda value: f"{100 * value:.0f}%", optional=True),
    Column("expert_load_cv", "load cv", 7, lambda value: f"{value:.2f}", optional=True),
    Column("dead_experts", "dead", 4, lambda value: str(int(value)), optional=True),
)
_DROPPED_FIRST = ("dead_experts", "tflops", "data_fraction", "peak_memory_gib", "expert_load_cv")
"""What a narrow terminal does without, in this order; metrics.jsonl has it all."""


@dataclass(frozen=True)
class RunInfo:
    """What the banner tells about a run. Batch and sequence are in sequences and tokens."""

    model: str
    num_parameters: int
    num_active_parameters: int
    device: str
    num_devices: int
    mesh: str
    global_batch_size: int
    seq_len: int
    num_steps: int
    data: str
    dump_folder: str
    first_step: int = 1
    """The first step of this process: more than 1 after a resume."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Further lines, such as precision or converters."""

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_len


class Console:
    def __init__(self, terminal: Terminal, clock: Callable[[], float] = time.monotonic) -> None:
        self._terminal, self._clock = terminal, clock
        self._columns: tuple[Column, ...] = ()
        self._lines_since_header: int | None = None
        self._run: RunInfo | None = None
        self._begin = self._first_bar = self._last_bar = 0.0
        self._first_bar_step: int | None = None
        self._speed: float | None = None
        self._last: dict[str, Value] = {}

    def start(self, run: RunInfo) -> None:
        """Print the banner and start the clock that the summary reads."""
        self._run, self._begin = run, self._clock()
        active = run.num_active_parameters
        parameters = format_count(run.num_parameters)
        if active != run.num_parameters:
            parameters += f" total, {format_count(active)} active per token"
        left = run.num_steps - run.first_step + 1
        steps = f"{run.num_steps:,} steps = {format_count(run.num_steps * run.tokens_per_step)} tokens"
        if run.first_step > 1:
            steps += f", {left:,} of them left: resuming at step {run.first_step:,}"
        batch = f"{run.global_batch_size:,} x {run.seq_len:,} tokens = {run.tokens_per_step:,} tokens per step"
        rows = {
            "parameters": parameters,
            "devices": f"{run.num_devices} x {run.device}",
            "mesh": run.mesh,
            "batch": batch,
            "length": steps,
            "data": run.data,
            **run.extra,
            "outputs": run.dump_folder,
        }
        self._block(f"titanmoe trains {run.model}", rows)

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """One line of the table."""
        row = {"step": step, **values}
        data_seconds, step_seconds = values.get("data_seconds"), values.get("step_seconds")
        if data_seconds is not None and step_seconds:
            row["data_fraction"] = data_seconds / step_seconds
        if not self._columns:
            self._columns = self._choose_columns(row)
        # In a file one header is enough; on a screen it has scrolled away.
        if self._lines_since_header is None or (
            self._terminal.is_interactive and self._lines_since_header >= _LINES_PER_HEADER
        ):
            titles = "  ".join(f"{column.title:>{column.width}}" for column in self._columns)
            self._terminal.line(self._stamped(self._terminal.style(titles, "bold")))
            self._lines_since_header = 0
        self._lines_since_header += 1
        self._last |= values
        self._speed = values.get("tokens_per_second")
        cells = (self._cell(column, row.get(column.key)) for column in self._columns)
        self._terminal.line(self._stamped("  ".join(cells)))

    def log_validation(self, step: int, values: Mapping[str, Value]) -> None:
        """A validation's line: its loss in the loss column, and a mark; a sentence as long as there is no table."""
        step_column, loss_column = _COLUMNS[:2]
        loss = self._cell(loss_column, values.get("validation_loss"), plain=True)
        text = f"{self._cell(step_column, step, plain=True)}  {loss}  validation"
        self._last |= values
        if self._lines_since_header is None:
            text = f"validation loss at step {step:,}: {loss.strip()}"
        else:
            self._lines_since_header += 1
        self._terminal.line(self._stamped(self._terminal.style(text, "green")))

    def progress(self, step: int) -> None:
        """Step `step` has been queued: redraw the bar, at most ten times a second."""
        now = self._clock()
        if self._run is None or not self._terminal.is_interactive:
            return
        if self._first_bar_step is None:
            # The first step compiles, allocates and warms caches: time left is judged from those after it.
            self._first_bar_step, self._first_bar = step, now
        if now - self._last_bar < _SECONDS_PER_BAR and step < self._run.num_steps:
            return
        self._last_bar = now
        run, done = self._run, step - self._first_bar_step
        left = f"{format_clock((now - self._first_bar) / done * (run.num_steps - step))} left" if done else ""
        speed = "" if self._speed is None else f"{format_count(self._speed)} tok/s"
        self._terminal.progress_bar(step / max(run.num_steps, 1), f"{step:,}/{run.num_steps:,}", speed, left)

    def finish(self, step: int, outputs: Mapping[str, str], status: str = "done") -> None:
        """Print the summary. `outputs` names what was left behind and where; `status` says how the run ended."""
        self._terminal.clear_bar()
        if self._run is None:
            return
        seconds = self._clock() - self._begin
        steps = step - self._run.first_step + 1
        rate = steps * self._run.tokens_per_step / seconds if seconds > 0 else 0.0
        rows = {"time": f"{steps:,} steps in {format_duration(seconds)}, {format_count(rate)} tokens/s with all pauses"}
        for name, key in (("loss", "loss"), ("validation", "validation_loss")):
            value = self._last.get(key)
            if value is not None:
                rows[name] = f"{value:.4f}"
        self._block(f"{status} at step {step:,}", {**rows, **outputs})

    def close(self) -> None:
        self._terminal.clear_bar()

    def _choose_columns(self, row: Mapping[str, Value]) -> tuple[Column, ...]:
        columns = [column for column in _COLUMNS if not column.optional or row.get(column.key) is not None]
        for key in _DROPPED_FIRST:
            # Every column has a gap of two before it, and the time stamp takes eight.
            if self._terminal.is_interactive and 8 + sum(c.width + 2 for c in columns) > self._terminal.columns():
                columns = [column for column in columns if column.key != key]
        return tuple(columns)

    def _cell(self, column: Column, value: Value, plain: bool = False) -> str:
        if value is None:
            return f"{'-':>{column.width}}"
        if not math.isfinite(value):
            return self._terminal.style(f"{value:>{column.width}}", *([] if plain else ["red", "bold"]))
        text = f"{column.format(value):>{column.width}}"
        styles = [] if plain else {"loss": ["cyan"], "tokens_per_second": ["blue"]}.get(column.key, [])
        if column.key == "dead_experts" and value > 0 and not plain:
            styles = ["yellow"]
        return self._terminal.style(text, *styles)

    def _stamped(self, text: str) -> str:
        return f"{self._terminal.stamp()}  {text}"

    def _block(self, title: str, rows: Mapping[str, str]) -> None:
        width = max(len(name) for name in rows)
        lines = [self._stamped(self._terminal.style(title, "bold"))]
        # Ten blanks stand for the time stamp and its gap.
        lines += [f"{'':10}{self._terminal.style(f'{name:<{width}}', 'dim')}  {text}" for name, text in rows.items()]
        self._terminal.line("\n".join(lines))
