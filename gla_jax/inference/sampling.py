"""Choosing the next token from logits."""

import jax
import jax.numpy as jnp


def sample(
    logits: jax.Array, keys: jax.Array, *, temperature: float | jax.Array = 1.0, top_k: int = 0, top_p: float = 1.0
) -> jax.Array:
    """Draw one token a row.

    The filters apply in the usual order: temperature, then the k likeliest, then the smallest set of tokens whose
    probability reaches p (nucleus sampling, arXiv 1904.09751).

    Args:
        logits: [B, vocab] float32.
        keys: [B] random keys, one a row, so that a row's draw does not depend on its neighbours.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep only so many tokens; 0 keeps all.
        top_p: keep the likeliest tokens until their probability reaches this; 1 keeps all.

    Returns:
        [B] int32 token ids.
    """
    greedy = jnp.argmax(logits, axis=-1)
    scaled = logits / jnp.maximum(temperature, 1e-6)
    if top_k:
        kth = jax.lax.top_k(scaled, min(top_k, logits.shape[-1]))[0][:, -1:]
        scaled = jnp.where(scaled < kth, -jnp.inf, scaled)
    if top_p < 1.0:
        descending = jnp.sort(scaled, axis=-1, descending=True)
        probability = jax.nn.softmax(descending, axis=-1)
        # A token stays if the ones before it have not reached p yet, so the likeliest always stays.
        kept = jnp.cumsum(probability, axis=-1) - probability < top_p
        threshold = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
        scaled = jnp.where(scaled < threshold, -jnp.inf, scaled)
    drawn = jax.vmap(jax.random.categorical)(keys, scaled)
    return jnp.where(temperature == 0, greedy, drawn).astype(jnp.int32)
