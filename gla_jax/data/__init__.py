"""Data: corpora, tokenisers, token files, and the pipeline that makes batches of them."""

from gla_jax.data.pipeline import Data, open_dataset
from gla_jax.data.rows import Batch
from gla_jax.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Batch", "Data", "Tokenizer", "load_tokenizer", "open_dataset"]
