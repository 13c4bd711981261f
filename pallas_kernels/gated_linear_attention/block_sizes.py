"""Tuned sizes of the kernels, by device kind and by the shape of the state.

TPU sizes come from benchmarks/tpu_kernels.py, which compiles the candidates and ranks the compiler's estimates; GPU
sizes from benchmarks/gpu_block_sizes.py, which times them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TpuBlockSizes:
    """How a TPU kernel cuts its work.

    Attributes:
        chunk: C, tokens of one chunk.
        heads: Heads of one grid step, at most.
        step: Tokens of one grid step of the forward kernel, at most.
        unroll: Chunks laid out in a straight line of code, in the forward kernel.
        backward_step: Tokens of one grid step of the backward kernel, and of the forward that saves states for it.
        backward_unroll: Chunks laid out in a straight line of code, in the backward kernel.
    """

    chunk: int
    heads: int
    step: int
    unroll: int
    backward_step: int
    backward_unroll: int

    def halved(self) -> "TpuBlockSizes":
        """Return the sizes for float32 inputs, of which VMEM holds half as many."""
        step, backward_step = max(128, self.step // 2), max(128, self.backward_step // 2)
        return TpuBlockSizes(min(self.chunk, 128), max(1, self.heads // 2), step, 1, backward_step, 1)


# From the device kind (its beginning) and (K, V) to the sizes; a smaller state takes those of the next larger entry.
_TPU_V5E = {
    (64, 64): (128, 8, 512, 4, 512, 1),
    (128, 128): (128, 4, 1024, 2, 512, 1),
    (128, 256): (128, 4, 512, 2, 512, 1),
    (256, 512): (128, 2, 512, 2, 512, 1),
}
_TPU_V5P = {
    (64, 64): (128, 8, 1024, 2, 512, 1),
    (128, 128): (128, 4, 1024, 2, 512, 1),
    (128, 256): (128, 4, 1024, 2, 512, 1),
    (256, 512): (128, 2, 1024, 2, 512, 1),
}
# The matrix unit of 256 x 256 wants chunks of 256.
_TPU_V6E = {
    (64, 64): (256, 8, 1024, 2, 512, 1),
    (128, 128): (256, 4, 1024, 1, 512, 1),
    (128, 256): (256, 4, 1024, 1, 512, 1),
    (256, 512): (256, 2, 1024, 1, 512, 1),
}
_TPU = {
    "TPU": _TPU_V5E,
    "TPU v5 lite": _TPU_V5E,
    "TPU v5e": _TPU_V5E,
    "TPU v5": _TPU_V5P,
    "TPU v5p": _TPU_V5P,
    "TPU v6": _TPU_V6E,
    "TPU7": _TPU_V6E,
}


def tpu_block_sizes(device_kind: str, key_dim: int, value_dim: int) -> TpuBlockSizes:
    """Return the sizes for a TPU of this kind, or for any TPU if the kind is not in the table."""
    kind = max((kind for kind in _TPU if device_kind.startswith(kind)), key=len, default="TPU")
    table = sorted(_TPU[kind].items())
    for (keys, values), sizes in table:
        if key_dim <= keys and value_dim <= values:
            return TpuBlockSizes(*sizes)
    return TpuBlockSizes(128, 1, 256, 1, 256, 1)


@dataclass(frozen=True)
class GpuBlockSizes:
    """How the Hopper kernels cut their work.

    Attributes:
        value_tile: Value columns of a thread block, in the kernels for K <= 128: wide tiles read q, k, g less often,
            narrow ones fill the chip.
        segments: How many pieces a row is cut into. Rows that are cut take the kernels of wide heads, whatever K.
    """

    value_tile: int
    segments: int


# By K, V and by rows times heads up to which they are the best: value_tile, and whether rows are cut. Timed forward and
# backward at 4096 tokens; uncut rows take as long however few there are.
_H100 = {
    (64, 64): {16: (64, True), 32: (64, True), 64: (64, False)},
    (128, 128): {16: (64, True), 32: (64, False), 64: (64, False), 128: (128, False)},
    (128, 256): {16: (64, True), 32: (64, False), 64: (128, False)},
    (256, 512): {6: (128, True), 16: (128, False)},
}
MULTIPROCESSORS = 132  # of an H100 or H200; a cut row gives each at most one block of 128 value columns
_LEAST_CHUNKS = 4  # of a segment
_LEAST_CUT = 16  # chunks of a row that is worth more than one kernel


def gpu_block_sizes(key_dim: int, value_dim: int, batch_heads: int, chunks: int) -> GpuBlockSizes:
    """Return the sizes for a Hopper GPU, for so many rows times heads and chunks of a row."""
    shapes = sorted(_H100.items())
    table = next((t for (keys, values), t in shapes if key_dim <= keys and value_dim <= values), shapes[-1][1])
    value_tile, cut = next((sizes for most, sizes in table.items() if batch_heads <= most), list(table.values())[-1])
    segments = 1
    if cut and chunks >= _LEAST_CUT:
        segments = min(MULTIPROCESSORS // (batch_heads * -(-value_dim // 128)), chunks // _LEAST_CHUNKS)
    return GpuBlockSizes(value_tile if value_dim % value_tile == 0 else 64, max(segments, 1))
