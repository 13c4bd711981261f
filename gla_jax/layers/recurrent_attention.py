"""What GLA, RetNet and linear attention share: heads, the recurrence, the norm and the gate of what it returns."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from gla_jax.config import ConfigError
from gla_jax.layers.activation import ACTIVATIONS
from gla_jax.layers.check import check_divides, check_one_of
from gla_jax.layers.linear import apply_each, linear, linear_flops
from gla_jax.layers.norm import RMSNorm
from gla_jax.layers.recompute import recomputed
from gla_jax.layers.rotary import continue_positions, rotate
from gla_jax.layers.short_convolution import ShortConvolution
from gla_jax.parallel import sequence
from gla_jax.parallel.sharding import axis_size, out_sharding, per_shard, share, zeros
from pallas_kernels.gated_linear_attention import IMPLEMENTATIONS, gated_linear_attention_step

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RecurrentAttentionOptions:
    """What every such layer has beyond its size."""

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
    output_gate_bias: bool = False
    """Add a bias to the output gate, as the paper's own code does."""
    gate_fn: str = "swish"
    """Function of the output gate."""
    elementwise_affine: bool = True
    """Give the norm of the heads' outputs a learned scale, one for all heads."""
    implementation: str | tuple[str, ...] | None = None
    """Of `pallas_kernels.gated_linear_attention`; None: the best there is."""
    chunk_size: int | None = None
    """Of `pallas_kernels.gated_linear_attention`; None: the tuned one."""


