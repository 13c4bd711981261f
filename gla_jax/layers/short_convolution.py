"""A short causal convolution along time, channel by channel, with a state for decoding."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from gla_jax.layers.recompute import recomputed
from gla_jax.parallel import sequence
from gla_jax.parallel.sharding import per_shard, zeros


class ShortConvolution(nnx.Module):
    """silu(sum_w taps[w] * x[t - width + 1 + w] + bias): depthwise, causal, never across documents.

    Its state are the last `width - 1` inputs, [B, width - 1, channels].

    Args:
        channels: size of the last axis.
        width: number of taps.
        use_bias: add a bias per channel.
        initializer_range: standard deviation of the taps.
        dtype: compute dtype.
        param_dtype: dtype that parameters are held in.
        rngs: source of randomness.
    """

    def __init__(
        self,
        channels: int,
        width: int = 4,
        *,
        use_bias: bool = False,
        initializer_range: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.channels, self.width, self.dtype = channels, width, dtype
        taps = jax.nn.initializers.normal(initializer_range)(rngs.params(), (width, channels), param_dtype)
        self.taps = nnx.Param(taps, axes=(None, "heads"))
        self.bias = nnx.Param(jnp.zeros(channels, param_dtype), axes=("heads",)) if use_bias else nnx.data(None)

    def __call__(
        self, x: jax.Array, state: jax.Array | None = None, *, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Convolve x [B, T, channels].

        Args:
            x: inputs, any T >= 1.
            state: [B, width - 1, channels], the inputs before x; None: zeros.
            segment_ids: [B, T] int32; see `gla_jax.layers`.

        Returns:
            The result [B, T, channels] and the state after the last token.
        """
        rows, states, channels = ("batch", "time", "heads"), ("batch", None, "heads"), ("heads",)
        axes = (rows, (None, *channels), channels, states, ("batch", "time"))
        bias = None if self.bias is None else self.bias[...]
        convolve = per_shard(_convolve_part, axes, (rows, states))
        return convolve(x.astype(self.dtype), self.taps[...], bias, state, segment_ids)

    def init_state(self, batch_size: int) -> jax.Array:
        """Return the state before the first token."""
        return zeros((batch_size, self.width - 1, self.channels), self.dtype, "batch", None, "heads")

    def flops_per_token(self) -> float:
        """Return the FLOPs of the forward pass for one token."""
        return 2.0 * self.width * self.channels


def _convolve_part(
    x: jax.Array,
    taps: jax.Array,
    bias: jax.Array | None,
    state: jax.Array | None,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Convolve this device's part of the rows; `state` is the one before the whole rows, and so is the new one."""
    count = len(taps) - 1
    first = jnp.zeros((len(x), count, x.shape[2]), x.dtype) if state is None else state.astype(x.dtype)
    past, ids = sequence.tokens_before(x, count, first), None
    if segment_ids is not None:  # what is in the state belongs to the first token's document, whatever its id
        first_ids = jnp.broadcast_to(segment_ids[:, :1], (len(x), count))
        ids = jnp.concatenate([sequence.tokens_before(segment_ids, count, first_ids), segment_ids], axis=1)
    y, state = recomputed(_convolve)(past, x, taps, bias, ids)
    return y, sequence.last_part(state)


def _convolve(
    past: jax.Array, x: jax.Array, taps: jax.Array, bias: jax.Array | None, ids: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Convolve x [B, T, channels], given the `width - 1` tokens before it; return the last `width - 1` as well."""
    width, length = len(taps), x.shape[1]
    inputs = jnp.concatenate([past, x], axis=1)
    windows = [inputs[:, w : w + length] for w in range(width)]
    state = inputs[:, length:]
    if ids is not None:
        # Documents are told apart by the number of borders before them: ids may come back.
        borders = jnp.cumsum(ids[:, 1:] != ids[:, :-1], axis=1)
        document = jnp.pad(borders, ((0, 0), (1, 0)))
        own = document[:, width - 1 :, None]
        windows = [jnp.where(document[:, w : w + length, None] == own, x, 0) for w, x in enumerate(windows)]
        state = jnp.where(document[:, length:, None] == own[:, -1:], state, 0)
    taps = taps.astype(jnp.float32)
    y = sum(window.astype(jnp.float32) * tap for window, tap in zip(windows, taps, strict=True))
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return jax.nn.silu(y).astype(x.dtype), state
