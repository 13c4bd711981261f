"""From a DataConfig to batches: sources, mixture, shuffle, this process's share, prefetch."""

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from gla_jax.config import ConfigError, DataConfig
from gla_jax.data import corpora
from gla_jax.data.manifest import open_folder
from gla_jax.data.rows import Batch, Rows, make_batch, padding_row, split
from gla_jax.data.token_file import TokenArray, open_token_file, tokens_in_memory
from gla_jax.data.tokenizer import IntegerTokenizer, Tokenizer, load_tokenizer

_SYNTHETIC_HELD_OUT_ROWS = 64

Collate = Callable[[Sequence[np.ndarray]], Batch]


@dataclasses.dataclass(frozen=True)
class Data:
    """Batches to train on and to evaluate on, as this process of `process_count` sees them.

    A batch is a dict of numpy arrays, b = batch_size / process_count rows of T = sequence_length tokens: inputs,
    targets, segment_ids, positions [b, T] int32 and weights [b, T] float32 (see `gla_jax.data.rows`). Process p has
    the rows [p b, (p + 1) b) of a global batch that is the same for any number of processes.
    """

    tokenizer: Tokenizer
    vocab_size: int
    description: str
    """A few lines for the log."""
    fingerprint: str
    """Hex digest of all that decides the batches: a resumed run needs the same."""
    steps_per_epoch: float
    """Steps that see every row about once, of a mixture the rows of its longest part; infinite for synthetic data."""
    eval_tokens: int
    """Targets in the held-out part; 0 if nothing is held out."""
    eval_bytes_per_token: float
    """Bytes of held-out text by target: bits per byte = nats per token / (log(2) * this)."""
    _train: grain.MapDataset
    _eval: grain.MapDataset
    _prefetch: int

    def train_batch(self, step: int) -> Batch:
        """Return the batch of a step, a function of the seed and the step alone."""
        return self._train[step]

    def train_batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Iterate over the batches from a step on, without end, made ahead of time by background threads."""
        return self._iterate(self._train, start_step)

    def eval_batches(self, count: int = 0) -> Iterator[Batch]:
        """Iterate over the held-out part, the same batches in the same order at every call.

        The rows are in an order that does not depend on the seed and has no drift, so that the first batches are a
        fair sample of all. The last batch is filled up with rows of weight 0; every process gets as many batches.

        Args:
            count: at most this many batches; 0: all.
        """
        batches = self._eval[:count] if 0 < count < len(self._eval) else self._eval
        return self._iterate(batches, 0)

    def _iterate(self, batches: grain.MapDataset, start: int) -> Iterator[Batch]:
        # Threads and not worker processes: a batch is a copy out of mapped memory, which takes no longer than to
        # hand it from one process to another.
        threads = min(2, self._prefetch)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=self._prefetch)
        iterator = iter(batches.to_iter_dataset(options))
        iterator.set_state({"next_index": start})
        return iterator


def open_dataset(
    config: DataConfig, *, seed: int, process_index: int = 0, process_count: int = 1, vocab_size: int | None = None
) -> Data:
    """Open the corpus, token files or mixture that a config names.

    Args:
        config: what to read and how to cut it.
        seed: decides the order of the rows, and synthetic tokens.
        process_index: this process, in [0, process_count).
        process_count: how many processes share a batch.
        vocab_size: the model's, if it is set: synthetic tokens fill it, others must fit.

    Raises:
        ConfigError: one sentence, for whatever in `config` cannot be served.
    """
    _check(config, process_count)
    if config.path is None and config.corpus == "synthetic":
        tokenizer: Tokenizer = IntegerTokenizer(256 if vocab_size is None else vocab_size)
        parts = [_synthetic_part(tokenizer, config, seed)]
    else:
        tokenizer = load_tokenizer(config.tokenizer)
        named = _parse_mixture(config.path) if config.path is not None else [(config.corpus, 1.0)]
        parts = [
            _text_part(name, weight, tokenizer, config, _derive_seed(seed, i)) for i, (name, weight) in enumerate(named)
        ]
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size} is smaller than the vocabulary of data.tokenizer={config.tokenizer!r}, "
            f"{tokenizer.vocab_size}; leave it unset to get that."
        )

    here_count = config.batch_size // process_count
    here = slice(process_index * here_count, (process_index + 1) * here_count)
    total_weight = sum(part.weight for part in parts)
    train = parts[0].train
    if len(parts) > 1:
        train = grain.MapDataset.mix([part.train for part in parts], [part.weight / total_weight for part in parts])
    collate = functools.partial(make_batch, end_of_document=tokenizer.end_of_document)
    train = train.batch(here_count, batch_fn=collate)[process_index::process_count]

    steps_per_epoch = max(part.rows * total_weight / part.weight for part in parts) / config.batch_size
    eval_tokens = sum(part.eval_tokens for part in parts)
    eval_bytes = sum(part.eval_bytes for part in parts)
    cut = f"rows of {config.sequence_length} tokens, {config.batch_size} a step: "
    cut += "endless" if math.isinf(steps_per_epoch) else f"{steps_per_epoch:,.0f} steps an epoch"
    return Data(
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        description="\n".join(
            [
                *(part.describe(total_weight) for part in parts),
                f"tokenizer {tokenizer.name}: vocabulary {tokenizer.vocab_size:,}",
                cut,
            ]
        ),
        fingerprint=_fingerprint(
            seed=seed,
            sources=[(part.content, part.weight) for part in parts],
            tokenizer=tokenizer.fingerprint,
            sequence_length=config.sequence_length,
            batch_size=config.batch_size,
            held_out=config.held_out,
        ),
        steps_per_epoch=steps_per_epoch,
        eval_tokens=eval_tokens,
        eval_bytes_per_token=eval_bytes / eval_tokens if eval_tokens else 1.0,
        _train=train,
        _eval=_eval_batches([part.held_out for part in parts], config, here, collate),
        _prefetch=config.prefetch,
    )


@dataclasses.dataclass(frozen=True)
class _Part:
    """One source of a mixture, or the only one."""

    name: str
    weight: float
    content: list[str]
    """Hashes of all that it holds."""
    train: grain.MapDataset
    """Endless rows, every one once an epoch, in an order of each epoch's own."""
    rows: float
    """Rows in an epoch."""
    held_out: grain.MapDataset
    size: str
    eval_tokens: int
    eval_bytes: int

    def describe(self, total_weight: float) -> str:
        share = "" if self.weight == total_weight else f" ({self.weight / total_weight:.1%} of the rows)"
        return f"{self.name}{share}: {self.size}"


