"""Train one small model in several number formats and by several kernels, and compare the curves of their losses.

    python benchmarks/loss_agreement.py --output=loss_agreement.json

Every form starts from the same float32 parameters and sees the same batches of the default corpus, for each of
`--seeds` seeds, which decide both. The reference is the recurrence token by token, all in float32 with products of full
precision. A form agrees with it if the losses of its last steps differ by less than those of the reference do from seed
to seed. The heads have the sizes of GLA 340M's, K = 128 and V = 256; `--set=model.hidden_size=1024` makes those
of 1.3B.
"""

import argparse
import concurrent.futures
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gla_jax.config import Config, as_dict, build, default_config, override
from gla_jax.data import Data, open_dataset
from gla_jax.models import abstract_model
from gla_jax.training.optimizer import make_optimizer
from gla_jax.training.state import init_state
from gla_jax.training.step import compiler_options, make_train_step

REFERENCE = "float32, reference"
FORMS: dict[str, dict[str, str]] = {
    REFERENCE: {
        "dtype.compute": "float32",
        "model.mixers.gla.implementation": "reference",
        "model.remat": "full",  # it keeps the state after every token: of one layer at a time
    },
    "bfloat16": {},
    "bfloat16, chunked": {"model.mixers.gla.implementation": "chunked"},
    "float8 products": {"dtype.matmul": "float8"},
}
"""What each form sets; the best kernels that there are unless it says otherwise."""
BASE = {
    "steps": "200",
    "model.hidden_size": "512",
    "model.num_heads": "2",
    "model.vocab_size": "256",
    "data.sequence_length": "256",
    "data.batch_size": "8",
    "optimizer.learning_rate": "1e-3",
    "optimizer.final_learning_rate": "1e-4",
    "optimizer.warmup_steps": "20",
}
LAST = 20
"""Steps whose mean loss is compared."""
CALL = 20
"""Steps of one program; it divides the steps of a run."""


def make_config(form: str, seed: int, settings: Mapping[str, str]) -> Config:
    """Return the config of a form and a seed."""
    config = default_config()
    for name, text in (BASE | {"seed": str(seed)} | FORMS[form] | dict(settings)).items():
        override(config, name, text)
    return build(config)


def compile_steps(configs: Sequence[Config], states: Any, batches: Any) -> Any:
    """Compile `CALL` training steps of configs that differ in their seeds alone: all seeds in one program."""
    config = configs[0]
    graphdef, _ = abstract_model(config.model, config.dtype)
    optimizer = make_optimizer(config.optimizer, config.steps)
    train_all = jax.vmap(make_train_step(config, graphdef, optimizer, compiled=False))
    run = lambda states, batches: jax.lax.scan(lambda *step: train_all(*step), states, batches)
    with jax.default_matmul_precision("highest" if config.dtype.compute == "float32" else "default"):
        program = jax.jit(run, donate_argnums=0, compiler_options=compiler_options(config))
        return program.lower(states, batches).compile()


def make_states(configs: Sequence[Config]) -> Any:
    """Make the state before the first step, for each config."""
    states = [init_state(config, make_optimizer(config.optimizer, config.steps)) for config in configs]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def stack_batches(data: Sequence[Data], first: int) -> dict[str, np.ndarray]:
    """Return the batches of a call, arrays [CALL, seeds, B, T]."""
    steps = [[each.train_batch(step) for each in data] for step in range(first, first + CALL)]
    return {name: np.stack([np.stack([batch[name] for batch in batches]) for batches in steps]) for name in steps[0][0]}


def train(program: Any, states: Any, data: Sequence[Data], steps: int) -> list[list[float]]:
    """Return the loss of every step, for each seed."""
    states, losses = jax.tree.map(jnp.copy, states), []
    for first in range(0, steps, CALL):
        states, metrics = program(states, stack_batches(data, first))
        losses.append(metrics["loss"])  # [CALL, seeds]
    return np.concatenate(jax.device_get(losses)).T.tolist()


def compare(losses: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return how a form's curves, one for each seed, lie to the reference's of the same seeds."""
    end = lambda curve: statistics.fmean(curve[-LAST:])
    ends, wanted = [end(curve) for curve in losses], [end(curve) for curve in reference]
    farthest = max(
        abs(ours - theirs) / theirs
        for curve, other in zip(losses, reference, strict=True)
        for ours, theirs in zip(curve, other, strict=True)
    )
    return {
        "loss": statistics.fmean(ends),
        "difference": statistics.fmean(ours - theirs for ours, theirs in zip(ends, wanted, strict=True)),
        "differences": [ours - theirs for ours, theirs in zip(ends, wanted, strict=True)],
        "seed_noise": statistics.stdev(wanted),
        "farthest": farthest,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Train every form and write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", default=";".join(FORMS), help="by semicolon")
    parser.add_argument("--reference", default=REFERENCE, help="the form that the others are compared with")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the config")
    parser.add_argument("--output", type=Path, required=True, help="the JSON")
    options = parser.parse_args(arguments)
    settings = dict(pair.split("=", 1) for pair in options.set)
    report: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "last": LAST, "forms": []}
    forms = [options.reference, *(form for form in options.forms.split(";") if form != options.reference)]
    cases = {form: [make_config(form, seed, settings) for seed in range(options.seeds)] for form in forms}
    base = cases[options.reference]
    states = make_states(base)
    data = [open_dataset(config.data, seed=config.seed, vocab_size=config.model.vocab_size) for config in base]
    batches = stack_batches(data, 0)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = list(pool.map(lambda configs: compile_steps(configs, states, batches), cases.values()))
    report["config"] = as_dict(base[0])
    reference: list[list[float]] = []
    for form, program in zip(forms, programs, strict=True):
        start = time.perf_counter()
        losses = train(program, states, data, base[0].steps)
        reference = reference or losses
        row = {"form": form, "seconds": round(time.perf_counter() - start, 1)} | compare(losses, reference)
        print(row, flush=True)
        report["forms"].append(row | {"losses": losses})
        options.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
