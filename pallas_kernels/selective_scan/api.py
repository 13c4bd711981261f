"""The only door to the op: what it accepts, its defaults, and which implementation serves a call.

An implementation is a module with two functions, which are called with checked arguments: arrays in their own dtypes,
`initial_state` None or float32, `segment_ids` None or int32. The skip D x is added here, for all of them.

    unsupported(x, delta, A, B, C, initial_state, segment_ids, *, chunk_size, interpret) -> str | None
        The reason, in one sentence, why it does not serve this call; looks at shapes, dtypes and the backend only.
    selective_scan(x, delta, A, B, C, initial_state, segment_ids, *, chunk_size, interpret) -> (y float32, final_state)
"""

import importlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.selective_scan import reference

IMPLEMENTATIONS = ("reference", "chunked")

# What `implementation=None` tries, in this order, on every backend.
_BEST_FIRST = ("chunked",)

_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def selective_scan(
    x: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | Sequence[str] | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Apply Mamba's selective state space model (arXiv 2312.00752, algorithm 2) along the time axis.

    For every row and channel d, with a state h of N numbers,

        h_t = exp(delta_t A_d) h_{t-1} + delta_t x_t B_t,        y_t = C_t h_t + D_d x_t:

    A is discretised exactly, B by Euler's rule, as in the authors' code. All arithmetic is in float32.

    Differentiable in x, delta, A, B, C, D and initial_state, through both results. Two halves of a row with the state
    handed over equal the whole row. On padding, a delta of 0 leaves the state untouched. How a row is cut into chunks
    changes roundings only.

    Args:
        x: [B, T, D] float32, bfloat16 or float16.
        delta: [B, T, D], the step size, >= 0 (after its softplus).
        A: [D, N]; negative, so that the state decays.
        B: [B, T, N], what the state writes with.
        C: [B, T, N], what the state is read with.
        D: [D], the weight of the skip from x to y; None: no skip.
        initial_state: [B, D, N] float32; zeros by default.
        segment_ids: [B, T] int32. The state is reset where the id differs from the token before; the first token
            continues from `initial_state`.
        chunk_size: tokens a chunk; None takes the tuned size.
        implementation: one of `IMPLEMENTATIONS`, or several to try in order; None takes the best for the backend and
            the shapes.
        interpret: run Pallas kernels in their interpreter, on any backend.

    Returns:
        y: [B, T, D] in the dtype of x.
        final_state: [B, D, N] float32, the state after the last token.

    Raises:
        ValueError: an argument has the wrong shape or dtype.
        NotImplementedError: no requested implementation serves this call; the message says why.
    """
    x, delta, A, B, C, D, initial_state, segment_ids = _checked(
        x, delta, A, B, C, D, initial_state, segment_ids, chunk_size
    )
    arguments = (x, delta, A, B, C, initial_state, segment_ids)
    reasons = {}
    for name in _names(implementation):
        module = importlib.import_module(f"pallas_kernels.selective_scan.{name}")
        reasons[name] = module.unsupported(*arguments, chunk_size=chunk_size, interpret=interpret)
        if reasons[name] is None:
            break
    else:
        raise NotImplementedError(
            "selective_scan is not served by "
            + "; nor by ".join(f"{name!r}: {reason}" for name, reason in reasons.items())
        )
    y, state = module.selective_scan(*arguments, chunk_size=chunk_size, interpret=interpret)
    return _with_skip(y, x, D), state


def selective_scan_step(
    x: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Apply the selective state space model to one token: what `selective_scan` does, without the time axis.

    Args:
        x: [B, D] float32, bfloat16 or float16.
        delta: [B, D], the step size, >= 0.
        A: [D, N].
        B: [B, N].
        C: [B, N].
        D: [D], or None.
        state: [B, D, N] float32.

    Returns:
        y: [B, D] in the dtype of x.
        state: [B, D, N] float32.

    Raises:
        ValueError: an argument has the wrong shape or dtype.
    """
    for name, array in (("x", x), ("delta", delta), ("B", B), ("C", C)):
        if jnp.ndim(array) != 2:
            raise ValueError(f"{name} has shape {jnp.shape(array)}; it must be of rank 2, without a time axis.")
    if state is None:
        raise ValueError("state is None; it must be a float32 array of shape [batch, channels, state size].")
    x, delta, B, C = (jnp.asarray(array)[:, None] for array in (x, delta, B, C))
    x, delta, A, B, C, D, state, _ = _checked(x, delta, A, B, C, D, state, None, None, state_name="state")
    token = (array[:, 0].astype(jnp.float32) for array in (x, delta, B, C))
    x_t, delta_t, B_t, C_t = token
    y, state = reference.step(x_t, delta_t, A.astype(jnp.float32), B_t, C_t, state)
    return _with_skip(y, x[:, 0], D), state


def _with_skip(y, x, D):
    """Return y + D x in the dtype of x."""
    if D is not None:
        y = y + D.astype(jnp.float32) * x.astype(jnp.float32)
    return y.astype(x.dtype)


def _names(implementation):
    """Return the implementations to try, in order."""
    if implementation is None:
        return _BEST_FIRST
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    if not names or any(name not in IMPLEMENTATIONS for name in names):
        raise ValueError(
            f"implementation is {implementation!r}; it must be None, one of {', '.join(IMPLEMENTATIONS)}, "
            "or a sequence of them."
        )
    return names


def _checked(x, delta, A, B, C, D, initial_state, segment_ids, chunk_size, *, state_name="initial_state"):
    """Return the arguments as every implementation expects them, or raise a ValueError that names the one at fault."""
    x, A = jnp.asarray(x), jnp.asarray(A)
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x has shape {x.shape}; it must be of rank 3, [batch, time, channels], none of them 0.")
    batch, time, channels = x.shape
    if A.ndim != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise ValueError(f"A has shape {A.shape}; it must be [{channels}, state size], to go with x {x.shape}.")
    size = A.shape[1]
    delta, B, C = jnp.asarray(delta), jnp.asarray(B), jnp.asarray(C)
    D = None if D is None else jnp.asarray(D)
    expected = {
        "delta": (delta, (batch, time, channels)),
        "B": (B, (batch, time, size)),
        "C": (C, (batch, time, size)),
        "D": (D, (channels,)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(
                f"{name} has shape {array.shape}; it must be {shape}, to go with x {x.shape}, A {A.shape}."
            )
    for name, array in {"x": x, "A": A, "delta": delta, "B": B, "C": C, "D": D}.items():
        if array is not None and array.dtype not in _FLOATS:
            floats = ", ".join(jnp.dtype(dtype).name for dtype in _FLOATS)
            raise ValueError(f"{name} is {array.dtype}; it must be {floats}.")
    if initial_state is not None:
        initial_state = jnp.asarray(initial_state)
        shape = (batch, channels, size)
        if initial_state.shape != shape or initial_state.dtype != jnp.float32:
            raise ValueError(
                f"{state_name} is {initial_state.dtype}{list(initial_state.shape)}; it must be float32{list(shape)}."
            )
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        if segment_ids.shape != (batch, time) or segment_ids.dtype != jnp.int32:
            raise ValueError(
                f"segment_ids is {segment_ids.dtype}{list(segment_ids.shape)}; it must be int32{[batch, time]}."
            )
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size is {chunk_size!r}; it must be None or a positive integer.")
    return _vary_alike(x, delta, A, B, C, D, initial_state, segment_ids)


def _vary_alike(*arrays):
    """Make all arrays vary over the same manual axes of an enclosing `shard_map`, as custom gradients and kernels need.

    The transpose of this cast is the sum over the axes that an array did not vary over: the gradient of an A that all
    devices share, say. Outside `shard_map`, and with check_vma=False, nothing happens.
    """
    axes = lambda array: jax.typeof(array).manual_axis_type.varying
    union = frozenset().union(*(axes(array) for array in arrays if array is not None))
    vary = lambda array: jax.lax.pcast(array, tuple(sorted(union - axes(array))), to="varying")
    return tuple(None if array is None else vary(array) for array in arrays)
