"""What every implementation of the op must pass: the cases, the float64 truth, and how close to it is close enough.

An implementation joins by a line in `test_implementations.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import gated_linear_attention

RESULTS = ("out", "final_state")
GRADIENTS = ("query", "key", "value", "log_decay", "initial_state")

# Relative RMS: of the results, of the gradients. float16 is rounded to 11 bits, bfloat16 to 8; products keep float32.
TOLERANCES = {"float32": (2e-5, 1e-4), "bfloat16": (4e-3, 8e-3), "float16": (1e-3, 2e-3)}

_soft = lambda z: -np.log1p(np.exp(-z))  # logsigmoid
GATES = {
    "weak": lambda rng, shape: _soft(rng.standard_normal(shape)) / 16,  # what a layer has at its start
    "strong": lambda rng, shape: _soft(rng.standard_normal(shape)),
    "faint": lambda rng, shape: np.full(shape, -1e-3),
    "-7": lambda rng, shape: np.full(shape, -7.0),
    "0": lambda rng, shape: np.zeros(shape),
    "-1e4": lambda rng, shape: np.full(shape, -1e4),
    "-inf": lambda rng, shape: np.full(shape, -np.inf),
    "mixed": lambda rng, shape: rng.choice([-1e-3, -0.05, -0.7, -7.0, -60.0, 0.0, -1e4, -np.inf], shape),
    "rare resets": lambda rng, shape: np.where(
        rng.random(shape) < 0.05, rng.choice([-1e4, -np.inf], shape), GATES["weak"](rng, shape)
    ),
    "weak then -7": lambda rng, shape: np.where(
        np.arange(shape[1])[:, None, None] < shape[1] // 2, GATES["weak"](rng, shape), -7.0
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the op; `gate` names one of GATES, "fla ..." its authors' test gates, None stands for no gate."""

    batch: int = 2
    time: int = 50
    heads: int = 2
    key_dim: int = 24
    value_dim: int = 40
    dtype: str = "float32"
    gate: str | None = "weak"
    kv_heads: int | None = None
    gate_shape: str = "bthk"  # upper case: that dimension is 1; "x": the heads of the query, not those of the key
    gate_dtype: str | None = None
    positive: bool = False  # query, key, value from U[0, 1), as in fla's tests, instead of N(0, 1)
    initial_state: bool = True
    final_state_gradient: bool = True
    segments: tuple[int, ...] | None = None  # the offsets where segments begin and end, fla's cu_seqlens
    scale: float | None = None
    chunk_size: int | None = 16

    def __str__(self):
        changed = (
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        )
        return ",".join(changed) or "default"


@functools.lru_cache(maxsize=2)
def inputs(case):
    """Return the arguments of the op, rounded to the dtypes of the case, and the cotangents of its two results."""
    rng = np.random.default_rng([case.batch, case.time, case.heads, case.key_dim, case.value_dim])
    draw = rng.random if case.positive else rng.standard_normal
    kv_heads = case.kv_heads or case.heads
    arguments = {
        "query": draw((case.batch, case.time, case.heads, case.key_dim)),
        "key": draw((case.batch, case.time, kv_heads, case.key_dim)),
        "value": draw((case.batch, case.time, kv_heads, case.value_dim)),
    }
    cotangents = {"out": rng.standard_normal((case.batch, case.time, case.heads, case.value_dim))}
    arguments, cotangents = (
        {name: jnp.asarray(x, case.dtype) for name, x in group.items()} for group in (arguments, cotangents)
    )
    if case.gate is not None:
        sizes = {"b": case.batch, "t": case.time, "h": kv_heads, "x": case.heads, "k": case.key_dim}
        shape = tuple(1 if letter.isupper() else sizes[letter] for letter in case.gate_shape)
        if case.gate.startswith("fla "):
            gate = _soft(rng.random(shape)) / float(case.gate.removeprefix("fla "))
        else:
            gate = GATES[case.gate](rng, shape)
        arguments["log_decay"] = jnp.asarray(gate, case.gate_dtype or case.dtype)
    state = (case.batch, case.heads, case.key_dim, case.value_dim)
    if case.initial_state:
        arguments["initial_state"] = jnp.asarray(rng.standard_normal(state), jnp.float32)
    if case.final_state_gradient:
        cotangents["final_state"] = jnp.asarray(rng.standard_normal(state), jnp.float32)
    if case.segments is not None:
        ids = np.searchsorted(case.segments, np.arange(case.time), side="right")
        arguments["segment_ids"] = jnp.asarray(np.broadcast_to(ids, (case.batch, case.time)), jnp.int32)
    return arguments, cotangents


