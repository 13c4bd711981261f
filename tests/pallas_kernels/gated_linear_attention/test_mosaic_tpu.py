"""The TPU kernels in the interpreter against a float64 recurrence, and exported for TPU; no TPU or libtpu needed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_linear_attention import mosaic_tpu

# What a call is made of; one unit of heads in most, as it is compiling the interpreted kernels that takes time.
FULL = {"batch": 1, "time": 200, "heads": 1, "kv_heads": 1, "key_dim": 128, "value_dim": 128}
PAIR = FULL | {"heads": 2, "kv_heads": 2, "key_dim": 64, "value_dim": 64}
CASES = {
    "channel": (FULL | {"gate": "channel", "documents": True, "initial": True}, jnp.bfloat16),
    "channel, pairs of heads": (PAIR | {"gate": "channel", "initial": True}, jnp.bfloat16),
    "scalar, grouped heads, documents": (PAIR | {"gate": "scalar", "kv_heads": 1, "documents": True}, jnp.bfloat16),
    "constant per head, padded": (FULL | {"gate": "constant", "key_dim": 48, "value_dim": 80}, jnp.float32),
    "channel, float32": (FULL | {"gate": "channel", "initial": True}, jnp.float32),
    "ungated": (FULL | {"gate": "none", "documents": True, "initial": True, "batch": 2, "heads": 2}, jnp.bfloat16),
}


def make(case, dtype, seed=0, strong=True):
    """Return (arguments, scale, gradients of the results) of a case."""
    rng = np.random.default_rng(seed)
    batch, time, heads, kv_heads = (case[name] for name in ("batch", "time", "heads", "kv_heads"))
    key_dim, value_dim = case["key_dim"], case["value_dim"]
    normal = lambda *shape, dtype=dtype: jnp.asarray(rng.standard_normal(shape), dtype)
    shape = {
        "none": None,
        "constant": (1, 1, heads, 1),
        "scalar": (batch, time, heads, 1),
        "channel": (batch, time, kv_heads, key_dim),
    }[case["gate"]]
    gate = None
    if shape is not None:
        gate = -np.log1p(np.exp(-rng.standard_normal(shape))) / 16
        if strong and shape[1] > 1:
            gate[:, 20:30] *= 100  # some tokens forget nearly everything
            gate[:, 60] = -1e4
            gate[:, 61, :, : max(1, shape[3] // 2)] = -np.inf
            gate[:, 62] = 0.0
        gate = jnp.asarray(gate, dtype)
    initial = normal(batch, heads, key_dim, value_dim, dtype=jnp.float32) if case.get("initial") else None
    segments = jnp.asarray(np.cumsum(rng.random((batch, time)) < 0.02, 1), jnp.int32) if case.get("documents") else None
    arguments = (
        normal(batch, time, heads, key_dim),
        normal(batch, time, kv_heads, key_dim),
        normal(batch, time, kv_heads, value_dim),
        gate,
        initial,
        segments,
    )
    gradients = normal(batch, time, heads, value_dim), normal(batch, heads, key_dim, value_dim, dtype=jnp.float32)
    return arguments, key_dim**-0.5, gradients


def recurrence(q, k, v, g, initial, segments, *, scale):
    """The definition, token by token, in the dtype of its inputs."""
    heads = q.shape[2]
    spread = lambda x: jnp.repeat(x, heads // x.shape[2], axis=2)
    k, v = spread(k), spread(v)
    decay = jnp.ones_like(q) if g is None else jnp.broadcast_to(jnp.exp(spread(g)), q.shape)
    if segments is not None:
        starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
        decay = jnp.where(starts[..., None, None], 0.0, decay)
    state = jnp.zeros((*q.shape[:1], heads, q.shape[3], v.shape[3]), q.dtype) if initial is None else initial

    def step(state, token):
        q, k, v, decay = token
        state = decay[..., None] * state + k[..., None] * v[..., None, :]
        return state, jnp.einsum("bhk,bhkv->bhv", q, state) * scale

    state, out = jax.lax.scan(step, state, jax.tree.map(lambda x: x.swapaxes(0, 1), (q, k, v, decay)))
    return out.swapaxes(0, 1), state


def compiled(function):
    """Return a jitted function to out, the final state and the gradient of every floating argument, by name."""
    names = ("query", "key", "value", "log_decay", "initial_state")

    # The time goes into compiling what the interpreter makes of a kernel, not into running it.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

    @functools.partial(jax.jit, compiler_options=quick)
    def run(arguments, gradients):
        floats = {name: x for name, x in zip(names, arguments[:5], strict=True) if x is not None}
        call = lambda floats: function(*(floats.get(name) for name in names), arguments[5])
        (out, state), pull = jax.vjp(call, floats)
        (pulled,) = pull((gradients[0].astype(out.dtype), gradients[1].astype(state.dtype)))
        return {"out": out, "final_state": state} | {f"d {name}": x for name, x in pulled.items()}

    return run


def kernels(scale, chunk_size=None, interpret=True):
    """Return the kernels, interpreted."""
    return compiled(
        lambda *a: mosaic_tpu.gated_linear_attention(*a, scale=scale, chunk_size=chunk_size, interpret=interpret)
    )


def truth(arguments, scale, gradients):
    with jax.enable_x64(True):
        up = jax.tree.map(lambda x: x if x.dtype == jnp.int32 else x.astype(jnp.float64), (arguments, gradients))
        found = compiled(lambda *a: recurrence(*a, scale=scale))(*up)
        return {name: np.asarray(x) for name, x in found.items()}


def errors(found, expected):
    """Return the relative root mean square of every result; NaN where one is not finite."""
    rms = lambda x: float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))
    return {name: rms(np.asarray(found[name], np.float64) - x) / rms(x) for name, x in expected.items()}


def check(found, expected, dtype=jnp.bfloat16):
    for name, error in errors(found, expected).items():
        limit = 2e-6 if dtype == jnp.float32 else 8e-3 if name.startswith("d ") else 4e-3
        assert error <= limit, (name, error)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_recurrence(name):
    case, dtype = CASES[name]
    arguments, scale, gradients = make(case, dtype)
    found = kernels(scale)(arguments, gradients)
    assert found["out"].dtype == dtype
    check(found, truth(arguments, scale, gradients), dtype)


def test_every_strength_of_gate():
    """From no decay to a reset at every token, all chunks alike: the bounded form first, then the exact one."""
    case = FULL | {"gate": "channel", "time": 256}
    (q, k, v, g, _, _), scale, gradients = make(case, jnp.bfloat16, strong=False)
    run = kernels(scale)
    for strength in (0.0, 1.0, 16.0, 160.0):
        arguments = (q, k, v, g * strength, None, None)
        check(run(arguments, gradients), truth(arguments, scale, gradients))
    forgotten = run((q, k, v, jnp.full_like(g, -jnp.inf), None, None), gradients)
    own = scale * jnp.einsum("bthk,bthk,bthv->bthv", *(x.astype(jnp.float32) for x in (q, k, v)))
    check(forgotten, {"out": np.asarray(own)})
    assert not np.any(forgotten["d log_decay"])


def test_halves_with_the_state_handed_over_equal_the_whole():
    (q, k, v, g, initial, _), scale, _ = make(FULL | {"gate": "channel", "initial": True}, jnp.float32)
    run = jax.jit(lambda *a: mosaic_tpu.gated_linear_attention(*a, None, scale=scale, chunk_size=None, interpret=True))
    out, state = run(q, k, v, g, initial)
    first, middle = run(q[:, :100], k[:, :100], v[:, :100], g[:, :100], initial)
    second, last = run(q[:, 100:], k[:, 100:], v[:, 100:], g[:, 100:], middle)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), out, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(last, state, rtol=1e-4, atol=1e-4)


def test_no_races_and_nothing_read_before_it_is_written():
    arguments, scale, gradients = make(FULL | {"gate": "channel", "time": 128, "initial": True}, jnp.bfloat16)
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")  # a race raises
    check(kernels(scale, 64, interpret)(arguments, gradients), truth(arguments, scale, gradients))


@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (128, 128), (128, 256), (256, 512)])
def test_exports_for_tpu(key_dim, value_dim):
    shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    lead = (1, 512, 4)
    arguments = shape(*lead, key_dim), shape(*lead, key_dim), shape(*lead, value_dim), shape(*lead, key_dim)
    state = shape(1, 4, key_dim, value_dim, dtype=jnp.float32)

    def step(q, k, v, g, initial, dout, dstate):
        call = lambda *a: mosaic_tpu.gated_linear_attention(*a, None, scale=1.0, chunk_size=None, interpret=False)
        results, pull = jax.vjp(call, q, k, v, g, initial)
        return results, pull((dout, dstate))

    exported = export.export(jax.jit(step), platforms=["tpu"])(*arguments, state, arguments[2], state)
    text = exported.mlir_module()
    assert text.count("tpu_custom_call") == 2  # forward and backward
    assert "stablehlo.transpose" not in text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float16}, "query is float16; it must be bfloat16 or float32."),
        ({"key_dim": 16}, "K is 16; it must be from 32 to 1024."),
        (
            {"key_dim": 512, "value_dim": 1024},
            "a state of K * V = 524288 values is too large for VMEM; 262144 is the most.",
        ),
        ({"chunk_size": 48}, "chunk_size is 48; it must be None or one of 64, 128, 256."),
        ({"interpret": False}, "it needs a TPU, and the backend is cpu"),
        ({}, None),
    ],
)
def test_says_what_it_does_not_serve(change, reason):
    of = {"dtype": jnp.bfloat16, "key_dim": 64, "value_dim": 64, "chunk_size": None, "interpret": True} | change
    q = jax.ShapeDtypeStruct((1, 8, 2, of["key_dim"]), of["dtype"])
    v = jax.ShapeDtypeStruct((1, 8, 2, of["value_dim"]), of["dtype"])
    found = mosaic_tpu.unsupported(q, q, v, None, None, None, chunk_size=of["chunk_size"], interpret=of["interpret"])
    assert found == reason if reason is None else found.startswith(reason)
