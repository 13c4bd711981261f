"""Time Mamba's selective scan on one Hopper GPU, beside plain JAX and jax-linear-attention, in one run.

    python benchmarks/selective_scan.py --output=benchmarks/selective_scan_h100.json [--ops=mosaic_gpu,chunked,jla]

The whole of it at the sizes of the two models, bfloat16, N = 16: softplus of the step sizes with their bias, the
recurrence, the skip and the gate; forward alone and forward with backward (of everything), kernels only, medians, by
CUPTI. "jla" is the `mamba1` of jax-linear-attention, left out where it is not installed. Each op has a process of its
own at each size, all compile at once, and then they are timed one after another.

Copy bandwidth is measured first. Two floors: the bytes that must move once, with no stored states, over that bandwidth;
and the exponentials, one for each number of the state and token (forwards; no way back needs fewer than one more), at
16 a clock and multiprocessor and the 1.755 GHz of an H100 under load.
"""

import argparse
import functools
import importlib
import importlib.util
import json
import math
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.kernels import ask, ceilings, start, time_kernels, times, wait_until_ready
from pallas_kernels.selective_scan import selective_scan

SHAPES = {  # B, T, D
    "1.3B, 8 x 2048": (8, 2048, 4096),
    "1.3B, 1 x 16384": (1, 16384, 4096),
    "340M, 16 x 2048": (16, 2048, 2048),
}
STATES = 16
EXPONENTIALS_PER_MS = 132 * 16 * 1.755e6


def draw(shape):
    """Return the arguments of the op, and the gradient of y."""
    batch, time, channels = shape
    keys = iter(jax.random.split(jax.random.key(1), 8))
    normal = lambda *dims, dtype=jnp.bfloat16: jax.random.normal(next(keys), dims, dtype)
    wide, narrow = (batch, time, channels), (batch, time, STATES)
    arguments = {
        "x": normal(*wide),
        "delta": normal(*wide),
        "A": -jnp.tile(jnp.arange(1.0, STATES + 1), (channels, 1)),
        "B": normal(*narrow),
        "C": normal(*narrow),
        "D": jnp.ones(channels),
        "gate": normal(*wide),
        "delta_bias": normal(channels, dtype=jnp.float32) - 4.6,  # step sizes around 0.01
    }
    return arguments, normal(*wide)


def jla(arguments):
    """Run jax-linear-attention's."""
    mamba1 = importlib.import_module("jla.ops.mosaic_gpu.mamba1").mamba1
    names = {"d": "D", "z": "gate", "dt_bias": "delta_bias"}
    options = {theirs: arguments[ours] for theirs, ours in names.items()}
    return mamba1(*(arguments[name] for name in ("C", "B", "x", "delta", "A")), **options, dt_softplus=True)[0]


def ours(implementation, arguments):
    """Run the op."""
    return selective_scan(**arguments, implementation=implementation)[0]


OPS = {name: functools.partial(ours, name) for name in ("mosaic_gpu", "chunked")} | {"jla": jla}


def compile_op(op, shape):
    """Compile an op at one shape, forwards and both ways."""
    arguments, d_y = jax.eval_shape(lambda: draw(shape))

    def both(arguments, d_y):
        y, pull_back = jax.vjp(op, arguments)
        return y, pull_back(d_y)

    return jax.jit(op).lower(arguments).compile(), jax.jit(both).lower(arguments, d_y).compile()


def time_op(forward, both, shape, copy_rate):
    """Time what `compile_op` made of an op."""
    batch, time, channels = shape
    arguments, d_y = draw(shape)
    elements, row = batch * time * channels, {}
    for name, compiled, inputs, arrays, exponentials in (
        ("forward", forward, (arguments,), 4, 1),
        ("forward_backward", both, (arguments, d_y), 11, 2),
    ):
        row[name] = time_kernels(compiled, *inputs)
        memory = compiled.memory_analysis()
        peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
        row[name]["peak_MiB"] = round(peak / 2**20)
        row[name]["floor_of_bytes_ms"] = round(2 * elements * arrays / copy_rate / 1e9, 4)
        row[name]["floor_of_exponentials_ms"] = round(elements * STATES * exponentials / EXPONENTIALS_PER_MS, 4)
    return row


def measure(pipe, name, shape):
    """Compile an op at one shape, say so, and time it when the copy bandwidth comes: the work of one process."""
    forward, both = compile_op(OPS[name], shape)
    pipe.send("ready")
    pipe.send(time_op(forward, both, shape, copy_rate=pipe.recv()))


def measure_chip(pipe):
    """Measure what the chip can do."""
    pipe.send("ready")
    pipe.recv()
    device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    pipe.send(device | {"copy_TBps": ceilings()["copy_TBps"]})


def main():
    """Time everything and write the JSON, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ops", default=",".join(OPS), help="which of them to time, if installed")
    parser.add_argument("--patience", type=float, default=600, help="seconds for compiling")
    options = parser.parse_args()
    names = options.ops.split(",")
    unknown = [name for name in names if name not in OPS]
    if unknown:
        parser.error(f"--ops names {unknown[0]!r}; it must be of {', '.join(OPS)}.")
    names = [name for name in names if name != "jla" or importlib.util.find_spec("jla") is not None]

    context = multiprocessing.get_context("spawn")
    jobs = {"the chip": start(context, measure_chip)}
    jobs |= {f"{shape} {name}": start(context, measure, name, SHAPES[shape]) for shape in SHAPES for name in names}
    wait_until_ready(jobs, options.patience)

    report: dict[str, Any] = {"device": "unknown", "copy_TBps": math.nan, "shapes": []}
    for part in ask(jobs["the chip"], None):
        report |= part
    for shape in SHAPES:
        row: dict[str, Any] = {"shape": shape, "B, T, D": SHAPES[shape]}
        report["shapes"].append(row)
        for name in names:
            for figures in ask(jobs[f"{shape} {name}"], report["copy_TBps"]):
                row[name] = figures
                print(shape, name, *times(figures), flush=True)
                options.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