@functools.lru_cache(maxsize=2)
def truth(case):
    """Return results and gradients by name, in float64, token by token, one head of one row at a time."""
    arguments, cotangents = inputs(case)
    exact = {name: np.asarray(x, np.float64) for name, x in arguments.items()}
    scale = case.key_dim**-0.5 if case.scale is None else case.scale
    per_head = lambda x: np.repeat(x, case.heads // x.shape[2], axis=2)
    g = exact.get("log_decay", np.zeros((1, 1, 1, 1)))
    g = np.broadcast_to(per_head(g) if g.shape[2] > 1 else g, (case.batch, case.time, case.heads, case.key_dim))
    state_shape = (case.batch, case.heads, case.key_dim, case.value_dim)
    initial = exact.get("initial_state", np.zeros(state_shape))
    d_final = np.asarray(cotangents.get("final_state", np.zeros(state_shape)), np.float64)
    d_out = np.asarray(cotangents["out"], np.float64)
    starts = np.zeros((case.batch, case.time), bool)
    if case.segments is not None:
        ids = np.asarray(arguments["segment_ids"])
        starts[:, 1:] = ids[:, 1:] != ids[:, :-1]

    q, k, v = exact["query"], per_head(exact["key"]), per_head(exact["value"])
    full = {
        "out": np.zeros_like(d_out), "final_state": np.zeros(state_shape),
        "query": np.zeros_like(q), "key": np.zeros_like(k), "value": np.zeros_like(v),
        "log_decay": np.zeros_like(k), "initial_state": np.zeros(state_shape),
    }  # fmt: skip
    for b, h in np.ndindex(case.batch, case.heads):
        a = np.where(starts[b, :, None], 0.0, np.exp(g[b, :, h]))
        one_head = _recurrence(
            q[b, :, h], k[b, :, h], v[b, :, h], a, initial[b, h], scale, d_out[b, :, h], d_final[b, h]
        )
        for name, x in one_head.items():
            full[name][(b, h) if name in ("final_state", "initial_state") else (b, slice(None), h)] = x

    def sum_to(x, shape):
        groups = x.reshape(*x.shape[:2], shape[2], -1, x.shape[3]).sum(axis=3)
        return groups.sum(axis=tuple(axis for axis in range(4) if shape[axis] == 1), keepdims=True)

    for name in ("key", "value", "log_decay"):
        if name in exact:
            full[name] = sum_to(full[name], exact[name].shape)
    return {name: full[name] for name in (*RESULTS, *(name for name in GRADIENTS if name in exact))}


def _recurrence(q, k, v, a, state, scale, d_out, d_state):
    """Walk one head of one row forwards and backwards. q, k, a: [T, K]; v, d_out: [T, V]; states: [K, V]."""
    states = [state]
    for t in range(len(q)):
        states.append(a[t][:, None] * states[-1] + np.outer(k[t], v[t]))
    results = {
        "out": np.stack([scale * q_t @ s for q_t, s in zip(q, states[1:], strict=True)]),
        "final_state": states[-1],
    }
    gradients = {
        "query": np.zeros_like(q),
        "key": np.zeros_like(k),
        "value": np.zeros_like(v),
        "log_decay": np.zeros_like(k),
    }
    for t in reversed(range(len(q))):
        gradients["query"][t] = scale * states[t + 1] @ d_out[t]
        d_state = d_state + scale * np.outer(q[t], d_out[t])
        gradients["key"][t] = d_state @ v[t]
        gradients["value"][t] = k[t] @ d_state
        d_state = a[t][:, None] * d_state
        gradients["log_decay"][t] = (d_state * states[t]).sum(axis=1)
    return results | gradients | {"initial_state": d_state}


@functools.cache
def _compiled(implementation, interpret, scale, chunk_size):
    """Return the jitted results and gradients; calls with the same shapes share one compilation."""

    def run(arguments, cotangents):
        differentiable = {name: x for name, x in arguments.items() if name != "segment_ids"}
        rest = {name: x for name, x in arguments.items() if name == "segment_ids"}

        def call(differentiable):
            options = {
                "scale": scale,
                "chunk_size": chunk_size,
                "implementation": implementation,
                "interpret": interpret,
            }
            return gated_linear_attention(**differentiable, **rest, **options)

        (out, state), pull_back = jax.vjp(call, differentiable)
        (gradients,) = pull_back((cotangents["out"], cotangents.get("final_state", jnp.zeros_like(state))))
        return {"out": out, "final_state": state}, gradients

    return jax.jit(run)


def check(case, implementation, interpret=False):
    """Hold an implementation to the truth: shapes, dtypes, and the relative RMS of all that it returns."""
    arguments, cotangents = inputs(case)
    results, gradients = _compiled(implementation, interpret, case.scale, case.chunk_size)(arguments, cotangents)
    dtypes = {"out": arguments["value"].dtype, "final_state": jnp.float32} | {n: arguments[n].dtype for n in gradients}
    assert {name: x.dtype for name, x in (results | gradients).items()} == dtypes
    errors = {name: relative_rms(x, truth(case)[name]) for name, x in (results | gradients).items()}
    assert set(errors) == set(truth(case))
    for_results, for_gradients = TOLERANCES[case.dtype]
    failed = {n: e for n, e in errors.items() if not e <= (for_results if n in RESULTS else for_gradients)}
    assert not failed, f"relative RMS {failed} of {errors} against the float64 recurrence: {case}"


def relative_rms(x, exact):
    """Return RMS(x - exact) / RMS(exact); the plain RMS where the exact result is 0; inf if x is not finite."""
    assert x.shape == exact.shape
    x = np.asarray(x, np.float64)
    if not np.isfinite(x).all():
        return np.inf
    norm = np.sqrt(np.mean(exact**2))
    return float(np.sqrt(np.mean((x - exact) ** 2)) / (norm or 1.0))
