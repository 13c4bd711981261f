"""A loader that does not deliver is named while the run stands still, not found later in a plot."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax


class StallWatch:
    """Says when a step has waited long for its data, says so again whenever the wait has doubled, and when it is over.

    Args:
        say: shows a sentence. Processes other than the first, which show nothing else, print theirs.
        after: seconds that are no stall yet.
    """

    def __init__(self, say: Callable[[str], None], after: float = 30.0):
        self._say, self._prefix = say, ""
        if jax.process_index() > 0:
            self._say, self._prefix = print, f"Process {jax.process_index()}: "
        self._after = after
        self._waiting: tuple[int, float] | None = None
        self._alarm = after
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    @contextlib.contextmanager
    def waiting(self, step: int) -> Iterator[None]:
        """Watch a step wait inside."""
        start = time.perf_counter()
        self._waiting = step, start
        yield
        self._waiting = None
        if self._alarm > self._after:
            self._alarm = self._after
            self._say(f"{self._prefix}Step {step} waited {time.perf_counter() - start:.0f} s for its data.")

    def _watch(self) -> None:
        while not self._stop.wait(self._after / 4):
            waiting = self._waiting
            if waiting is not None and (seconds := time.perf_counter() - waiting[1]) >= self._alarm:
                self._alarm = 2 * seconds
                self._say(
                    f"{self._prefix}Step {waiting[0]} has waited {seconds:.0f} s for its data: the disk or the network "
                    "that holds them is slow or gone."
                )
