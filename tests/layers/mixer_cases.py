"""What every sequence mixer must do, whatever it computes: a test file of a mixer subclasses `MixerCases`.

Most of the time goes into compiling, so everything runs under `jax.jit` on NumPy arrays, in few shapes; mixers that
work in chunks are given small ones, of which a row has several.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gla_jax.config import DtypeConfig, MeshConfig, ModelConfig
from gla_jax.layers import MIXERS
from gla_jax.models import abstract_model, bind
from gla_jax.parallel.mesh import make_mesh
from gla_jax.parallel.sharding import shard, whole_rows

B, T, D, H = 2, 12, 16, 4
HALF = T // 2
PREFILL = T - 2  # of a language model; cut in two on a mesh
VOCABULARY = 24


def make(mixer, options=None, *, seed=0, dtype=jnp.float32):
    """Return a layer whose parameters are all drawn anew, far from their beginnings."""
    layer_class = MIXERS[mixer]
    options = layer_class.Options(**(options or {}))
    layer = jax.eval_shape(lambda: layer_class(D, H, options, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, abstract = nnx.split(layer)
    return nnx.merge(graphdef, draw(nnx.to_pure_dict(abstract), seed))


def draw(abstract, seed=0):
    """Return float32 arrays of the given shapes."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.normal(0.1, 0.4, leaf.shape).astype(np.float32), abstract)


def inputs(batch_size=B, length=T, seed=1):
    return np.random.default_rng(seed).normal(size=(batch_size, length, D)).astype(np.float32)


@jax.jit
def call(layer, x, state=None, segment_ids=None, positions=None):
    return layer(x, state, segment_ids=segment_ids, positions=positions)


def join(*parts):
    return np.concatenate(parts, axis=1)


def assert_close(x, wanted, tolerance=1e-5):
    """Compare trees: the largest difference of a leaf against the root mean square of what is wanted."""

    def check(path, x, wanted):
        x, wanted = np.asarray(x, np.float64), np.asarray(wanted, np.float64)
        assert x.shape == wanted.shape, path
        error, scale = np.max(np.abs(x - wanted), initial=0), np.sqrt(np.mean(wanted**2))
        assert error <= 5 * tolerance * scale + 1e-12, (jax.tree_util.keystr(path), error, scale)

    jax.tree_util.tree_map_with_path(check, x, wanted)


def assert_equals_truth(layer, truth, tolerance=5e-6, **arguments):
    """Compare outputs and every gradient with a definition in float64.

    Args:
        layer: in float32.
        truth: (nested dict of parameters, x) -> y, in whatever precision the arguments have.
        tolerance: relative root-mean-square error.
        arguments: of the layer's call.
    """
    graphdef, params = nnx.split(layer)
    params, x = nnx.to_pure_dict(params), inputs()
    weight = np.random.default_rng(2).normal(size=x.shape)

    def compare(function, params, x):
        def loss(params, x):
            y = function(params, x)
            return jnp.sum(y * weight), y

        (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)
        return jax.tree.map(np.asarray, (y, gradients))

    got = compare(lambda params, x: nnx.merge(graphdef, params)(x, **arguments)[0], params, x)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), (params, x))
        wanted = compare(truth, *exact)

    def check(path, x, wanted):
        assert wanted.dtype == np.float64
        error = np.sqrt(np.mean((x - wanted) ** 2)) / np.sqrt(np.mean(wanted**2))
        assert error < tolerance, (jax.tree_util.keystr(path), error)

    jax.tree_util.tree_map_with_path(check, got, wanted)


