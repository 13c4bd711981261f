"""From a DataConfig to batches: the order of the rows, this process's share of each batch, and prefetch."""

import dataclasses
import functools
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from gla_jax.config import ConfigError, DataConfig
from gla_jax.data import corpora, mqar
from gla_jax.data.corpora import Synthetic
from gla_jax.data.rows import Batch, Rows, long_spans, make_batch
from gla_jax.data.sources import check_corpus, open_sources
from gla_jax.data.tokenizer import IntegerTokenizer, Tokenizer, load_tokenizer

_SYNTHETIC_HELD_OUT_ROWS = 64


class _RowSource(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Data:
    """Batches to train on and to evaluate on, as one of the processes that share them sees them.

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

        The rows are shuffled, the same way for any seed, so that the first batches are a fair sample of all. The last
        batch is filled up with rows of weight 0; every process gets as many batches.

        Args:
            count: at most this many batches; 0: all.
        """
        return self._iterate(self._eval[:count] if 0 < count < len(self._eval) else self._eval, 0)

    def _iterate(self, batches: grain.MapDataset, start: int) -> Iterator[Batch]:
        # Threads and not worker processes: a batch is copied out of mapped memory, which takes no longer than handing
        # it from one process to another.
        options = grain.ReadOptions(num_threads=min(2, self._prefetch), prefetch_buffer_size=self._prefetch)
        iterator = iter(batches.to_iter_dataset(options))
        iterator.set_state({"next_index": start})
        return iterator


def open_dataset(
    config: DataConfig, *, seed: int, process_index: int = 0, process_count: int = 1, vocab_size: int | None = None
) -> Data:
    """Open the corpus, token files or mixture that a config names.

    Args:
        config: what to read and how to cut it.
        seed: decides the order of the rows, and generated tokens.
        process_index: this process, in [0, process_count).
        process_count: how many processes share a batch.
        vocab_size: the model's, if it is set: synthetic tokens fill it, others must fit.

    Raises:
        ConfigError: one sentence, for whatever in `config` cannot be served.
    """
    _check(config, process_count)
    here_count = config.batch_size // process_count
    here = slice(process_index * here_count, (process_index + 1) * here_count)
    train: _RowSource
    held_out: _RowSource
    tokenizer = open_tokenizer(config, vocab_size)
    stack: Callable[[Sequence[np.ndarray]], Batch] = functools.partial(
        make_batch, end_of_document=tokenizer.end_of_document
    )
    # Rows are numbered without end, in the order in which they are trained on; a batch has those from `first` on.
    make_rows: Callable[[int], Batch] = lambda first: stack(
        [train[order[number]] for number in range(first, first + here_count)]
    )
    row_length = config.segments * config.sequence_length
    if config.path is None and config.corpus == "synthetic":
        train = Synthetic(tokenizer.vocab_size, row_length + 1, f"{seed}/train")
        held_out = Synthetic(
            tokenizer.vocab_size, config.sequence_length + 1, f"{seed}/held out", _SYNTHETIC_HELD_OUT_ROWS
        )
        order = grain.MapDataset.range(len(train))
        steps_per_epoch = math.inf
        eval_tokens = eval_bytes = len(held_out) * config.sequence_length
        description = ["synthetic: endless random tokens"]
        content: list[Any] = ["synthetic"]
    elif config.path is None and config.corpus == "mqar":
        make_examples = functools.partial(
            mqar.AssociativeRecall, tokenizer.vocab_size, config.sequence_length, config.pairs
        )
        train = make_examples(f"{seed}/train", mqar.TRAIN_EXAMPLES)
        held_out = make_examples(f"{seed}/held out", mqar.HELD_OUT_EXAMPLES)
        steps_per_epoch = len(train) / config.batch_size
        eval_tokens = eval_bytes = len(held_out) * config.pairs
        description = [f"mqar: {len(train):,} examples of {config.pairs} pairs; held out: {len(held_out):,}"]
        content = ["mqar", "shuffled by epoch", config.pairs, tokenizer.vocab_size]
        stack = lambda rows: mqar.make_recall_batch(np.stack(rows, axis=1))
        examples, places = train, mqar.EpochOrder(len(train), f"{seed}/order")
        make_rows = lambda first: mqar.make_recall_batch(examples.take(places.take(first, here_count)))
    else:
        sources = open_sources(config, tokenizer)
        train = Rows([span for source in sources for span in source.split.train], row_length)
        held_out = Rows([span for source in sources for span in source.split.held_out], config.sequence_length)
        counts = [len(Rows(source.split.train, row_length)) for source in sources]
        weights = [source.weight for source in sources]
        order = _mixed_order(counts, weights, seed)
        rows_per_epoch = max(count / weight for count, weight in zip(counts, weights, strict=True))
        steps_per_epoch = rows_per_epoch * config.segments / config.batch_size
        eval_tokens = sum(source.split.tokens for source in sources)
        eval_bytes = sum(source.split.bytes for source in sources)
        description = [source.description for source in sources]
        content = [[source.weight, source.content] for source in sources]

    def train_batch(step: int) -> Batch:
        # The rows of all processes for one step follow each other.
        turn, segment = divmod(step, config.segments)
        first = (turn * process_count + process_index) * here_count
        batch = make_rows(first)
        columns = slice(segment * config.sequence_length, (segment + 1) * config.sequence_length)
        return {name: values[:, columns] for name, values in batch.items()}

    epoch = "without end" if math.isinf(steps_per_epoch) else f"{steps_per_epoch:,.0f} steps an epoch"
    in_segments = f", each going on for {config.segments} steps" if config.segments > 1 else ""
    return Data(
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        description="\n".join(
            [
                *description,
                f"tokenizer {tokenizer.name}: vocabulary {tokenizer.vocab_size:,}",
                f"rows of {config.sequence_length:,} tokens{in_segments}, {config.batch_size:,} a step: {epoch}",
            ]
        ),
        fingerprint=_fingerprint(
            seed=seed,
            content=content,
            tokenizer=tokenizer.fingerprint,
            sequence_length=config.sequence_length,
            batch_size=config.batch_size,
            held_out=config.held_out,
            **({"segments": config.segments} if config.segments > 1 else {}),
        ),
        steps_per_epoch=steps_per_epoch,
        eval_tokens=eval_tokens,
        eval_bytes_per_token=eval_bytes / eval_tokens if eval_tokens else 1.0,
        _train=grain.MapDataset.range(sys.maxsize).map(train_batch),
        _eval=_eval_batches(held_out, config, here, stack),
        _prefetch=config.prefetch,
    )


def open_long_rows(
    config: DataConfig, *, length: int, stream: bool, most: int | None = None, vocab_size: int | None = None
) -> Rows:
    """Open rows of any length of the held-out part, or of all that there is where `config.held_out` is 0.

    Args:
        config: what to read.
        length: targets in a row.
        stream: see `gla_jax.data.rows.long_spans`.
        most: open no more than this many.
        vocab_size: the model's.

    Returns:
        Rows of [length + 1] int32 ids, shuffled, the same way every time: the first ones are a fair sample.

    Raises:
        ConfigError: as `open_dataset`, or there is no row of that length.
    """
    if config.path is None and config.corpus not in corpora.TEXTS:
        raise ConfigError(f"data.corpus={config.corpus!r} is no text, so it has no positions; name one with --data.")
    sources = open_sources(config, open_tokenizer(config, vocab_size))
    parts = [source.split.held_out if config.held_out else source.split.train for source in sources]
    spans, longest = long_spans([span for part in parts for span in part], length, stream=stream)
    if not spans:
        has = "holds out" if config.held_out else "has"
        what = f"no {length:,} tokens in a row" if stream else f"no document of {length:,} tokens"
        cure = "" if stream else ", or join documents with --stream"
        raise ConfigError(
            f"{config.path or config.corpus} {has} {what}; the longest has {longest:,}: lower --length to that{cure}."
        )
    order = np.random.default_rng(0).permutation(len(spans))
    return Rows([spans[number] for number in order[:most]], length)


def open_tokenizer(config: DataConfig, vocab_size: int | None) -> Tokenizer:
    """Load the tokeniser of the data that a config names; that of generated data fills the model's vocabulary.

    Raises:
        ConfigError: if there is no such file, it cannot be read, its library is not installed, or it has more ids than
            the model.
    """
    if config.path is None and config.corpus in corpora.GENERATED:
        default = mqar.VOCABULARY if config.corpus == "mqar" else 256
        return IntegerTokenizer(default if vocab_size is None else vocab_size)
    tokenizer = load_tokenizer(config.tokenizer)
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size} is smaller than the vocabulary of data.tokenizer={config.tokenizer!r}, "
            f"{tokenizer.vocab_size}; leave it unset to get that."
        )
    return tokenizer


