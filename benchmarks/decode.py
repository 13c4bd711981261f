"""Time the drawing of tokens against the length of what was read: constant states against caches of keys and values.

    python benchmarks/decode.py --output=decode.json
    python benchmarks/plot.py decode.json decode.png

The step is that of `gla_jax.inference`: a token is drawn for each row from the last hidden state, at temperature 1, and
fed; `--tokens` of them in one compiled loop. Parameters and compute are bfloat16. States have the size, and counters
the value, that they have once a context of that length has been read; what the arrays hold makes no difference to the
time. A cache has room for the context and the tokens drawn. Memory is what the compiler reserves: parameters, state and
what is made on the way.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gla_jax.config import Config, load
from gla_jax.hardware import GIB
from gla_jax.inference.generation import draw_token, keys_by_row
from gla_jax.models import abstract_model, bind, init_params, split_layers, stack_layers
from gla_jax.models.language_model import make_room
from gla_jax.parallel.program import read_memory

SPLIT = jax.default_backend() == "gpu"
"""Whether layers run one by one, as `gla_jax.inference` has it."""

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def drawing(graphdef: Any, room: int, batch_size: int, tokens: int) -> tuple[Any, Any]:
    """Return the function that draws tokens, and the one that makes a state with a context in it."""

    def model_of(params: Any) -> Any:
        model = bind(graphdef, params)
        make_room(model, room)
        return model

    def draw(params: Any, last: jax.Array, state: Any) -> tuple[jax.Array, jax.Array, Any]:
        model, row_keys = model_of(params), keys_by_row(jax.random.key(0), 0, batch_size)
        if SPLIT:
            model = split_layers(model, stack_layers(state))[0]

        def step(carry: Any, number: jax.Array) -> tuple[Any, jax.Array]:
            last, state = carry
            token = draw_token(model, last, row_keys, number, jnp.float32(1), top_k=0, top_p=1.0)
            return model.hidden_states(token[:, None], state), token

        (last, state), drawn = jax.lax.scan(step, (last, state), jnp.arange(tokens))
        return drawn.T, last, state

    def state_after(params: Any, context: int) -> Any:
        def fill(path: Any, leaf: jax.Array) -> jax.Array:
            name = path[-1].key
            if name in ("length", "position"):
                return jnp.full_like(leaf, context)
            if name == "order":  # slot i of a cache holds token i + 1
                slots = jnp.broadcast_to(jnp.arange(1, leaf.shape[-1] + 1, dtype=leaf.dtype), leaf.shape)
                return jnp.where(slots <= context, slots, 0)
            return leaf

        model = model_of(params)
        state = jax.tree_util.tree_map_with_path(fill, model.init_state(batch_size))
        return split_layers(model, state)[1] if SPLIT else state

    return draw, state_after


def measure(config: Config, params: Any, context: int, batch_size: int, tokens: int, runs: int) -> dict[str, Any]:
    """Compile and time the drawing of tokens after one context."""
    graphdef, _ = abstract_model(config.model, config.dtype)
    draw, state_after = drawing(graphdef, context + tokens * (runs + 1), batch_size, tokens)
    fill = jax.jit(state_after, static_argnums=1)
    shape = jax.eval_shape(lambda params: state_after(params, context), params)
    last = jnp.zeros((batch_size, 1, config.model.hidden_size), jnp.bfloat16)
    start = time.perf_counter()
    compiled = jax.jit(draw, donate_argnums=2).lower(params, last, shape).compile()
    seconds, memory = time.perf_counter() - start, read_memory(compiled)
    state, times = fill(params, context), []
    for _ in range(runs + 1):
        start = time.perf_counter()
        drawn, last, state = compiled(params, last, state)
        jax.block_until_ready(drawn)
        times.append((time.perf_counter() - start) / tokens)
    times = times[1:]
    rate = lambda seconds: round(batch_size / seconds, 1)
    return {
        "step_ms": round(1e3 * statistics.median(times), 4),
        "tokens_per_second": {
            "median": rate(statistics.median(times)),
            "least": rate(max(times)),
            "most": rate(min(times)),
        },
        "state_GiB": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shape)) / GIB,
        "memory_GiB": round(memory.peak / GIB, 3),
        "compile_seconds": round(seconds, 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every model at every batch size and context and write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="gla_1p3b,transformer_1p3b", help="files in configs/, by comma")
    parser.add_argument("--contexts", default="2048,8192,32768,131072", help="tokens read before, by comma")
    parser.add_argument("--batch-sizes", default="1,64", help="rows, by comma")
    parser.add_argument("--tokens", type=int, default=64, help="drawn in one call")
    parser.add_argument("--runs", type=int, default=3, help="timed calls")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the configs")
    parser.add_argument("--output", type=Path, required=True, help="the JSON")
    options = parser.parse_args(arguments)
    settings = {"dtype.params": "bfloat16"} | dict(pair.split("=", 1) for pair in options.set)
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "tokens": options.tokens,
        "set": options.set,
        "rows": [],
    }
    for model in options.models.split(","):
        config = load(str(CONFIGS / f"{model}.py"), settings)
        params = init_params(config.model, config.dtype, jax.random.key(0))
        for batch_size in map(int, options.batch_sizes.split(",")):
            for context in map(int, options.contexts.split(",")):
                row: dict[str, Any] = {"model": model, "batch_size": batch_size, "context": context}
                try:
                    row |= measure(config, params, context, batch_size, options.tokens, options.runs)
                except jax.errors.JaxRuntimeError as error:  # most of all, a cache that does not fit
                    row["error"] = str(error).splitlines()[0][:300]
                gc.collect()
                report["rows"].append(row)
                print(row, flush=True)
                options.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
