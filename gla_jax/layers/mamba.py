"""The Mamba block (arXiv 2312.00752, section 3.4): short convolution, selective scan, gate."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from gla_jax.config import ConfigError
from gla_jax.layers.check import check_divides, check_one_of
from gla_jax.layers.linear import linear, linear_flops
from gla_jax.layers.short_convolution import ShortConvolution
from gla_jax.parallel import sequence
from gla_jax.parallel.sharding import axis_size, out_sharding, per_shard, share, zeros
from pallas_kernels.selective_scan import IMPLEMENTATIONS, selective_scan_step

State = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class MambaOptions:
    """What a Mamba block has beyond its size."""

    expand: float = 2.0
    """Inner channels E, as a multiple of the model dimension."""
    state_size: int = 16
    """Numbers in the state of each channel, N."""
    conv_size: int = 4
    """Tokens that the short convolution sees."""
    conv_bias: bool = True
    dt_rank: int | None = None
    """Rank of the map to the step sizes, R; None: a sixteenth of the model dimension, rounded up."""
    dt_min: float = 0.001
    """Least step size of a fresh layer, where the input says nothing."""
    dt_max: float = 0.1
    """Largest step size of a fresh layer, where the input says nothing."""
    implementation: str | tuple[str, ...] | None = None
    """Of `pallas_kernels.selective_scan`; None: the best there is."""
    chunk_size: int | None = None
    """Of `pallas_kernels.selective_scan`; None: the tuned one."""


class Mamba(nnx.Module):
    """A selective state space model between two linear maps, with a gate; it needs no MLP beside it.

        u = silu(convolve(Wu x))        r, B, C = Wr u, WB u, WC u        delta = softplus(Wd r + b)
        h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t        o_t = C_t h_t + D u_t
        y = Wo (o * silu(Wz x))

    with u, delta, o, D [E], B, C [N] and h, A [E, N]: the paper's algorithm 2, and its section 3.4 around it. D are the
    weights of the skip here, as in the paper, and not the model dimension.

    A, D, Wd, b and the convolution begin as in the authors' code: A = -(1 .. N) in every channel, D = 1, Wd uniform
    within R^-0.5, softplus(b) log-uniform in [dt_min, dt_max]; the other linear maps as everywhere here, normal.

    Args:
        hidden_size: model dimension D.
        num_heads: not used; a Mamba block has no heads.
        options: everything else; see `Mamba.Options`.
        norm_eps: not used.
        initializer_range: standard deviation of the linear maps.
        dtype: compute dtype.
        param_dtype: dtype that parameters are held in.
        rngs: source of randomness.

    Raises:
        ConfigError: sizes out of range, or an unknown name.
    """

    Options = MambaOptions

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        options: MambaOptions = MambaOptions(),
        *,
        norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.check(hidden_size, num_heads, options)
        self.options, self.dtype = options, dtype
        self.channels = round(hidden_size * options.expand)  # E
        self.rank = options.dt_rank or math.ceil(hidden_size / 16)

        weights = functools.partial(
            linear, initializer_range=initializer_range, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.input = weights(hidden_size, self.channels, ("embed", "heads"))
        self.gate = weights(hidden_size, self.channels, ("embed", "heads"))
        self.convolution = ShortConvolution(
            self.channels,
            options.conv_size,
            use_bias=options.conv_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.selection = weights(self.channels, self.rank + 2 * options.state_size, ("heads", None))
        self.step_size = weights(self.rank, self.channels, (None, "heads"))
        self.output = weights(self.channels, hidden_size, ("heads", "embed"))

        def uniform(bound: float, *shape: int) -> jax.Array:
            return jax.random.uniform(rngs.params(), shape, param_dtype, -bound, bound)

        self.convolution.taps[...] = uniform(options.conv_size**-0.5, options.conv_size, self.channels)
        if self.convolution.bias is not None:
            self.convolution.bias[...] = uniform(options.conv_size**-0.5, self.channels)
        self.step_size.kernel[...] = uniform(self.rank**-0.5, self.rank, self.channels)
        low, high = math.log(options.dt_min), math.log(options.dt_max)
        steps = jnp.exp(jax.random.uniform(rngs.params(), (self.channels,), jnp.float32, low, high))
        softplus_inverse = steps + jnp.log(-jnp.expm1(-steps))
        # Apart from its map, because it is added in float32: half precision would blur small steps.
        self.step_size_bias = nnx.Param(softplus_inverse.astype(param_dtype), axes=("heads",))
        log_numbers = jnp.log(jnp.arange(1, options.state_size + 1, dtype=jnp.float32))
        self.A_log = nnx.Param(jnp.tile(log_numbers, (self.channels, 1)).astype(param_dtype), axes=("heads", None))
        self.D = nnx.Param(jnp.ones(self.channels, param_dtype), axes=("heads",))

    def __call__(
        self,
        x: jax.Array,
        state: State | None = None,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, State]:
        """Mix x [B, T, D] along time.

        Args:
            x: inputs, any T >= 1.
            state: what an earlier call or `init_state` returned; None: zeros.
            segment_ids: [B, T] int32; see `gla_jax.layers`.
            positions: not used.

        Returns:
            y [B, T, D] in the compute dtype, and the state after the last token.
        """
        past: dict[str, Any] = {} if state is None else state
        x = share(x, "heads", "batch", "time", None)
        wide = out_sharding("batch", "time", "heads")
        u, convolution = self.convolution(
            self.input(x, out_sharding=wide), past.get("convolution"), segment_ids=segment_ids
        )
        selection = self.selection(u, out_sharding=out_sharding("batch", "time", None))
        low_rank, B, C = jnp.split(selection, [self.rank, self.rank + self.options.state_size], axis=-1)
        delta = self.step_size(share(low_rank, "heads", "batch", "time", None), out_sharding=wide)
        gate = self.gate(x, out_sharding=wide)
        out, recurrent = self._scan(u, delta, B, C, gate, past.get("recurrent"), segment_ids)
        y = self.output(out, out_sharding=out_sharding("batch", "time", "hidden"))
        return y, {"convolution": convolution, "recurrent": recurrent}

    def _scan(
        self,
        u: jax.Array,
        delta: jax.Array,
        B: jax.Array,
        C: jax.Array,
        gate: jax.Array,
        state: jax.Array | None,
        segment_ids: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Run the recurrence, gate included: one step of it for one token, else the parallel form."""

        def scan(u, delta, bias, A_log, B, C, D, gate, state, segment_ids):
            A = -jnp.exp(A_log.astype(jnp.float32))
            if u.shape[1] == 1 and state is not None:  # a single token always continues from the state
                token = (u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], D, state)
                y, state = selective_scan_step(*token, gate=gate[:, 0], delta_bias=bias)
                return y[:, None], state
            return sequence.selective_scan(
                u,
                delta,
                A,
                B,
                C,
                D,
                gate=gate,
                delta_bias=bias,
                initial_state=state,
                segment_ids=segment_ids,
                chunk_size=self.options.chunk_size,
                implementation=self.options.implementation,
            )

        rows, row, all_channels = ("batch", "time", "heads"), ("batch", "time"), ("batch", "time", None)
        channels, states = ("heads",), ("batch", "heads", None)
        axes = (rows, rows, channels, ("heads", None), all_channels, all_channels, channels, rows, states, row)
        return per_shard(scan, axes, (rows, states))(
            u, delta, self.step_size_bias[...], self.A_log[...], B, C, self.D[...], gate, state, segment_ids
        )

    def init_state(self, batch_size: int) -> State:
        """Return the state before the first token: zeros.

        "convolution" [B, width - 1, E] in the compute dtype, "recurrent" [B, E, N] float32.
        """
        shape = (batch_size, self.channels, self.options.state_size)
        return {
            "convolution": self.convolution.init_state(batch_size),
            "recurrent": zeros(shape, jnp.float32, "batch", "heads", None),
        }

    def flops_per_token(self, context_length: int) -> float:
        """Return the FLOPs of the forward pass for one token: linear maps, convolution, and the recurrence itself.

        The recurrence is counted as six operations per number of the state (the exponent, decay, write and read), the
        exponential itself as none; the context length does not matter.
        """
        maps = (self.input, self.gate, self.selection, self.step_size, self.output)
        return linear_flops(*maps) + self.convolution.flops_per_token() + 6.0 * self.channels * self.options.state_size

    @staticmethod
    def check(hidden_size: int, num_heads: int, options: MambaOptions) -> None:
        """Raise ConfigError, in one sentence, if no layer can be made of these on the current mesh."""
        section = "model.mixers.mamba"
        channels = round(hidden_size * options.expand)
        if channels < 1:
            raise ConfigError(f"{section}.expand={options.expand} leaves no channels; it must be above 0.")
        check_divides("mesh.tensor", axis_size("heads"), f"model.hidden_size*{section}.expand", channels)
        for field in ("state_size", "conv_size", "dt_rank", "chunk_size"):
            value = getattr(options, field)
            if value is not None and value < 1:
                raise ConfigError(f"{section}.{field}={value} must be at least 1.")
        if not 0 < options.dt_min <= options.dt_max:
            raise ConfigError(
                f"{section}.dt_min={options.dt_min} must be above 0 and at most {section}.dt_max={options.dt_max}."
            )
        implementations = (
            options.implementation if isinstance(options.implementation, tuple) else (options.implementation,)
        )
        for implementation in implementations:
            check_one_of(f"{section}.implementation", implementation, (None, *IMPLEMENTATIONS))
