"""The Hopper kernels of the selective scan in the interpreter against float64, and their lowering for CUDA."""

import functools
import importlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_selective_scan as shared

from pallas_kernels.selective_scan import selective_scan, selective_scan_support

mosaic_gpu = importlib.import_module("pallas_kernels.selective_scan.mosaic_gpu")

# B, T, D, N, dtype, what else: fused = gate and bias of the step size, but for one of them; cut = rows in two parts;
# strong = A times 30; plain = no skip either
CASES = {
    "everything, cut": (1, 50, 128, 9, "float32", "fused segments cut"),
    "plain": (1, 16, 128, 16, "bfloat16", "plain"),
    "fused": (2, 48, 256, 16, "bfloat16", "fused segments"),
    "strong": (1, 33, 128, 16, "float32", "fused ungated strong"),
    "cut": (2, 70, 128, 4, "bfloat16", "fused unbiased cut"),
}
QUICK = ("everything, cut",)  # the others are variations, and the interpreter is slow
ON_A_GPU = CASES | {
    "long": (2, 2048, 256, 16, "bfloat16", "fused segments"),
    "long, float32": (1, 1000, 128, 16, "float32", "fused cut"),
    "four parts": (1, 1030, 128, 16, "bfloat16", "fused four segments"),
}


def check(case, *, interpret):
    """Compare y, the final state and all gradients with float64."""
    batch, time, channels, size, dtype, more = case
    fused, decay = "fused" in more, 30.0 if "strong" in more else 1.0
    arguments = shared.make(time, batch, time, channels, size, dtype=jnp.dtype(dtype), decay=decay, fused=fused)
    for name, without in (("gate", "ungated"), ("delta_bias", "unbiased"), ("D", "plain")):
        if without in more:
            del arguments[name]
    if "delta_bias" not in arguments:
        arguments["delta"] = jnp.abs(arguments["delta"])
    ids = None
    if "segments" in more:
        ids = jnp.asarray(np.cumsum(np.random.default_rng(time).random((batch, time)) < 0.1, axis=1), jnp.int32)
    parts = 4 if "four" in more else 2 if "cut" in more else 1
    with mock.patch.object(mosaic_gpu, "_parts", lambda x: parts):
        errors = shared.errors_against_truth(
            arguments, segment_ids=ids, implementation="mosaic_gpu", interpret=interpret
        )
    for name, error in errors.items():
        assert error < (5e-6 if dtype == "float32" else 4e-3), (name, errors)


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.long) for c in CASES])
def test_interpreter_matches_float64(case):
    check(CASES[case], interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")
@pytest.mark.parametrize("case", ON_A_GPU)
def test_hopper_matches_float64(case):
    check(ON_A_GPU[case], interpret=False)


def like(batch, time, channels, size=16, dtype=jnp.bfloat16):
    """Return the types of the arguments of a layer."""
    wide, narrow = (jax.ShapeDtypeStruct((batch, time, width), dtype) for width in (channels, size))
    a_channel = jax.ShapeDtypeStruct((channels,), jnp.float32)
    state = jax.ShapeDtypeStruct((channels, size), jnp.float32)
    shapes = {"x": wide, "delta": wide, "A": state, "B": narrow, "C": narrow, "D": a_channel}
    return shapes | {"gate": wide, "delta_bias": a_channel}


def kernel(**arguments):
    """Call the kernels as for a device that this machine need not have."""
    missing = dict.fromkeys(("D", "gate", "delta_bias", "initial_state", "segment_ids"))
    return mosaic_gpu.selective_scan(**(missing | arguments), chunk_size=None, interpret=False)


def program(loss, shapes):
    return jax.jit(jax.grad(loss)).trace(shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("shape", "cut"),
    [
        ((8, 2048, 4096), False),  # 1.3B
        pytest.param((16, 2048, 2048), False, marks=pytest.mark.long),  # 340M
        pytest.param((1, 16384, 4096), True, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_lowers_for_cuda(shape, cut):
    text = program(lambda a: sum(jnp.sum(y.astype(jnp.float32)) for y in kernel(**a)), like(*shape))
    assert "mamba_forward" in text and "mamba_backward" in text
    assert cut == ("mamba_written" in text) == ("mamba_wanted" in text)


def test_rows_are_cut_to_fill_the_device():
    for batch in range(1, 40):
        for channels in (128, 2048, 4096):
            for time in (1, 500, 2048, 16384):
                x = jax.ShapeDtypeStruct((batch, time, channels), jnp.bfloat16)
                parts = mosaic_gpu._parts(x)
                assert parts == 1 or (time >= 256 * parts and parts * batch * channels // 128 <= 256)
    assert mosaic_gpu._parts(like(1, 16384, 4096)["x"]) == 8
    assert mosaic_gpu._parts(like(8, 2048, 4096)["x"]) == mosaic_gpu._parts(like(16, 2048, 2048)["x"]) == 1


@pytest.mark.long
def test_recomputed_layers_run_no_kernel_for_nothing():
    """A scan over layers under `jax.checkpoint`: a forward that saves nothing, one that saves, and the backward."""

    def loss(arguments):
        layer = jax.checkpoint(lambda x, rest: kernel(x=x, **rest)[0])
        rest = {name: array for name, array in arguments.items() if name != "x"}
        x, _ = jax.lax.scan(lambda x, _: (layer(x, rest), None), arguments["x"], length=3)
        return jnp.sum(x.astype(jnp.float32))

    lines = [line for line in program(loss, like(1, 256, 128)).splitlines() if "@mosaic_gpu" in line]
    assert [line.rsplit("->", 1)[1].count("tensor<") for line in lines] == [2, 3, 8]


@pytest.mark.long
def test_vmap_equals_a_loop():
    """A sweep trains several models at once."""
    many = shared.make(0, 2, 32, 128, 16, fused=True)
    many = {name: jnp.stack([array, 0.5 * array]) for name, array in many.items()}
    loss = lambda a: sum(jnp.sum(jnp.sin(y)) for y in selective_scan(**a, implementation="mosaic_gpu", interpret=True))
    mapped = jax.jit(jax.grad(lambda a: jax.vmap(loss)(a).sum()))(many)
    each = [jax.jit(jax.grad(loss))({name: array[i] for name, array in many.items()}) for i in range(2)]
    for name, array in mapped.items():
        assert shared.error(array, jnp.stack([one[name] for one in each])) < 1e-6, name


@pytest.mark.long
@pytest.mark.parametrize(
    ("implementation", "devices"),
    [("chunked", 2), ("mosaic_gpu", 1)],  # the interpreter knows one device
)
def test_on_a_mesh_each_device_runs_its_own_part(implementation, devices, monkeypatch):
    arguments = shared.make(1, 2, 20, 256, 16, fused=True)
    layouts = {name: jax.P("rows", None, "channels") for name in ("x", "delta", "gate")}
    layouts |= {name: jax.P("rows") for name in ("B", "C")} | {name: jax.P("channels") for name in ("D", "delta_bias")}
    layouts |= {"A": jax.P("channels"), "initial_state": jax.P("rows", "channels")}

    def loss(arguments, **options):
        return sum(jnp.sum(jnp.sin(y)) for y in selective_scan(**arguments, **options))

    wanted = jax.grad(functools.partial(loss, implementation="chunked"))(arguments)
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    with jax.set_mesh(jax.make_mesh((devices, devices), ("rows", "channels"), axis_types=kinds)):
        placed = {name: jax.reshard(array, layouts[name]) for name, array in arguments.items()}
        options = {"implementation": implementation, "interpret": implementation == "mosaic_gpu"}
        gradients = jax.jit(jax.grad(functools.partial(loss, **options)))(placed)
        for name, array in gradients.items():
            assert jax.typeof(array).sharding.spec == jax.typeof(placed[name]).sharding.spec, name
            assert shared.error(array, wanted[name]) < 1e-5, name
        monkeypatch.setattr(mosaic_gpu, "unsupported", lambda **call: None)  # which asks for the devices of this test
        text = program(functools.partial(loss, implementation="mosaic_gpu"), placed)
    (backward,) = [line for line in text.splitlines() if "mamba_backward" in line]
    assert f"tensor<{2 // devices}x32x{8 // devices}x32x" in backward.rsplit("->", 1)[1]


def test_says_why_it_does_not_serve():
    def reason(*, interpret=True, chunk_size=None, **change):
        arguments = like(1, 32, 128) | change
        return selective_scan_support(**arguments, interpret=interpret, chunk_size=chunk_size)["mosaic_gpu"]

    half = jax.ShapeDtypeStruct((1, 32, 128), jnp.float16)
    assert reason() is None
    assert "would run on cpu" in reason(interpret=False)
    assert "delta is float16" in reason(delta=half)
    assert "chunks of 16" in reason(chunk_size=32)
    assert "multiples of 128" in reason(**like(1, 32, 192))
    assert "at most 16" in reason(**like(1, 32, 128, 32))
    wide = like(1, 32, 128, 32)
    with pytest.raises(
        NotImplementedError, match=r"not served by 'mosaic_gpu': a state has 32 numbers; .* at most 16\."
    ):
        jax.eval_shape(functools.partial(selective_scan, implementation="mosaic_gpu"), *list(wide.values())[:6])
