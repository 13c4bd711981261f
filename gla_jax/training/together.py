"""Train one model at several learning rates, and from several initialisations, at once: a point of a sweep.

Models of a few million parameters leave a device idle between two steps. Here the models of a point are one program,
`jax.vmap` over parameters and optimiser states, which makes many steps before it returns.
"""

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gla_jax.config import Config, ConfigError, ModelConfig
from gla_jax.data import Data, mqar, open_dataset
from gla_jax.models import abstract_model
from gla_jax.models.language_model import layer_mixers, mixer_options
from gla_jax.training.optimizer import make_optimizer
from gla_jax.training.state import TrainState, init_state
from gla_jax.training.step import Batch, Metrics, compiler_options, make_eval_step, make_train_step
from pallas_kernels.target import target

AVERAGED_STEPS = 200
"""Last steps whose training loss is averaged, as in the paper's table 4."""
_MOST_STEPS_AT_ONCE = 64
_MOST_BYTES_AT_ONCE = 2**27
"""Of batches, moved to the device for one call."""

_open_dataset = functools.lru_cache(maxsize=1)(open_dataset)  # the next point most likely reads the same


@dataclasses.dataclass(frozen=True)
class Progress:
    """What an evaluation found. The lists have an entry for each model."""

    step: int
    loss: list[float]
    """Of training, averaged over the last `AVERAGED_STEPS` steps, nats per token."""
    eval_loss: list[float]
    eval_accuracy: list[float]
    seconds: float
    """Since training began, compilation included."""


def train_together(
    config: Config, learning_rates: Sequence[float], seeds: Sequence[int] | None = None
) -> Iterator[Progress]:
    """Train a model at several learning rates, from several initialisations, on the same batches, on one device.

    Every model makes the steps that `gla_jax.training.train` would make with its learning rate on the default device.
    The config's mesh and what it says of checkpoints, samples, profiles and logs is not used.

    Args:
        config: the run.
        learning_rates: in the place of `optimizer.learning_rate`.
        seeds: of the parameters, each with every learning rate: first come the models of the first learning rate. None:
            the config's, which is that of the data in any case.

    Yields:
        The progress after every `eval.every` steps and after the last one; a model that has diverged has NaN. Whoever
        has seen enough stops asking.

    Raises:
        ConfigError: the data cannot be served, or hold nothing out; or attention by cuDNN on rows of documents.
    """
    start = time.monotonic()
    data = _open_dataset(config.data, seed=config.seed, vocab_size=config.model.vocab_size)
    if not data.eval_tokens:
        raise ConfigError(f"data.held_out={config.data.held_out} leaves nothing to evaluate; try 0.05.")
    vocab_size = config.model.vocab_size or data.vocab_size
    model = dataclasses.replace(config.model, vocab_size=vocab_size)
    if "segment_ids" in data.train_batch(0):
        model = _with_attention_for_documents(model)
    config = dataclasses.replace(config, model=model, optimizer=dataclasses.replace(config.optimizer, offload=False))
    run_steps, evaluate = make_steps(config)
    seeds = [config.seed] if seeds is None else seeds
    rates = jnp.repeat(jnp.asarray(learning_rates, jnp.float32), len(seeds))
    states, batches = stack_states(config, len(learning_rates), seeds), data.train_batches()
    held_out = jax.device_put(list(data.eval_batches(config.eval.batches)))  # made once, for they cost as a step does
    losses: list[Any] = []
    for step, count in _calls(config, data):
        chunk = [next(batches) for _ in range(count)]
        states, measured = run_steps(states, rates, jax.tree.map(lambda *rows: np.stack(rows), *chunk))
        losses.append(measured["loss"])  # [steps, models], left on the device until it is asked for
        if step == config.steps or (config.eval.every and step % config.eval.every == 0):
            sums = [evaluate(states, batch) for batch in held_out]
            nll, weight, correct = (
                np.sum([np.asarray(each[name], np.float64) for each in sums], axis=0)
                for name in ("nll", "weight", "correct")
            )
            recent = np.concatenate(jax.device_get(losses))[-AVERAGED_STEPS:]
            losses = [recent]
            yield Progress(
                step,
                recent.mean(axis=0).tolist(),
                (nll / weight).tolist(),
                np.where(np.isfinite(nll), correct / weight, math.nan).tolist(),
                time.monotonic() - start,
            )


def make_steps(config: Config) -> tuple[Callable[..., tuple[TrainState, Metrics]], Callable[..., Metrics]]:
    """Return the compiled functions that train and score the models of one config.

    Returns:
        (states of L models, learning rates [L], batches of arrays [steps, B, T]) -> (states, metrics [steps, L]), which
        gives its first argument's memory up; and (states, batch) -> sums [L].
    """
    graphdef, _ = abstract_model(config.model, config.dtype)
    eval_step = make_eval_step(graphdef, most_scored=mqar.most_scored(config.data))

    def train_one(rate: Any, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # The schedule is arithmetic on the learning rate, so a traced one serves it as a number does.
        optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
        tuned = dataclasses.replace(config, optimizer=optimizer)
        step = make_train_step(tuned, graphdef, make_optimizer(optimizer, config.steps), compiled=False)
        return step(state, batch)

    def run_steps(states: TrainState, rates: jax.Array, batches: Batch) -> tuple[TrainState, Metrics]:
        train_all = jax.vmap(train_one, in_axes=(0, 0, None))
        return jax.lax.scan(lambda states, batch: train_all(rates, states, batch), states, batches)

    def evaluate(states: TrainState, batch: Batch) -> Metrics:
        return jax.vmap(eval_step, in_axes=(0, None))(states.eval_params, batch)

    train = jax.jit(run_steps, donate_argnums=0, compiler_options=compiler_options(config))
    return train, jax.jit(evaluate)


def stack_states(config: Config, count: int, seeds: Sequence[int]) -> TrainState:
    """Make the state before the first step for every seed, all of them so many times."""
    optimizer = make_optimizer(config.optimizer, config.steps)
    states = [init_state(dataclasses.replace(config, seed=seed), optimizer) for seed in seeds]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves * count), *states)


def _with_attention_for_documents(model: ModelConfig) -> ModelConfig:
    """Leave cuDNN's attention out: what jax makes of it under `jax.vmap` fails on a mask for all heads."""
    if "attention" not in layer_mixers(model):
        return model
    options = mixer_options(model, "attention")
    if options.implementation == "cudnn":
        raise ConfigError(
            "model.mixers.attention.implementation=cudnn cannot be trained at several learning rates on rows of "
            "several documents; leave it out for xla, or use train.py."
        )
    if options.implementation is not None or target().platform != "gpu":
        return model
    print("Attention runs by XLA here, which is slower: under vmap cuDNN's cannot mask documents.", file=sys.stderr)
    attention = dataclasses.replace(options, implementation="xla")
    return dataclasses.replace(model, mixers=model.mixers | {"attention": attention})


def _calls(config: Config, data: Data) -> Iterator[tuple[int, int]]:
    """Cut the run into calls of equally many steps, for one program, with an end wherever an evaluation is due.

    Yields:
        The step after a call, and the steps in it.
    """
    together = math.gcd(config.steps, config.eval.every)
    size = sum(rows.nbytes for rows in data.train_batch(0).values())
    most = min(_MOST_STEPS_AT_ONCE, max(1, _MOST_BYTES_AT_ONCE // size))
    count = max(steps for steps in range(1, min(most, together) + 1) if together % steps == 0)
    for step in range(count, config.steps + 1, count):
        yield step, count
