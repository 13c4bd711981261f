"""The only door to the op: what it accepts, its defaults, and which implementation serves a call.

An implementation is a module with two functions, which are called with checked arguments by keyword, each under its
name in `selective_scan`: arrays in their own dtypes, D, gate and delta_bias or None, `initial_state` None or float32,
`segment_ids` None or int32.

    unsupported(*, x, ..., segment_ids, chunk_size, interpret) -> str | None
        The reason, in one sentence, why it does not serve this call; looks at shapes, dtypes and the target only.
    selective_scan(*, x, ..., segment_ids, chunk_size, interpret) -> (y in the dtype of x, final_state)
"""

import functools
import importlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import choose, vary_alike
from pallas_kernels.selective_scan import reference
from pallas_kernels.selective_scan.shards import per_shard
from pallas_kernels.selective_scan.terms import output, step_size
from pallas_kernels.target import target

IMPLEMENTATIONS = ("reference", "chunked", "mosaic_gpu")

# What `implementation=None` tries, in this order. `unsupported` of mosaic_gpu says no to GPUs before Hopper.
_BEST_FIRST = {"gpu": ("mosaic_gpu", "chunked")}
_BEST_FIRST_ELSEWHERE = ("chunked",)

_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def selective_scan(
    x: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    *,
    gate: jax.Array | None = None,
    delta_bias: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | Sequence[str] | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Apply Mamba's selective state space model (arXiv 2312.00752, algorithm 2) along the time axis.

    For every row and channel d, with a state h of N numbers,

        h_t = exp(delta_t A_d) h_{t-1} + delta_t x_t B_t,        y_t = (C_t h_t + D_d x_t) silu(gate_t):

    A is discretised exactly, B by Euler's rule, as in the authors' code. With a `delta_bias` the step size is not delta
    but softplus(delta + delta_bias). The state is kept in float32, and all arithmetic is float32.

    Differentiable in x, delta, A, B, C, D, gate, delta_bias and initial_state, through both results. Two halves of a
    row with the state handed over equal the whole row. On padding, a step size of 0 leaves the state untouched. The
    same call on the same device gives the same bits; how a row is cut into chunks changes roundings only.

    Args:
        x: [B, T, D] float32, bfloat16 or float16.
        delta: [B, T, D], the step size, >= 0; or what softplus makes it of, with `delta_bias`.
        A: [D, N]; negative, so that the state decays.
        B: [B, T, N], what the state writes with.
        C: [B, T, N], what the state is read with.
        D: [D], the weight of the skip from x to y; None: no skip.
        gate: [B, T, D], whose silu multiplies y; None: no gate.
        delta_bias: [D]; None: delta is the step size itself.
        initial_state: [B, D, N] float32; zeros by default.
        segment_ids: [B, T] int32. The state is reset where the id differs from the token before; the first token
            continues from `initial_state`.
        chunk_size: tokens a chunk; None takes the tuned size.
        implementation: one of `IMPLEMENTATIONS`, or several to try in order; None takes the best for the shapes and
            the devices: those of the current mesh, or else the default one.
        interpret: run Pallas kernels in their interpreter, on any backend.

    Returns:
        y: [B, T, D] in the dtype of x.
        final_state: [B, D, N] float32, the state after the last token.

    Raises:
        ValueError: an argument has the wrong shape or dtype.
        NotImplementedError: no requested implementation serves this call; the message says why.
    """
    arguments = _checked(x, delta, A, B, C, D, gate, delta_bias, initial_state, segment_ids, chunk_size=chunk_size)
    options = {"chunk_size": chunk_size, "interpret": interpret}
    best = _BEST_FIRST.get(target().platform, _BEST_FIRST_ELSEWHERE)
    unsupported = functools.partial(_unsupported, arguments=arguments, **options)
    name = choose("selective_scan", implementation, IMPLEMENTATIONS, best, unsupported)
    run = functools.partial(_module(name).selective_scan, **options)
    return per_shard(lambda **parts: run(**vary_alike(parts)), arguments)


def selective_scan_support(
    x: jax.Array | jax.ShapeDtypeStruct,
    delta: jax.Array | jax.ShapeDtypeStruct,
    A: jax.Array | jax.ShapeDtypeStruct,
    B: jax.Array | jax.ShapeDtypeStruct,
    C: jax.Array | jax.ShapeDtypeStruct,
    D: jax.Array | jax.ShapeDtypeStruct | None = None,
    *,
    gate: jax.Array | jax.ShapeDtypeStruct | None = None,
    delta_bias: jax.Array | jax.ShapeDtypeStruct | None = None,
    initial_state: jax.Array | jax.ShapeDtypeStruct | None = None,
    segment_ids: jax.Array | jax.ShapeDtypeStruct | None = None,
    chunk_size: int | None = None,
    interpret: bool = False,
) -> dict[str, str | None]:
    """Say for every implementation why it does not serve a call of `selective_scan`.

    Args:
        x, delta, A, B, C, D, gate, delta_bias, initial_state, segment_ids: arrays, or `jax.ShapeDtypeStruct`s of them.
        chunk_size, interpret: as in the call.

    Returns:
        By name of the implementation, the reason in one sentence, or None where it does serve.

    Raises:
        ValueError: an argument has the wrong shape or dtype.
    """
    reasons = {}

    def trace(*arrays):
        arguments = _checked(*arrays, chunk_size=chunk_size)
        reasons.update({name: _unsupported(name, arguments, chunk_size, interpret) for name in IMPLEMENTATIONS})

    jax.eval_shape(trace, x, delta, A, B, C, D, gate, delta_bias, initial_state, segment_ids)
    return reasons


def selective_scan_step(
    x: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    state: jax.Array,
    *,
    gate: jax.Array | None = None,
    delta_bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Apply the selective state space model to one token: what `selective_scan` does, without the time axis.

    Args:
        x: [B, D] float32, bfloat16 or float16.
        delta: [B, D], the step size, >= 0; or what softplus makes it of, with `delta_bias`.
        A: [D, N].
        B: [B, N].
        C: [B, N].
        D: [D], or None.
        state: [B, D, N] float32.
        gate: [B, D], or None.
        delta_bias: [D], or None.

    Returns:
        y: [B, D] in the dtype of x.
        state: [B, D, N] float32.

    Raises:
        ValueError: an argument has the wrong shape or dtype.
    """
    for name, array in (("x", x), ("delta", delta), ("B", B), ("C", C), ("gate", gate)):
        if array is not None and jnp.ndim(array) != 2:
            raise ValueError(f"{name} has shape {jnp.shape(array)}; it must be of rank 2, without a time axis.")
    if state is None:
        raise ValueError("state is None; it must be a float32 array of shape [batch, channels, state size].")
    add_time = lambda array: None if array is None else jnp.asarray(array)[:, None]
    tokens = (add_time(x), add_time(delta), A, add_time(B), add_time(C), D, add_time(gate), delta_bias)
    checked = vary_alike(_checked(*tokens, state, None, chunk_size=None, state_name="state"))
    x, delta, B, C = (checked[name][:, 0] for name in ("x", "delta", "B", "C"))
    gate = None if gate is None else checked["gate"][:, 0]
    size = step_size(delta, checked["delta_bias"])
    wide_x, A, B, C = (array.astype(jnp.float32) for array in (x, checked["A"], B, C))
    y, state = reference.step(wide_x, size, A, B, C, checked["initial_state"])
    return output(y, x, checked["D"], gate), state


def _module(name):
    """Import an implementation, only when it is wanted: the kernels' toolchains are not everywhere."""
    return importlib.import_module(f"pallas_kernels.selective_scan.{name}")


def _unsupported(name, arguments, chunk_size, interpret):
    """Return why an implementation does not serve the call, or None."""
    try:
        module = _module(name)
    except ImportError as error:
        return f"it cannot be imported here ({error})."
    return module.unsupported(**arguments, chunk_size=chunk_size, interpret=interpret)


def _checked(
    x, delta, A, B, C, D, gate, delta_bias, initial_state, segment_ids, *, chunk_size, state_name="initial_state"
):
    """Return the arguments as every implementation expects them, or raise a ValueError that names the one at fault."""
    x, A = jnp.asarray(x), jnp.asarray(A)
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x has shape {x.shape}; it must be of rank 3, [batch, time, channels], none of them 0.")
    batch, time, channels = x.shape
    if A.ndim != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise ValueError(f"A has shape {A.shape}; it must be [{channels}, state size], to go with x {x.shape}.")
    size = A.shape[1]
    delta, B, C = jnp.asarray(delta), jnp.asarray(B), jnp.asarray(C)
    D, gate, delta_bias = (None if array is None else jnp.asarray(array) for array in (D, gate, delta_bias))
    expected = {
        "delta": (delta, (batch, time, channels)),
        "B": (B, (batch, time, size)),
        "C": (C, (batch, time, size)),
        "D": (D, (channels,)),
        "gate": (gate, (batch, time, channels)),
        "delta_bias": (delta_bias, (channels,)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(
                f"{name} has shape {array.shape}; it must be {shape}, to go with x {x.shape}, A {A.shape}."
            )
    floats = {"x": x, "A": A} | {name: array for name, (array, _) in expected.items()}
    for name, array in floats.items():
        if array is not None and array.dtype not in _FLOATS:
            allowed = ", ".join(jnp.dtype(dtype).name for dtype in _FLOATS)
            raise ValueError(f"{name} is {array.dtype}; it must be {allowed}.")
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
    return floats | {"initial_state": initial_state, "segment_ids": segment_ids}
