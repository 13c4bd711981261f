"""Time one layer of each sequence mixer against the length of rows, the tokens of a step being the same.

    python benchmarks/layers.py --output=layers.json
    python benchmarks/plot.py layers.json layers.png

Each mixer as in the 1.3B models of `configs/` (linear attention with the sizes of GLA), without norm and SwiGLU;
bfloat16 on float32 parameters. Forward alone, and forward with the gradients of inputs and parameters. A time is that
of a run of calls that the device never waits for, divided by their number: the median of several runs, with the least
and the most. Memory is what the compiler reserves beyond arguments and results.

Tracing and compiling take nearly all of the time, so every mixer has a process of its own. When all are ready, or
--patience is over, they are timed one after another. The JSON is written after each row.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.kernels import ask, start, wait_until_ready
from benchmarks.training import CONFIGS, parse_settings
from gla_jax.config import ModelConfig, load
from gla_jax.hardware import GIB
from gla_jax.layers import MIXERS
from gla_jax.models.language_model import mixer_options

MODELS = {
    "gla": "gla_1p3b",
    "linear_attention": "gla_1p3b",
    "retention": "retnet_1p3b",
    "attention": "transformer_1p3b",
    "mamba": "mamba_1p3b",
}
"""Whose sizes each mixer takes."""


def make_layer(config: ModelConfig, mixer: str) -> tuple[Any, Any]:
    """Return the graphdef of one layer in bfloat16, and its float32 parameters."""

    @jax.jit
    def make() -> nnx.Module:
        return MIXERS[mixer](
            config.hidden_size,
            config.num_heads,
            mixer_options(config, mixer),
            dtype=jnp.bfloat16,
            param_dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        )

    return nnx.split(make())


def forward(graphdef: Any) -> Callable[..., jax.Array]:
    """Return the layer as a function of its parameters and of x [B, T, D]."""
    return lambda params, x: nnx.merge(graphdef, params)(x)[0]


def forward_backward(graphdef: Any) -> Callable[..., Any]:
    """Return the function that returns the layer's result and the gradients for a given one of the result."""

    def both(params: Any, x: jax.Array, gradient: jax.Array) -> Any:
        y, pull_back = jax.vjp(forward(graphdef), params, x)
        return y, pull_back(gradient)

    return both


def time_calls(function: Callable[..., Any], arguments: Sequence[Any], runs: int) -> dict[str, float]:
    """Return the milliseconds of a call: median, least and most of some runs of a twentieth of a second or so."""
    jax.block_until_ready(function(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    calls = max(2, min(50, round(0.05 / (time.perf_counter() - start))))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        results = [function(*arguments) for _ in range(calls)][-1]
        jax.block_until_ready(results)
        times.append(1e3 * (time.perf_counter() - start) / calls)
    return {"ms": round(statistics.median(times), 4), "least": round(min(times), 4), "most": round(max(times), 4)}


def measure_mixer(pipe: Any, mixer: str, lengths: Sequence[int], options: argparse.Namespace) -> None:
    """Compile a mixer's layer for all lengths, say so, and time it when told to: the work of one process."""
    config = load(str(CONFIGS / f"{MODELS[mixer]}.py"), parse_settings(options.set)).model
    graphdef, params = make_layer(config, mixer)
    shapes = [(options.tokens // length, length, config.hidden_size) for length in lengths]
    passes = {"forward": (forward(graphdef), 1), "forward_backward": (forward_backward(graphdef), 2)}
    compiled: dict[Any, concurrent.futures.Future[Any]] = {}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for shape in shapes:
            x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
            for name, (function, count) in passes.items():
                compiled[shape, name] = pool.submit(jax.jit(function).lower(params, *[x] * count).compile)
    pipe.send("ready")
    pipe.recv()
    for shape in shapes:
        row: dict[str, Any] = {"mixer": mixer, "length": shape[1]}
        for name, (_, count) in passes.items():
            inputs = [jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) for seed in range(count)]
            try:
                program = compiled[shape, name].result()
                row[name] = time_calls(program, (params, *inputs), options.runs)
                row[name]["temporary_GiB"] = round(program.memory_analysis().temp_size_in_bytes / GIB, 3)
            except jax.errors.JaxRuntimeError as error:  # most of all, one that does not fit
                row[name] = {"error": str(error).splitlines()[0][:300]}
        pipe.send({"device": jax.devices()[0].device_kind, "row": row})


def main(arguments: Sequence[str] | None = None) -> None:
    """Time every mixer at every length and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", default=",".join(MODELS), help="by comma")
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384,32768", help="tokens of a row, by comma")
    parser.add_argument("--tokens", type=int, default=32_768, help="of a step")
    parser.add_argument("--runs", type=int, default=5, help="timed runs")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the configs")
    parser.add_argument("--patience", type=float, default=1200, help="seconds for compiling")
    parser.add_argument("--output", type=Path, required=True, help="the JSON")
    options = parser.parse_args(arguments)
    mixers, lengths = options.mixers.split(","), [int(length) for length in options.lengths.split(",")]
    for mixer in mixers:
        if mixer not in MODELS:
            parser.error(f"--mixers names {mixer!r}; it must be of {', '.join(MODELS)}.")

    context = multiprocessing.get_context("spawn")
    jobs = {mixer: start(context, measure_mixer, mixer, lengths, options) for mixer in mixers}
    wait_until_ready(jobs, options.patience)
    report: dict[str, Any] = {"jax": jax.__version__, "tokens": options.tokens, "set": options.set, "rows": []}
    for mixer in mixers:
        for answer in ask(jobs[mixer], "go"):
            report["device"] = answer["device"]
            report["rows"].append(answer["row"])
            print(answer["row"], flush=True)
            options.output.write_text(json.dumps(report, indent=1))
    missing = [mixer for mixer in mixers if mixer not in {row["mixer"] for row in report["rows"]}]
    if missing:
        sys.exit(f"Nothing was timed of {', '.join(missing)}.")


if __name__ == "__main__":
    main()
