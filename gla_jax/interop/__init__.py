"""Checkpoints of other libraries, read and written without them."""

from gla_jax.interop.conversion import export_model, import_model
from gla_jax.interop.folder import open_model

__all__ = ["export_model", "import_model", "open_model"]
