"""Cross-entropy from hidden states, without ever holding all logits."""

import functools

import jax
import jax.numpy as jnp

from gla_jax.parallel.sharding import axis_size, max_shards, per_shard, shard_index, sum_shards

CHUNK_LOGITS = 2**26
"""Logits, in float32, that a device holds at a time unless told otherwise: 256 MiB."""

SUMS = ("nll", "z_loss", "weight", "correct")
Sums = dict[str, jax.Array]


def cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
    most_scored: int | None = None,
    chunk_tokens: int | None = None,
) -> tuple[jax.Array, Sums]:
    """Add up the weighted cross-entropy of all tokens: sums, so that microbatches and hosts can be added to each other.

    Tokens are scored in chunks, and where a gradient is wanted, it is formed in the same sweep: the logits of a chunk
    are computed once, turned into the gradients of hidden states and head, and dropped. Products are in the dtype of
    `hidden`, all sums in float32.

    Args:
        hidden: [B, T, D], what the head is applied to.
        head: [D, vocab] in the parameters' dtype.
        targets: [B, T] int32, the tokens to predict.
        weights: [B, T] float32, 0 for tokens that do not count.
        z_loss: coefficient of log(Z)^2, which keeps logits near 0 (arXiv 2204.02311, section 5).
        most_scored: no row has more tokens than this whose weight is not 0, and the logits of the others are not
            computed; None: any number.
        chunk_tokens: tokens of a device whose logits are held at a time; None: as many as make `CHUNK_LOGITS`.

    Returns:
        The sum of weight * (-log p(target) + z_loss log(Z)^2), differentiable in `hidden`, `head` and `weights`; and
        sums that are not: "nll" and "z_loss", the two parts of it, "weight", and "correct", the weight of tokens whose
        target is the likeliest.

    Raises:
        ValueError: shapes that do not fit.
    """
    if targets.shape != hidden.shape[:2] or weights.shape != hidden.shape[:2]:
        raise ValueError(
            f"targets {targets.shape} and weights {weights.shape} must have the shape [B, T] of hidden "
            f"{hidden.shape}, {hidden.shape[:2]}"
        )
    if hidden.shape[2] != head.shape[0]:
        raise ValueError(f"head {head.shape} must be [D, vocab] for hidden {hidden.shape} with D={hidden.shape[2]}")
    if most_scored is not None:
        hidden, targets, weights = _keep_scored(most_scored, hidden, targets, weights)
    if chunk_tokens is None:
        chunk_tokens = max(1, CHUNK_LOGITS * axis_size("vocab") // head.shape[1])
    return _cross_entropy(z_loss, chunk_tokens, hidden, head, targets, weights)


def _keep_scored(most, hidden, targets, weights):
    """Keep, of each device's part of a row, no more tokens than may have a weight."""

    def keep(hidden, targets, weights):
        _, places = jax.lax.top_k(jnp.where(weights != 0, 1, 0), min(most, weights.shape[1]))
        take = lambda x: jnp.take_along_axis(x, places, axis=1)
        return jnp.take_along_axis(hidden, places[..., None], axis=1), take(targets), take(weights)

    row = ("batch", "time")
    axes = ((*row, None), row, row)
    return per_shard(keep, axes, axes)(hidden, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(z_loss, chunk_tokens, hidden, head, targets, weights):
    sums, _ = _sweep(z_loss, chunk_tokens, False, hidden, head, targets, weights)
    return _total(sums), sums


def _forward(z_loss, chunk_tokens, hidden, head, targets, weights):
    sums, gradients = _sweep(z_loss, chunk_tokens, True, hidden, head, targets, weights)
    dtypes = [jnp.zeros((), x.dtype) for x in (hidden, head, weights)]
    return (_total(sums), sums), (gradients, dtypes)


def _backward(z_loss, chunk_tokens, residuals, cotangents):
    gradients, dtypes = residuals
    scale, _ = cotangents
    d_hidden, d_head, d_weights = (
        (scale * gradient).astype(like.dtype) for gradient, like in zip(gradients, dtypes, strict=True)
    )
    return d_hidden, d_head, None, d_weights


_cross_entropy.defvjp(_forward, _backward)


def _total(sums: Sums) -> jax.Array:
    return sums["nll"] + sums["z_loss"]


def _sweep(z_loss, chunk_tokens, with_gradients, hidden, head, targets, weights):
    """Return the sums and, if asked for, the gradients of their total in hidden, head and weights."""
    tokens = ("batch", "time")
    gradient_axes = ((*tokens, None), ("embed", "vocab"), tokens) if with_gradients else None
    run = per_shard(
        functools.partial(_local_sweep, z_loss, chunk_tokens, with_gradients),
        ((*tokens, None), (None, "vocab"), tokens, tokens),
        (dict.fromkeys(SUMS, ()), gradient_axes),
    )
    return run(hidden, head.astype(hidden.dtype), targets, weights)


def _local_sweep(z_loss, chunk_tokens, with_gradients, hidden, head, targets, weights):
    """Do the work of `_sweep` on one device's tokens and its part of the vocabulary."""
    batch_size, length, _ = hidden.shape
    count = batch_size * length
    chunks = -(-count // chunk_tokens)
    chunk_tokens = -(-count // chunks)

    def split(x):
        x = x.reshape(count, *x.shape[2:])
        x = jnp.pad(x, ((0, chunks * chunk_tokens - count), *((0, 0),) * (x.ndim - 1)))  # of weight 0
        return x.reshape(chunks, chunk_tokens, *x.shape[1:])

    def join(x):
        return x.reshape(chunks * chunk_tokens, *x.shape[2:])[:count].reshape(batch_size, length, *x.shape[2:])

    vocabulary = shard_index("vocab") * head.shape[1] + jnp.arange(head.shape[1], dtype=targets.dtype)

    def score(carry, chunk):
        sums, d_head = carry
        hidden, targets, weights = chunk
        logits = jnp.dot(hidden, head, preferred_element_type=jnp.float32)
        is_target = targets[:, None] == vocabulary
        largest = max_shards(jnp.max(logits, axis=1), "vocab")
        exponentials = jnp.exp(logits - largest[:, None])
        normaliser = sum_shards(jnp.sum(exponentials, axis=1), "vocab")
        target_logits = sum_shards(jnp.sum(jnp.where(is_target, logits, 0), axis=1), "vocab")
        log_z = largest + jnp.log(normaliser)
        nll, penalty = log_z - target_logits, z_loss * log_z**2
        parts = {"nll": nll, "z_loss": penalty, "weight": jnp.ones_like(nll), "correct": target_logits >= largest}
        sums = {name: sums[name] + jnp.sum(weights * part) for name, part in parts.items()}
        if not with_gradients:
            return (sums, d_head), None
        slope = weights * (1 + 2 * z_loss * log_z) / normaliser
        d_logits = slope[:, None] * exponentials - jnp.where(is_target, weights[:, None], 0)
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = sum_shards(jnp.dot(d_logits, head.T, preferred_element_type=jnp.float32), "vocab")
        d_head += jnp.dot(hidden.T, d_logits, preferred_element_type=jnp.float32)
        return (sums, d_head), (d_hidden.astype(hidden.dtype), nll + penalty)

    sums = {name: jnp.zeros((), jnp.float32) for name in SUMS}
    d_head = jnp.zeros(head.shape, jnp.float32) if with_gradients else None
    (sums, d_head), per_token = jax.lax.scan(score, (sums, d_head), (split(hidden), split(targets), split(weights)))
    sums = {name: sum_shards(x, "batch", "time") for name, x in sums.items()}
    if not with_gradients:
        return sums, None
    assert d_head is not None
    d_hidden, d_weights = per_token
    d_head = sum_shards(d_head, "batch", "time", scatter={0: "embed"})
    return sums, (join(d_hidden), d_head, join(d_weights))
