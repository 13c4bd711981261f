"""Log-probabilities of tokens, one by one, in rows of any length."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gla_jax.models import LanguageModel
from gla_jax.parallel.sharding import axis_size, shard, whole_rows

SEGMENT = 2048
"""Tokens of a row that are read at a time; longer rows go on from the state."""
_CHUNK_LOGITS = 2**25
"""Logits that are held at a time."""


class Scorer:
    """Scores rows of tokens, in batches of a fixed size.

    Args:
        model: the model.
        batch_size: rows at a time, rounded up to what the mesh divides.
        segment: see `SEGMENT`.
    """

    def __init__(self, model: LanguageModel, batch_size: int, *, segment: int = SEGMENT):
        self._graphdef, self._params = nnx.split(model)
        self._model = model
        self.batch_size = -(-batch_size // axis_size("batch")) * axis_size("batch")
        self._segment = segment

    def __call__(self, rows: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Score up to `batch_size` rows.

        A row's scores do not depend on what else is in the batch, but for rounding where another is so much longer
        that the program is a different one.

        Args:
            rows: int32 [at least 2] each.

        Returns:
            For each row, of all its tokens but the first: the natural log of their probabilities, float32, and whether
            they were the likeliest.
        """
        lengths = [len(row) - 1 for row in rows]
        longest = max(lengths)
        size = min(padded_length(longest), self._segment)
        padded = -(-longest // size) * size
        tokens = np.zeros((self.batch_size, padded + 1), np.int32)
        for place, row in enumerate(rows):
            tokens[place, : len(row)] = row
        state = None
        parts = []
        for start in range(0, padded, size):
            if padded > size and state is None:
                state = self._model.init_state(self.batch_size)  # as what comes back, so that there is one program
            part = tokens[:, start : start + size + 1]
            *scores, state = _score(self._graphdef, self._params, part[:, :-1], part[:, 1:], state)
            parts.append(scores)
        found, likeliest = (np.concatenate([np.asarray(part[i]) for part in parts], axis=1) for i in range(2))
        return [(found[i, :length], likeliest[i, :length]) for i, length in enumerate(lengths)]


def padded_length(length: int) -> int:
    """Return the least of 16, 24, 32, 48, 64, ... that is not below a length: few programs, little padding."""
    power = 1 << max(4, (length - 1).bit_length())
    return power * 3 // 4 if power > 16 and length <= power * 3 // 4 else power


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="state")
@whole_rows()
def _score(
    graphdef: Any, params: Any, inputs: jax.Array, targets: jax.Array, state: Any
) -> tuple[jax.Array, jax.Array, Any]:
    """Return [B, T] log-probabilities of the targets, whether they are the likeliest tokens, and the state."""
    model = nnx.merge(graphdef, params)
    hidden, state = model.hidden_states(shard(inputs, "batch", "time"), state)
    batch_size, length, _ = hidden.shape
    size = max(1, min(length, _CHUNK_LOGITS * axis_size("batch") // (batch_size * model.vocab_size)))
    while length % size:
        size -= 1
    cut = lambda x: jnp.moveaxis(x.reshape(batch_size, length // size, size, *x.shape[2:]), 1, 0)

    def score(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, targets = part
        logits = shard(model.logits(hidden), "batch", None, None)
        at_target = jnp.arange(logits.shape[-1]) == targets[:, :, None]
        chosen = jnp.sum(jnp.where(at_target, logits, 0.0), axis=-1)
        return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets

    scores, likeliest = jax.lax.map(score, (cut(hidden), cut(shard(targets, "batch", "time"))))
    join = lambda x: shard(jnp.moveaxis(x, 0, 1).reshape(batch_size, length), None, None)
    return join(scores), join(likeliest), state
