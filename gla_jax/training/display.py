"""What a person sees of a run: a progress bar at a terminal, plain lines anywhere else."""

import datetime
import sys
import time
from collections.abc import Mapping
from typing import Any, Self

import jax
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Numbers = Mapping[str, float | None]


def open_display(steps: int) -> "Display":
    """Return the display that suits where standard output goes; only the first process shows anything.

    Args:
        steps: of the whole run.
    """
    if jax.process_index() > 0:
        return Display(steps)
    return BarDisplay(steps) if sys.stdout.isatty() else LineDisplay(steps)


class Display:
    """Shows nothing; what the others share."""

    def __init__(self, steps: int):
        self._steps = steps

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def say(self, text: str) -> None:
        """Show a sentence or several lines."""

    def begin(self, step: int) -> None:
        """Take note that the next step is the one after this."""

    def advance(self, step: int, loss: float) -> None:
        """Take note of a step; called for every one."""

    def report(self, step: int, metrics: Numbers, timings: Numbers) -> None:
        """Show the figures of a step, of training or of an evaluation."""


class LineDisplay(Display):
    """Prints a line for each report, for logs and pipes."""

    def say(self, text: str) -> None:
        """Print it."""
        print(text, flush=True)

    def begin(self, step: int) -> None:
        """Start the clock for the time that is left."""
        self._first_step, self._start = step, time.perf_counter()

    def report(self, step: int, metrics: Numbers, timings: Numbers) -> None:
        """Print one line."""
        parts = [f"step {step:>{len(str(self._steps))}}/{self._steps}"]
        parts += [f"{name} {value:.4g}" for name, value in metrics.items() if value is not None]
        if rate := timings.get("tokens_per_second"):
            elapsed, done = time.perf_counter() - self._start, step - self._first_step
            left = datetime.timedelta(seconds=round(elapsed / done * (self._steps - step)))
            mfu = timings["mfu"]
            parts += [f"{rate:,.0f} tokens/s", "mfu n/a" if mfu is None else f"mfu {mfu:.1%}"]
            parts += [f"waited {timings['data_seconds']:.1f} s for data", f"{left} left"]
        self.say("  ".join(parts))


class BarDisplay(Display):
    """Keeps a bar at the bottom of a terminal, with the loss of the newest step, the speed, and the time left."""

    def __init__(self, steps: int):
        super().__init__(steps)
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._task = self._bar.add_task("", total=steps, loss="-", speed="compiling", visible=False)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print it above the bar."""
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, step: int) -> None:
        """Show the bar."""
        self._bar.reset(self._task, completed=step, visible=True)

    def advance(self, step: int, loss: float) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=step, loss=f"{loss:.4f}")

    def report(self, step: int, metrics: Numbers, timings: Numbers) -> None:
        """Print an evaluation above the bar, and show the speed in it."""
        if rate := timings.get("tokens_per_second"):
            mfu = timings["mfu"]
            self._bar.update(self._task, speed=f"{rate:,.0f} tokens/s" + ("" if mfu is None else f"  mfu {mfu:.1%}"))
        if any(name.startswith("eval/") for name in metrics):
            self.say(f"step {step}  " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