def _text_part(name: str, weight: float, tokenizer: Tokenizer, config: DataConfig, seed: int) -> _Part:
    arrays = [array for array in _open(name, tokenizer) if len(array.starts) > 1]
    if not arrays:
        raise ConfigError(f"{name} is empty: it holds no document.")
    for array in arrays:
        if array.tokenizer_fingerprint != tokenizer.fingerprint:
            raise ConfigError(
                f"{array.name} was made with tokenizer {array.tokenizer_name} "
                f"({array.tokenizer_fingerprint[:8]}), which data.tokenizer={config.tokenizer!r} "
                f"({tokenizer.fingerprint[:8]}) is not; set data.tokenizer to the former."
            )
    parts = split(arrays, config.held_out, tokenizer)
    train, held_out = Rows(parts.train, config.sequence_length), Rows(parts.held_out, config.sequence_length)
    tokens = sum(len(array.tokens) - 1 for array in arrays)
    eval_tokens = sum(span.end - span.start for span in parts.held_out)
    if tokens - eval_tokens < config.sequence_length:
        raise ConfigError(
            f"{name} has {tokens - eval_tokens:,} tokens to train on, fewer than one row of "
            f"data.sequence_length={config.sequence_length}."
        )
    documents = sum(len(array.starts) - 1 for array in arrays)
    source_bytes = sum(int(array.source_bytes[-1]) for array in arrays)
    return _Part(
        name=name,
        weight=weight,
        content=[array.content for array in arrays],
        train=grain.MapDataset.source(train).shuffle(seed=seed).repeat(),
        rows=len(train),
        held_out=grain.MapDataset.source(held_out),
        size=f"{documents:,} documents, {tokens:,} tokens of {source_bytes / tokens:.2f} bytes; "
        f"held out: {parts.documents:,} documents, {eval_tokens:,} tokens ({eval_tokens / tokens:.1%})",
        eval_tokens=eval_tokens,
        eval_bytes=parts.bytes,
    )


