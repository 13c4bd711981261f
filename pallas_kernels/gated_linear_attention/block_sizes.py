"""Tuned sizes of the kernels, by device kind and by the shape of the state.

TPU sizes come from benchmarks/tpu_kernels.py, which compiles the candidates and ranks the compiler's estimates.
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


def gpu_value_tile(value_dim: int, batch_heads: int) -> int:
    """Return the value columns of a thread block, K <= 128: wide reads q, k, g less often, narrow fills the chip.

    Measured on an H100 of 132 multiprocessors: the forward pass of (B, T, H, K, V) = (4, 2048, 16, 128, 128) takes
    0.082 ms with 64 columns and 0.102 ms with 128, which make 64 blocks only.
    """
    fills = batch_heads * value_dim // 128 >= 120
    return 128 if value_dim % 128 == 0 and fills else 64
