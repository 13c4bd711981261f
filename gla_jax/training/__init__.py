"""Training: `train(config, workdir)` is all of it; the rest are its parts."""

from gla_jax.training.loop import DivergedError, Outcome, train

__all__ = ["DivergedError", "Outcome", "train"]
