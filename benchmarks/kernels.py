"""Time the op against softmax attention on one Hopper GPU, and say what share of the memory's floor it reaches.

    python benchmarks/kernels.py --output benchmarks/kernels_h100.json

Ours is `gated_linear_attention` with bfloat16 gates, forward alone and forward with backward, timed by CUPTI: kernels
only, median over the iterations. The inputs of every shape exceed the L2 cache, so each iteration starts cold. If torch
is installed, cuDNN and FlashAttention-2 of the same width run in the same process, causal, timed by CUDA events. The
copy bandwidth and the matrix rate of the GPU are measured first; a floor is the bytes that must move once, inputs and
outputs with no stored states, over that bandwidth.
"""

import argparse
import importlib.util
import json
import statistics
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pallas_kernels import gated_linear_attention

SHAPES = (  # B, T, H, K, V
    (32, 1024, 16, 64, 64),
    (32, 2048, 16, 64, 64),
    (16, 2048, 4, 128, 256),
    (16, 2048, 4, 256, 512),
    (4, 8192, 4, 256, 512),
    (1, 32768, 4, 256, 512),
    (4, 2048, 16, 128, 128),
)


def time_kernels(function, *arguments, iterations=12):
    """Return milliseconds of GPU kernels: median, least, most, and the median of each kernel by name."""
    _, runs = profiler.Cupti(finalize=False).measure(function, aggregate=False, iterations=iterations)(*arguments)
    runs = runs[2:]
    totals = [sum(duration for _, duration in run) for run in runs]
    kernels = {name: statistics.median(run[i][1] for run in runs) for i, (name, _) in enumerate(runs[0])}
    rounded = {name: round(duration, 4) for name, duration in kernels.items()}
    return {
        "ms": round(statistics.median(totals), 4),
        "least": round(min(totals), 4),
        "most": round(max(totals), 4),
        "kernels": rounded,
    }


def ceilings():
    """Return the copy bandwidth in TB/s, bytes read and written, and the bfloat16 matrix rate in TFLOP/s."""
    x = jnp.ones((2**29,), jnp.bfloat16)
    square = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    return {
        "copy_TBps": round(2 * x.nbytes / time_kernels(lambda x: x + 1, x)["ms"] / 1e9, 3),
        "matmul_TFLOPs": round(2 * 8192**3 / time_kernels(lambda a: a @ a, square)["ms"] / 1e9, 1),
    }


def time_ours(shape, copy_rate):
    """Time the op at one shape."""
    batch, time, heads, key_dim, value_dim = shape
    keys = jax.random.split(jax.random.key(1), 5)
    normal = lambda i, width: jax.random.normal(keys[i], (batch, time, heads, width), jnp.bfloat16)
    arguments = [normal(0, key_dim), normal(1, key_dim), normal(2, value_dim)]
    arguments.append((jax.nn.log_sigmoid(normal(3, key_dim).astype(jnp.float32)) / 16).astype(jnp.bfloat16))
    op = lambda *x: gated_linear_attention(*x, implementation="mosaic_gpu")

    def both(d_out, *x):
        out, pull_back = jax.vjp(lambda *x: op(*x)[0], *x)
        return out, pull_back(d_out)

    tokens = batch * time * heads
    row = {}
    for name, function, inputs, floor in (
        ("forward", op, arguments, tokens * (6 * key_dim + 4 * value_dim)),
        ("forward_backward", both, [normal(4, value_dim), *arguments], tokens * (18 * key_dim + 10 * value_dim)),
    ):
        compiled = jax.jit(function).lower(*inputs).compile()
        row[name] = time_kernels(compiled, *inputs)
        row[name]["temporary_MiB"] = round(compiled.memory_analysis().temp_size_in_bytes / 2**20)
        row[name]["floor_ms"] = round(floor / copy_rate / 1e9, 4)
        row[name]["share_of_floor"] = round(row[name]["floor_ms"] / row[name]["ms"], 3)
    return row


def time_softmax(shape):
    """Time cuDNN and FlashAttention-2 of the same width (heads of 64 or 128 channels) through torch."""
    torch = importlib.import_module("torch")
    attention = importlib.import_module("torch.nn.attention")
    functional = importlib.import_module("torch.nn.functional")
    do_bench = importlib.import_module("triton.testing").do_bench
    batch, time, heads, _, value_dim = shape
    width = 64 if heads * value_dim <= 1024 else 128
    normal = lambda: torch.randn(batch, heads * value_dim // width, time, width, device="cuda", dtype=torch.bfloat16)
    q, k, v = (normal().requires_grad_() for _ in range(3))
    d_out, rows = normal(), {}
    for name, backend in (("cudnn", "CUDNN_ATTENTION"), ("flash_attention_2", "FLASH_ATTENTION")):
        with attention.sdpa_kernel([getattr(attention.SDPBackend, backend)]):
            run = lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True)

            def both(run=run):
                q.grad = k.grad = v.grad = None
                run().backward(d_out)

            bench = lambda function: round(do_bench(function, warmup=20, rep=60, return_mode="median"), 4)
            with torch.no_grad():
                forward = bench(run)
            rows[name] = {"forward": forward, "forward_backward": bench(both)}
    return rows


def main():
    """Time everything and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    rates = ceilings()
    report = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, **rates, "shapes": []}
    print(report, flush=True)
    for shape in SHAPES:
        row = {"B, T, H, K, V": shape, "ours": time_ours(shape, rates["copy_TBps"])}
        if importlib.util.find_spec("torch") is not None:
            row["softmax"] = time_softmax(shape)
        report["shapes"].append(row)
        ours = row["ours"]
        print(shape, ours["forward"]["ms"], ours["forward_backward"]["ms"], row.get("softmax"), flush=True)
        output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
