"""Gated Linear Attention (arXiv 2312.06635) in JAX: layers, models, data, training, evaluation, sampling."""

from typing import Any

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """Import `load_model` when it is asked for: importing the package alone should cost nothing."""
    if name == "load_model":
        from gla_jax.loading import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
