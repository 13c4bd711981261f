"""A short causal convolution along time, channel by channel, with a state for decoding."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from gla_jax.layers.recompute import recomputed
from gla_jax.parallel.sharding import per_shard, shard, zeros


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
        rows, channels = ("batch", None, "heads"), ("heads",)  # taps slide along time: a device needs whole rows
        convolve = per_shard(
            recomputed(_convolve), (rows, (None, *channels), channels, rows, ("batch", None)), (rows, rows)
        )
        bias = None if self.bias is None else self.bias[...]
        y, state = convolve(x.astype(self.dtype), self.taps[...], bias, state, segment_ids)
        return shard(y, "batch", "time", "heads"), state

    def init_state(self, batch_size: int) -> jax.Array:
        """Return the state before the first token."""
        return zeros((batch_size, self.width - 1, self.channels), self.dtype, "batch", None, "heads")

    def flops_per_token(self) -> float:
        """Return the FLOPs of the forward pass for one token."""
        return 2.0 * self.width * self.channels


def _convolve(
    x: jax.Array,
    taps: jax.Array,
    bias: jax.Array | None,
    state: jax.Array | None,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    batch_size, length, channels = x.shape
    width = len(taps)
    past = jnp.zeros((batch_size, width - 1, channels), x.dtype) if state is None else state.astype(x.dtype)
    inputs = jnp.concatenate([past, x], axis=1)
    windows = [inputs[:, w : w + length] for w in range(width)]
    state = inputs[:, length:]
    if segment_ids is not None:
        # Documents are told apart by the number of borders before them: ids may come back, and what is in the state
        # belongs to the first token's document whatever its id.
        borders = jnp.cumsum(segment_ids[:, 1:] != segment_ids[:, :-1], axis=1)
        document = jnp.pad(borders, ((0, 0), (width, 0)))  # of every input, past ones included
        own = document[:, width - 1 :, None]
        windows = [jnp.where(document[:, w : w + length, None] == own, x, 0) for w, x in enumerate(windows)]
        state = jnp.where(document[:, length:, None] == own[:, -1:], state, 0)
    taps = taps.astype(jnp.float32)
    y = sum(window.astype(jnp.float32) * tap for window, tap in zip(windows, taps, strict=True))
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return jax.nn.silu(y).astype(x.dtype), state
