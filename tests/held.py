"""Arrays in memory, to make checkpoints of."""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Held:
    """An array as `write_params` wants it."""

    array: np.ndarray

    def __post_init__(self):
        self.shape, self.size, self.dtype = self.array.shape, self.array.size, self.array.dtype

    def pieces(self):
        yield (), self.array
