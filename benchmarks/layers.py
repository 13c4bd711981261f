"""Time one layer of each sequence mixer against the length of rows, the tokens of a step being the same.

    python benchmarks/layers.py --output=layers.json
    python benchmarks/plot.py layers.json layers.png

Each mixer as in the 1.3B models of `configs/` (linear attention with the sizes of GLA), without norm and SwiGLU;
bfloat16 on float32 parameters. Forward alone, and forward with the gradients of inputs and parameters. A time is that
of a run of calls that the device never waits for, divided by their number: the median of several runs, with the least
and the most. Memory is what the compiler reserves beyond arguments and results.
"""

import argparse
import concurrent.futures
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
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


def make_layer(mixer: str, settings: dict[str, str]) -> tuple[Any, Any]:
    """Return the graphdef of one layer in bfloat16, and its float32 parameters."""
    config: ModelConfig = load(str(CONFIGS / f"{MODELS[mixer]}.py"), settings).model

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
    """Return the milliseconds of a call: median, least and most of some runs of a tenth of a second or so."""
    jax.block_until_ready(function(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    calls = max(2, min(50, round(0.1 / (time.perf_counter() - start))))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        results = [function(*arguments) for _ in range(calls)][-1]
        jax.block_until_ready(results)
        times.append(1e3 * (time.perf_counter() - start) / calls)
    return {"ms": round(statistics.median(times), 4), "least": round(min(times), 4), "most": round(max(times), 4)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Time every mixer at every length and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", default=",".join(MODELS), help="by comma")
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384,32768", help="tokens of a row, by comma")
    parser.add_argument("--tokens", type=int, default=32_768, help="of a step")
    parser.add_argument("--runs", type=int, default=5, help="timed runs")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the configs")
    parser.add_argument("--output", type=Path, required=True, help="the JSON")
    options = parser.parse_args(arguments)
    settings = parse_settings(options.set)
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "tokens": options.tokens,
        "set": options.set,
        "rows": [],
    }
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = []
        for mixer in options.mixers.split(","):
            graphdef, params = make_layer(mixer, settings)
            for length in map(int, options.lengths.split(",")):
                width = load(str(CONFIGS / f"{MODELS[mixer]}.py"), settings).model.hidden_size
                x = jax.ShapeDtypeStruct((options.tokens // length, length, width), jnp.bfloat16)
                forwards = jax.jit(forward(graphdef)).lower(params, x)
                both = jax.jit(forward_backward(graphdef)).lower(params, x, x)
                waiting.append((mixer, length, params, x, pool.submit(forwards.compile), pool.submit(both.compile)))
        concurrent.futures.wait([future for *_, first, second in waiting for future in (first, second)])
        for mixer, length, params, shape, *futures in waiting:
            row: dict[str, Any] = {"mixer": mixer, "length": length}
            x, gradient = (jax.random.normal(jax.random.key(seed), shape.shape, shape.dtype) for seed in (0, 1))
            for name, future, inputs in zip(
                ("forward", "forward_backward"), futures, ((params, x), (params, x, gradient)), strict=True
            ):
                try:
                    compiled = future.result()
                    row[name] = time_calls(compiled, inputs, options.runs)
                    row[name]["temporary_GiB"] = round(compiled.memory_analysis().temp_size_in_bytes / GIB, 3)
                except jax.errors.JaxRuntimeError as error:  # most of all, one that does not fit
                    row[name] = {"error": str(error).splitlines()[0][:300]}
            report["rows"].append(row)
            print(row, flush=True)
            options.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