def _mixed_order(counts: Sequence[int], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """Order the rows of all sources, numbered one source after the other, without end.

    Each source's rows come once an epoch of that source, in another order in each; the sources take turns by weight.
    """
    orders, first = [], 0
    for number, count in enumerate(counts):
        # Grain adds the number of the epoch to a seed, so that with plain seeds 0 and 1 would share epochs.
        digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=4).digest()
        rows = grain.MapDataset.range(first, first + count)
        orders.append(rows.shuffle(seed=int.from_bytes(digest, "little")).repeat())
        first += count
    return orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, weights)


def _eval_batches(
    held_out: _RowSource, config: DataConfig, here: slice, stack: Callable[[Sequence[np.ndarray]], Batch]
) -> grain.MapDataset:
    batches = grain.MapDataset.range(math.ceil(len(held_out) / config.batch_size))
    if not len(batches):
        return batches
    order = grain.MapDataset.range(len(held_out)).shuffle(seed=0)
    padding = np.full_like(held_out[0], -1)  # that of text and of examples alike

    def eval_batch(number: int) -> Batch:
        numbers = range(number * config.batch_size, (number + 1) * config.batch_size)[here]
        return stack([held_out[order[number]] if number < len(order) else padding for number in numbers])

    return batches.map(eval_batch)


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
    if config.path is None:
        check_corpus(config.corpus)
        if config.segments > 1 and config.corpus == "mqar":
            raise ConfigError(f"data.segments={config.segments} must be 1 with data.corpus='mqar': rows are examples.")


def _fingerprint(**parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
