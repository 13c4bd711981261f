import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gla_jax.config import ConfigError, DtypeConfig, MeshConfig, ModelConfig
from gla_jax.layers import MIXERS, GatedLinearAttention
from gla_jax.models import abstract_model, bind, language_model, split_layers, stack_layers
from gla_jax.parallel.mesh import make_mesh
from gla_jax.parallel.sharding import shard

FLOAT32 = DtypeConfig(compute="float32")
PLAIN = {"gla": {"implementation": "reference"}}  # the op has its own tests
WITH_CONVOLUTION = {"gla": {"implementation": "reference", "use_short_conv": True, "num_kv_heads": 2}}
CONFIG = ModelConfig(vocab_size=24, hidden_size=16, num_layers=3, num_heads=4, intermediate_size=32, mixers=PLAIN)


class Ungated(GatedLinearAttention):
    """Another mixer, for hybrids: without output gate and with states of another shape."""

    def __init__(self, *args, **kwargs):
        hidden_size, num_heads, options = args
        options = dataclasses.replace(options, use_output_gate=False, expand_k=1.0)
        super().__init__(hidden_size, num_heads, options, **kwargs)


@pytest.fixture(autouse=True)
def ungated(monkeypatch):
    monkeypatch.setitem(MIXERS, "ungated", Ungated)


def make(config=CONFIG, dtype=FLOAT32):
    """Return a graphdef and random parameters, laid out on the mesh if there is one."""
    graphdef, abstract = abstract_model(config, dtype)
    random = np.random.default_rng(0)
    draw = lambda leaf: jax.device_put(random.normal(0.1, 0.3, leaf.shape).astype(leaf.dtype), leaf.sharding)
    return graphdef, jax.tree.map(draw, abstract)


def tokens(batch_size=4, length=12, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 24, (batch_size, length)), jnp.int32)


@jax.jit(static_argnums=0)
def forward(graphdef, params, input_ids, state=None, segment_ids=None):
    return bind(graphdef, params)(input_ids, state, segment_ids=segment_ids)


def score(graphdef, params, input_ids, segment_ids=None):
    """Return the mean log-likelihood of tokens, by the plain formula."""
    logits, _ = bind(graphdef, params)(input_ids, segment_ids=segment_ids)
    targets = jax.nn.one_hot((input_ids + 1) % 24, 24)
    return jnp.mean(jnp.sum(shard(jax.nn.log_softmax(logits), "batch", None, None) * targets, axis=-1))


value_and_grad = jax.jit(jax.value_and_grad(score, argnums=1), static_argnums=0)


def assert_close(x, wanted, tolerance=1e-5):
    def check(path, x, wanted):
        scale = np.sqrt(np.mean(np.square(wanted))) + 1e-12
        assert np.max(np.abs(np.asarray(x) - np.asarray(wanted))) < 10 * tolerance * scale, path

    jax.tree_util.tree_map_with_path(check, x, wanted)


@pytest.mark.parametrize("mixer", ["gla", ("gla", "gla", "ungated", "gla")])
def test_scanned_layers_equal_layers_one_by_one(mixer):
    config = dataclasses.replace(CONFIG, mixer=mixer, num_layers=3 if mixer == "gla" else 4)
    model = bind(*make(config))
    groups = ["layers"] if mixer == "gla" else ["layers_0_1", "layers_2_2", "layers_3_3"]
    input_ids = tokens()
    logits, state = jax.jit(lambda model, input_ids: model(input_ids))(model, input_ids)
    assert logits.shape == (4, 12, 24) and logits.dtype == jnp.float32
    assert list(state) == groups
    x = model.embed.embedding[...][input_ids]
    run = jax.jit(lambda block, x: block(x, None, segment_ids=None, positions=None))
    for group in groups:
        stack = getattr(model, group)
        for layer in range(len(stack.mixer_norm.scale[...])):
            x, last = run(jax.tree.map(lambda leaf, layer=layer: leaf[layer], stack), x)
            assert_close(jax.tree.map(lambda leaf, layer=layer: leaf[layer], state[group]), last)
    assert_close(logits, model.norm(x) @ model.embed.embedding[...].T)
    shapes = lambda state: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    assert shapes(model.init_state(4)) == shapes(state)


