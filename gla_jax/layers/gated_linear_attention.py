"""The GLA layer (arXiv 2312.06635, section 4.4), with the options of the authors' flash-linear-attention."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gla_jax.config import ConfigError
from gla_jax.layers.activation import ACTIVATIONS
from gla_jax.layers.linear import linear, linear_flops
from gla_jax.layers.norm import RMSNorm
from gla_jax.layers.short_convolution import ShortConvolution
from gla_jax.parallel.sharding import axis_size, out_sharding, per_shard, shard, zeros
from pallas_kernels import gated_linear_attention, gated_linear_attention_step

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class GatedLinearAttentionOptions:
    """What a GLA layer has beyond its size."""

    expand_k: float = 0.5
    """Size of all keys together, as a multiple of the model dimension."""
    expand_v: float = 1.0
    """Size of all values together, as a multiple of the model dimension."""
    num_kv_heads: int | None = None
    """Heads of key, value and gate, each shared by as many query heads; None: as many as query heads."""
    feature_map: str | None = None
    """Function of query and key, e.g. "relu"; None: the identity."""
    use_short_conv: bool = False
    """Convolve query, key and value along time first."""
    conv_size: int = 4
    conv_bias: bool = False
    use_output_gate: bool = True
    gate_fn: str = "swish"
    """Function of the output gate."""
    elementwise_affine: bool = True
    """Give the norm of the heads' outputs a learned scale, one for all heads."""
    gate_logit_normalizer: float = 16.0
    """The forget gate is sigmoid(z) to the power of 1/this."""
    gate_low_rank_dim: int = 16
    """Rank of the map from x to the forget gate's logits z."""
    clamp_min: float | None = None
    """Least log forget gate; None: unbounded."""
    implementation: str | tuple[str, ...] | None = None
    """Of `pallas_kernels.gated_linear_attention`; None: the best there is."""
    chunk_size: int | None = None
    """Of `pallas_kernels.gated_linear_attention`; None: the tuned one."""


