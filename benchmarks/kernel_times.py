"""Read from a trace of `jax.profiler` what the kernels of a GPU did."""

import collections
import re
from pathlib import Path
from typing import Any

import jax

PARTS = ("embed", "mixer", "mlp", "norm", "loss", "optimizer")
"""The scopes by which the training step names what it does."""


def read_kernels(folder: Path, op_names: dict[str, str], steps: int) -> dict[str, Any] | None:
    """Add up the time of GPU kernels by their names, by part of the model, and by instruction of the program.

    Args:
        folder: what `jax.profiler.trace` wrote, of `steps` runs of one program.
        op_names: of `read_op_names`, of that program.
        steps: how many runs.

    Returns:
        Milliseconds of one run: "busy", during which some kernel ran; "parts", "kernels" and "instructions", each from
        the largest on, with how often it ran; None if no GPU is in the trace.
    """
    by_kernel: collections.Counter[str] = collections.Counter()
    by_instruction: collections.Counter[str] = collections.Counter()
    by_part: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    intervals: list[tuple[float, float]] = []
    for file in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    stats = {name: value for name, value in event.stats if name is not None}
                    instruction = str(stats.get("hlo_op", "?"))
                    milliseconds = event.duration_ns / 1e6 / steps
                    name = re.sub(r"[_.]?\d+$", "", event.name)[:100]
                    by_kernel[name] += milliseconds
                    counts[name] += 1
                    by_instruction[instruction] += milliseconds
                    counts[instruction] += 1
                    by_part[part_of(op_names.get(instruction, ""), name)] += milliseconds
                    intervals.append((event.start_ns, event.start_ns + event.duration_ns))
    if not intervals:
        return None
    busy, end = 0.0, 0.0
    for start, stop in sorted(intervals):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    row = lambda name, ms: {"name": name, "ms": round(ms, 3), "runs": counts[name] / steps}
    return {
        "busy": round(busy / 1e6 / steps, 3),
        "parts": {name: round(ms, 3) for name, ms in by_part.most_common()},
        "kernels": [row(name, ms) for name, ms in by_kernel.most_common(25)],
        "instructions": [
            row(name, ms) | {"op": op_names.get(name, "")[-120:]} for name, ms in by_instruction.most_common(60)
        ],
    }


def read_op_names(text: str) -> dict[str, str]:
    """Return JAX's name of every instruction of a program, `compiled.as_text()`."""
    return dict(re.findall(r"%?([\w.\-]+) = [^\n]*op_name=\"([^\"]*)\"", text))


def part_of(op_name: str, kernel: str) -> str:
    """Say which part of the model an operation belongs to, and in which direction, e.g. "mlp backward"."""
    scopes = re.split(r"[/()]", op_name)
    part = next((scope for scope in reversed(scopes) if scope in PARTS), "other")
    if part == "other" and ("copy" in kernel.lower() or "memcpy" in kernel.lower()):
        part = "copies"
    return part + (" backward" if "transpose" in scopes else "")
