"""AdamW (arXiv 1711.05101) and the learning rate's course."""

import functools

import jax
import jax.numpy as jnp
import optax

from gla_jax.config import OptimizerConfig
from gla_jax.models import decay_mask
from gla_jax.training.spikes import notice_spikes


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the number of updates made so far.

    It rises linearly from `final_learning_rate` to the peak within `warmup_steps`, and ends at `final_learning_rate`:
    after half a cosine ("cosine"), after a stable stretch and a linear fall ("wsd"), or it stays ("constant").
    """
    peak, final = config.learning_rate, config.final_learning_rate

    def schedule(step: jax.Array) -> jax.Array:
        height = jnp.ones((), jnp.float32)
        if config.warmup_steps:
            height = jnp.minimum(step / config.warmup_steps, 1)
        if config.schedule == "cosine":
            progress = jnp.clip((step - config.warmup_steps) / max(steps - config.warmup_steps, 1), 0, 1)
            height = jnp.minimum(height, (1 + jnp.cos(jnp.pi * progress)) / 2)
        elif config.schedule == "wsd":
            height = jnp.clip((steps - step) / (steps * config.decay_fraction), 0, height)
        return final + (peak - final) * height

    return schedule


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """Return AdamW after clipping by the global norm; weight decay is applied to `decay_mask` alone.

    Its `update` takes the step's `loss` and `grad_norm` besides, for `optimizer.spike_policy`.
    """
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=functools.partial(decay_mask, decayed=config.decayed),
        mu_dtype=jnp.float32,
    )
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw
    if config.spike_policy == "none":
        return optax.with_extra_args_support(optimizer)
    return notice_spikes(optimizer, config.spike_sigmas, skip=config.spike_policy == "skip")