class GatedLinearAttention(nnx.Module):
    """Gated Linear Attention with a data-dependent forget gate for every key channel.

        q, k, v = Wq x, Wk x, Wv x        g = log sigmoid(W2 W1 x + b) / 16
        S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = K^-0.5 S_t^T q_t
        y = Wo (RMSNorm(o) * swish(Wg x))

    Args:
        hidden_size: model dimension D.
        num_heads: query heads H.
        options: everything else; see `GatedLinearAttention.Options`.
        norm_eps: epsilon of the norm of the heads' outputs.
        initializer_range: standard deviation of all weights.
        dtype: compute dtype.
        param_dtype: dtype that parameters are held in.
        rngs: source of randomness.

    Raises:
        ConfigError: sizes that do not divide, or an unknown name.
    """

    Options = GatedLinearAttentionOptions

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        options: GatedLinearAttentionOptions = GatedLinearAttentionOptions(),
        *,
        norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.check(hidden_size, num_heads, options)
        self.options, self.dtype = options, dtype
        self.num_heads, self.num_kv_heads = num_heads, options.num_kv_heads or num_heads
        self.key_size = round(hidden_size * options.expand_k) // num_heads  # K
        self.value_size = round(hidden_size * options.expand_v) // num_heads  # V
        keys, values = self.num_kv_heads * self.key_size, self.num_kv_heads * self.value_size

        common = dict(initializer_range=initializer_range, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        into_heads, rank = ("embed", "heads"), options.gate_low_rank_dim
        self.query = linear(hidden_size, num_heads * self.key_size, into_heads, **common)
        self.key = linear(hidden_size, keys, into_heads, **common)
        self.value = linear(hidden_size, values, into_heads, **common)
        self.forget_gate_down = linear(hidden_size, rank, ("embed", None), **common)
        self.forget_gate_up = linear(rank, keys, (None, "heads"), use_bias=True, **common)
        self.output_gate = nnx.data(None)
        if options.use_output_gate:
            self.output_gate = linear(hidden_size, num_heads * self.value_size, into_heads, **common)
        self.output = linear(num_heads * self.value_size, hidden_size, ("heads", "embed"), **common)
        self.output_norm = RMSNorm(
            self.value_size,
            epsilon=norm_eps,
            use_scale=options.elementwise_affine,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.query_convolution = self.key_convolution = self.value_convolution = nnx.data(None)
        if options.use_short_conv:
            convolution = lambda channels: ShortConvolution(
                channels, options.conv_size, use_bias=options.conv_bias, **common
            )
            self.query_convolution = convolution(num_heads * self.key_size)
            self.key_convolution = convolution(keys)
            self.value_convolution = convolution(values)

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
        wide = out_sharding("batch", "time", "heads")
        query, key, value = (project(x, out_sharding=wide) for project in (self.query, self.key, self.value))
        convolutions = {}
        if self.options.use_short_conv:
            past = {} if state is None else state["convolution"]
            convolve = lambda layer, x, name: layer(x, past.get(name), segment_ids=segment_ids)
            query, convolutions["query"] = convolve(self.query_convolution, query, "query")
            key, convolutions["key"] = convolve(self.key_convolution, key, "key")
            value, convolutions["value"] = convolve(self.value_convolution, value, "value")

        low_rank = self.forget_gate_down(x, out_sharding=out_sharding("batch", "time", None))
        log_decay = self._log_decay(self.forget_gate_up(low_rank, out_sharding=wide))
        if self.options.feature_map is not None:
            query, key = (ACTIVATIONS[self.options.feature_map](x) for x in (query, key))

        heads = lambda x, count: x.reshape(*x.shape[:2], count, -1)
        query = heads(query, self.num_heads)
        key, value, log_decay = (heads(x, self.num_kv_heads) for x in (key, value, log_decay))
        out, recurrent = self._attend(
            query, key, value, log_decay, None if state is None else state["recurrent"], segment_ids
        )

        out = self.output_norm(out.astype(jnp.float32))
        out = shard(out, "batch", "time", "heads", None).reshape(*x.shape[:2], -1)
        if self.output_gate is not None:
            gate = self.output_gate(x, out_sharding=wide)
            out = out * ACTIVATIONS[self.options.gate_fn](gate.astype(jnp.float32))
        y = self.output(out.astype(self.dtype), out_sharding=out_sharding("batch", "time", "hidden"))
        return y, {"recurrent": recurrent} | ({"convolution": convolutions} if convolutions else {})

    def _log_decay(self, logits: jax.Array) -> jax.Array:
        """Return g <= 0 in the compute dtype, which halves what the kernels read; the logarithm itself in float32."""
        log_decay = jax.nn.log_sigmoid(logits.astype(jnp.float32)) / self.options.gate_logit_normalizer
        if self.options.clamp_min is not None:
            log_decay = jnp.maximum(log_decay, self.options.clamp_min)
        return log_decay.astype(self.dtype)

    def _attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        log_decay: jax.Array,
        state: jax.Array | None,
        segment_ids: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Run the recurrence: one step of it for one token, else the parallel form."""

        def attend(query, key, value, log_decay, state, segment_ids):
            if query.shape[1] == 1 and state is not None:  # a single token always continues from the state
                out, state = gated_linear_attention_step(query[:, 0], key[:, 0], value[:, 0], log_decay[:, 0], state)
                return out[:, None], state
            return gated_linear_attention(
                query,
                key,
                value,
                log_decay,
                initial_state=state,
                segment_ids=segment_ids,
                chunk_size=self.options.chunk_size,
                implementation=self.options.implementation,
            )

        # The recurrence runs along time, so each device needs whole rows.
        rows, states = ("batch", None, "heads", None), ("batch", "heads", None, None)
        return per_shard(attend, (rows, rows, rows, rows, states, ("batch", None)), (rows, states))(
            query, key, value, log_decay, state, segment_ids
        )

    def init_state(self, batch_size: int) -> State:
        """Return the state before the first token of `batch_size` rows: {"recurrent": zeros [B, H, K, V] float32}.

        With short convolutions also {"convolution": {"query", "key", "value"}}, each [B, width - 1, channels].
        """
        shape = (batch_size, self.num_heads, self.key_size, self.value_size)
        state: State = {"recurrent": zeros(shape, jnp.float32, "batch", "heads", None, None)}
        if self.options.use_short_conv:
            state["convolution"] = {
                "query": self.query_convolution.init_state(batch_size),
                "key": self.key_convolution.init_state(batch_size),
                "value": self.value_convolution.init_state(batch_size),
            }
        return state

    def flops_per_token(self, context_length: int) -> float:
        """Return the FLOPs of the forward pass for one token: every linear map, and the recurrence itself.

        The recurrence is counted as writing k v^T and reading S^T q, 4 K V per head, whatever the implementation
        computes beyond that; so the context length does not matter.
        """
        maps = (self.query, self.key, self.value, self.forget_gate_down, self.forget_gate_up, self.output)
        flops = linear_flops(*maps, self.output_gate) + 4.0 * self.num_heads * self.key_size * self.value_size
        convolutions = (self.query_convolution, self.key_convolution, self.value_convolution)
        return flops + sum(layer.flops_per_token() for layer in convolutions if layer is not None)

    @staticmethod
    def check(hidden_size: int, num_heads: int, options: GatedLinearAttentionOptions) -> None:
        """Raise ConfigError, in one sentence, if a layer cannot be made of these."""
        for name in ("expand_k", "expand_v"):
            width = round(hidden_size * getattr(options, name))
            if num_heads < 1 or width < 1 or width % num_heads:
                _raise_heads(num_heads, hidden_size, options, f"model.hidden_size*{name}={width}")
        kv_heads = options.num_kv_heads
        if kv_heads is not None and (kv_heads < 1 or num_heads % kv_heads):
            raise ConfigError(
                f"model.mixers.gla.num_kv_heads={kv_heads} does not divide model.num_heads={num_heads}; "
                f"try {_nearest_divisors(kv_heads, num_heads)}"
            )
        if (kv_heads or num_heads) % axis_size("heads"):
            name = "model.num_heads" if kv_heads is None else "model.mixers.gla.num_kv_heads"
            raise ConfigError(
                f"mesh.tensor={axis_size('heads')} does not divide {name}={kv_heads or num_heads}; "
                f"try {_nearest_divisors(axis_size('heads'), kv_heads or num_heads)}"
            )
        for field in ("feature_map", "gate_fn"):
            name = getattr(options, field)
            if name not in ACTIVATIONS and not (name is None and field == "feature_map"):
                raise ConfigError(f"model.mixers.gla.{field}={name!r} is unknown; try one of {', '.join(ACTIVATIONS)}")
        for field, least in (("conv_size", 1), ("gate_low_rank_dim", 1)):
            if getattr(options, field) < least:
                raise ConfigError(f"model.mixers.gla.{field}={getattr(options, field)} must be at least {least}")
        if options.gate_logit_normalizer <= 0:
            raise ConfigError(f"model.mixers.gla.gate_logit_normalizer={options.gate_logit_normalizer} must be above 0")
        if options.clamp_min is not None and options.clamp_min > 0:
            raise ConfigError(
                f"model.mixers.gla.clamp_min={options.clamp_min} must be at most 0: it bounds a logarithm"
            )


def _raise_heads(num_heads: int, hidden_size: int, options: GatedLinearAttentionOptions, what: str) -> None:
    both = math.gcd(round(hidden_size * options.expand_k), round(hidden_size * options.expand_v))
    raise ConfigError(f"model.num_heads={num_heads} does not divide {what}; try {_nearest_divisors(num_heads, both)}")


def _nearest_divisors(wanted: int, number: int) -> str:
    divisors: Sequence[int] = [d for d in range(1, number + 1) if number % d == 0]
    near = [
        max((d for d in divisors if d < wanted), default=None),
        min((d for d in divisors if d > wanted), default=None),
    ]
    return " or ".join(str(d) for d in near if d is not None)
