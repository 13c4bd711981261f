"""The language model: embedding, blocks of (mixer, SwiGLU), head. It never asks which mixer it has."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from gla_jax.config import ConfigError, ModelConfig
from gla_jax.layers import MIXERS
from gla_jax.layers.check import check_one_of
from gla_jax.layers.float8 import FLOAT8_LEAST
from gla_jax.layers.linear import Linear, linear
from gla_jax.layers.mlp import SwiGLU
from gla_jax.layers.norm import RMSNorm
from gla_jax.parallel.sharding import gather_weight, in_mesh, out_sharding, shard
from pallas_kernels.target import target

_LAYER_INPUT = "layer_input"
REMAT_POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""What a layer keeps for its backward pass, by `model.remat`; "none" is no checkpoint at all."""


class Embedding(nnx.Module):
    """A table of vectors, one per token.

    Args:
        vocab_size: number of rows.
        hidden_size: model dimension D.
        initializer_range: standard deviation of the entries.
        dtype: dtype of what is looked up.
        param_dtype: dtype that the table is held in.
        rngs: source of randomness.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        initializer_range: float,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        table = jax.nn.initializers.normal(initializer_range)(rngs.params(), (vocab_size, hidden_size), param_dtype)
        self.embedding = nnx.Param(table, axes=("vocab", "embed"))

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        """Look up input_ids [B, T]; the result is [B, T, D], NaN for ids outside the table."""
        # The table is cast after the look-up, so that the gradients of a frequent token are summed in float32.
        with jax.named_scope("embed"):
            table = gather_weight(self.embedding[...], "vocab", "embed")
            if not in_mesh() and target().platform == "gpu":
                return look_up(table, input_ids).astype(self.dtype)
            sharding = out_sharding("batch", "time", "hidden") if in_mesh() else None
            rows = table.at[input_ids].get(mode="fill", fill_value=jnp.nan, out_sharding=sharding)
            return rows.astype(self.dtype)


@jax.custom_vjp
def look_up(table: jax.Array, input_ids: jax.Array) -> jax.Array:
    """Return the rows of a table [vocab, D] for input_ids [B, T], with a gradient that sorts the tokens.

    A GPU adds the gradients of tokens to rows by atomics, and those of a frequent token wait for each other. Where
    it is told that tokens are sorted, it adds neighbours in registers first.
    """
    return table.at[input_ids].get(mode="fill", fill_value=jnp.nan)


def _look_up_forward(table: jax.Array, input_ids: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return look_up(table, input_ids), (input_ids, jnp.zeros((table.shape[0], 0), table.dtype))


def _look_up_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None]:
    input_ids, empty_table = saved
    ids, rows = input_ids.reshape(-1), gradient.reshape(-1, gradient.shape[-1])
    order = jnp.argsort(ids)
    zeros = jnp.zeros((empty_table.shape[0], rows.shape[1]), empty_table.dtype)
    return zeros.at[ids[order]].add(rows[order].astype(zeros.dtype), mode="drop", indices_are_sorted=True), None


look_up.defvjp(_look_up_forward, _look_up_backward)


class Block(nnx.Module):
    """x + mixer(norm(x)), then, if `intermediate_size` is not 0, x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, mixer: str, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        norm = functools.partial(
            RMSNorm, config.hidden_size, epsilon=config.norm_eps, param_dtype=param_dtype, rngs=rngs
        )
        self.mixer_norm = norm()
        self.mixer = MIXERS[mixer](
            config.hidden_size,
            config.num_heads,
            mixer_options(config, mixer),
            norm_eps=config.norm_eps,
            initializer_range=config.initializer_range,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.mlp_norm = self.mlp = nnx.data(None)
        if config.intermediate_size != 0:
            self.mlp_norm = norm()
            self.mlp = SwiGLU(
                config.hidden_size,
                config.intermediate_size,
                initializer_range=config.initializer_range,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

    def __call__(
        self, x: jax.Array, state: Any, *, segment_ids: jax.Array | None, positions: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """Map x [B, T, D] to [B, T, D] and the mixer's state to the next."""
        with jax.named_scope("norm"):
            normalised = self.mixer_norm(x)
        with jax.named_scope("mixer"):
            mixed, state = self.mixer(normalised, state, segment_ids=segment_ids, positions=positions)
            x = x + mixed
        if self.mlp is not None and self.mlp_norm is not None:
            with jax.named_scope("norm"):
                normalised = self.mlp_norm(x)
            with jax.named_scope("mlp"):
                x = x + self.mlp(normalised)
        return x, state

    def flops_per_token(self, context_length: int) -> float:
        """Return the FLOPs of the forward pass for one token."""
        mlp = 0.0 if self.mlp is None else self.mlp.flops_per_token()
        return self.mixer.flops_per_token(context_length) + mlp


class LanguageModel(nnx.Module):
    """An autoregressive language model over tokens.

    The layers' parameters and states are stacked along a leading axis and run by `lax.scan`: all in `layers` if they
    are alike; in a hybrid one stack for each run of equal mixers, `layers_0_5` being the layers from 0 up to 5.

    Args:
        config: sizes and mixers; `vocab_size` must be set.
        compute_dtype: dtype of activations; parameters are cast to it where they are used.
        param_dtype: dtype that parameters are held in.
        float8: multiply with the layers' weights in 8-bit floats; not in the head.
        rngs: source of randomness.

    Raises:
        ConfigError: the config cannot be made into a model; see `check`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        compute_dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        float8: bool = False,
        rngs: nnx.Rngs,
    ):
        check(config)
        assert config.vocab_size is not None
        self.vocab_size, self.hidden_size, self.dtype = config.vocab_size, config.hidden_size, compute_dtype
        self.remat, self.embedding_dropout = config.remat, config.embedding_dropout
        self.embed = Embedding(
            config.vocab_size,
            config.hidden_size,
            initializer_range=config.initializer_range,
            dtype=compute_dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.groups = layer_groups(config)
        for name, mixer, count in self.groups:
            block = lambda key, mixer=mixer: Block(
                config, mixer, dtype=compute_dtype, param_dtype=param_dtype, rngs=nnx.Rngs(key)
            )
            setattr(self, name, jax.vmap(block)(jax.random.split(rngs.params(), count)))
        if float8:
            for _, module in nnx.iter_graph(self):
                if isinstance(module, Linear):
                    module.float8 = min(module.in_features, module.out_features) >= FLOAT8_LEAST
        self.norm = RMSNorm(config.hidden_size, epsilon=config.norm_eps, param_dtype=param_dtype, rngs=rngs)
        self.head = nnx.data(None)
        if not config.tie_embeddings:
            self.head = linear(
                config.hidden_size,
                config.vocab_size,
                ("embed", "vocab"),
                initializer_range=config.initializer_range,
                dtype=compute_dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

    def __call__(
        self,
        input_ids: jax.Array,
        state: Any = None,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Predict the next token at every position.

        Args:
            input_ids: [B, T] int32, any T >= 1.
            state: what an earlier call or `init_state` returned, to go on from there; None: the start of a text.
            segment_ids: [B, T] int32; documents in a row, and padding, that must not see each other. A new one begins
                where the id differs from the token before; the first token continues from `state`.
            positions: [B, T] int32 for mixers that use them; None: counted on from the state.

        Returns:
            logits [B, T, vocab] float32, and the state after the last token.
        """
        hidden, state = self.hidden_states(input_ids, state, segment_ids=segment_ids, positions=positions)
        return self.logits(hidden), state

    def hidden_states(
        self,
        input_ids: jax.Array,
        state: Any = None,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        unroll: bool = False,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Return what the head is applied to, [B, T, D] in the compute dtype, and the state; arguments as in a call.

        With `unroll`, every layer is compiled by itself instead of one loop over all; see `model.unroll`. With
        `dropout_key`, a key of `jax.random`, entries of embeddings are 0 as `model.embedding_dropout` says.
        """

        def run(x: jax.Array, block_and_state: tuple[Block, Any]) -> tuple[jax.Array, Any]:
            block, state = block_and_state
            x = checkpoint_name(x, _LAYER_INPUT)  # a name for `REMAT_POLICIES`; it computes nothing
            return block(x, state, segment_ids=segment_ids, positions=positions)

        if self.remat != "none":
            # Without a loop around it, the compiler would notice that the layer has run before, and keep its results.
            run = jax.checkpoint(run, policy=REMAT_POLICIES[self.remat], prevent_cse=unroll)
        x = self.embed(input_ids)
        if dropout_key is not None and self.embedding_dropout:
            x = _drop(x, self.embedding_dropout, dropout_key)
        next_state = {}
        for name, _, count in self.groups:
            blocks = getattr(self, name)
            if unroll or (state is not None and isinstance(state[name], tuple)):
                x, next_state[name] = _unroll(run, x, blocks, None if state is None else state[name], count)
            elif state is None or input_ids.shape[1] > 1:
                x, next_state[name] = jax.lax.scan(run, x, (blocks, None if state is None else state[name]))
            else:
                x, next_state[name] = _scan_in_place(run, x, blocks, state[name], count)
        return self.norm(x), next_state

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Apply the head to hidden states [B, T, D]: [B, T, vocab] float32."""
        return jnp.einsum(
            "btd,dv->btv",
            hidden,
            self.head_matrix().astype(self.dtype),
            preferred_element_type=jnp.float32,
            out_sharding=out_sharding("batch", "time", "vocab"),
        )

    def head_matrix(self) -> jax.Array:
        """Return the matrix [D, vocab] from hidden states to logits, in the dtype that it is held in."""
        return self.embed.embedding[...].T if self.head is None else self.head.kernel[...]

    def init_state(self, batch_size: int) -> dict[str, Any]:
        """Return the state before the first token: for each stack of layers the mixer's, with a leading layer axis."""
        states = {}
        for name, _, count in self.groups:
            one = jax.eval_shape(lambda name=name: getattr(self, name).mixer.init_state(batch_size))
            states[name] = jax.tree.map(lambda leaf, count=count: _stacked_zeros(leaf, count), one)
        return states

    def flops_per_token(self, context_length: int) -> float:
        """Return the FLOPs of the forward pass for one token, head included; a training step takes three times as many.

        Matrix products of parameters and the mixers' own; nothing for look-ups, norms, recomputation.
        """
        head = 2.0 * self.hidden_size * self.vocab_size
        return head + sum(count * getattr(self, name).flops_per_token(context_length) for name, _, count in self.groups)

    @property
    def parameter_count(self) -> int:
        """The number of parameters; a tied head is counted once."""
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self, nnx.Param)))


def _drop(x: jax.Array, probability: float, key: jax.Array) -> jax.Array:
    """Set entries of x [B, T, D] to 0 with a probability; scale the rest, so that the mean stays (arXiv 1207.0580)."""
    kept = shard(jax.random.bernoulli(key, 1 - probability, x.shape), "batch", "time", "hidden")
    return jnp.where(kept, x / (1 - probability), jnp.zeros_like(x))


def split_layers(model: LanguageModel, state: Any) -> tuple[LanguageModel, Any]:
    """Return a model and its state with the layers one by one in place of the stacks: for loops over tokens.

    In such a loop the compiler copies the weights of a layer out of their stack again for every token, and what a layer
    leaves into the stack of states. Done once before the loop, this takes room for the weights once more. They are cast
    to what products are computed in as well, which would have been done for every token.
    """
    model = nnx.merge(*nnx.split(model))
    for _, module in nnx.iter_graph(model):
        if isinstance(module, Linear):
            module.kernel[...] = module.kernel[...].astype(module.dtype)
        elif isinstance(module, Embedding):
            module.embedding[...] = module.embedding[...].astype(module.dtype)
    for name, _, count in model.groups:
        setattr(model, name, nnx.List(_split(getattr(model, name), count)))
    return model, {name: tuple(_split(state[name], count)) for name, _, count in model.groups}


def stack_layers(state: Any) -> Any:
    """Return the state that `split_layers` was given, or what became of it."""
    return {name: jax.tree.map(lambda *layers: jnp.stack(layers), *states) for name, states in state.items()}


def _split(stack: Any, count: int) -> list[Any]:
    """Return a pytree for each layer of a stack of them."""
    # Split and not indexed: the gradient is one concatenation then, and no sum of stacks that are 0 but for a layer.
    leaves, tree = jax.tree.flatten(stack)
    layers = [jax.lax.split(leaf, [1] * count) for leaf in leaves]
    return [
        jax.tree.unflatten(tree, [jax.lax.squeeze(part, [0]) for part in parts]) for parts in zip(*layers, strict=True)
    ]


def _unroll(run: Callable[..., Any], x: jax.Array, blocks: Any, states: Any, count: int) -> tuple[jax.Array, Any]:
    """Do as `lax.scan(run, x, (blocks, states))`, without a loop; states come back as they came, stacked or split."""
    is_split = isinstance(states, tuple)
    old_states = states if is_split else [None] * count if states is None else _split(states, count)
    run_layer = jax.jit(run)  # which is traced once
    new_states = []
    for block, state in zip(blocks if is_split else _split(blocks, count), old_states, strict=True):
        x, new_state = run_layer(x, (block, state))
        new_states.append(new_state)
    return x, tuple(new_states) if is_split else jax.tree.map(lambda *layers: jnp.stack(layers), *new_states)


def _scan_in_place(
    run: Callable[..., Any], x: jax.Array, blocks: Block, states: Any, count: int
) -> tuple[jax.Array, Any]:
    """Do as `lax.scan(run, x, (blocks, states))`, with the states in the carry.

    There the compiler writes each over the one before. A plain scan makes a new stack of states, which a loop over
    tokens then copies back at every one of them.
    """

    def run_layer(carry: Any, block_and_layer: tuple[Block, jax.Array]) -> tuple[Any, None]:
        (x, states), (block, layer) = carry, block_and_layer
        state = jax.tree.map(lambda stack: jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False), states)
        x, state = run(x, (block, state))
        put = lambda stack, new: jax.lax.dynamic_update_index_in_dim(stack, new.astype(stack.dtype), layer, 0)
        return (x, jax.tree.map(put, states, state)), None

    return jax.lax.scan(run_layer, (x, states), (blocks, jnp.arange(count)))[0]


