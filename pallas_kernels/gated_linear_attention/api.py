"""The only door to the op: what it accepts, its defaults, and which implementation serves a call.

An implementation is a module with two functions, which are called with checked and normalised arguments: arrays in
their own dtypes, `log_decay` None or of rank 4 and not yet broadcast, heads not yet repeated, `initial_state` None or
float32, `segment_ids` None or int32, `scale` a Python float.

    unsupported(query, key, value, log_decay, initial_state, segment_ids, *, chunk_size, interpret) -> str | None
        The reason, in one sentence, why it does not serve this call; looks at shapes, dtypes and the target only.
    gated_linear_attention(query, key, value, log_decay, initial_state, segment_ids,
                           *, scale, chunk_size, interpret, output_final_state=True) -> (out, final_state)
        Nobody reads the final state without `output_final_state`: it may be None.

One with a way of its own for a single token has a second module, named in `_STEPS`, with the same pair of functions,
`unsupported_step(query, value, *, interpret)` and `gated_linear_attention_step(query, key, value, log_decay, state,
*, scale, interpret)`, of arrays without the time axis.
"""

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import choose, vary_alike
from pallas_kernels.gated_linear_attention import reference
from pallas_kernels.gated_linear_attention.shards import per_shard
from pallas_kernels.target import target

IMPLEMENTATIONS = ("reference", "chunked", "mosaic_gpu", "mosaic_tpu")

# What `implementation=None` tries, in this order. `unsupported` of mosaic_gpu says no to GPUs before Hopper.
_BEST_FIRST = {"gpu": ("mosaic_gpu", "chunked"), "tpu": ("mosaic_tpu", "chunked")}
_BEST_FIRST_ELSEWHERE = ("chunked",)

# The same for a single token, and the modules that serve one; the reference serves it as a row of length 1.
_BEST_STEP_FIRST = {"tpu": ("mosaic_tpu", "reference")}
_BEST_STEP_FIRST_ELSEWHERE = ("reference",)
_STEPS = {"mosaic_tpu": "mosaic_tpu_step"}

_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def gated_linear_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | Sequence[str] | None = None,
    interpret: bool = False,
    output_final_state: bool = True,
) -> tuple[jax.Array, Any]:
    """Apply Gated Linear Attention (arXiv 2312.06635, equation 3) along the time axis.

    For every row and head, with the state S of shape [K, V] and g = log_decay,

        S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T,        out_t = scale * S_t^T q_t:

    decay first, then write, then read. Ungated linear attention is `log_decay=None`, a scalar gate [B, T, H, 1],
    RetNet's constant one [1, 1, H, 1].

    Differentiable in query, key, value, log_decay and initial_state, through both results. The gradient of a log_decay
    of -inf is 0. Two halves of a row with the state handed over equal the whole row. On padding, a key of 0 and a
    log_decay of 0 leave the state untouched, so rows of different length need nothing else. The same call on the same
    device gives the same bits; how a row is cut into chunks changes roundings only.

    Args:
        query: [B, T, H, K] float32, bfloat16 or float16.
        key: [B, T, H_kv, K]; H is a multiple of H_kv, and consecutive query heads share a key head.
        value: [B, T, H_kv, V].
        log_decay: natural logarithm of the forget gate, <= 0, -inf allowed, broadcastable to [B, T, H_kv, K] or
            [B, T, H, K]; None does not forget.
        scale: what the query is multiplied by; K**-0.5 by default.
        initial_state: [B, H, K, V] float32; zeros by default.
        segment_ids: [B, T] int32. The state is reset where the id differs from the token before; the first token
            continues from `initial_state`.
        chunk_size: tokens a chunk; None takes the tuned size.
        implementation: one of `IMPLEMENTATIONS`, or several to try in order; None takes the best for the shapes and
            the devices: those of the current mesh, or else the default one.
        interpret: run Pallas kernels in their interpreter, on any backend.
        output_final_state: False where nobody reads the final state: kernels then need not write it, nor read its
            gradient, which takes 1 to 3 % of the time.

    Returns:
        out: [B, T, H, V] in the dtype of value.
        final_state: [B, H, K, V] float32, the state after the last token, or None without `output_final_state`.

    Raises:
        ValueError: an argument has the wrong shape, dtype or value.
        NotImplementedError: no requested implementation serves this call; the message says why.
    """
    arguments = _checked(query, key, value, log_decay, initial_state, segment_ids, chunk_size)
    scale = _checked_scale(scale, arguments[0].shape[-1])
    best = _BEST_FIRST.get(target().platform, _BEST_FIRST_ELSEWHERE)
    unsupported = functools.partial(_unsupported, arguments=arguments, chunk_size=chunk_size, interpret=interpret)
    name = choose("gated_linear_attention", implementation, IMPLEMENTATIONS, best, unsupported)
    options = {"scale": scale, "chunk_size": chunk_size, "interpret": interpret}
    attention = functools.partial(_module(name).gated_linear_attention, **options)
    out, final_state = _run(functools.partial(attention, output_final_state=output_final_state), *arguments)
    return out, final_state if output_final_state else None


