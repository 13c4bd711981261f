"""Leaving in good order when asked to: by SIGTERM, by Ctrl-C, or by a scheduler that takes the machines away."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class Interruption:
    """Turns the first SIGTERM or Ctrl-C into a request to stop after the step in progress.

    After a first Ctrl-C a second one raises KeyboardInterrupt, as ever.
    With several processes all must stop at the same step, so there it asks JAX's own preemption service, which watches
    for SIGTERM since `jax.distributed.initialize`. Outside the main thread signals are left alone.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Say whether to stop after this step; every process gets the same answer."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # A handler may run in the middle of a print, so it writes past Python's buffers.
        os.write(2, b"\nStopping after this step, with a checkpoint. Ctrl-C leaves at once.\n")
