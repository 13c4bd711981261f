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
import concurrent.futures
import dataclasses
import gc
import itertools
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
from benchmarks.training import CONFIGS, parse_settings
from gla_jax.config import Config, load
from gla_jax.hardware import GIB
from gla_jax.inference.generation import draw_token, keys_by_row
from gla_jax.models import abstract_model, bind, init_params, split_layers, stack_layers
from gla_jax.models.language_model import make_room
from gla_jax.parallel.program import read_memory

SPLIT = jax.default_backend() == "gpu"
"""Whether layers run one by one, as `gla_jax.inference` has it."""


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


@dataclasses.dataclass
class Case:
    """One model, batch size and context, on its way through the compiler."""

    model: str
    config: Config
    context: int
    batch_size: int
    tokens: int
    runs: int

    def compile(self) -> None:
        """Compile the drawing of tokens."""
        graphdef, params = abstract_model(self.config.model, self.config.dtype)
        draw, self.state_after = drawing(
            graphdef, self.context + self.tokens * (self.runs + 1), self.batch_size, self.tokens
        )
        self.state = jax.eval_shape(lambda params: self.state_after(params, self.context), params)
        self.last = jax.ShapeDtypeStruct((self.batch_size, 1, self.config.model.hidden_size), jnp.bfloat16)
        lowered = jax.jit(draw, donate_argnums=2).lower(params, self.last, self.state)
        start = time.perf_counter()
        self.draw = lowered.compile()
        self.seconds = time.perf_counter() - start

    def measure(self, params: Any) -> dict[str, Any]:
        """Run and time it."""
        state = jax.jit(self.state_after, static_argnums=1)(params, self.context)
        last, times = jnp.zeros(self.last.shape, self.last.dtype), []
        for _ in range(self.runs + 1):
            start = time.perf_counter()
            drawn, last, state = self.draw(params, last, state)
            jax.block_until_ready(drawn)
            times.append((time.perf_counter() - start) / self.tokens)
        times = times[1:]
        rate = lambda seconds: round(self.batch_size / seconds, 1)
        return {
            "step_ms": round(1e3 * statistics.median(times), 4),
            "tokens_per_second": {
                "median": rate(statistics.median(times)),
                "least": rate(max(times)),
                "most": rate(min(times)),
            },
            "state_GiB": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.state)) / GIB,
            "memory_GiB": round(read_memory(self.draw).peak / GIB, 3),
            "compile_seconds": round(self.seconds, 1),
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
    settings = {"dtype.params": "bfloat16"} | parse_settings(options.set)
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "tokens": options.tokens,
        "set": options.set,
        "rows": [],
    }
    models, numbers = options.models.split(","), lambda text: [int(number) for number in text.split(",")]
    configs = {model: load(str(CONFIGS / f"{model}.py"), settings) for model in models}
    cases = [
        Case(model, configs[model], context, batch_size, options.tokens, options.runs)
        for model in models
        for batch_size in numbers(options.batch_sizes)
        for context in numbers(options.contexts)
    ]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(Case.compile, cases))
    for model, of_model in itertools.groupby(cases, lambda case: case.model):
        params = init_params(configs[model].model, configs[model].dtype, jax.random.key(0))
        for case in of_model:
            row: dict[str, Any] = {"model": model, "batch_size": case.batch_size, "context": case.context}
            try:
                row |= case.measure(params)
            except jax.errors.JaxRuntimeError as error:  # most of all, a cache that does not fit
                row["error"] = str(error).splitlines()[0][:300]
            gc.collect()
            report["rows"].append(row)
            print(row, flush=True)
            options.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