def _stacked_zeros(leaf: jax.ShapeDtypeStruct, count: int) -> jax.Array:
    shape = (count, *leaf.shape)
    if not in_mesh():
        return jnp.zeros(shape, leaf.dtype)
    return jnp.zeros(shape, leaf.dtype, out_sharding=jax.sharding.PartitionSpec(None, *leaf.sharding.spec))


def layer_groups(config: ModelConfig) -> tuple[tuple[str, str, int], ...]:
    """Return (name, mixer, number of layers) for each run of equal mixers, in order."""
    names = layer_mixers(config)
    runs = [(mixer, len(list(run))) for mixer, run in itertools.groupby(names)]
    if len(runs) == 1:
        return (("layers", *runs[0]),)
    stops = list(itertools.accumulate(count for _, count in runs))
    return tuple(
        (f"layers_{stop - count}_{stop - 1}", mixer, count) for (mixer, count), stop in zip(runs, stops, strict=True)
    )


def layer_mixers(config: ModelConfig) -> tuple[str, ...]:
    """Return the name of every layer's mixer."""
    return (config.mixer,) * config.num_layers if isinstance(config.mixer, str) else tuple(config.mixer)


def mixer_options(config: ModelConfig, mixer: str) -> Any:
    """Return the options of a mixer, `config.mixers[mixer]`, as an instance of its `Options`."""
    options = config.mixers.get(mixer, {})
    return MIXERS[mixer].Options(**options) if isinstance(options, Mapping) else options


