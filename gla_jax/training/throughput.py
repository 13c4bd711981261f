"""How fast training goes, and how fast the hardware could."""

import contextlib
import time
from collections.abc import Iterator

from gla_jax.hardware import peak_flops


class Throughput:
    """Measures tokens per second, model FLOPs utilisation, and time spent waiting for data.

    Args:
        tokens_per_step: of all hosts together.
        flops_per_token: of a training step, forward and backward.
        device_kind: of every device.
        device_count: of all hosts together.
    """

    def __init__(self, tokens_per_step: int, flops_per_token: float, device_kind: str, device_count: int):
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        peak = peak_flops(device_kind)
        self._peak = None if peak is None else peak * device_count
        self.restart(None)

    def restart(self, step: int | None) -> None:
        """Measure from here on: `step` steps are done; None: what comes first is no steady step but a compilation."""
        self._step, self._start, self._data_seconds = step, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time spent inside as waiting."""
        start = time.perf_counter()
        yield
        self._data_seconds += time.perf_counter() - start

    def read(self, step: int) -> dict[str, float | None]:
        """Return the figures since the last reading or restart, now that `step` steps are done, and begin anew."""
        seconds = time.perf_counter() - self._start
        rate = None if self._step is None else (step - self._step) * self._tokens_per_step / seconds
        figures = {
            "seconds": seconds,
            "data_seconds": self._data_seconds,
            "tokens_per_second": rate,
            "mfu": None if rate is None or self._peak is None else rate * self._flops_per_token / self._peak,
        }
        self.restart(step)
        return figures
