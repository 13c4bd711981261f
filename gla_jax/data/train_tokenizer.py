"""Train a byte-level BPE on a corpus that needs no download.

    python -m gla_jax.data.train_tokenizer --corpus=site-packages --size=4096 --output=runs/site-packages.json
    python train.py --config=... --config.data.corpus=site-packages --config.data.tokenizer=runs/site-packages.json

For text in files see `python -m gla_jax.data.prepare --train_tokenizer`.
"""

from pathlib import Path

from absl import flags

from gla_jax import command_line
from gla_jax.config import ConfigError
from gla_jax.data import corpora
from gla_jax.data.sources import check_corpus
from gla_jax.data.tokenizer import load_tokenizer, train_tokenizer

_CORPUS = flags.DEFINE_string("corpus", None, "One of the corpora that are text.", required=True)
_SIZE = flags.DEFINE_integer("size", 4096, "Entries of the vocabulary.")
_OUTPUT = flags.DEFINE_string("output", None, "The file to write, a tokenizer.json.", required=True)

_CHARACTERS = 32 << 20
"""Text to train on, about, taken evenly; more changes little."""


def main(_: dict[str, str]) -> None:
    """Train, and say how well it compresses."""
    path = Path(_OUTPUT.value)
    if path.suffix != ".json":
        raise ConfigError(f"--output={path} must end in .json, as tokenisers of this kind do.")
    check_corpus(_CORPUS.value)
    if _CORPUS.value not in corpora.TEXTS:
        raise ConfigError(f"--corpus={_CORPUS.value} is no text; take one of {', '.join(corpora.TEXTS)}.")
    texts = [text for group in corpora.TEXTS[_CORPUS.value]() for text in group]
    every = -(-sum(map(len, texts)) // _CHARACTERS)
    path.parent.mkdir(parents=True, exist_ok=True)
    train_tokenizer(texts[::every], _SIZE.value, path)
    tokenizer = load_tokenizer(str(path))
    sample = texts[1 :: 8 * every] or texts
    tokens = sum(map(len, tokenizer.encode_batch(sample)))
    size = sum(len(text.encode("utf-8", "replace")) for text in sample)
    print(f"{path}: {tokenizer.vocab_size:,} entries; {size / tokens:.2f} bytes a token.")


if __name__ == "__main__":
    command_line.run(main)
