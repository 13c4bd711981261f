"""Multi-query associative recall (MQAR): pairs to remember, keys to look them up; figure 4 of the paper.

The generator and its settings are those of Zoology (arXiv 2312.04927), which the paper takes them from.
"""

import functools
from hashlib import sha256

import numpy as np

from gla_jax.config import ConfigError, DataConfig
from gla_jax.data.rows import Batch

VOCABULARY = 8192
TRAIN_EXAMPLES = 100_000
HELD_OUT_EXAMPLES = 3_000

_POWER = 0.01
_NOTHING = -1
_DRAWN_AT_A_TIME = 8192


class AssociativeRecall:
    """A fixed set of examples, each a row.

    An example of P pairs begins with them, key value key value .., 2 P tokens. Every key comes once more, at 2 P plus
    twice a gap of its own, where its value is to be predicted; all other tokens are 0, and nothing else is predicted.
    Keys are drawn from 1 .. vocab_size / 2 - 1, values from the ids above, gaps i from 0 .. T / 2 - P - 1 with
    probabilities in proportion to (i + 1)^-0.99, one after the other; no two of an example are equal.

    Args:
        vocab_size: number of ids.
        length: tokens of an example, T.
        pairs: P.
        stream: the name of what decides all draws.
        examples: how many.

    Raises:
        ConfigError: sizes that do not go together.
    """

    def __init__(self, vocab_size: int, length: int, pairs: int, stream: str, examples: int):
        if length % 2 or not 1 <= pairs <= length // 4:
            raise ConfigError(
                f"data.pairs={pairs} must be from 1 to a quarter of data.sequence_length={length}, which must be even."
            )
        if pairs > vocab_size // 2 - 1:
            raise ConfigError(
                f"data.pairs={pairs} needs as many keys, for which model.vocab_size={vocab_size} is too small; "
                f"try {VOCABULARY}."
            )
        self._length = length
        gap_weights = np.arange(1, length // 2 - pairs + 1) ** (_POWER - 1)
        random = _open_stream(stream)
        self._keys, self._values, self._gaps = (np.empty((examples, pairs), np.int32) for _ in range(3))
        for first in range(0, examples, _DRAWN_AT_A_TIME):
            rows = slice(first, min(first + _DRAWN_AT_A_TIME, examples))
            count = rows.stop - first
            self._keys[rows] = 1 + _draw_distinct(random, count, pairs, vocab_size // 2 - 1)
            self._values[rows] = vocab_size // 2 + _draw_distinct(random, count, pairs, vocab_size - vocab_size // 2)
            # The order in which exponential clocks ring is that of draws by weight without replacement.
            clocks = random.standard_exponential((count, len(gap_weights))) / gap_weights
            self._gaps[rows] = np.argsort(clocks, axis=1)[:, :pairs]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return example `index`, [2, T] int32: inputs, and targets with -1 where there is nothing to predict."""
        return self.take(np.array([index]))[:, 0]

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Return many examples at once, [2, examples, T]; see `__getitem__`."""
        keys, values = self._keys[indices], self._values[indices]
        queries = 2 * (keys.shape[1] + self._gaps[indices])
        rows = np.arange(len(indices))[:, None]
        examples = np.zeros((2, len(indices), self._length), np.int32)
        inputs, targets = examples
        inputs[:, 0 : 2 * keys.shape[1] : 2], inputs[:, 1 : 2 * keys.shape[1] : 2] = keys, values
        inputs[rows, queries] = keys
        targets[:] = _NOTHING
        targets[rows, queries] = values
        return examples


class EpochOrder:
    """An order without end in which every example comes once an epoch, another in each.

    Args:
        examples: how many there are.
        stream: the name of what decides the order.
    """

    def __init__(self, examples: int, stream: str):
        self._examples, self._stream = examples, stream
        self._epoch = functools.lru_cache(maxsize=4)(self._shuffle)

    def take(self, first: int, count: int) -> np.ndarray:
        """Return `count` numbers of examples, from place `first` of the order on."""
        epochs, places = np.divmod(np.arange(first, first + count), self._examples)
        return np.concatenate([self._epoch(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs).tolist()])

    def _shuffle(self, epoch: int) -> np.ndarray:
        return _open_stream(f"{self._stream}/{epoch}").permutation(self._examples)


def make_recall_batch(examples: np.ndarray) -> Batch:
    """Say what each token of examples, [2, b, T], is; only answers have weight. One of nothing but -1 is padding.

    Returns:
        As `gla_jax.data.rows.make_batch`, without what tells documents apart: each row is one.
    """
    inputs, targets = examples
    return {
        "inputs": np.maximum(inputs, 0),
        "targets": np.maximum(targets, 0),
        "weights": (targets != _NOTHING).astype(np.float32),
    }


def most_scored(config: DataConfig) -> int | None:
    """Return how many tokens of a row have weight at most, where that is known beforehand; None: any number may."""
    return config.pairs if config.path is None and config.corpus == "mqar" else None


def _open_stream(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=int.from_bytes(sha256(name.encode()).digest()[:16])))


def _draw_distinct(random: np.random.Generator, rows: int, count: int, below: int) -> np.ndarray:
    """Draw [rows, count] numbers below a bound, no two in a row equal, in random order (Floyd's algorithm)."""
    drawn = np.empty((rows, count), np.int32)
    for place, top in enumerate(range(below - count, below)):
        new = random.integers(0, top, rows, np.int32, endpoint=True)
        taken = np.any(drawn[:, :place] == new[:, None], axis=1)
        drawn[:, place] = np.where(taken, top, new)
    return random.permuted(drawn, axis=1)
