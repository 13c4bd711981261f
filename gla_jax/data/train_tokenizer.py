"""Train a byte-level BPE on a corpus that needs no download.

    python -m gla_jax.data.train_tokenizer --corpus=site-packages --size=4096 --output=runs/site-packages.json
    python train.py --config=... --config.data.corpus=site-packages --config.data.tokenizer=runs/site-packages.json

For text in files see `python -m gla_jax.data.prepare --train_tokenizer`.
"""

from pathlib import Path

from absl import flags

from gla_jax import command_line
from gla_jax.data.sources import train_on_corpus

_CORPUS = flags.DEFINE_string("corpus", None, "One of the corpora that are text.", required=True)
_SIZE = flags.DEFINE_integer("size", 4096, "Entries of the vocabulary.")
_OUTPUT = flags.DEFINE_string("output", None, "The file to write, a tokenizer.json.", required=True)


def main(_: dict[str, str]) -> None:
    """Train, and say how well it compresses."""
    print(train_on_corpus(_CORPUS.value, _SIZE.value, Path(_OUTPUT.value)))


if __name__ == "__main__":
    command_line.run(main)