def room_for_tokens(config: ModelConfig) -> int | None:
    """Return how many tokens the model's state has room for; None: any number."""
    options = [mixer_options(config, mixer) for mixer in set(layer_mixers(config))]
    rooms = [each.cache_length for each in options if hasattr(each, "cache_length") and each.window is None]
    return min(rooms, default=None)


def make_room(model: LanguageModel, tokens: int) -> None:
    """Enlarge, in place, the caches that `init_state` will make to hold at least so many tokens."""
    for name, _, _ in model.groups:
        mixer = getattr(model, name).mixer
        if getattr(mixer.options, "cache_length", tokens) < tokens:
            mixer.options = dataclasses.replace(mixer.options, cache_length=tokens)


def check(config: ModelConfig) -> None:
    """Raise ConfigError, in one sentence, if no model can be made of the config on the current mesh."""
    if config.vocab_size is None:
        raise ConfigError("model.vocab_size=None must be known by now; take the tokeniser's.")
    least = {"vocab_size": 1, "hidden_size": 1, "num_layers": 1, "num_heads": 1, "intermediate_size": 0}
    for field, smallest in least.items():
        value = getattr(config, field)
        if value is not None and value < smallest:
            raise ConfigError(f"model.{field}={value} must be at least {smallest}.")
    if not 0 <= config.embedding_dropout < 1:
        raise ConfigError(f"model.embedding_dropout={config.embedding_dropout} must be at least 0 and below 1.")
    mixers = layer_mixers(config)
    if len(mixers) != config.num_layers:
        raise ConfigError(
            f"model.mixer lists {len(mixers)} layers, which model.num_layers={config.num_layers} must be."
        )
    for name in dict.fromkeys(mixers):
        check_one_of("model.mixer", name, tuple(MIXERS))
        MIXERS[name].check(config.hidden_size, config.num_heads, mixer_options(config, name))
    check_one_of("model.remat", config.remat, ("none", *REMAT_POLICIES))
