"""Time the Hopper kernels' candidate sizes on the GPU that is there, and print the table for block_sizes.py.

    python benchmarks/gpu_block_sizes.py [--processes=8]

For every head size and number of rows times heads: forward and backward, kernels only, with thread blocks of 64 and 128
value columns, and with rows cut into segments that fill the chip. Compilation takes nearly all of the time, so every
candidate has a process of its own, of which one at a time uses the GPU.
"""

import argparse
import concurrent.futures
import importlib
import math
import multiprocessing
import os
import sys
from pathlib import Path
from unittest import mock

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

HEAD_SIZES = {  # K, V: the rows times heads to try
    (64, 64): (16, 32, 64),
    (128, 128): (16, 32, 64, 128),
    (128, 256): (16, 32, 64),
    (256, 512): (8, 16),
}
TIME = 4096
MULTIPROCESSORS = 132
_gpu = None


def candidates(key_dim, value_dim, batch_heads):
    """Return (value_tile, whether rows are cut) to try: what could fill at least half of the chip."""
    blocks = batch_heads * -(-value_dim // 128)  # of 128 value columns
    tiles = [64]
    if key_dim > 128:  # whose kernels have their own
        tiles = [128]
    elif value_dim % 128 == 0 and 2 * blocks >= MULTIPROCESSORS:
        tiles = [64, 128]
    return [(tile, False) for tile in tiles] + [(tiles[-1], True)] * (2 * blocks <= MULTIPROCESSORS)


def milliseconds(key_dim, value_dim, batch_heads, value_tile, cut):
    """Time one candidate, forward and with backward."""
    kernels = importlib.import_module("benchmarks.kernels")
    block_sizes = importlib.import_module("pallas_kernels.gated_linear_attention.block_sizes")
    table = {(key_dim, value_dim): {batch_heads: (value_tile, cut)}}
    shape = (batch_heads, TIME, 1, key_dim, value_dim)
    with mock.patch.object(block_sizes, "_H100", table):
        forward, both = kernels.compile_jax(kernels.ours, shape)
    with _gpu:
        row = kernels.time_jax(forward, both, shape, copy_rate=1.0)
    return row["forward"]["ms"], row["forward_backward"]["ms"]


def _keep(lock):
    global _gpu
    _gpu = lock


def main():
    """Time all candidates and print them, then the best of each as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        options.processes, context, initializer=_keep, initargs=(context.Lock(),)
    ) as pool:
        running = {
            (*sizes, batch_heads, *candidate): pool.submit(milliseconds, *sizes, batch_heads, *candidate)
            for sizes, all_batch_heads in HEAD_SIZES.items()
            for batch_heads in all_batch_heads
            for candidate in candidates(*sizes, batch_heads)
        }
        best = {}
        for (*sizes, batch_heads, value_tile, cut), result in running.items():
            how = f"tile {value_tile}{', cut' if cut else ''}"
            try:
                forward, both = result.result()
            except Exception as error:  # which costs this candidate only
                print(f"{tuple(sizes)}, {batch_heads:3} rows x heads, {how:13} {type(error).__name__}: {error}"[:200])
                continue
            print(f"{tuple(sizes)}, {batch_heads:3} rows x heads, {how:13} {forward:.3f} {both:.3f} ms", flush=True)
            places = best.setdefault(tuple(sizes), {})
            places[batch_heads] = min(places.get(batch_heads, (math.inf,)), (both, value_tile, cut))
    print("_H100 = {")
    for sizes, places in best.items():
        table = {place: (tile, cut) for place, (_, tile, cut) in places.items()}
        print(f"    {sizes}: {table},")
    print("}")


if __name__ == "__main__":
    main()