def test_layers_without_a_loop_equal_the_loop():
    memory, results = {}, {}
    for remat, unroll in (("none", False), ("none", True), ("full", True)):
        graphdef, params = make(dataclasses.replace(CONFIG, mixer=("gla", "gla", "ungated"), remat=remat))
        state = jax.tree.map(lambda leaf: leaf + 0.5, bind(graphdef, params).init_state(2))

        def total(params, state, graphdef=graphdef, unroll=unroll):
            hidden, state = bind(graphdef, params).hidden_states(tokens(2, 64), state, unroll=unroll)
            return jnp.sum(hidden**3), state

        compiled = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True)).lower(params, state).compile()
        memory[remat, unroll] = compiled.memory_analysis().temp_size_in_bytes
        results[remat, unroll] = compiled(params, state)
    assert_close(results["none", True], results["none", False])
    assert_close(results["full", True], results["none", False])
    assert memory["full", True] < 0.8 * memory["none", True]


def test_a_step_with_split_layers_equals_one_with_stacks():
    graphdef, params = make(dataclasses.replace(CONFIG, mixer=("gla", "gla", "ungated")), DtypeConfig())
    _, state = forward(graphdef, params, tokens())
    wanted = forward(graphdef, params, tokens(length=1), state)

    @jax.jit
    def step(params, state, input_ids):
        model, layers = split_layers(bind(graphdef, params), state)
        logits, layers = model(input_ids, layers)
        return logits, stack_layers(layers)

    results = step(params, state, tokens(length=1))
    jax.tree.map(np.testing.assert_array_equal, results, wanted)


def test_prefill_and_steps_equal_the_whole():
    graphdef, params = make(dataclasses.replace(CONFIG, mixers=WITH_CONVOLUTION))
    input_ids = tokens()
    whole, last = forward(graphdef, params, input_ids)
    logits, state = forward(graphdef, params, input_ids[:, :7])
    parts = [logits]
    for t in range(7, 12):
        logits, state = forward(graphdef, params, input_ids[:, t : t + 1], state)
        parts.append(logits)
    assert_close(jnp.concatenate(parts, axis=1), whole)
    assert_close(state, last)
    fresh, _ = forward(graphdef, params, input_ids, bind(graphdef, params).init_state(4))
    assert_close(fresh, whole)


def test_packed_documents_equal_separate_ones():
    graphdef, params = make(dataclasses.replace(CONFIG, mixers=WITH_CONVOLUTION))
    input_ids = tokens(batch_size=1)
    packed, _ = forward(graphdef, params, input_ids, None, jnp.asarray([[1] * 7 + [2] * 5]))
    assert_close(packed[:, :7], forward(graphdef, params, input_ids[:, :7])[0])
    assert_close(packed[:, 7:], forward(graphdef, params, input_ids[:, 7:])[0])


def test_no_token_sees_a_later_one():
    graphdef, params = make(dataclasses.replace(CONFIG, mixers=WITH_CONVOLUTION))
    model = bind(graphdef, params)
    x = model.embed(tokens(batch_size=1))

    @jax.jacrev
    def jacobian(x):
        run = lambda x, block: (block(x, None, segment_ids=None, positions=None)[0], None)
        return jnp.sum(jax.lax.scan(run, x, model.layers)[0][0], axis=-1)

    seen = np.abs(jacobian(x)[:, 0]).sum(-1) > 0
    np.testing.assert_array_equal(seen, np.tril(np.ones((12, 12), bool)))


def test_recomputation_saves_memory_and_changes_nothing():
    memory, results = {}, {}
    for remat in ("none", "dots", "full"):
        graphdef, params = make(dataclasses.replace(CONFIG, num_layers=16, remat=remat))
        compiled = value_and_grad.lower(graphdef, params, tokens(length=64)).compile()
        memory[remat] = compiled.memory_analysis().temp_size_in_bytes
        results[remat] = compiled(params, tokens(length=64))
    assert memory["full"] < 0.5 * memory["dots"] < 0.5 * memory["none"]
    assert_close(results["full"], results["none"])
    assert_close(results["dots"], results["none"])


def test_what_layers_start_from_can_wait_in_the_hosts_memory():
    results, programs = {}, {}
    for remat in ("full", "offload"):
        graphdef, params = make(dataclasses.replace(CONFIG, num_layers=3, remat=remat))
        programs[remat] = str(value_and_grad.trace(graphdef, params, tokens(length=16)).jaxpr)
        results[remat] = value_and_grad(graphdef, params, tokens(length=16))
    stack = f"<host>[3,{tokens().shape[0]},16,{CONFIG.hidden_size}]"
    assert stack in programs["offload"] and "<host>" not in programs["full"]
    jax.tree.map(np.testing.assert_array_equal, results["offload"], results["full"])


