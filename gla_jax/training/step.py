"""One update of the parameters: loss, gradients, optimiser."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from gla_jax.config import Config
from gla_jax.data import mqar
from gla_jax.layers.float8 import COMPILER_OPTIONS
from gla_jax.models import bind
from gla_jax.models.language_model import make_room
from gla_jax.parallel.sharding import shard, to_device, to_host
from gla_jax.training.loss import cross_entropy
from gla_jax.training.optimizer import make_schedule
from gla_jax.training.spikes import SpikeState
from gla_jax.training.state import Params, TrainState, to_float32
from pallas_kernels.target import target

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def compiler_options(config: Config) -> dict[str, Any]:
    """Return what the compiler has to be told of a program that trains."""
    return COMPILER_OPTIONS if config.dtype.matmul == "float8" and target().platform == "gpu" else {}


def make_train_step(
    config: Config, graphdef: Any, optimizer: optax.GradientTransformationExtraArgs, *, compiled: bool = True
) -> TrainStep:
    """Return the compiled step (state, batch) -> (state, metrics), which gives its first argument's memory up.

    Args:
        config: the run.
        graphdef: of `gla_jax.models.abstract_model`.
        optimizer: of `gla_jax.training.optimizer.make_optimizer`.
        compiled: False: as it is, for a program that does more; compile that with `compiler_options`.

    Returns:
        A function of the state and a batch of arrays [B, T]: inputs, targets, weights, and, where rows hold more than
        one document, segment_ids and positions. The metrics are float32 scalars: loss (nats per token), grad_norm
        (before clipping), learning_rate; z_loss, and spikes (how many up to here), if the config asks for them.
    """
    schedule = make_schedule(config.optimizer, config.steps)
    unroll = target().platform == "gpu" if config.model.unroll is None else config.model.unroll
    segments = config.data.segments

    def total_loss(params: Params, batch: Batch, carried: Any, key: Any) -> tuple[jax.Array, tuple[Metrics, Any]]:
        model = bind(graphdef, params)
        if segments > 1:
            make_room(model, segments * config.data.sequence_length)
            carried = _begin_anew(carried, batch["positions"])
        hidden, carried = model.hidden_states(
            batch["inputs"],
            carried,
            segment_ids=batch.get("segment_ids"),
            positions=batch.get("positions"),
            unroll=unroll,
            dropout_key=key,
        )
        with jax.named_scope("loss"):
            total, sums = cross_entropy(
                hidden,
                model.head_matrix(),
                batch["targets"],
                batch["weights"],
                z_loss=config.optimizer.z_loss,
                most_scored=mqar.most_scored(config.data),
            )
        return total, (sums, carried if segments > 1 else None)

    def total_gradient(params: Params, batch: Batch, carried: Any, key: Any) -> tuple[Params, Metrics, Any]:
        gradient, (sums, carried) = jax.grad(total_loss, has_aux=True)(params, batch, carried, key)
        return to_float32(gradient), sums, carried

    def accumulate(params: Params, batch: Batch, carried: Any, key: Any) -> tuple[Params, Metrics, Any]:
        # Sums over tokens, divided once at the end, weigh every token alike, whichever microbatch it came in.
        parts = config.optimizer.accumulation_steps
        if parts == 1:
            return total_gradient(params, batch, carried, key)
        gradient = lambda part: total_gradient(params, part[0], None, part[1])
        each = (split_rows(batch, parts), None if key is None else jax.random.split(key, parts))
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], each)))
        return jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, gradient(part)), None), zeros, each)[0]

    def dropout_key(state: TrainState) -> jax.Array | None:
        if not config.model.embedding_dropout:
            return None
        return jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

    def update(state: TrainState, gradient: Params, sums: Metrics, carried: Any) -> tuple[TrainState, Metrics]:
        tokens = jnp.maximum(sums["weight"], 1)
        with jax.named_scope("optimizer"):
            gradient = jax.tree.map(lambda x: x / tokens, gradient)
            loss, grad_norm = sums["nll"] / tokens, optax.tree.norm(gradient)
            told = {"loss": loss, "grad_norm": grad_norm}
            opt_state = to_device(state.opt_state) if config.optimizer.offload else state.opt_state
            updates, opt_state = optimizer.update(gradient, opt_state, state.params, **told)
            params = optax.apply_updates(state.params, updates)
            ema = state.ema
            if ema is not None:
                decay = config.optimizer.ema_decay
                ema = jax.tree.map(lambda average, x: decay * average + (1 - decay) * x, ema, params)
        metrics = {"loss": loss, "grad_norm": grad_norm, "learning_rate": schedule(state.step)}
        if isinstance(opt_state, SpikeState):
            metrics["spikes"] = opt_state.spikes.astype(jnp.float32)
        if config.optimizer.z_loss:
            metrics["z_loss"] = sums["z_loss"] / tokens
        if config.optimizer.offload:
            opt_state = to_host(opt_state)
        return TrainState(state.step + 1, params, opt_state, state.rng, ema, carried), metrics

    compile_ = functools.partial(jax.jit, compiler_options=compiler_options(config))
    if config.optimizer.offload:
        return _TwoPrograms(compile_(accumulate, donate_argnums=2), compile_(update, donate_argnums=0), dropout_key)
    train_step = lambda state, batch: update(state, *accumulate(state.params, batch, state.carried, dropout_key(state)))
    return compile_(train_step, donate_argnums=0) if compiled else train_step


class _TwoPrograms:
    """A step whose second program begins when the first has ended, and only then moves the moments to the device.

    In one program XLA moves them at the start, whatever depends on what, and nothing is gained.
    """

    def __init__(self, accumulate: Any, update: Any, dropout_key: Any):
        self._accumulate, self._update, self._dropout_key = accumulate, update, dropout_key

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        results = self._accumulate(state.params, batch, state.carried, self._dropout_key(state))
        return self._update(dataclasses.replace(state, carried=None), *results)

    def lower(self, state: TrainState, batch: Batch) -> tuple[Any, Any]:
        """Return both programs, lowered for such arguments."""
        first = self._accumulate.trace(state.params, batch, state.carried, jax.eval_shape(self._dropout_key, state))
        place = lambda leaf: NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec)
        describe = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf))
        results = jax.tree.map(describe, first.out_info)
        second = self._update.trace(dataclasses.replace(state, carried=None), *results)
        return first.lower(), second.lower()


def make_eval_step(graphdef: Any, *, most_scored: int | None = None) -> Callable[[Params, Batch], Metrics]:
    """Return the compiled function from parameters and a batch to the sums of `cross_entropy`, which see."""

    def eval_step(params: Params, batch: Batch) -> Metrics:
        model = bind(graphdef, params)
        hidden, _ = model.hidden_states(
            batch["inputs"], segment_ids=batch.get("segment_ids"), positions=batch.get("positions")
        )
        _, sums = cross_entropy(
            hidden, model.head_matrix(), batch["targets"], batch["weights"], most_scored=most_scored
        )
        return sums

    return jax.jit(eval_step)


def _begin_anew(carried: Any, positions: jax.Array) -> Any:
    """Forget what came before in rows that now begin with a document: a state before the first token is all zeros."""
    fresh = shard(positions, "batch", None)[:, 0] == 0
    forget = lambda x: jnp.where(fresh.reshape(1, -1, *(1,) * (x.ndim - 2)), jnp.zeros_like(x), x)
    return jax.tree.map(forget, carried)  # [layers, B, ..]


def split_rows(batch: Batch, parts: int) -> Batch:
    """Return [parts, B / parts, T] for every array [B, T]: row i goes to part i % parts.

    Consecutive rows lie on one device, so every part has rows on all devices and nothing moves between them.
    """
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)
