"""Time the op on one Hopper GPU, beside softmax attention and other implementations of the op, in one run.

    python benchmarks/kernels.py --output=benchmarks/kernels_h100.json [--rivals=cudnn,flash_attention_2,jla,fla]

Ours is `gated_linear_attention` with bfloat16 gates, forward alone and forward with backward, timed by CUPTI: kernels
only, medians. Rivals that are not installed are left out: "cudnn" and "flash_attention_2" are torch's causal attention
of the same width, "jla" is jax-linear-attention's `gla`, "fla" is flash-linear-attention's `chunk_gla`, which tunes
itself for minutes at every new head size and is therefore timed only where --rivals names it, at one shape of each.
Torch is timed by CUDA events after a flush of the L2 cache. The inputs of every shape exceed that cache, so ours start
cold as well.

Copy bandwidth and matrix rate of the GPU are measured first. The floor is the bytes that must move once, inputs and
outputs with no stored states, over that bandwidth; the rate is the FLOPs of chunks of 64 tokens over the time.
"""

import argparse
import concurrent.futures
import contextlib
import importlib.util
import json
import statistics
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pallas_kernels import gated_linear_attention, gated_linear_attention_step

SHAPES = (  # B, T, H, K, V
    (32, 1024, 16, 64, 64),
    (32, 2048, 16, 64, 64),
    (16, 2048, 4, 128, 256),
    (16, 2048, 4, 256, 512),
    (4, 8192, 4, 256, 512),
    (1, 32768, 4, 256, 512),
    (4, 2048, 16, 128, 128),
)
STEPS = ((64, 4, 256, 512), (64, 4, 128, 256), (1, 4, 256, 512))  # B, H, K, V: single tokens
CHUNK = 64
PACKAGES = {"cudnn": "torch", "flash_attention_2": "torch", "jla": "jla", "fla": "fla"}


def time_kernels(function, *arguments, iterations=14):
    """Return milliseconds of GPU kernels: median, least, most, and the median of each kernel by name."""
    _, runs = profiler.Cupti(finalize=False).measure(function, aggregate=False, iterations=iterations)(*arguments)
    runs = runs[2:]
    totals = [sum(duration for _, duration in run) for run in runs]
    kernels = {}
    for i, (name, _) in enumerate(runs[0]):
        kernels[name] = kernels.get(name, 0.0) + statistics.median(run[i][1] for run in runs)
    return {
        "ms": round(statistics.median(totals), 4),
        "least": round(min(totals), 4),
        "most": round(max(totals), 4),
        "kernels": {name: round(duration, 4) for name, duration in kernels.items()},
    }


def ceilings():
    """Return the copy bandwidth in TB/s, bytes read and written, and the bfloat16 matrix rate in TFLOP/s."""
    x = jnp.ones((2**29,), jnp.bfloat16)
    square = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    return {
        "copy_TBps": round(2 * x.nbytes / time_kernels(lambda x: x + 1, x)["ms"] / 1e9, 3),
        "matmul_TFLOPs": round(2 * 8192**3 / time_kernels(lambda a: a @ a, square)["ms"] / 1e9, 1),
    }


def draw(shape):
    """Return query, key, value, log_decay and the cotangent of the output."""
    batch, time, heads, key_dim, value_dim = shape
    keys = jax.random.split(jax.random.key(1), 5)
    normal = lambda i, width: jax.random.normal(keys[i], (batch, time, heads, width), jnp.bfloat16)
    gate = (jax.nn.log_sigmoid(normal(3, key_dim).astype(jnp.float32)) / 16).astype(jnp.bfloat16)
    return normal(0, key_dim), normal(1, key_dim), normal(2, value_dim), gate, normal(4, value_dim)


def compile_jax(op, shape):
    """Compile an op of JAX at one shape, forwards and both ways; it takes query, key, value, log_decay."""
    *arguments, d_out = jax.eval_shape(lambda: draw(shape))

    def both(d_out, *x):
        out, pull_back = jax.vjp(op, *x)
        return out, pull_back(d_out)

    return jax.jit(op).lower(*arguments).compile(), jax.jit(both).lower(d_out, *arguments).compile()


def time_jax(forward, both, shape, copy_rate):
    """Time what `compile_jax` made of an op."""
    batch, time, heads, key_dim, value_dim = shape
    *arguments, d_out = draw(shape)
    tokens = batch * time * heads
    row = {}
    for name, compiled, inputs, numbers, flops in (
        (
            "forward", forward, arguments, 3 * key_dim + 2 * value_dim,
            2 * CHUNK * (key_dim + value_dim) + 4 * key_dim * value_dim,
        ),
        (
            "forward_backward", both, [d_out, *arguments], 9 * key_dim + 5 * value_dim,
            CHUNK * (8 * key_dim + 6 * value_dim) + 14 * key_dim * value_dim,
        ),
    ):  # fmt: skip
        memory = compiled.memory_analysis()
        row[name] = time_kernels(compiled, *inputs)
        peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
        row[name]["peak_MiB"] = round(peak / 2**20)
        row[name]["floor_ms"] = round(2 * tokens * numbers / copy_rate / 1e9, 4)
        row[name]["share_of_floor"] = round(row[name]["floor_ms"] / row[name]["ms"], 3)
        row[name]["TFLOPs"] = round(tokens * flops / row[name]["ms"] / 1e9, 1)
    return row