class RecurrentAttention(nnx.Module):
    """A linear recurrence over heads; a subclass says how the state forgets.

        q, k, v = Wq x, Wk x, Wv x
        S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = K^-0.5 S_t^T q_t
        y = Wo (RMSNorm(o) * swish(Wg x))

    Args:
        hidden_size: model dimension D.
        num_heads: query heads H.
        options: everything else; see `Options` of the layer.
        norm_eps: epsilon of the norm of the heads' outputs.
        initializer_range: standard deviation of all weights.
        dtype: compute dtype.
        param_dtype: dtype that parameters are held in.
        rngs: source of randomness.

    Raises:
        ConfigError: sizes that do not divide, or an unknown name.
    """

    Options: ClassVar[type] = RecurrentAttentionOptions
    section: ClassVar[str]
    """Where the options are in a config, for messages."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        options: Any = None,
        *,
        norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = self.Options() if options is None else options
        self.check(hidden_size, num_heads, options)
        self.options, self.dtype = options, dtype
        self.num_heads, self.num_kv_heads = num_heads, options.num_kv_heads or num_heads
        self.key_size = round(hidden_size * options.expand_k) // num_heads  # K
        self.value_size = round(hidden_size * options.expand_v) // num_heads  # V
        keys, values = self.num_kv_heads * self.key_size, self.num_kv_heads * self.value_size

        weights = functools.partial(
            linear, initializer_range=initializer_range, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.query = weights(hidden_size, num_heads * self.key_size, ("embed", "heads"))
        self.key = weights(hidden_size, keys, ("embed", "heads"))
        self.value = weights(hidden_size, values, ("embed", "heads"))
        self._make_forget_gate(hidden_size, weights)
        self.output_gate = nnx.data(None)
        if options.use_output_gate:
            self.output_gate = weights(
                hidden_size, num_heads * self.value_size, ("embed", "heads"), use_bias=options.output_gate_bias
            )
        self.output = weights(num_heads * self.value_size, hidden_size, ("heads", "embed"))
        self.output_norm = RMSNorm(
            self.value_size,
            epsilon=norm_eps,
            use_scale=options.elementwise_affine,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        widths = {"query": num_heads * self.key_size, "key": keys, "value": values} if options.use_short_conv else {}
        self.convolutions = nnx.Dict(
            {
                name: ShortConvolution(
                    width,
                    options.conv_size,
                    use_bias=options.conv_bias,
                    initializer_range=initializer_range,
                    dtype=dtype,
                    param_dtype=param_dtype,
                    rngs=rngs,
                )
                for name, width in widths.items()
            }
        )

    # What a subclass says ---------------------------------------------------------------------------------------------

    def _make_forget_gate(self, hidden_size: int, weights: Callable[..., nnx.Linear]) -> None:
        """Make the parameters of the forget gate, if it has any."""

    def _forget_gate(self, x: jax.Array) -> jax.Array | None:
        """Return g <= 0 for inputs x [B, T, D], broadcastable to [B, T, H_kv, K]; None: the state does not forget."""
        raise NotImplementedError

    def _forget_gate_maps(self) -> tuple[nnx.Linear, ...]:
        """Return the linear maps of the forget gate."""
        return ()

    @property
    def _rotary_base(self) -> float | None:
        """Base of the rotary positions of query and key; None: there are none."""
        return None

    # The layer --------------------------------------------------------------------------------------------------------

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
            positions: [B, T] int32, for layers with rotary positions; None: counted on from the state.

        Returns:
            y [B, T, D] in the compute dtype, and the state after the last token.
        """
        log_decay = self._forget_gate(x)
        x = share(x, "heads", "batch", "time", None)
        wide = out_sharding("batch", "time", "heads")
        maps = {"query": self.query, "key": self.key, "value": self.value}
        if self.output_gate is not None:
            maps["gate"] = self.output_gate
        projected = dict(zip(maps, apply_each(x, *maps.values(), out_sharding=wide), strict=True))
        convolutions = {}
        for name, convolution in self.convolutions.items():
            past = None if state is None else state["convolutions"][name]
            projected[name], convolutions[name] = convolution(projected[name], past, segment_ids=segment_ids)
        query, key, value = projected["query"], projected["key"], projected["value"]
        if self.options.feature_map is not None:
            query, key = (ACTIVATIONS[self.options.feature_map](x) for x in (query, key))

        heads = lambda x, count: x.reshape(*x.shape[:2], count, -1)
        query, key, value = heads(query, self.num_heads), heads(key, self.num_kv_heads), heads(value, self.num_kv_heads)
        out, state = self._recur(query, key, value, log_decay, state, segment_ids, positions)

        out = recomputed(self._gated_norm)(out, projected.get("gate"))
        y = self.output(out, out_sharding=out_sharding("batch", "time", "hidden"))
        return y, state | ({"convolutions": convolutions} if convolutions else {})

    def _gated_norm(self, out: jax.Array, gate: jax.Array | None) -> jax.Array:
        """Normalise what each head returned, [B, T, H, V], and gate it: [B, T, H V]."""
        out = self.output_norm(out.astype(jnp.float32)).reshape(*out.shape[:2], -1)
        if gate is not None:
            out = out * ACTIVATIONS[self.options.gate_fn](gate.astype(jnp.float32))
        return out.astype(self.dtype)

    def _recur(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        log_decay: jax.Array | None,
        state: State | None,
        segment_ids: jax.Array | None,
        positions: jax.Array | None,
    ) -> tuple[jax.Array, State]:
        """Run the recurrence: one step of it for one token, else the parallel form."""

        def recur(query, key, value, log_decay, state, segment_ids, positions, next_position):
            next_state = {}
            if self._rotary_base is not None:
                positions, next_state["position"] = continue_positions(query, positions, next_position)
                query, key = (rotate(x, positions, self._rotary_base) for x in (query, key))
            if query.shape[1] == 1 and state is not None:  # a single token always continues from the state
                gate = None if log_decay is None else log_decay[:, 0]
                out, state = gated_linear_attention_step(query[:, 0], key[:, 0], value[:, 0], gate, state)
                return out[:, None], next_state | {"recurrent": state}
            out, state = sequence.gated_linear_attention(
                query,
                key,
                value,
                log_decay,
                initial_state=state,
                segment_ids=segment_ids,
                chunk_size=self.options.chunk_size,
                implementation=self.options.implementation,
            )
            return out, next_state | {"recurrent": state}

        rows, row = ("batch", "time", "heads", None), ("batch", "time")
        gates: tuple[str | None, ...] = ()
        if log_decay is not None:  # where a gate is the same for all, it is whole on all devices
            gates = tuple(name if size > 1 else None for name, size in zip(rows, log_decay.shape, strict=True))
        states = self._state_axes()
        past = {} if state is None else state
        return per_shard(recur, (rows, rows, rows, gates, states["recurrent"], row, row, ("batch",)), (rows, states))(
            query, key, value, log_decay, past.get("recurrent"), segment_ids, positions, past.get("position")
        )

    def _state_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Return the logical axes of the state's arrays, without those of convolutions."""
        axes: dict[str, tuple[str | None, ...]] = {"recurrent": ("batch", "heads", None, None)}
        return axes if self._rotary_base is None else axes | {"position": ("batch",)}

    def init_state(self, batch_size: int) -> State:
        """Return the state before the first token of `batch_size` rows: {"recurrent": zeros [B, H, K, V] float32}.

        With rotary positions also {"position": [B] int32}, the next one; with short convolutions
        {"convolutions": {"query", "key", "value"}}, each [B, width - 1, channels].
        """
        shape = (batch_size, self.num_heads, self.key_size, self.value_size)
        axes = self._state_axes()
        state: State = {"recurrent": zeros(shape, jnp.float32, *axes["recurrent"])}
        if "position" in axes:
            state["position"] = zeros((batch_size,), jnp.int32, *axes["position"])
        if self.convolutions:
            state["convolutions"] = {name: layer.init_state(batch_size) for name, layer in self.convolutions.items()}
        return state

    def flops_per_token(self, context_length: int) -> float:
        """Return the FLOPs of the forward pass for one token: every linear map, and the recurrence itself.

        The recurrence is counted as writing k v^T and reading S^T q, 4 K V per head, whatever the implementation
        computes beyond that; so the context length does not matter.
        """
        maps = (self.query, self.key, self.value, *self._forget_gate_maps(), self.output_gate, self.output)
        flops = linear_flops(*maps) + 4.0 * self.num_heads * self.key_size * self.value_size
        return flops + sum(layer.flops_per_token() for layer in self.convolutions.values())

    @classmethod
    def check(cls, hidden_size: int, num_heads: int, options: Any) -> None:
        """Raise ConfigError, in one sentence, if no layer can be made of these on the current mesh."""
        widths = {name: round(hidden_size * getattr(options, name)) for name in ("expand_k", "expand_v")}
        for name, width in widths.items():
            if width < 1:
                raise ConfigError(
                    f"{cls.section}.{name}={getattr(options, name)} leaves heads without width; it must be above 0."
                )
            check_divides("model.num_heads", num_heads, f"model.hidden_size*{name}", width, math.gcd(*widths.values()))
        kv_heads, kv_name = num_heads, "model.num_heads"
        if options.num_kv_heads is not None:
            kv_heads, kv_name = options.num_kv_heads, f"{cls.section}.num_kv_heads"
            check_divides(kv_name, kv_heads, "model.num_heads", num_heads)
        check_divides("mesh.tensor", axis_size("heads"), kv_name, kv_heads)
        check_one_of(f"{cls.section}.feature_map", options.feature_map, (None, *ACTIVATIONS))
        check_one_of(f"{cls.section}.gate_fn", options.gate_fn, tuple(ACTIVATIONS))
        implementations = (
            options.implementation if isinstance(options.implementation, tuple) else (options.implementation,)
        )
        for implementation in implementations:
            check_one_of(f"{cls.section}.implementation", implementation, (None, *IMPLEMENTATIONS))
        for field in ("conv_size", "chunk_size"):
            value = getattr(options, field)
            if value is not None and value < 1:
                raise ConfigError(f"{cls.section}.{field}={value} must be at least 1.")