class MixerCases:
    """The contract of `gla_jax.layers`, for one mixer and some of its options."""

    mixer: str
    variants: ClassVar[dict[str, dict]] = {"default": {}}
    bfloat16_tolerance = 3e-2
    intermediate_size = 16
    """Of the language model that the mixer is tried in."""

    def window_of(self, layer):
        """Return how many tokens a token can see."""
        return T

    @pytest.fixture(scope="class")
    @classmethod
    def layers(cls):
        return {name: make(cls.mixer, options) for name, options in cls.variants.items()}

    def test_prefill_and_steps_equal_the_whole(self, layers):
        x = inputs()
        describe = lambda state: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
        for layer in layers.values():
            beginning = layer.init_state(B)
            assert all(len(leaf) == B and not np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(beginning))
            whole, last = call(layer, x)
            y, state = call(layer, x[:, :HALF])
            parts = [y]
            for t in range(HALF, T):
                assert describe(state) == describe(beginning)
                y, state = call(layer, x[:, t : t + 1], state)
                parts.append(y)
            assert_close(join(*parts), whole)
            assert_close(state, last)
            assert_close(call(layer, x[:, :1], beginning)[0], whole[:, :1])

    def test_two_parts_of_packed_rows_equal_the_whole(self, layers):
        """The second part goes on in the first's document, whatever its id, and has a border of its own."""
        x = inputs()
        segment_ids = np.asarray([[5] * 3 + [2] * 6 + [5] * 3, [1] * 9 + [4] * 3], np.int32)
        positions = np.asarray([[*range(3), *range(6), *range(3)], [*range(9), *range(3)]], np.int32)
        for layer in layers.values():
            whole, last = call(layer, x, None, segment_ids, positions)
            parts, state = [], layer.init_state(B)
            for part in (slice(HALF), slice(HALF, T)):
                ids = segment_ids[:, part] + part.stop  # other ids, the same borders
                y, state = call(layer, x[:, part], state, ids, positions[:, part])
                parts.append(y)
            assert_close(join(*parts), whole)
            assert_close(call(layer, x[:, :1], state), call(layer, x[:, :1], last))

    def test_documents_in_a_row_equal_separate_rows(self, layers):
        x = inputs()
        segment_ids = np.asarray([[3] * HALF + [1] * HALF] * B, np.int32)
        positions = np.asarray([[*range(HALF)] * 2] * B, np.int32)
        for layer in layers.values():
            packed, state = call(layer, x, None, segment_ids, positions)
            first, _ = call(layer, x[:, :HALF])
            second, alone = call(layer, x[:, HALF:])
            assert_close(packed, join(first, second))
            assert_close(call(layer, x[:, :1], state)[0], call(layer, x[:, :1], alone)[0])

    def test_padding_on_the_left_changes_nothing(self, layers):
        """Row 0 is padded, row 1 is full; then single tokens follow, with positions as in sampling."""
        x, pads = inputs(), 100 * inputs(length=HALF, seed=9)
        rows = np.stack([np.concatenate([pads[0], x[0, :HALF]]), x[1]])
        segment_ids = np.asarray([[0] * HALF + [1] * HALF, [1] * T], np.int32)
        positions = np.asarray([[0] * HALF + [*range(HALF)], [*range(T)]], np.int32)
        for layer in layers.values():
            y, state = call(layer, rows, None, segment_ids, positions)
            wanted, alone = call(layer, x[:, :HALF])
            assert_close(y[0, HALF:], wanted[0])
            for t in range(3):
                token = inputs(length=1, seed=20 + t)
                y, state = call(layer, token, state, None, np.asarray([[HALF + t], [T + t]], np.int32))
                wanted, alone = call(layer, token, alone)
                assert_close(y[0], wanted[0])

    def test_a_token_sees_its_document_up_to_itself(self, layers):
        """By the gradient of every output: what is not seen has none, not even a small one."""
        x = inputs()
        segment_ids = np.asarray([[1] * 5 + [2] * 7, [1] * T], np.int32)
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        ages = np.arange(T)[:, None] - np.arange(T)
        for layer in layers.values():
            read = lambda x, t, layer=layer: jnp.sum(layer(x, segment_ids=segment_ids)[0][:, t])
            gradient = jax.jit(jax.grad(read))
            seen = np.stack([np.abs(gradient(x, t)).sum(-1) > 0 for t in range(T)], axis=1)  # [B, T of y, T of x]
            np.testing.assert_array_equal(seen, same & (ages >= 0) & (ages < self.window_of(layer)))

    def test_bfloat16_stays_close_to_float32(self, layers):
        for name, options in self.variants.items():
            low = make(self.mixer, options, dtype=jnp.bfloat16)
            y, state = call(low, inputs().astype(jnp.bfloat16))
            assert y.dtype == jnp.bfloat16
            assert jax.tree.map(lambda leaf: leaf.dtype, state) == jax.tree.map(
                lambda leaf: leaf.dtype, low.init_state(B)
            )
            wanted, _ = call(layers[name], inputs())
            error = np.sqrt(np.mean((np.asarray(y, np.float64) - wanted) ** 2) / np.mean(np.square(wanted)))
            assert error < self.bfloat16_tolerance, (name, error)

    # Inside a language model ------------------------------------------------------------------------------------------

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls):
        return ModelConfig(
            mixer=cls.mixer,
            vocab_size=VOCABULARY,
            hidden_size=D,
            num_layers=2,
            num_heads=H,
            intermediate_size=cls.intermediate_size,
            mixers={cls.mixer: next(iter(cls.variants.values()))},
        )

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, config):
        graphdef, abstract = abstract_model(config, FLOAT32)
        return graphdef, draw(abstract)

    def test_a_language_model_decodes_as_it_reads(self, model):
        whole, last = forward(*model, TOKENS)
        logits, state = forward(*model, TOKENS[:, :PREFILL])
        parts = [logits]
        for t in range(PREFILL, T):
            logits, state = forward(*model, TOKENS[:, t : t + 1], state)
            parts.append(logits)
        assert_close(join(*parts), whole, 2e-5)
        assert_close(state, last, 2e-5)

    def test_a_mesh_equals_one_device(self, config, model):
        """FSDP, sequence and tensor parallelism at once: the loss, every gradient, prefill and a step."""
        graphdef, params = model
        segment_ids = np.asarray([[1] * 5 + [2] * (T - 5)] * 8, np.int32)
        positions = np.asarray([[*range(5), *range(T - 5)]] * 8, np.int32)
        wanted = value_and_grad(graphdef, params, TOKENS, segment_ids, positions)
        logits, state = forward(graphdef, params, TOKENS[:, :PREFILL])
        token = TOKENS[:, PREFILL : PREFILL + 1]
        wanted_logits = join(logits, forward(graphdef, params, token, state)[0])
        with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, sequence=2, tensor=2), jax.devices()[:8])):
            graphdef, abstract = abstract_model(config, FLOAT32)
            params = jax.tree.map(lambda leaf, place: jax.device_put(leaf, place.sharding), params, abstract)
            row = lambda x: shard(jnp.asarray(x), "batch", "time")
            got = value_and_grad(graphdef, params, row(TOKENS), row(segment_ids), row(positions))
            logits, state = forward(graphdef, params, row(TOKENS[:, :PREFILL]))
            describe = lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding.spec)
            assert jax.tree.map(describe, state) == jax.tree.map(describe, bind(graphdef, params).init_state(8))
            with whole_rows():
                step, _ = forward(graphdef, params, row(token), state)
        places = lambda tree: jax.tree.map(lambda leaf: leaf.sharding, tree)
        assert places(got[1]) == places(params)
        # Sums over devices are added up in another order; a sum that is missing would be off by far more.
        assert_close(jax.device_get(got), wanted, 4e-5)
        assert_close(join(*jax.device_get((logits, step))), wanted_logits, 2e-5)


FLOAT32 = DtypeConfig(compute="float32")
TOKENS = np.random.default_rng(3).integers(0, VOCABULARY, (8, T)).astype(np.int32)


@jax.jit(static_argnums=0)
def forward(graphdef, params, input_ids, state=None):
    return bind(graphdef, params)(input_ids, state)


@jax.jit(static_argnums=0)
def value_and_grad(graphdef, params, input_ids, segment_ids, positions):
    def score(params):
        logits, _ = bind(graphdef, params)(input_ids, segment_ids=segment_ids, positions=positions)
        targets = jax.nn.one_hot(shard(input_ids, "batch", None), VOCABULARY, axis=-1)
        log_likelihoods = shard(jax.nn.log_softmax(logits), "batch", None, None)[:, :-1] * targets[:, 1:]
        return jnp.mean(jnp.sum(log_likelihoods, axis=-1))

    return jax.value_and_grad(score)(params)