def test_bfloat16_stays_close_to_float32():
    graphdef, params = make()
    low, low_params = make(dtype=DtypeConfig(compute="bfloat16"))
    jax.tree.map(np.testing.assert_array_equal, low_params, params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(low_params))
    logits, _ = forward(low, params, tokens())
    wanted, _ = forward(graphdef, params, tokens())
    assert logits.dtype == jnp.float32
    assert np.sqrt(np.mean((logits - wanted) ** 2) / np.mean(wanted**2)) < 5e-2
    (value, gradient), (wanted, wanted_gradient) = (value_and_grad(g, params, tokens()) for g in (low, graphdef))
    assert abs(value - wanted) < 2e-2 * abs(wanted)
    norm = lambda tree: np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))
    assert norm(jax.tree.map(jnp.subtract, gradient, wanted_gradient)) < 0.1 * norm(wanted_gradient)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))


def test_gradients_of_frequent_tokens_are_summed_in_float32():
    graphdef, params = make(dtype=DtypeConfig(compute="bfloat16"))
    embed = lambda params, ids: jnp.sum(bind(graphdef, params).embed(ids).astype(jnp.float32))
    gradient = jax.grad(embed)(params, jnp.zeros((4, 250), jnp.int32))
    np.testing.assert_array_equal(gradient["embed"]["embedding"][0], 1000)  # bfloat16 stops counting at 256


def test_sorting_tokens_changes_no_gradient_of_the_table():
    random = np.random.default_rng(0)
    table, wanted = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((11, 5), (2, 4, 9, 5)))
    ids = random.choice(11, (4, 9), p=[0.5, *[0.05] * 10])
    gradient = lambda wanted: jax.vjp(lambda table: language_model.look_up(table, ids), table)[1](wanted)[0]
    expected = np.zeros((2, 11, 5))
    np.add.at(expected, (slice(None), ids), wanted)
    np.testing.assert_allclose(jax.vmap(gradient)(wanted), expected, atol=1e-5)
    np.testing.assert_array_equal(language_model.look_up(table, ids), table[ids])


def test_dropout_takes_entries_for_zero_and_keeps_the_mean():
    graphdef, params = make(dataclasses.replace(CONFIG, num_layers=1, embedding_dropout=0.25, hidden_size=64))
    model, ids = bind(graphdef, params), jnp.arange(24).reshape(2, 12)
    seen = []
    model.layers, model.groups = None, ()  # what is left is embedding and norm
    model.norm = lambda x: seen.append(x) or x
    for key in (None, jax.random.key(0), jax.random.key(1)):
        model.hidden_states(ids, dropout_key=key)
    whole, one, other = seen
    kept = one != 0
    assert 0.7 < kept.mean() < 0.8 and (kept != (other != 0)).any()
    np.testing.assert_allclose(jnp.where(kept, one, 0), jnp.where(kept, whole / 0.75, 0), rtol=1e-6)


def test_a_token_outside_the_vocabulary_is_not_taken_for_another():
    graphdef, params = make()
    logits, _ = forward(graphdef, params, tokens().at[0, 5].set(24))
    assert np.all(np.isnan(logits[0, 5:])) and not np.any(np.isnan(logits[0, :5])) and not np.any(np.isnan(logits[1:]))


def test_an_untied_head_is_another_matrix():
    graphdef, params = make(dataclasses.replace(CONFIG, tie_embeddings=False))
    assert params["head"]["kernel"].shape == (16, 24)
    model = bind(graphdef, params)
    hidden, _ = model.hidden_states(tokens())
    assert_close(model.logits(hidden), hidden @ params["head"]["kernel"])
    assert_close(model(tokens())[0], model.logits(hidden))
    tied, _ = abstract_model(CONFIG, FLOAT32)
    del params["head"]
    np.testing.assert_array_equal(bind(tied, params).head_matrix(), params["embed"]["embedding"].T)


MESHES = [
    ({"fsdp": 8}, "reference"),
    ({"tensor": 4}, "reference"),
    ({"data": 4}, "reference"),
    ({"data": 2, "fsdp": 2, "tensor": 2}, None),
    ({"sequence": 2, "fsdp": 2, "tensor": 2}, None),
]


