"""Every implementation of the selective scan against the recurrence in float64, forward and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.selective_scan import selective_scan, selective_scan_step

IMPLEMENTATIONS = ("reference", "chunked")  # the Hopper kernels have a file of their own
NAMES = ("x", "delta", "A", "B", "C", "D", "initial_state")
FUSED = ("gate", "delta_bias")


def make(seed, batch, time, channels, size, *, dtype=np.float32, decay=1.0, fused=False):
    """Draw arguments; `decay` multiplies A, whose entries are those of Mamba's initialisation.

    With `fused` there are a gate and a bias of the step size too.
    """
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape)
    arguments = {
        "x": normal(batch, time, channels),
        "delta": np.exp(rng.uniform(np.log(1e-3), np.log(1.0), (batch, time, channels))),
        "A": -decay * np.arange(1, size + 1) * np.ones((channels, 1)),
        "B": normal(batch, time, size),
        "C": normal(batch, time, size),
        "D": normal(channels),
        "initial_state": normal(batch, channels, size),
    }
    if fused:
        arguments["delta"] = normal(batch, time, channels)
        arguments |= {"gate": normal(batch, time, channels), "delta_bias": rng.uniform(-7, 1, channels)}
    cast = lambda name, array: array.astype(dtype if name in ("x", "delta", "B", "C", "gate") else np.float32)
    return {name: jnp.asarray(cast(name, array)) for name, array in arguments.items()}


def truth(arguments, segment_ids=None):
    """Return (y, state) by the definition, in whatever precision the arguments have."""
    x, delta, A, B, C, D, state = (arguments.get(name, 0.0) for name in NAMES)
    gate, delta_bias = (arguments.get(name) for name in FUSED)
    if delta_bias is not None:
        delta = jax.nn.softplus(delta + delta_bias)

    def body(state, token):
        x, delta, B, C, start = token
        state = jnp.where(start[:, None, None], 0.0, state)
        state = jnp.exp(delta[:, :, None] * A) * state + (delta * x)[:, :, None] * B[:, None, :]
        return state, jnp.einsum("bdn,bn->bd", state, C) + D * x

    ids = np.zeros(x.shape[:2], np.int32) if segment_ids is None else np.asarray(segment_ids)
    starts = np.diff(ids, axis=1, prepend=ids[:, :1]) != 0
    state, y = jax.lax.scan(body, state, (*(jnp.moveaxis(a, 1, 0) for a in (x, delta, B, C)), jnp.asarray(starts).T))
    y = jnp.moveaxis(y, 0, 1)
    return y if gate is None else y * jax.nn.silu(gate), state


def value_and_gradients(function, arguments, cotangents):
    """Return the results of `function` and the gradients of their product with `cotangents`."""
    results, pull = jax.vjp(function, arguments)
    return results, pull(jax.tree.map(lambda c, r: jnp.asarray(c, r.dtype), cotangents, results))[0]


def error(got, wanted):
    """Return the root-mean-square difference over the root-mean-square of what is wanted."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape and np.all(np.isfinite(got))
    # The least float32 stands in for a truth of zero, which must then be met exactly.
    return np.sqrt(np.mean((got - wanted) ** 2)) / max(np.sqrt(np.mean(wanted**2)), 1e-38)