def gated_linear_attention_support(
    query: jax.Array | jax.ShapeDtypeStruct,
    key: jax.Array | jax.ShapeDtypeStruct,
    value: jax.Array | jax.ShapeDtypeStruct,
    log_decay: jax.Array | jax.ShapeDtypeStruct | None = None,
    *,
    initial_state: jax.Array | jax.ShapeDtypeStruct | None = None,
    segment_ids: jax.Array | jax.ShapeDtypeStruct | None = None,
    chunk_size: int | None = None,
    interpret: bool = False,
) -> dict[str, str | None]:
    """Say for every implementation why it does not serve a call of `gated_linear_attention`.

    Args:
        query, key, value, log_decay, initial_state, segment_ids: arrays, or `jax.ShapeDtypeStruct`s of them.
        chunk_size, interpret: as in the call.

    Returns:
        By name of the implementation, the reason in one sentence, or None where it does serve.

    Raises:
        ValueError: an argument has the wrong shape or dtype.
    """
    reasons = {}

    def trace(query, key, value, log_decay, initial_state, segment_ids):
        checked = _checked(query, key, value, log_decay, initial_state, segment_ids, chunk_size)
        reasons.update({name: _unsupported(name, checked, chunk_size, interpret) for name in IMPLEMENTATIONS})

    jax.eval_shape(trace, query, key, value, log_decay, initial_state, segment_ids)
    return reasons


