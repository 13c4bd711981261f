"""Time the op's plain-JAX forms on a CPU, running and compiling: `python benchmarks/op_cpu.py --output=FILE`.

For every shape: the median and least milliseconds of the forward pass and of forward with backward (all gradients),
float32, gates logsigmoid(N(0, 1)) / 16; and the seconds that compiling forward with backward takes, for rows of growing
length. An idle machine is assumed: look at how far the median lies from the least.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import statistics
import sys
import time

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from pallas_kernels import gated_linear_attention

SHAPES = {  # B, T, H, K, V
    "one long row": (1, 2048, 4, 64, 128),
    "as the quickstart": (16, 256, 4, 64, 128),
    "small": (8, 256, 2, 32, 64),
}
AGAINST_REFERENCE = "one long row"  # whose backward pass keeps the state of every token: gigabytes for many rows
LENGTHS = (256, 2048, 16384)


def inputs(batch, time, heads, key_dim, value_dim):
    """Return query, key, value, log_decay."""
    keys = jax.random.split(jax.random.key(0), 4)
    dims = (key_dim, key_dim, value_dim, key_dim)
    query, key, value, gate = (jax.random.normal(k, (batch, time, heads, d)) for k, d in zip(keys, dims, strict=True))
    return query, key, value, jax.nn.log_sigmoid(gate) / 16


def forward_and_backward(implementation):
    """Return a jitted function of the inputs: the gradients of a loss that looks at both results."""

    def loss(*arguments):
        out, state = gated_linear_attention(*arguments, implementation=implementation)
        return jnp.sum(out**2) + jnp.sum(state**2)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))


def milliseconds(function, arguments, seconds=3.0):
    """Return the median and the least time of a call, over at least 5 calls."""
    jax.block_until_ready(function(*arguments))
    times = []
    while len(times) < 5 or sum(times) < seconds:
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return {"median": round(1e3 * statistics.median(times), 2), "least": round(1e3 * min(times), 2)}


def compile_seconds(implementation, shape):
    """Return the wall-clock seconds that tracing, lowering and compiling forward with backward take."""
    arguments = jax.eval_shape(functools.partial(inputs, *shape))
    start = time.perf_counter()
    forward_and_backward(implementation).lower(*arguments).compile()
    return round(time.perf_counter() - start, 2)


def main():
    """Measure, print a line for each result, write them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path)
    output = parser.parse_args().output
    jax.config.update("jax_platforms", "cpu")
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "jax": jax.__version__}
    results = []
    for name, shape in SHAPES.items():
        arguments = inputs(*shape)
        row = {"name": name, "B,T,H,K,V": shape}
        for implementation in ("reference", "chunked") if name == AGAINST_REFERENCE else ("chunked",):
            forward = jax.jit(functools.partial(gated_linear_attention, implementation=implementation))
            row[implementation] = {
                "forward ms": milliseconds(forward, arguments),
                "forward and backward ms": milliseconds(forward_and_backward(implementation), arguments),
            }
        if name == AGAINST_REFERENCE:
            slow, fast = (row[i]["forward and backward ms"]["least"] for i in ("reference", "chunked"))
            row["times faster"] = round(slow / fast, 1)
        results.append(row)
        print(json.dumps(row), flush=True)
    compiling = {i: {t: compile_seconds(i, (1, t, 4, 64, 128)) for t in LENGTHS} for i in ("reference", "chunked")}
    print(json.dumps({"compile seconds by length": compiling}))
    if output:
        output.write_text(
            json.dumps({"machine": machine, "results": results, "compile seconds": compiling}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