def errors_against_truth(arguments, *, segment_ids=None, **options):
    """Return the errors of y, the state and every gradient."""
    rng = np.random.default_rng(7)
    y_shape, state_shape = arguments["x"].shape, arguments["initial_state"].shape
    cotangents = (rng.standard_normal(y_shape).astype(arguments["x"].dtype), rng.standard_normal(state_shape))
    with jax.enable_x64(True):
        exact = {name: jnp.asarray(np.asarray(array, np.float64)) for name, array in arguments.items()}
        wanted = value_and_gradients(functools.partial(truth, segment_ids=segment_ids), exact, cotangents)
        wanted = jax.tree.map(np.asarray, wanted)
    call = jax.jit(lambda arguments: selective_scan(**arguments, segment_ids=segment_ids, **options))
    got = value_and_gradients(call, arguments, cotangents)
    (y, state), gradients = got
    assert y.dtype == arguments["x"].dtype and state.dtype == jnp.float32
    assert all(gradients[name].dtype == arguments[name].dtype for name in arguments)
    errors = {"y": error(y, wanted[0][0]), "state": error(state, wanted[0][1])}
    return errors | {"d" + name: error(gradients[name], wanted[1][name]) for name in arguments}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("batch", "time", "channels", "size", "chunk_size"),
    [(1, 1, 3, 1, None), (2, 7, 5, 4, None), (2, 64, 8, 16, 16), (1, 200, 6, 16, None), (3, 33, 4, 5, 8)],
)
def test_matches_the_truth(implementation, batch, time, channels, size, chunk_size):
    arguments = make(time, batch, time, channels, size)
    errors = errors_against_truth(arguments, implementation=implementation, chunk_size=chunk_size)
    assert max(errors.values()) < 3e-6, errors


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_is_rounded_once(implementation):
    """All arithmetic is in float32: only results in bfloat16 carry its rounding, about 2^-9."""
    errors = errors_against_truth(make(1, 2, 100, 8, 16, dtype=jnp.bfloat16), implementation=implementation)
    for name, value in errors.items():
        assert value < (3e-3 if name in ("y", "dx", "ddelta", "dB", "dC") else 3e-6), errors


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gate_and_bias_of_the_step_size(implementation):
    errors = errors_against_truth(make(8, 2, 50, 4, 8, fused=True), implementation=implementation)
    assert max(errors.values()) < 5e-6, errors


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("decay", [0.0, 30.0, 1e6])
def test_any_decay_is_safe(implementation, decay):
    """From none at all to states that live for less than a token."""
    arguments = make(2, 2, 150, 4, 8, decay=decay)
    errors = errors_against_truth(arguments, implementation=implementation)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_segments_reset_the_state(implementation):
    ids = np.repeat([[3, 1, 1, 3], [0, 5, 2, 2]], [1, 30, 24, 25], axis=1).astype(np.int32)
    arguments = make(3, 2, 80, 4, 8)
    errors = errors_against_truth(arguments, segment_ids=jnp.asarray(ids), implementation=implementation, chunk_size=16)
    assert max(errors.values()) < 3e-6, errors
    read = lambda x: selective_scan(**(arguments | {"x": x}), segment_ids=jnp.asarray(ids))[0][0, 60].sum()
    seen = np.any(np.asarray(jax.grad(read)(arguments["x"]))[0] != 0, axis=1)
    np.testing.assert_array_equal(np.flatnonzero(seen), np.arange(55, 61))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("split", [1, 16, 45])
