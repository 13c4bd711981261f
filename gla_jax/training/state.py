"""What training carries from step to step, and all that a checkpoint holds: plain nested dicts and tuples of arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding

from gla_jax.config import Config
from gla_jax.models import LanguageModel, init_params
from gla_jax.models.language_model import make_room
from gla_jax.parallel.sharding import describe_on_host, to_host

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state after `step` updates."""

    step: jax.Array
    """int32 []."""
    params: Params
    opt_state: optax.OptState
    rng: jax.Array
    """uint32 [2]: data of the key for randomness of the run's own; the data pipeline's comes from the seed."""
    ema: Params | None
    """Moving average of the parameters, float32; None unless `optimizer.ema_decay` is set."""
    carried: Any = None
    """The model's state after the last token of the newest batch; None unless `data.segments` is above 1."""

    @property
    def eval_params(self) -> Params:
        """The parameters to evaluate, to sample from and to export: the average where there is one."""
        return self.params if self.ema is None else self.ema


def init_state(config: Config, optimizer: optax.GradientTransformation, params: Params | None = None) -> TrainState:
    """Make the state before the first step; inside a mesh every device makes its own part of it.

    Args:
        config: the run.
        optimizer: what the state's `opt_state` belongs to.
        params: parameters to start from, which are given up; None: fresh ones of the config's seed.
    """
    run_key, model_key = jax.random.split(jax.random.key(config.seed))
    if params is None:
        params = init_params(config.model, config.dtype, model_key)

    def around(params: Params) -> TrainState:
        in_float32 = to_float32(params)
        moments = optimizer.init(in_float32)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=to_host(moments) if config.optimizer.offload else moments,
            rng=jax.random.key_data(run_key),
            ema=in_float32 if config.optimizer.ema_decay else None,
            carried=_init_carried(config) if config.data.segments > 1 else None,
        )

    return jax.jit(around, donate_argnums=0)(params)


def abstract_state(config: Config, optimizer: optax.GradientTransformation, abstract_params: Params) -> TrainState:
    """Describe what `init_state` makes, without making it: a TrainState of `jax.ShapeDtypeStruct` with shardings.

    Args:
        config: the run.
        optimizer: as in `init_state`.
        abstract_params: of `gla_jax.models.abstract_model`, inside a mesh.
    """
    state = jax.eval_shape(lambda params: init_state(config, optimizer, params), abstract_params)
    place = lambda leaf: NamedSharding(jax.sharding.get_mesh(), jax.typeof(leaf).sharding.spec)
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf)), state)
    if config.optimizer.offload:
        state = dataclasses.replace(state, opt_state=describe_on_host(state.opt_state))
    return state


def _init_carried(config: Config) -> Any:
    """Return the model's state before the first token, with room for all segments of a row."""
    compute = jnp.dtype(config.dtype.compute)
    model = jax.eval_shape(lambda: LanguageModel(config.model, compute_dtype=compute, rngs=nnx.Rngs(0)))
    make_room(model, config.data.segments * config.data.sequence_length)
    return model.init_state(config.data.batch_size)


def to_float32(tree: Any) -> Any:
    """Cast every array of a pytree."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
