"""Sampling from a model: prefill by the parallel form, decoding by the recurrent step."""

from gla_jax.inference.generation import generate
from gla_jax.inference.sampling import sample

__all__ = ["generate", "sample"]
