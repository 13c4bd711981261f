"""Data: corpora, tokenisers, token files, and the pipeline that makes batches of them."""

from typing import TYPE_CHECKING, Any

from gla_jax.data.rows import Batch
from gla_jax.data.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from gla_jax.data.pipeline import Data, open_dataset

__all__ = ["Batch", "Data", "Tokenizer", "load_tokenizer", "open_dataset"]


def __getattr__(name: str) -> Any:
    # Grain and all that it imports take seconds, and the workers that prepare text do not need them.
    if name in ("Data", "open_dataset"):
        from gla_jax.data import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
