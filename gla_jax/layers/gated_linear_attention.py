"""The GLA layer (arXiv 2312.06635, section 4.4), with the options of the authors' flash-linear-attention."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gla_jax.config import ConfigError
from gla_jax.layers.recompute import recomputed_afresh
from gla_jax.layers.recurrent_attention import RecurrentAttention, RecurrentAttentionOptions
from gla_jax.parallel.sharding import out_sharding, share


@dataclasses.dataclass(frozen=True)
class GatedLinearAttentionOptions(RecurrentAttentionOptions):
    """What a GLA layer has beyond its size."""

    gate_logit_normalizer: float = 16.0
    """The forget gate is sigmoid(z) to the power of 1/this."""
    longest_half_life: float | None = None
    """Tokens in which the channels of a new layer forget half of their state, where x says nothing: in each head from 1
    to this many, evenly in logarithms. None: `gate_logit_normalizer` tokens in all, as in the paper."""
    half_life_skew: float = 1.0
    """Above 1 fewer channels forget fast: channel i of K forgets half in longest ** ((i / (K - 1)) ** (1 / this))."""
    gate_low_rank_dim: int = 16
    """Rank of the map from x to the forget gate's logits z."""
    clamp_min: float | None = None
    """Least log forget gate; None: unbounded."""


class GatedLinearAttention(RecurrentAttention):
    """Gated Linear Attention: a data-dependent forget gate for every key channel, g = log sigmoid(W2 W1 x + b) / 16.

    See `RecurrentAttention` for the rest.
    """

    Options: ClassVar[type] = GatedLinearAttentionOptions
    section = "model.mixers.gla"

    def _make_forget_gate(self, hidden_size: int, weights: Callable[..., nnx.Linear]) -> None:
        rank = self.options.gate_low_rank_dim
        self.forget_gate_down = weights(hidden_size, rank, ("embed", None))
        self.forget_gate_up = weights(rank, self.num_kv_heads * self.key_size, (None, "heads"), use_bias=True)
        bias = self.forget_gate_up.bias
        if self.options.longest_half_life is not None and bias is not None:
            exponents = np.linspace(0, 1, self.key_size) ** (1 / self.options.half_life_skew)
            half_lives = self.options.longest_half_life**exponents
            decay = self.options.gate_logit_normalizer * np.log(2) / half_lives  # -log sigmoid(bias)
            bias[...] = jnp.asarray(np.tile(-decay - np.log(-np.expm1(-decay)), self.num_kv_heads), bias.dtype)

    def _forget_gate(self, x: jax.Array) -> jax.Array:
        """Return g [B, T, H_kv, K] in the compute dtype."""
        low_rank = self.forget_gate_down(x, out_sharding=out_sharding("batch", "time", None))
        low_rank = share(low_rank, "heads", "batch", "time", None)
        logits = self.forget_gate_up(low_rank, out_sharding=out_sharding("batch", "time", "heads"))
        return recomputed_afresh(self._log_decay)(logits).reshape(*x.shape[:2], self.num_kv_heads, self.key_size)

    def _log_decay(self, logits: jax.Array) -> jax.Array:
        """Return g <= 0 in the compute dtype, which halves what the kernels read; the logarithm itself in float32."""
        log_decay = jax.nn.log_sigmoid(logits.astype(jnp.float32)) / self.options.gate_logit_normalizer
        if self.options.clamp_min is not None:
            log_decay = jnp.maximum(log_decay, self.options.clamp_min)
        return log_decay.astype(self.dtype)

    def _forget_gate_maps(self) -> tuple[nnx.Linear, ...]:
        return (self.forget_gate_down, self.forget_gate_up)

    @classmethod
    def check(cls, hidden_size: int, num_heads: int, options: Any) -> None:
        """Raise ConfigError, in one sentence, if no layer can be made of these on the current mesh."""
        super().check(hidden_size, num_heads, options)
        if options.gate_low_rank_dim < 1:
            raise ConfigError(f"{cls.section}.gate_low_rank_dim={options.gate_low_rank_dim} must be at least 1.")
        if options.gate_logit_normalizer <= 0:
            raise ConfigError(f"{cls.section}.gate_logit_normalizer={options.gate_logit_normalizer} must be above 0.")
        if options.longest_half_life is not None and options.longest_half_life < 1:
            raise ConfigError(
                f"{cls.section}.longest_half_life={options.longest_half_life} must be at least 1, the shortest."
            )
        if options.half_life_skew <= 0:
            raise ConfigError(f"{cls.section}.half_life_skew={options.half_life_skew} must be above 0.")
        if options.clamp_min is not None and options.clamp_min > 0:
            raise ConfigError(f"{cls.section}.clamp_min={options.clamp_min} must be at most 0: it bounds a logarithm.")