def test_two_halves_and_steps_equal_the_whole(implementation, split):
    arguments = make(4, 2, 60, 4, 8, fused=True)
    whole = selective_scan(**arguments, implementation=implementation, chunk_size=16)
    cut = lambda piece: arguments | {n: arguments[n][:, piece] for n in ("x", "delta", "B", "C", "gate")}
    y, state = selective_scan(**cut(slice(split)), implementation=implementation, chunk_size=16)
    rest = cut(slice(split, None)) | {"initial_state": state}
    second, final = selective_scan(**rest, implementation=implementation, chunk_size=16)
    np.testing.assert_allclose(jnp.concatenate([y, second], axis=1), whole[0], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(final, whole[1], rtol=2e-5, atol=2e-5)
    for t in range(split, min(split + 5, 60)):
        token = {name: arguments[name][:, t] for name in ("x", "delta", "B", "C", "gate")}
        of_channel = {name: arguments[name] for name in ("A", "D", "delta_bias")}
        y_t, state = selective_scan_step(**token, **of_channel, state=state)
        np.testing.assert_allclose(y_t, whole[0][:, t], rtol=2e-5, atol=2e-5)


def test_optional_arguments_are_zeros():
    arguments = make(5, 2, 20, 4, 8)
    zeros = {name: jnp.zeros_like(arguments[name]) for name in ("D", "initial_state")}
    given = selective_scan(**(arguments | zeros))
    omitted = selective_scan(**{name: array for name, array in arguments.items() if name not in zeros})
    jax.tree.map(np.testing.assert_array_equal, given, omitted)


def test_program_and_memory_do_not_grow_with_time():
    """The program has one size; beside the inputs, the backward pass keeps one state per chunk."""

    def compile(time, chunk_size=32):
        arguments = jax.eval_shape(lambda: make(0, 1, time, 16, 16))
        loss = lambda arguments: selective_scan(**arguments, chunk_size=chunk_size)[0].sum()
        text = str(jax.make_jaxpr(jax.grad(loss))(arguments))
        residuals = jax.eval_shape(lambda arguments: jax.vjp(loss, arguments)[1], arguments)
        return len(text.splitlines()), sum(leaf.size for leaf in jax.tree.leaves(residuals))

    (short, _), (long, kept) = compile(64), compile(640)
    assert short == long
    inputs = 640 * (16 * 3 + 16 * 2) + 16 * 16
    states = 640 // 32 * 16 * 16
    assert kept <= inputs + states + 32 * 16, (kept, inputs, states)


def test_vmap_and_shard_map():
    arguments = make(6, 4, 40, 4, 8)
    whole = selective_scan(**arguments)
    stacked = {n: a if n in ("A", "D") else a.reshape(2, 2, *a.shape[1:]) for n, a in arguments.items()}
    axes = {name: None if name in ("A", "D") else 0 for name in NAMES}
    mapped = jax.vmap(lambda arguments: selective_scan(**arguments), in_axes=(axes,))(stacked)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-5, atol=1e-5), mapped, whole)

    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    rows, all_rows = jax.P("rows"), jax.P()
    specs = {name: all_rows if name in ("A", "D") else rows for name in NAMES}

    def loss(arguments):
        return jnp.sum(sharded(arguments)[0] ** 2)

    with jax.set_mesh(mesh):
        sharded = jax.shard_map(
            lambda arguments: selective_scan(**arguments), in_specs=(specs,), out_specs=(rows, rows)
        )
        placed = {name: jax.device_put(a, jax.NamedSharding(mesh, specs[name])) for name, a in arguments.items()}
        got = jax.jit(jax.grad(loss))(placed)
    wanted = jax.grad(lambda arguments: jnp.sum(selective_scan(**arguments)[0] ** 2))(arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((2, 4))}, r"x has shape \(2, 4\); it must be of rank 3"),
        ({"A": jnp.zeros((5, 8))}, r"A has shape \(5, 8\); it must be \[4, state size\]"),
        ({"delta": jnp.zeros((2, 20, 3))}, r"delta has shape \(2, 20, 3\); it must be \(2, 20, 4\)"),
        ({"B": jnp.zeros((2, 20, 4))}, r"B has shape"),
        ({"C": jnp.zeros((2, 20, 8), jnp.int32)}, r"C is int32; it must be float32, bfloat16, float16"),
        ({"D": jnp.zeros(3)}, r"D has shape \(3,\); it must be \(4,\)"),
        ({"gate": jnp.zeros((2, 20, 3))}, r"gate has shape \(2, 20, 3\); it must be \(2, 20, 4\)"),
        ({"delta_bias": jnp.zeros(4, jnp.int32)}, "delta_bias is int32"),
        ({"initial_state": jnp.zeros((2, 4, 8), jnp.bfloat16)}, r"initial_state is bfloat16\[2, 4, 8\]"),
        ({"segment_ids": jnp.zeros((2, 19), jnp.int32)}, r"segment_ids is int32\[2, 19\]; it must be int32\[2, 20\]"),
        ({"chunk_size": 0}, r"chunk_size is 0"),
        ({"implementation": "fast"}, r"implementation is 'fast'; it must be None, one of reference, chunked"),
    ],
)
def test_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**(make(0, 2, 20, 4, 8) | change))


def test_step_says_what_is_wrong():
    arguments = make(0, 2, 20, 4, 8)
    token = {name: arguments[name][:, 0] for name in ("x", "delta", "B", "C")} | {"A": arguments["A"], "D": None}
    with pytest.raises(ValueError, match="x has shape"):
        selective_scan_step(**(token | {"x": arguments["x"]}), state=arguments["initial_state"])
    with pytest.raises(ValueError, match="state is None"):
        selective_scan_step(**token, state=None)
    with pytest.raises(ValueError, match="state is float32"):
        selective_scan_step(**token, state=jnp.zeros((2, 4, 7)))
