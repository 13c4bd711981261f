"""Linear attention without a forget gate, or with one scalar per head (arXiv 2312.06635, sections 3 and 5.3)."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from gla_jax.config import ConfigError
from gla_jax.layers.check import check_one_of
from gla_jax.layers.recurrent_attention import RecurrentAttention, RecurrentAttentionOptions
from gla_jax.parallel.sharding import out_sharding


@dataclasses.dataclass(frozen=True)
class LinearAttentionOptions(RecurrentAttentionOptions):
    """What a linear attention layer has beyond its size."""

    gate: str = "none"
    """"none", or "scalar": a forget gate that depends on the data, one number per head and token."""
    gate_logit_normalizer: float = 16.0
    """The scalar gate is sigmoid(z) to the power of 1/this."""


class LinearAttention(RecurrentAttention):
    """Linear attention, S_t = S_{t-1} + k_t v_t^T, or with a scalar gate, g = log sigmoid(Wz x + b) / 16.

    See `RecurrentAttention` for the rest.
    """

    Options: ClassVar[type] = LinearAttentionOptions
    section = "model.mixers.linear_attention"

    def _make_forget_gate(self, hidden_size: int, weights: Callable[..., nnx.Linear]) -> None:
        self.forget_gate = nnx.data(None)
        if self.options.gate == "scalar":
            self.forget_gate = weights(hidden_size, self.num_kv_heads, ("embed", "heads"), use_bias=True)

    def _forget_gate(self, x: jax.Array) -> jax.Array | None:
        """Return g [B, T, H_kv, 1] float32, or None."""
        if self.forget_gate is None:
            return None
        logits = self.forget_gate(x, out_sharding=out_sharding("batch", "time", "heads"))
        return (jax.nn.log_sigmoid(logits.astype(jnp.float32)) / self.options.gate_logit_normalizer)[..., None]

    def _forget_gate_maps(self) -> tuple[nnx.Linear, ...]:
        return () if self.forget_gate is None else (self.forget_gate,)

    @classmethod
    def check(cls, hidden_size: int, num_heads: int, options: Any) -> None:
        """Raise ConfigError, in one sentence, if no layer can be made of these on the current mesh."""
        super().check(hidden_size, num_heads, options)
        check_one_of(f"{cls.section}.gate", options.gate, ("none", "scalar"))
        if options.gate_logit_normalizer <= 0:
            raise ConfigError(f"{cls.section}.gate_logit_normalizer={options.gate_logit_normalizer} must be above 0.")
