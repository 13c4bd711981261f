"""Sources: the text corpora, token files and mixtures that a config may name, opened, checked and split."""

import dataclasses
import difflib
import math
import os
from pathlib import Path

from gla_jax.config import ConfigError, DataConfig
from gla_jax.data import corpora
from gla_jax.data.manifest import open_folder
from gla_jax.data.rows import Split, split
from gla_jax.data.token_file import TokenArray, open_token_file, tokens_in_memory
from gla_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer


@dataclasses.dataclass(frozen=True)
class Source:
    """A corpus, in two parts: one of a mixture, or the only one."""

    weight: float
    """Share of the rows; all sources together have 1."""
    split: Split
    content: list[str]
    """Hashes of all ids in it."""
    description: str


def open_sources(config: DataConfig, tokenizer: Tokenizer) -> list[Source]:
    """Open what `config.path` names, or else `config.corpus`.

    Raises:
        ConfigError: if anything there is missing, damaged, empty, too short, or made with another tokeniser.
    """
    parts = [(config.corpus, 1.0)] if config.path is None else _parse_mixture(config.path)
    total = sum(weight for _, weight in parts)
    return [_open_source(name, weight / total, config, tokenizer) for name, weight in parts]


def check_corpus(name: str) -> None:
    """Raise ConfigError, with the nearest name, if there is no corpus of this name."""
    if name not in corpora.NAMES:
        raise ConfigError(f"data.corpus={name!r} is none of {', '.join(corpora.NAMES)}{_nearest(name)}")


def _open_source(name: str, weight: float, config: DataConfig, tokenizer: Tokenizer) -> Source:
    arrays = [array for array in _open_arrays(name, tokenizer) if len(array.starts) > 1]
    if not arrays:
        raise ConfigError(f"{name} is empty: it holds no document.")
    for array in arrays:
        if array.tokenizer_fingerprint != tokenizer.fingerprint:
            raise ConfigError(
                f"{array.name} was made with tokenizer {array.tokenizer_name} ({array.tokenizer_fingerprint[:8]}), "
                f"which data.tokenizer={config.tokenizer!r} ({tokenizer.fingerprint[:8]}) is not."
            )
    parts = split(arrays, config.held_out, tokenizer)
    tokens = sum(len(array.tokens) - 1 for array in arrays)
    if tokens - parts.tokens < config.sequence_length:
        raise ConfigError(
            f"{name} has {tokens - parts.tokens:,} tokens to train on, fewer than the "
            f"data.sequence_length={config.sequence_length} of a row."
        )
    documents = sum(len(array.starts) - 1 for array in arrays)
    source_bytes = sum(int(array.source_bytes[-1]) for array in arrays)
    share = "" if weight == 1 else f", {weight:.1%} of the rows"
    return Source(
        weight=weight,
        split=parts,
        content=[array.content for array in arrays],
        description=f"{name}{share}: {documents:,} documents, {tokens:,} tokens of {source_bytes / tokens:.2f} bytes; "
        f"held out: {parts.documents:,} documents, {parts.tokens:,} tokens ({parts.tokens / tokens:.1%})",
    )


def _open_arrays(name: str, tokenizer: Tokenizer) -> list[TokenArray]:
    if name in corpora.TEXTS:
        return [tokens_in_memory(name, texts, tokenizer) for texts in corpora.TEXTS[name]()]
    if name in corpora.GENERATED:
        raise ConfigError(f"data.path: {name} tokens are no text, so they cannot be mixed; name another corpus.")
    path = Path(name)
    if path.is_dir():
        return open_folder(path)
    if not path.exists():
        raise ConfigError(
            f"data.path: there is no file or folder {name}; make one with python -m gla_jax.data.prepare"
            f"{_nearest(name)}"
        )
    return [open_token_file(path)]


def _parse_mixture(text: str) -> list[tuple[str, float]]:
    """Parse "a" or "a:0.7,b:0.3"."""
    if "," not in text and (":" not in text or os.path.exists(text)):
        return [(text, 1.0)]
    parts = []
    for part in text.split(","):
        name, _, number = part.strip().rpartition(":")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or not 0 < weight < math.inf:
            raise ConfigError(
                f"data.path={text!r}: {part.strip()!r} needs a positive number as its weight; "
                f'a mixture is written "mine.tokens:0.7,kjv:0.3".'
            )
        parts.append((name, weight))
    return parts


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, corpora.NAMES, 1)
    return f"; did you mean {near[0]!r}?" if near else "."


_CHARACTERS = 32 << 20
"""Text to train a tokeniser on, about, taken evenly; more changes little."""


def train_on_corpus(corpus: str, size: int, path: Path) -> str:
    """Train a byte-level BPE of so many entries on a corpus of text, and write it.

    Args:
        corpus: one of `corpora.TEXTS`.
        size: entries of the vocabulary.
        path: the file to write, "... .json".

    Returns:
        A line that says what was written, and how many bytes a token of it stands for.

    Raises:
        ConfigError: there is no such corpus, it is no text, or the file has another ending.
    """
    if path.suffix != ".json":
        raise ConfigError(f"--output={path} must end in .json, as tokenisers of this kind do.")
    check_corpus(corpus)
    if corpus not in corpora.TEXTS:
        raise ConfigError(f"--corpus={corpus} is no text; take one of {', '.join(corpora.TEXTS)}.")
    texts = [text for group in corpora.TEXTS[corpus]() for text in group]
    every = -(-sum(map(len, texts)) // _CHARACTERS)
    path.parent.mkdir(parents=True, exist_ok=True)
    train_tokenizer(texts[::every], size, path)
    tokenizer = load_tokenizer(str(path))
    sample = texts[1 :: 8 * every] or texts
    tokens = sum(map(len, tokenizer.encode_batch(sample)))
    length = sum(len(text.encode("utf-8", "replace")) for text in sample)
    return f"{path}: {tokenizer.vocab_size:,} entries; {length / tokens:.2f} bytes a token."
