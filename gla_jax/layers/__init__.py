"""Layers: sequence mixers, the SwiGLU, norms. Each is an `nnx.Module` that can be used alone.

A sequence mixer is a class with

    Options                                                                   a frozen dataclass of what is its own
    check(hidden_size, num_heads, options)                                    static; ConfigError in one sentence
    __init__(hidden_size, num_heads, options, *, norm_eps, initializer_range, dtype, param_dtype, rngs)
    __call__(x, state=None, *, segment_ids=None, positions=None) -> (y, state)     x, y [B, T, D], any T >= 1
    init_state(batch_size) -> state                                           a pytree of zeros, batch axis first
    flops_per_token(context_length) -> float                                  of the forward pass

and a line in `MIXERS`; the model knows no more of it. `state=None` starts a row; a state that is passed in continues
one, and what comes back continues after the last token. `segment_ids` [B, T] mark documents that must not see each
other: a new one begins where the id differs from the token before, and the first token continues from `state`. Padding
on the left is therefore a segment of its own and needs nothing else. `positions` [B, T] are for mixers that have them:
None counts on from the state, and given ones must go on, too, where a document goes on.
"""

from typing import Any

from gla_jax.layers.attention import Attention
from gla_jax.layers.gated_linear_attention import GatedLinearAttention
from gla_jax.layers.linear_attention import LinearAttention
from gla_jax.layers.mamba import Mamba
from gla_jax.layers.retention import Retention

MIXERS: dict[str, Any] = {
    "gla": GatedLinearAttention,
    "attention": Attention,
    "retention": Retention,
    "linear_attention": LinearAttention,
    "mamba": Mamba,
}
"""Every sequence mixer by its name in `model.mixer`."""

__all__ = ["MIXERS", "Attention", "GatedLinearAttention", "LinearAttention", "Mamba", "Retention"]