def time_step(shape, copy_rate):
    """Time one token; its floor is to read and write the states."""
    batch, heads, key_dim, value_dim = shape
    keys = jax.random.split(jax.random.key(2), 5)
    normal = lambda i, *dims: jax.random.normal(keys[i], (batch, heads, *dims), jnp.float32)
    widths = (key_dim, key_dim, value_dim, key_dim)
    query, key, value, gate = (normal(i, width).astype(jnp.bfloat16) for i, width in enumerate(widths))
    arguments = query, key, value, jax.nn.log_sigmoid(gate), normal(4, key_dim, value_dim)
    row = time_kernels(jax.jit(gated_linear_attention_step), *arguments)
    row["floor_ms"] = round(8 * batch * heads * key_dim * value_dim / copy_rate / 1e9, 4)
    row["share_of_floor"] = round(row["floor_ms"] / row["ms"], 3)
    return row


def time_torch(name, shape):
    """Time an op of torch at one shape: milliseconds, and MiB at the peak of forward and backward."""
    torch = importlib.import_module("torch")
    do_bench = importlib.import_module("triton.testing").do_bench
    batch, time, heads, key_dim, value_dim = shape
    random = lambda *dims: torch.randn(*dims, device="cuda", dtype=torch.bfloat16)
    if name == "fla":
        chunk_gla = importlib.import_module("fla.ops.gla").chunk_gla
        inputs = [random(batch, time, heads, width) for width in (key_dim, key_dim, value_dim)]
        gate = torch.nn.functional.logsigmoid(random(batch, time, heads, key_dim).float()) / 16
        inputs.append(gate)
        op, d_out = lambda *x: chunk_gla(*x)[0], random(batch, time, heads, value_dim)
        context = contextlib.nullcontext()
    else:  # heads of 64 or 128 channels
        attention = importlib.import_module("torch.nn.attention")
        width = 64 if heads * value_dim <= 1024 else 128
        inputs = [random(batch, heads * value_dim // width, time, width) for _ in range(3)]
        functional = importlib.import_module("torch.nn.functional")
        op, d_out = lambda *x: functional.scaled_dot_product_attention(*x, is_causal=True), torch.randn_like(inputs[0])
        backend = {"cudnn": "CUDNN_ATTENTION", "flash_attention_2": "FLASH_ATTENTION"}[name]
        context = attention.sdpa_kernel([getattr(attention.SDPBackend, backend)])
    for x in inputs:
        x.requires_grad_()

    def both():
        for x in inputs:
            x.grad = None
        op(*inputs).backward(d_out)

    bench = lambda function: round(do_bench(function, warmup=20, rep=60, return_mode="median"), 4)
    with context:
        with torch.no_grad():
            forward = bench(lambda: op(*inputs))
        both()
        torch.cuda.reset_peak_memory_stats()
        row = {"forward": {"ms": forward}, "forward_backward": {"ms": bench(both)}}
    # do_bench holds 256 MiB of its own, with which it flushes the cache
    row["forward_backward"]["peak_MiB"] = round(torch.cuda.max_memory_allocated() / 2**20) - 256
    torch.cuda.empty_cache()
    return row


def ours(*x):
    """Run the op."""
    return gated_linear_attention(*x, implementation="mosaic_gpu")[0]


def jla(*x):
    """Run jax-linear-attention's."""
    return importlib.import_module("jla.ops.mosaic_gpu.gla").gla(*x)[0]


def main():
    """Time everything and write the JSON, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rivals", default="cudnn,flash_attention_2,jla", help="which of them to time, if installed")
    parser.add_argument("--shapes", help="which rows to time, by number from 0, e.g. 0,3; all by default")
    arguments = parser.parse_args()
    rivals = [name for name in arguments.rivals.split(",") if name]
    unknown = [name for name in rivals if name not in PACKAGES]
    if unknown:
        parser.error(f"--rivals names {unknown[0]!r}; it must be of {', '.join(PACKAGES)}.")
    rivals = [name for name in rivals if importlib.util.find_spec(PACKAGES[name]) is not None]
    shapes = SHAPES if arguments.shapes is None else [SHAPES[int(i)] for i in arguments.shapes.split(",")]

    rates = ceilings()
    report = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, **rates, "shapes": [], "steps": []}
    print({key: report[key] for key in ("device", "jax", *rates)}, flush=True)
    with concurrent.futures.ThreadPoolExecutor() as threads:  # while one shape is lowered, others are compiled
        ops = {"ours": ours} | ({"jla": jla} if "jla" in rivals else {})
        compiling = {
            (name, shape): threads.submit(compile_jax, op, shape) for shape in shapes for name, op in ops.items()
        }
    for shape in shapes:
        row = {"B, T, H, K, V": shape}
        new_heads = all(other[3:] != shape[3:] for other in shapes[: shapes.index(shape)])
        for name in ("ours", *(name for name in rivals if name != "fla" or new_heads)):
            try:
                if name in ops:
                    row[name] = time_jax(*compiling[name, shape].result(), shape, rates["copy_TBps"])
                else:
                    row[name] = time_torch(name, shape)
                figures = [part["ms"] for part in row[name].values()]
            except Exception as error:  # a rival that does not serve the shape
                if name == "ours":
                    raise
                figures = [f"{type(error).__name__}: {str(error)[:200]}"]
                row[name] = {"error": figures[0]}
            print(shape, name, *figures, flush=True)
        report["shapes"].append(row)
        arguments.output.write_text(json.dumps(report, indent=1))
    for shape in STEPS:
        row = {"B, H, K, V": shape, **time_step(shape, rates["copy_TBps"])}
        report["steps"].append(row)
        print("one token", shape, row["ms"], row["share_of_floor"], flush=True)
        arguments.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