def _synthetic_part(tokenizer: Tokenizer, config: DataConfig, seed: int) -> _Part:
    length = config.sequence_length + 1
    train = corpora.Synthetic(tokenizer.vocab_size, length, seed, "train")
    held_out = corpora.Synthetic(tokenizer.vocab_size, length, seed, "held out", rows=_SYNTHETIC_HELD_OUT_ROWS)
    tokens = len(held_out) * config.sequence_length
    return _Part(
        name="synthetic",
        weight=1.0,
        content=["synthetic"],
        train=grain.MapDataset.source(train),
        rows=math.inf,
        held_out=grain.MapDataset.source(held_out),
        size=f"endless random tokens; held out: {tokens:,} tokens",
        eval_tokens=tokens,
        eval_bytes=tokens,
    )


def _open(name: str, tokenizer: Tokenizer) -> list[TokenArray]:
    if name in corpora.TEXTS:
        return [tokens_in_memory(name, corpora.TEXTS[name](), tokenizer)]
    path = Path(name)
    if path.is_dir():
        return open_folder(path)
    if not path.exists():
        raise ConfigError(
            f"data.path names {name}, which is no file or folder; make one with python -m gla_jax.data.prepare"
            f"{_nearest(name)}"
        )
    return [open_token_file(path)]


def _eval_batches(
    held_out: Sequence[grain.MapDataset], config: DataConfig, here: slice, collate: Collate
) -> grain.MapDataset:
    sources = [source for source in held_out if len(source)]
    if not sources:
        return grain.MapDataset.range(0)
    rows = grain.MapDataset.concatenate(sources).shuffle(seed=0)
    padding = padding_row(config.sequence_length)

    def batch(number: int) -> Batch:
        numbers = range(number * config.batch_size, (number + 1) * config.batch_size)[here]
        return collate([rows[row] if row < len(rows) else padding for row in numbers])

    return grain.MapDataset.range(math.ceil(len(rows) / config.batch_size)).map(batch)


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
                f'a mixture is written "a.tokens:0.7,b.tokens:0.3".'
            )
        parts.append((name, weight))
    return parts


def _check(config: DataConfig, process_count: int) -> None:
    for field in ("sequence_length", "batch_size"):
        if getattr(config, field) < 1:
            raise ConfigError(f"data.{field}={getattr(config, field)} must be at least 1.")
    if config.prefetch < 0:
        raise ConfigError(f"data.prefetch={config.prefetch} must be 0 (no threads) or more.")
    if not 0 <= config.held_out < 1:
        raise ConfigError(f"data.held_out={config.held_out} must be a share from 0 to below 1.")
    if config.batch_size % process_count:
        below = config.batch_size // process_count * process_count
        near = " or ".join(str(size) for size in (below, below + process_count) if size)
        raise ConfigError(
            f"data.batch_size={config.batch_size} does not divide among {process_count} processes; try {near}."
        )
    if config.path is None and config.corpus not in corpora.NAMES:
        raise ConfigError(
            f"data.corpus={config.corpus!r} is none of {', '.join(corpora.NAMES)}{_nearest(str(config.corpus))}"
        )


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, corpora.NAMES, 1)
    return f"; did you mean {near[0]!r}?" if near else "."


def _derive_seed(seed: int, part: int) -> int:
    # Grain adds the number of the epoch to a seed, so that with plain seeds 0 and 1 would share epochs.
    return int.from_bytes(hashlib.blake2b(f"{seed}/{part}".encode(), digest_size=4).digest(), "little")


def _fingerprint(**parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
