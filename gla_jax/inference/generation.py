"""Continue prompts: one parallel pass over them, then one compiled loop of single steps.

The memory of the loop is the mixers' states, which for GLA do not grow. Prompts of different length share a batch by
padding on the left: a pad has segment id 0 and a prompt segment id 1, and every mixer starts afresh where the id
changes, so a row's continuation is the same whatever stands beside it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gla_jax.inference.sampling import sample
from gla_jax.models import LanguageModel, split_layers
from gla_jax.parallel.sharding import axis_size, shard, whole_rows
from pallas_kernels.target import target


def generate(
    model: nnx.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    end_token: int | None = None,
    seed: int = 0,
) -> list[np.ndarray]:
    """Continue each prompt by up to `max_tokens` tokens.

    Args:
        model: a `gla_jax.models.LanguageModel` (or anything with its `hidden_states` and `logits`).
        prompts: lists of token ids, each at least one long.
        max_tokens: how many tokens to add at the most.
        temperature: 0 is greedy decoding.
        top_k: sample among so many of the likeliest tokens only; 0: all.
        top_p: sample among the likeliest tokens that together reach this probability only; 1: all.
        end_token: a row ends when it has drawn this token, which is not part of the result; None: never.
        seed: row i draws the same tokens for the same seed whatever the other rows are.

    Returns:
        One int32 array of new tokens a prompt.

    Raises:
        ValueError: a prompt without tokens, or an option outside its range.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("every prompt needs at least one token; for an empty text pass the end-of-document token")
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]")
    if top_k < 0:
        raise ValueError(f"top_k={top_k} must be 0 (no limit) or more")

    # One program serves all prompts up to the next power of two, and batches that fill the mesh.
    length = 1 << (max(len(prompt) for prompt in prompts) - 1).bit_length()
    tokens, starts = pad_left(prompts, length)
    graphdef, params = nnx.split(model)
    new = _generate(
        graphdef, params, tokens, starts, jax.random.key(seed), jnp.float32(temperature),
        max_tokens=max_tokens, top_k=top_k, top_p=top_p, end_token=end_token,
    )  # fmt: skip
    results = list(np.asarray(new)[: len(prompts)])
    if end_token is not None:
        results = [row[: np.argmax(row == end_token)] if end_token in row else row for row in results]
    return results


def pad_left(prompts: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens [B, length] int32 that end together, and where each prompt starts, [B]; B fills the mesh."""
    rows = -len(prompts) % axis_size("batch") + len(prompts)
    tokens, starts = np.zeros((rows, length), np.int32), np.full(rows, length - 1)
    for row, prompt in enumerate(prompts):
        starts[row] = length - len(prompt)
        tokens[row, starts[row] :] = prompt
    return tokens, starts


def prefill(model: Any, tokens: jax.Array, starts: jax.Array) -> tuple[jax.Array, Any]:
    """Read what `pad_left` returns; return the hidden states [B, T, D] and the state after the prompts."""
    positions = jnp.arange(tokens.shape[1])[None] - starts[:, None]
    return model.hidden_states(
        shard(tokens, "batch", "time"),
        segment_ids=shard((positions >= 0).astype(jnp.int32), "batch", "time"),
        positions=shard(jnp.maximum(positions, 0), "batch", "time"),
    )


def keys_by_row(key: jax.Array, first_row: jax.Array | int, rows: int) -> jax.Array:
    """Return a key for each row, [B]; a row's does not depend on the others."""
    return shard(jax.vmap(lambda row: jax.random.fold_in(key, row))(first_row + jnp.arange(rows)), "batch")


def draw_token(
    model: Any, hidden: jax.Array, row_keys: jax.Array, number: jax.Array, temperature: jax.Array, *,
    top_k: int, top_p: float,
) -> jax.Array:  # fmt: skip
    """Draw every row's token of that number, [B] int32, given the last hidden state, [B, 1, D]."""
    logits = shard(model.logits(hidden)[:, 0], "batch", None)
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(row_keys, number)
    return sample(logits, keys, temperature=temperature, top_k=top_k, top_p=top_p)


@functools.partial(jax.jit, static_argnames=("graphdef", "max_tokens", "top_k", "top_p", "end_token"))
@whole_rows()
def _generate(
    graphdef: Any, params: Any, tokens: jax.Array, starts: jax.Array, key: jax.Array, temperature: jax.Array, *,
    max_tokens: int, top_k: int, top_p: float, end_token: int | None,
) -> jax.Array:  # fmt: skip
    """Return [B, max_tokens] int32; rows that ended are filled up with `end_token`."""
    model = nnx.merge(graphdef, params)
    rows, length = tokens.shape
    row_keys = keys_by_row(key, 0, rows)

    def draw(hidden: jax.Array, step: jax.Array) -> jax.Array:
        return draw_token(model, hidden[:, -1:], row_keys, step, temperature, top_k=top_k, top_p=top_p)

    hidden, state = prefill(model, tokens, starts)
    if target().platform == "gpu" and isinstance(model, LanguageModel):
        model, state = split_layers(model, state)
    starts = shard(starts, "batch")
    first = draw(hidden, jnp.int32(0))
    new = shard(jnp.full((rows, max_tokens), 0 if end_token is None else end_token, jnp.int32), "batch", None)
    new = new.at[:, 0].set(first)
    ended = first == (-1 if end_token is None else end_token)

    def running(carry: Any) -> jax.Array:
        step, _, _, ended, _ = carry
        return (step < max_tokens) & ~jnp.all(ended)

    def advance(carry: Any) -> Any:
        step, last, new, ended, state = carry
        position = (length - 1 + step - starts)[:, None]
        hidden, state = model.hidden_states(last[:, None], state, positions=position)
        token = draw(hidden, step)
        if end_token is not None:
            token = jnp.where(ended, end_token, token)
            ended = ended | (token == end_token)
        return step + 1, token, new.at[:, step].set(token), ended, state

    new = jax.lax.while_loop(running, advance, (jnp.int32(1), first, new, ended, state))[2]
    return shard(new, None, None)  # whole on every host
