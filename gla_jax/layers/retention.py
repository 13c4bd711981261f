"""Retention, the mixer of RetNet (arXiv 2307.08621), with the semantics of flash-linear-attention."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from gla_jax.config import ConfigError
from gla_jax.layers.recurrent_attention import RecurrentAttention, RecurrentAttentionOptions


@dataclasses.dataclass(frozen=True)
class RetentionOptions(RecurrentAttentionOptions):
    """What a retention layer has beyond its size."""

    expand_k: float = 1.0
    """Size of all keys together, as a multiple of the model dimension."""
    expand_v: float = 2.0
    """Size of all values together, as a multiple of the model dimension."""
    rotary_base: float = 10_000.0
    """Base of the rotary frequencies of query and key."""


class Retention(RecurrentAttention):
    """Linear attention with rotary positions and a constant decay per head, g_h = log(1 - 2^(-5 - h)), h = 0 .. H - 1.

    See `RecurrentAttention` for the rest.
    """

    Options: ClassVar[type] = RetentionOptions
    section = "model.mixers.retention"

    def _forget_gate(self, x: jax.Array) -> jax.Array:
        """Return the constant g [1, 1, H, 1] float32."""
        return jnp.asarray(np.log1p(-(2.0 ** (-5.0 - np.arange(self.num_heads)))), jnp.float32).reshape(1, 1, -1, 1)

    @property
    def _rotary_base(self) -> float | None:
        return self.options.rotary_base

    @classmethod
    def check(cls, hidden_size: int, num_heads: int, options: Any) -> None:
        """Raise ConfigError, in one sentence, if no layer can be made of these on the current mesh."""
        super().check(hidden_size, num_heads, options)
        if round(hidden_size * options.expand_k) // num_heads % 2:
            raise ConfigError(
                f"model.num_heads={num_heads} makes keys of {round(hidden_size * options.expand_k) // num_heads} "
                "channels, which rotary positions turn in pairs; choose one that makes their number even."
            )
        if options.rotary_base <= 0:
            raise ConfigError(f"{cls.section}.rotary_base={options.rotary_base} must be above 0.")
