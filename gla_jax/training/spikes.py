"""Steps that leap out of those before, and an optimiser that lets them pass without an update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

WINDOW = 128
"""Steps that a step is compared with; before half as many have been seen, none leaps."""


class SpikeState(NamedTuple):
    """What steps are compared with, and the state of the optimiser inside."""

    losses: jax.Array
    """[WINDOW] float32, of the last steps that were finite; step i is at i % WINDOW."""
    grad_norms: jax.Array
    seen: jax.Array
    """int32 []: steps in the window so far."""
    spikes: jax.Array
    """int32 []: steps that leapt."""
    inner: optax.OptState


def notice_spikes(
    optimizer: optax.GradientTransformation, sigmas: float, *, skip: bool
) -> optax.GradientTransformationExtraArgs:
    """Count the steps whose loss or gradient norm leaps, and make no update of them if told to skip.

    A step leaps if one of the two is not finite, or lies more than `sigmas` standard deviations above the mean of the
    last `WINDOW` steps. A skipped step leaves parameters and the optimiser's state as they were.

    Args:
        optimizer: what makes the updates.
        sigmas: standard deviations.
        skip: make no update.

    Returns:
        An optimiser whose `update` also takes `loss` and `grad_norm`, both float32 [].
    """

    def init(params: optax.Params) -> SpikeState:
        window, zero = jnp.zeros(WINDOW, jnp.float32), jnp.zeros((), jnp.int32)
        return SpikeState(window, window, zero, zero, optimizer.init(params))

    def update(
        updates: optax.Updates, state: SpikeState, params: Any = None, *, loss: jax.Array, grad_norm: jax.Array
    ) -> tuple[optax.Updates, SpikeState]:
        filled = jnp.arange(WINDOW) < state.seen

        def leaps(x: jax.Array, before: jax.Array) -> jax.Array:
            mean, deviation = jnp.mean(before, where=filled), jnp.std(before, where=filled)
            return (state.seen >= WINDOW // 2) & (x > mean + sigmas * deviation)

        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        spike = ~finite | leaps(loss, state.losses) | leaps(grad_norm, state.grad_norms)
        # Spikes enter the window as well: should the loss stay at a new height, it is the usual one soon.
        enter = lambda x, window: jnp.where(finite, window.at[state.seen % WINDOW].set(x), window)
        updates, inner = optimizer.update(updates, state.inner, params)
        if skip:
            updates = jax.tree.map(lambda x: jnp.where(spike, 0, x), updates)
            inner = jax.tree.map(lambda new, old: jnp.where(spike, old, new), inner, state.inner)
        return updates, SpikeState(
            enter(loss, state.losses),
            enter(grad_norm, state.grad_norms),
            state.seen + finite.astype(jnp.int32),
            state.spikes + spike.astype(jnp.int32),
            inner,
        )

    return optax.GradientTransformationExtraArgs(init, update)
