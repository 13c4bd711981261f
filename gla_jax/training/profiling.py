"""A trace of a few steps, for xprof or Perfetto."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import jax

from gla_jax.config import ProfileConfig
from gla_jax.storage import is_remote


class ProfileWindow:
    """Traces the steps that the config asks for, on every host.

    Args:
        config: which steps.
        folder: where the trace goes.
    """

    def __init__(self, config: ProfileConfig, folder: Path):
        self._first, self._last = config.start, config.start + config.steps - 1
        self._folder = folder
        self._traced = Path(tempfile.mkdtemp()) if config.steps and is_remote(folder) else folder
        self._tracing = False

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Mark what is dispatched inside as that step."""
        if step == self._first <= self._last:
            jax.profiler.start_trace(str(self._traced))
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def finish(self, step: int, results: Any) -> None:
        """End the trace after its last step, whose results are waited for."""
        if self._tracing and step == self._last:
            jax.block_until_ready(results)
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._tracing:
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._tracing = False
        if self._traced == self._folder:
            return
        for file in self._traced.rglob("*"):  # the profiler writes to this machine only
            if file.is_file():
                there = self._folder / file.relative_to(self._traced).as_posix()
                there.parent.mkdir(parents=True, exist_ok=True)
                there.write_bytes(file.read_bytes())
        shutil.rmtree(self._traced)
