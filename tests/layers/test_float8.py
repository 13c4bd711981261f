import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gla_jax.config import ConfigError, MeshConfig, ModelConfig, build
from gla_jax.layers.float8 import GRADIENTS, VALUES, float8_dot, float8_dots, float8_gated, round_to
from gla_jax.layers.linear import Linear
from gla_jax.models.language_model import LanguageModel
from gla_jax.parallel.mesh import make_mesh
from gla_jax.parallel.sharding import gather_weight, share, spec


def random(seed, shape, size=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * size, jnp.bfloat16)


def error(x, wanted):
    x, wanted = np.asarray(x, np.float64), np.asarray(wanted, np.float64)
    return np.sqrt(np.mean((x - wanted) ** 2) / np.mean(wanted**2))


@pytest.mark.parametrize(("dtype", "bits"), [(VALUES, 3), (GRADIENTS, 2)])
@pytest.mark.parametrize("size", [1e-20, 1e-5, 1.0, 448.0, 1e30])
def test_rounds_by_half_a_unit_at_any_size(dtype, bits, size):
    x = np.float32(size) * np.random.default_rng(0).uniform(1e-2, 1, 1000).astype(np.float32)
    rounded, scale = round_to(jnp.asarray(x), dtype)
    assert rounded.dtype == dtype and np.log2(float(scale)) % 1 == 0
    np.testing.assert_allclose(np.asarray(rounded, np.float32) * float(scale), x, rtol=2.0 ** -(bits + 1))
    assert np.asarray(rounded, np.float32).max() > float(jnp.finfo(dtype).max) / 2.01  # no bit is given away


def test_zeros_stay_and_what_is_not_finite_is_seen():
    rounded, scale = round_to(jnp.zeros(4), VALUES)
    assert float(scale) > 0 and not np.asarray(rounded, np.float32).any()
    product = float8_dot(jnp.full((1, 2), jnp.inf), jnp.ones((2, 2)))
    assert np.isnan(np.asarray(product)).all()


def products(x, kernel, gradient):
    """The product and its gradients, in float64."""
    x, kernel, gradient = (np.asarray(a, np.float64) for a in (x, kernel, gradient))
    return x @ kernel, gradient @ kernel.T, x.T @ gradient


def test_equals_the_product_of_the_rounded_factors():
    x, kernel, gradient = random(0, (48, 64)), random(1, (64, 80), 0.02), random(2, (48, 80), 1e-6)
    y, pull = jax.vjp(float8_dot, x, kernel)
    got = (y, *pull(gradient))
    assert [a.dtype for a in got] == [jnp.bfloat16] * 3
    back = lambda pair: np.asarray(pair[0], np.float64) * float(pair[1])
    rounded = products(*map(back, (round_to(x, VALUES), round_to(kernel, VALUES), round_to(gradient, GRADIENTS))))
    # A factor is off by half of 1/8 or 1/4 of itself at most, about a third of that on the average.
    for ours, theirs, exact, most in zip(got, rounded, products(x, kernel, gradient), (0.05, 0.08, 0.08), strict=True):
        assert error(ours, theirs) < 4e-3
        assert error(ours, exact) < most


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_a_gated_product_is_what_two_products_make(size):
    # Where gates are large, swish is the identity or 0, and the bounds of its gradients hold only just.
    x, gradient = random(0, (48, 64), size), random(3, (48, 80), 1e-6)
    gate, up = random(1, (64, 80), 0.1), random(2, (64, 80), 0.1)

    def gated(x, gate, up, dot=jnp.matmul):
        return jax.nn.silu(dot(x, gate)) * dot(x, up)

    with jax.enable_x64(True):
        exact, pull = jax.vjp(gated, *(jnp.asarray(np.asarray(a, np.float64)) for a in (x, gate, up)))
        exact = (exact, *pull(jnp.asarray(np.asarray(gradient, np.float64))))
    y, pull = jax.vjp(float8_gated, x, gate, up)
    got = (y, *pull(gradient))
    y, pull = jax.vjp(lambda *a: gated(*a, dot=float8_dot), x, gate, up)
    assert [a.dtype for a in got] == [jnp.bfloat16] * 4
    for ours, theirs, wanted in zip(got, (y, *pull(gradient)), exact, strict=True):
        assert error(ours, wanted) < min(0.16, 1.1 * error(theirs, wanted))
        assert np.isfinite(np.asarray(ours, np.float32)).all()


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}])
def test_is_the_same_on_a_mesh(mesh):
    x, kernel, gradient = random(0, (16, 64)), random(1, (64, 80), 0.02), random(2, (16, 80), 1e-6)

    @jax.jit
    def on_mesh(x, kernel, gradient):
        place = lambda x, *axes: jax.sharding.reshard(x, spec(*axes))

        def multiply(function, *kernels):
            def run(x, *kernels):
                kernels = (gather_weight(kernel, "embed", "mlp") for kernel in kernels)
                return function(share(x, "mlp", "batch", None), *kernels, spec("batch", "mlp"))

            y, pull = jax.vjp(run, place(x, "batch", None), *(place(kernel, "embed", "mlp") for kernel in kernels))
            return y, *pull(place(gradient, "batch", "mlp"))

        return *multiply(added, kernel, kernel[::-1]), *multiply(float8_gated, kernel, -kernel)

    def added(x, a, b, sharding=None):
        return sum(float8_dots(x, (a, b), sharding))

    def alone(function, *kernels):
        y, pull = jax.vjp(function, x, *kernels)
        return y, *pull(gradient)

    with jax.set_mesh(make_mesh(MeshConfig(**({"fsdp": 1} | mesh)))):
        got = on_mesh(x, kernel, gradient)
    for ours, wanted in zip(
        got, (*alone(added, kernel, kernel[::-1]), *alone(float8_gated, kernel, -kernel)), strict=True
    ):
        assert error(ours, wanted) < 4e-3  # sums in another order, in bfloat16


def test_a_model_multiplies_so_in_its_wide_maps_alone():
    config = ModelConfig(hidden_size=64, num_layers=1, num_heads=1, vocab_size=80, tie_embeddings=False)
    model = LanguageModel(config, float8=True, rngs=nnx.Rngs(0))
    named = {"/".join(map(str, path)): m for path, m in nnx.iter_graph(model) if isinstance(m, Linear)}
    plain = {name.rpartition("/")[2] for name, m in named.items() if not m.float8}
    assert plain == {"query", "key", "forget_gate_down", "forget_gate_up", "head"}  # K = 32, a rank of 16; the head
    text = str(jax.make_jaxpr(model)(jnp.zeros((1, 4), jnp.int32)))
    rounded = text.count("new_dtype=float8_e4m3fn")
    assert rounded == 2 * 6 - 1  # both factors of value, output gate, output; gate and up, which share one, and down


def test_a_config_says_so():
    assert build({"dtype": {"matmul": "float8"}}).dtype.matmul == "float8"
    with pytest.raises(ConfigError, match=r"dtype\.matmul='float4' is unknown; choose one of 'compute', 'float8'"):
        build({"dtype": {"matmul": "float4"}})
