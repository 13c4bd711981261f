"""Linear maps whose weights know the logical names of their axes."""

import jax
from flax import nnx
from jax.typing import DTypeLike


def linear(
    in_features: int,
    out_features: int,
    axes: tuple[str | None, str | None],
    *,
    use_bias: bool = False,
    initializer_range: float,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """Make a linear map with weights N(0, initializer_range^2) and, if asked for, a bias of zeros.

    Args:
        in_features, out_features: sizes of the last axis, before and after.
        axes: logical names of the kernel's two axes, e.g. ("embed", "heads").
        use_bias: add a bias.
        initializer_range: standard deviation of the weights.
        dtype: what inputs and weights are cast to when used.
        param_dtype: what weights are held in.
        rngs: source of randomness.
    """
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        kernel_init=jax.nn.initializers.normal(initializer_range),
        kernel_metadata={"axes": axes},
        bias_metadata={"axes": axes[1:]},
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def linear_flops(*maps: nnx.Linear | None) -> float:
    """Return the FLOPs per token of linear maps, two per weight; None counts nothing."""
    return float(sum(2 * m.in_features * m.out_features for m in maps if m is not None))