def for_meshes(implementation):
    mixers = {"gla": {"implementation": implementation, "use_short_conv": True}}
    return dataclasses.replace(CONFIG, mixers=mixers, tie_embeddings=False)


@pytest.fixture(scope="module")
def on_one_device():
    segment_ids = jnp.asarray([[1] * 5 + [2] * 7] * 8)
    return segment_ids, value_and_grad(*make(for_meshes("reference")), tokens(8), segment_ids)


@pytest.mark.parametrize(("sizes", "implementation"), MESHES, ids=lambda x: "-".join(x) if isinstance(x, dict) else x)
def test_a_mesh_equals_one_device(sizes, implementation, on_one_device):
    segment_ids, wanted = on_one_device
    sizes = {"fsdp": 1} | sizes
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: int(np.prod(list(sizes.values())))])
    with jax.set_mesh(mesh):
        graphdef, params = make(for_meshes(implementation))
        input_ids = shard(tokens(8), "batch", "time")
        value, gradient = value_and_grad(graphdef, params, input_ids, shard(segment_ids, "batch", "time"))
    assert_close((value, gradient), wanted)
    jax.tree.map(lambda leaf, param: leaf.sharding == param.sharding or pytest.fail(str(leaf)), gradient, params)
    query = gradient["layers"]["mixer"]["query"]["kernel"]
    assert query.addressable_shards[0].data.size * sizes["fsdp"] * sizes.get("tensor", 1) == query.size


def test_a_mesh_decodes_as_one_device():
    config = dataclasses.replace(CONFIG, mixers=WITH_CONVOLUTION)
    graphdef, params = make(config)
    wanted, wanted_state = forward(graphdef, params, tokens())
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        graphdef, params = make(config)
        state = bind(graphdef, params).init_state(4)
        assert state["layers"]["recurrent"].sharding.spec == jax.P(None, ("data", "fsdp"), "tensor", None, None)
        logits, state = forward(graphdef, params, shard(tokens()[:, :11], "batch", None), state)
        last, state = forward(graphdef, params, shard(tokens()[:, 11:], "batch", None), state)
    assert_close(jnp.concatenate([jax.device_get(logits), jax.device_get(last)], axis=1), wanted)
    assert_close(jax.device_get(state), wanted_state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": None}, "model.vocab_size=None must be known by now; take the tokeniser's."),
        ({"mixer": "gal"}, "model.mixer='gal' is unknown; did you mean 'gla'?"),
        ({"mixer": ("gla", "gla")}, "model.mixer lists 2 layers, which model.num_layers=3 must be."),
        ({"num_heads": 3}, "model.num_heads=3 does not divide model.hidden_size*expand_k=8; try 2 or 4."),
        ({"remat": "ful"}, "model.remat='ful' is unknown; did you mean 'full'?"),
        ({"num_layers": 0}, "model.num_layers=0 must be at least 1."),
    ],
)
def test_mistakes_are_said_in_one_sentence(changes, message):
    with pytest.raises(ConfigError) as error:
        abstract_model(dataclasses.replace(CONFIG, **changes), FLOAT32)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        ({"tensor": 8}, {}, "mesh.tensor=8 does not divide model.num_heads=4; try 4."),
        (
            {"tensor": 4}, {"mixers": WITH_CONVOLUTION},
            "mesh.tensor=4 does not divide model.mixers.gla.num_kv_heads=2; try 2.",
        ),
        (
            {"tensor": 4}, {"vocab_size": 258},
            "mesh.tensor=4 does not divide the 'vocab' axis of embed/embedding=258; try 3 or 6.",
        ),
        (
            {"fsdp": 8}, {"hidden_size": 20, "num_heads": 2},
            "mesh.fsdp=8 does not divide the 'embed' axis of embed/embedding=20; try 5 or 10.",
        ),
    ],
)  # fmt: skip
def test_a_mesh_that_does_not_divide_the_model_is_refused(sizes, changes, message):
    sizes = {"fsdp": 1} | sizes
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: int(np.prod(list(sizes.values())))])
    with jax.set_mesh(mesh), pytest.raises(ConfigError) as error:
        abstract_model(dataclasses.replace(CONFIG, **changes), FLOAT32)
    assert str(error.value) == message
