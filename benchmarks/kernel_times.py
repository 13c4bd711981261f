"""Read from a trace of `jax.profiler` what the kernels of a GPU did."""

import collections
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

PARTS = ("embed", "mixer", "mlp", "norm", "loss", "optimizer")
"""The scopes by which the training step names what it does."""

TABLES = ("parts", "kernels", "operations")


def read_kernels(folder: Path, op_names: dict[str, str], steps: int) -> dict[str, Any] | None:
    """Add up the time of GPU kernels by their names, by part of the model, and by operation of the program.

    Args:
        folder: what `jax.profiler.trace` wrote, of `steps` runs of one program.
        op_names: of `read_op_names`, of that program.
        steps: how many runs.

    Returns:
        Milliseconds of one run: "busy", during which some kernel ran, and `TABLES`, from the largest on, with how often
        each ran; None if no GPU is in the trace.
    """
    tables: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in TABLES}
    runs: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in TABLES}
    intervals: list[tuple[float, float]] = []
    for event, stats in _kernel_events(folder):
        instruction = str(stats.get("hlo_op", ""))
        kernel = re.sub(r"[_.]?\d+$", "", event.name)[:100]
        op_name = op_names.get(instruction, "")
        keys = (part_of(op_name, kernel), kernel, f"{re.sub(r'[_.0-9]+$', '', instruction)}  {_short(op_name)}")
        for name, key in zip(TABLES, keys, strict=True):
            tables[name][key] += event.duration_ns / 1e6 / steps
            runs[name][key] += 1
        intervals.append((event.start_ns, event.start_ns + event.duration_ns))
    if not intervals:
        return None
    busy, end = 0.0, 0.0
    for start, stop in sorted(intervals):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    rows = lambda name: [
        {"name": key, "ms": round(ms, 3), "runs": runs[name][key] / steps} for key, ms in tables[name].most_common(25)
    ]
    return {"busy": round(busy / 1e6 / steps, 3)} | {name: rows(name) for name in TABLES}


def _kernel_events(folder: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield what ran on GPUs: events of all streams, and what is known of each."""
    for file in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                if plane.name.startswith("/device:GPU") and line.name.startswith("Stream"):
                    for event in line.events:
                        yield event, {name: value for name, value in event.stats if name is not None}


def read_op_names(text: str) -> dict[str, str]:
    """Return JAX's name of every instruction of a program, `compiled.as_text()`."""
    return dict(re.findall(r"%?([\w.\-]+) = [^\n]*op_name=\"([^\"]*)\"", text))


def part_of(op_name: str, kernel: str) -> str:
    """Say which part of the model an operation belongs to, and in which direction, e.g. "mlp backward"."""
    scopes = re.split(r"[/()]", op_name)
    part = next((scope for scope in reversed(scopes) if scope in PARTS), "other")
    if part == "other" and "memcpy" in kernel.lower():
        part = "copies"
    return part + (" backward" if "transpose" in scopes else "")


def _short(op_name: str) -> str:
    """Return the end of JAX's name of an operation: the same one of all layers has the same."""
    return "/".join(re.sub(r"\d+", "", op_name).split("/")[1:])[-90:]
