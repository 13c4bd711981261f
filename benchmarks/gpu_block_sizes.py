"""Time the Hopper kernels' candidate sizes on the GPU that is there, and print the table for block_sizes.py.

    python benchmarks/gpu_block_sizes.py [--processes=16]

For every head size and number of rows times heads: forward and backward, kernels only, with thread blocks of 64 and 128
value columns, and with rows cut into segments that fill the chip. Compilation takes nearly all of the time, so every
candidate has a process of its own, of which so many compile at once. When all are ready they are timed one by one.
"""

import argparse
import concurrent.futures
import importlib
import math
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pallas_kernels.gated_linear_attention import block_sizes

HEAD_SIZES = {  # K, V: the rows times heads to try
    (64, 64): (16, 32, 64),
    (128, 128): (16, 32, 64, 128),
    (128, 256): (16, 32, 64),
    (256, 512): (6, 8, 16),
}
TIME = 4096
_compilers: Any
_ready: Any
_gpu: Any  # what the processes share


def candidates(key_dim, value_dim, batch_heads):
    """Return (value_tile, whether rows are cut) to try: what could fill at least half of the chip."""
    blocks = batch_heads * -(-value_dim // 128)  # of 128 value columns
    tiles = [64]
    if key_dim > 128:  # whose kernels have their own
        tiles = [128]
    elif value_dim % 128 == 0 and 2 * blocks >= block_sizes.MULTIPROCESSORS:
        tiles = [64, 128]
    return [(tile, False) for tile in tiles] + [(tiles[-1], True)] * (2 * blocks <= block_sizes.MULTIPROCESSORS)


def milliseconds(key_dim, value_dim, batch_heads, value_tile, cut):
    """Time one candidate, forward and with backward."""
    table = {(key_dim, value_dim): {batch_heads: (value_tile, cut)}}
    shape = (batch_heads, TIME, 1, key_dim, value_dim)
    try:
        with _compilers, mock.patch.object(block_sizes, "_H100", table):
            kernels = importlib.import_module("benchmarks.kernels")
            forward, both = kernels.compile_jax(kernels.ours, shape)
    finally:
        _ready.wait()
    with _gpu:
        row = kernels.time_jax(forward, both, shape, copy_rate=1.0)
    return row["forward"]["ms"], row["forward_backward"]["ms"]


def _share(*shared):
    global _compilers, _ready, _gpu
    _compilers, _ready, _gpu = shared


def main():
    """Time all candidates and print them, then the best of each as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=16)
    options = parser.parse_args()
    jobs = [
        (*sizes, batch_heads, *candidate)
        for sizes, all_batch_heads in HEAD_SIZES.items()
        for batch_heads in all_batch_heads
        for candidate in candidates(*sizes, batch_heads)
    ]
    jobs.sort(key=lambda job: -job[0] * job[1])  # the widest take longest to compile
    context = multiprocessing.get_context("spawn")
    shared = context.Semaphore(options.processes), context.Barrier(len(jobs)), context.Lock()
    with concurrent.futures.ProcessPoolExecutor(
        len(jobs), context, initializer=_share, initargs=shared, max_tasks_per_child=1
    ) as pool:
        running = {job: pool.submit(milliseconds, *job) for job in jobs}
        best: dict[tuple, dict] = {}
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
    for head_sizes, places in sorted(best.items()):
        table = {place: (tile, cut) for place, (_, tile, cut) in places.items()}
        print(f"    {head_sizes}: {table},")
    print("}")


if __name__ == "__main__":
    main()
