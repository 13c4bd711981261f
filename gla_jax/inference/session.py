"""Go on with texts step by step: a state that is kept between calls, for streams, stop strings and conversations.

`generate` is one compiled call and forgets. A `Session` keeps what the model remembers of each row, which for linear
recurrences has the same size whatever it has read; it can be saved and taken up again by another process.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gla_jax.config import ConfigError
from gla_jax.inference.generation import draw_token, keys_by_row, pad_left, prefill
from gla_jax.models import LanguageModel, split_layers, stack_layers
from gla_jax.parallel.sharding import shard, whole_rows
from pallas_kernels.target import target

_FED_AT_A_TIME = 2048


class Session:
    """Texts that a model goes on with.

    The tokens drawn are those that `generate` would draw with the same seed.

    Args:
        model: the model.
        prompts: lists of token ids, each at least one long; a row each.
        temperature, top_k, top_p, seed: as in `gla_jax.inference.generate`.
        first_row: number of the first row, which decides what it draws; for batches of one and the same job.
        room: tokens that the model's state has room for; None: any number.
        reserve: how many of them will be drawn or fed later.

    Raises:
        ConfigError: the prompts do not fit.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        first_row: int = 0,
        room: int | None = None,
        reserve: int = 0,
    ):
        self._graphdef, self._params = nnx.split(model)
        self._rows, self._first_row, self._drawn, self._read, self._room = len(prompts), first_row, 0, 0, room
        self._key, self._temperature = jax.random.key(seed), jnp.float32(temperature)
        self._filters = {"top_k": top_k, "top_p": top_p}
        longest = max(len(prompt) for prompt in prompts)
        length = 1 << (longest - 1).bit_length()  # one program serves all prompts up to that
        if room is not None and length + reserve > room:
            length = longest
        self._make_room(length)
        self._last, self._state = _prefill(self._graphdef, self._params, *pad_left(prompts, length))

    def draw(self, count: int) -> np.ndarray:
        """Add tokens to every row: [rows, count] int32."""
        self._make_room(count)
        tokens, self._last, self._state = _draw(
            self._graphdef, self._params, self._last, self._state, self._key, self._temperature,
            jnp.int32(self._first_row), jnp.int32(self._drawn), count=count, **self._filters,
        )  # fmt: skip
        self._drawn += count
        return np.asarray(tokens)[: self._rows]

    def feed(self, tokens: Sequence[int]) -> None:
        """Have every row read some tokens, the same for all; any number, at constant memory."""
        # In pieces of 2^n tokens: few programs, and no padding between what was read and what is.
        ids = np.asarray(tokens, np.int32)
        rows = self._last.shape[0]
        while len(ids):
            size = min(_FED_AT_A_TIME, 1 << (len(ids).bit_length() - 1))
            self._make_room(size)
            piece = np.broadcast_to(ids[:size], (rows, size))
            self._last, self._state = _feed(self._graphdef, self._params, piece, self._state)
            ids = ids[size:]

    def save(self, path: Path) -> None:
        """Write what the model remembers into a .npz file.

        Raises:
            ConfigError: the file cannot be written.
        """
        kept = {"last": self._last, "state": self._state, "read": jnp.int32(self._read)}
        leaves = jax.tree_util.tree_leaves_with_path(kept)
        # NumPy has no bfloat16; float32 holds it exactly.
        arrays: dict[str, Any] = {jax.tree_util.keystr(name): np.asarray(_wide(leaf)) for name, leaf in leaves}
        partial = path.with_name(f".{path.name}.partial")
        try:
            with partial.open("wb") as file:
                np.savez(file, **arrays)
            partial.replace(path)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}.") from None

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote, in place of the prompts.

        Raises:
            ConfigError: there is no such file, or it is of another model.
        """
        try:
            with np.load(path) as file:
                arrays = dict(file)
        except FileNotFoundError:
            raise ConfigError(f"{path}: there is no such file.") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is no saved state: {error}.") from None
        mine = {"last": self._last, "state": self._state, "read": jnp.int32(0)}

        def take(name: Any, leaf: jax.Array) -> jax.Array:
            key = jax.tree_util.keystr(name)
            found = arrays[key].shape if key in arrays else None
            if found != leaf.shape:
                raise ConfigError(f"{path} is the state of another model: {key} is {found} there, {leaf.shape} here.")
            return jax.device_put(arrays[key].astype(leaf.dtype), leaf.sharding)

        taken = jax.tree_util.tree_map_with_path(take, mine)
        self._last, self._state, self._read = taken["last"], taken["state"], int(taken["read"])

    def _make_room(self, count: int) -> None:
        self._read += count
        if self._room is not None and self._read > self._room:
            raise ConfigError(
                f"{self._read} tokens do not fit into the {self._room} that this model's state has room for; raise "
                "cache_length, where its config has it."
            )


def _wide(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf


@functools.partial(jax.jit, static_argnames="graphdef")
@whole_rows()
def _prefill(graphdef: Any, params: Any, tokens: jax.Array, starts: jax.Array) -> tuple[jax.Array, Any]:
    """Read rows whose tokens begin at `starts`; return the last hidden state [B, 1, D] and the state."""
    hidden, state = prefill(nnx.merge(graphdef, params), tokens, starts)
    return hidden[:, -1:], state


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="state")
@whole_rows()
def _feed(graphdef: Any, params: Any, tokens: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    hidden, state = nnx.merge(graphdef, params).hidden_states(shard(tokens, "batch", "time"), state)
    return hidden[:, -1:], state


@functools.partial(jax.jit, static_argnames=("graphdef", "count", "top_k", "top_p"), donate_argnames="state")
@whole_rows()
def _draw(
    graphdef: Any, params: Any, last: jax.Array, state: Any, key: jax.Array, temperature: jax.Array,
    first_row: jax.Array, drawn: jax.Array, *, count: int, top_k: int, top_p: float,
) -> tuple[jax.Array, jax.Array, Any]:  # fmt: skip
    model = nnx.merge(graphdef, params)
    row_keys = keys_by_row(key, first_row, last.shape[0])

    def step(carry: Any, number: jax.Array) -> tuple[Any, jax.Array]:
        last, state = carry
        token = draw_token(model, last, row_keys, number, temperature, top_k=top_k, top_p=top_p)
        last, state = model.hidden_states(token[:, None], state)
        return (last, state), token

    is_split = target().platform == "gpu"
    if is_split:
        model, state = split_layers(model, state)
    (last, state), tokens = jax.lax.scan(step, (last, state), drawn + jnp.arange(count))
    return shard(tokens.T, None, None), last, stack_layers(state) if is_split else state