def gated_linear_attention_step(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array | None,
    state: jax.Array,
    *,
    scale: float | None = None,
    implementation: str | Sequence[str] | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Apply Gated Linear Attention to one token: what `gated_linear_attention` does, without the time axis.

    Args:
        query: [B, H, K] float32, bfloat16 or float16.
        key: [B, H_kv, K].
        value: [B, H_kv, V].
        log_decay: <= 0, broadcastable to [B, H_kv, K] or [B, H, K]; None does not forget.
        state: [B, H, K, V] float32.
        scale: what the query is multiplied by; K**-0.5 by default.
        implementation: as for `gated_linear_attention`; "reference" and "mosaic_tpu" serve single tokens.
        interpret: run Pallas kernels in their interpreter, on any backend.

    Returns:
        out: [B, H, V] in the dtype of value.
        state: [B, H, K, V] float32.

    Raises:
        ValueError: an argument has the wrong shape, dtype or value.
        NotImplementedError: no requested implementation serves this call; the message says why.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if jnp.ndim(x) != 3:
            raise ValueError(
                f"{name} has shape {jnp.shape(x)}; it must be of rank 3, [batch, heads, dim], without a time axis."
            )
    if log_decay is not None:
        _check_sign(log_decay)
        log_decay = jnp.asarray(log_decay)
        if log_decay.ndim > 3:
            raise ValueError(
                f"log_decay has shape {log_decay.shape}; it must be of rank 3 at most, without a time axis."
            )
        log_decay = log_decay.reshape((1,) * (3 - log_decay.ndim) + log_decay.shape)[:, None]
    add_time = lambda x: jnp.asarray(x)[:, None]
    q, k, v, g, state, _ = _checked(
        add_time(query), add_time(key), add_time(value), log_decay, state, None, None, state_name="state"
    )
    if state is None:
        raise ValueError("state is None; it must be a float32 array of shape [batch, heads, key dim, value dim].")
    scale = _checked_scale(scale, q.shape[-1])
    best = _BEST_STEP_FIRST.get(target().platform, _BEST_STEP_FIRST_ELSEWHERE)
    unsupported = functools.partial(_unsupported_step, query=q, value=v, interpret=interpret)
    name = choose("gated_linear_attention_step", implementation, IMPLEMENTATIONS, best, unsupported)
    if name == "reference":
        options = {"scale": scale, "chunk_size": None, "interpret": interpret}
        step = functools.partial(reference.gated_linear_attention, **options)
    else:
        step = functools.partial(_step, _module(_STEPS[name]), scale=scale, interpret=interpret)
    out, state = _run(step, q, k, v, g, state, None)
    return out[:, 0], state


def _step(module, query, key, value, log_decay, state, segment_ids, **options):
    """Run a module's step on arrays with a time axis of 1; `segment_ids` is None."""
    query, key, value, log_decay = (x if x is None else x[:, 0] for x in (query, key, value, log_decay))
    out, state = module.gated_linear_attention_step(query, key, value, log_decay, state, **options)
    return out[:, None], state


def _run(function, *arguments):
    """Call an implementation on each device's own rows and heads; all its arguments vary over the same manual axes."""
    varied = lambda *parts: function(*vary_alike(parts))
    return per_shard(varied, *arguments)


def _module(name):
    """Import an implementation, only when it is wanted: the kernels' toolchains are not everywhere."""
    return importlib.import_module(f"pallas_kernels.gated_linear_attention.{name}")


def _unsupported(name, arguments, chunk_size, interpret):
    """Return why an implementation does not serve the call, or None."""
    try:
        module = _module(name)
    except ImportError as error:
        return f"it cannot be imported here ({error})."
    return module.unsupported(*arguments, chunk_size=chunk_size, interpret=interpret)


def _unsupported_step(name, query, value, interpret):
    """Return why an implementation does not serve one token of [B, 1, H, K] and [B, 1, H_kv, V], or None."""
    if name == "reference":
        return None
    if name not in _STEPS:
        return f"it has no step for a single token; take {', '.join(map(repr, ('reference', *_STEPS)))} or None."
    try:
        module = _module(_STEPS[name])
    except ImportError as error:
        return f"it cannot be imported here ({error})."
    return module.unsupported_step(query[:, 0], value[:, 0], interpret=interpret)


def _checked(query, key, value, log_decay, initial_state, segment_ids, chunk_size, *, state_name="initial_state"):
    """Return the arguments as every implementation expects them, or raise a ValueError that names the one at fault."""
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(
                f"{name} has shape {x.shape}; it must be of rank 4, [batch, time, heads, dim], none of them 0."
            )
        _check_float(name, x)
    batch, time, heads, key_dim = query.shape
    kv_heads, value_dim = value.shape[2:]
    if key.shape != (batch, time, kv_heads, key_dim):
        raise ValueError(
            f"key has shape {key.shape}; it must be {(batch, time, kv_heads, key_dim)}, "
            f"to go with query {query.shape} and value {value.shape}."
        )
    if value.shape[:2] != (batch, time):
        raise ValueError(f"value has shape {value.shape}; its batch and time must be {(batch, time)}, those of query.")
    if heads % kv_heads:
        raise ValueError(f"key and value have {kv_heads} heads; their number must divide the {heads} heads of query.")
    if log_decay is not None:
        log_decay = _checked_log_decay(log_decay, (batch, time, kv_heads, key_dim), heads)
    if initial_state is not None:
        initial_state = jnp.asarray(initial_state)
        expected = (batch, heads, key_dim, value_dim)
        if initial_state.shape != expected or initial_state.dtype != jnp.float32:
            raise ValueError(
                f"{state_name} is {initial_state.dtype}{list(initial_state.shape)}; it must be float32{list(expected)}."
            )
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        if segment_ids.shape != (batch, time) or segment_ids.dtype != jnp.int32:
            raise ValueError(
                f"segment_ids is {segment_ids.dtype}{list(segment_ids.shape)}; it must be int32{[batch, time]}."
            )
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size is {chunk_size!r}; it must be None or a positive integer.")
    return query, key, value, log_decay, initial_state, segment_ids


def _checked_log_decay(log_decay, shape, heads):
    """Return log_decay in rank 4; `shape` is what it must broadcast to, or the same with the heads of the query."""
    _check_sign(log_decay)
    log_decay = jnp.asarray(log_decay)
    _check_float("log_decay", log_decay)
    if log_decay.ndim <= 4:
        log_decay = log_decay.reshape((1,) * (4 - log_decay.ndim) + log_decay.shape)
    batch, time, kv_heads, key_dim = shape
    if log_decay.ndim != 4 or any(
        size not in allowed
        for size, allowed in zip(
            log_decay.shape, ((1, batch), (1, time), (1, kv_heads, heads), (1, key_dim)), strict=True
        )
    ):
        raise ValueError(
            f"log_decay has shape {log_decay.shape}; it must be broadcastable to {shape}"
            + (f" or {(batch, time, heads, key_dim)}." if heads != kv_heads else ".")
        )
    return log_decay


def _check_sign(log_decay):
    """Refuse a positive log_decay, if its values are known now; under `jax.jit` that is a constant one."""
    if not isinstance(log_decay, jax.core.Tracer) and np.size(log_decay):
        with jax.ensure_compile_time_eval():
            largest = float(jnp.max(jnp.asarray(log_decay)))
        if largest > 0:
            raise ValueError(f"log_decay reaches {largest:g}; it must be at most 0, for exp(log_decay) to be a gate.")


def _check_float(name, x):
    if x.dtype not in _FLOATS:
        raise ValueError(f"{name} is {x.dtype}; it must be float32, bfloat16 or float16.")


def _checked_scale(scale, key_dim):
    if scale is None:
        return key_dim**-0.5
    if isinstance(scale, jax.core.Tracer) or np.ndim(scale) or not math.isfinite(scale):
        raise ValueError(
            f"scale is {scale}; it must be a finite Python number (a traced one can multiply the query instead)."
        )
    return float(scale)
