"""Time the op on one Hopper GPU, beside softmax attention and other implementations of the op, in one run.

    python benchmarks/kernels.py --output=benchmarks/kernels_h100.json [--rivals=cudnn,flash_attention_2,jla,fla]

Ours is `gated_linear_attention` with bfloat16 gates, forward alone and forward with backward, timed by CUPTI: kernels
only, medians of a short run. Rivals that are not installed are left out: "cudnn" and "flash_attention_2" are torch's
causal attention of the same width, "jla" is jax-linear-attention's `gla`, "fla" is flash-linear-attention's
`chunk_gla`. Torch is timed by CUDA events after a flush of the L2 cache. The inputs of every shape exceed that cache,
so ours start cold as well. "call_ms", of all alike, is the time from call to call in the second half of a load of
0.4 seconds, gaps between kernels included: a GPU at the limit of its power lowers its clocks within milliseconds.

Compilation takes nearly all of the time, so every shape has a process of its own, and fla, which tunes itself while the
others compile, one more. When all are ready, or --patience is over, they are timed one after another; a process takes
its memory with it when it ends. The JSON is written after each.

Copy bandwidth and matrix rate of the GPU are measured first. The floor is the bytes that must move once, inputs and
outputs with no stored states, over that bandwidth; the rate is the FLOPs of chunks of 64 tokens over the time.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import importlib
import importlib.util
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

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
LOAD = 0.4  # seconds of calls without a pause
PACKAGES = {"ours": "jax", "cudnn": "torch", "flash_attention_2": "torch", "jla": "jla", "fla": "fla"}


def time_kernels(function, *arguments, iterations=14):
    """Return milliseconds of GPU kernels: median, least, most, and the median of each kernel by name."""
    _, runs = profiler.Cupti(finalize=False).measure(function, aggregate=False, iterations=iterations)(*arguments)
    runs = runs[2:]
    totals = [sum(duration for _, duration in run) for run in runs]
    kernels: dict[str, float] = {}
    for i, (name, _) in enumerate(runs[0]):
        kernels[name] = kernels.get(name, 0.0) + statistics.median(run[i][1] for run in runs)
    return {
        "ms": round(statistics.median(totals), 4),
        "least": round(min(totals), 4),
        "most": round(max(totals), 4),
        "kernels": {name: round(duration, 4) for name, duration in kernels.items()},
    }


def time_calls(call, wait, ms):
    """Return milliseconds from call to call in the second half of `LOAD` seconds of calls of about `ms` each."""
    calls = max(10, int(LOAD / 2 / ms * 1e3))
    results = [call()]
    for _ in range(2):  # the first half warms the chip
        start = time.perf_counter()
        for _ in range(calls):
            results.append(call())
            if len(results) > 4:  # more in flight would only take memory
                wait(results.pop(0))
        wait(results[-1])
        took = time.perf_counter() - start
    return round(took / calls * 1e3, 4)


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
        call = functools.partial(compiled, *inputs)
        row[name]["call_ms"] = time_calls(call, jax.block_until_ready, row[name]["ms"])
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


def torch_op(name, shape):
    """Return an op of torch at one shape, its inputs, the cotangent of its output, and the context to run it in."""
    torch = importlib.import_module("torch")
    batch, time, heads, key_dim, value_dim = shape
    random = lambda *dims: torch.randn(*dims, device="cuda", dtype=torch.bfloat16)
    if name == "fla":
        chunk_gla = importlib.import_module("fla.ops.gla").chunk_gla
        inputs = [random(batch, time, heads, width) for width in (key_dim, key_dim, value_dim)]
        inputs.append((torch.nn.functional.logsigmoid(random(batch, time, heads, key_dim).float()) / 16).bfloat16())
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
    return op, inputs, d_out, context


def time_torch(name, shape):
    """Time an op of torch at one shape: milliseconds, and MiB at the peak of forward and backward."""
    torch = importlib.import_module("torch")
    do_bench = importlib.import_module("triton.testing").do_bench
    op, inputs, d_out, context = torch_op(name, shape)

    def forward():
        with torch.no_grad():
            op(*inputs)

    def both():
        for x in inputs:
            x.grad = None
        op(*inputs).backward(d_out)

    def enqueue(function):
        function()
        event = torch.cuda.Event()
        event.record()
        return event

    row: dict[str, dict[str, float]] = {}
    with context:
        for key, function in (("forward", forward), ("forward_backward", both)):
            function()
            torch.cuda.reset_peak_memory_stats()
            row[key] = {"ms": round(do_bench(function, warmup=20, rep=60, return_mode="median"), 4)}
            call = functools.partial(enqueue, function)
            row[key]["call_ms"] = time_calls(call, lambda event: event.synchronize(), row[key]["ms"])
    # do_bench holds 256 MiB of its own, with which it flushes the cache
    row["forward_backward"]["peak_MiB"] = round(torch.cuda.max_memory_allocated() / 2**20) - 256
    return row


def tune_fla(shape, briefly):
    """Have fla's kernels choose among Triton's configurations; briefly, among those of four warps and two stages."""
    torch = importlib.import_module("torch")
    tuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    initialise = tuner.__init__

    def limited(self, fn, arg_names, configs, *others, **named):
        few = [config for config in configs if config.num_warps == 4] or configs[:1]
        few = [config for config in few if config.num_stages == 2] or few
        initialise(self, fn, arg_names, few, *others, **named)

    if briefly:
        tuner.__init__ = limited
    op, inputs, d_out, _ = torch_op("fla", shape)
    op(*inputs).backward(d_out)
    del op, inputs, d_out
    torch.cuda.empty_cache()


def ours(*x):
    """Run the op, which like the others' by default leaves out the final state."""
    return gated_linear_attention(*x, implementation="mosaic_gpu", output_final_state=False)[0]


def jla(*x):
    """Run jax-linear-attention's."""
    return importlib.import_module("jla.ops.mosaic_gpu.gla").gla(*x)[0]


def prepare(name, shape, briefly) -> Any:
    """Do what takes long and needs no quiet GPU; return the compiled op if it is one of JAX."""
    if name in ("ours", "jla"):
        return compile_jax({"ours": ours, "jla": jla}[name], shape)
    return tune_fla(shape, briefly) if name == "fla" else importlib.import_module("torch")


def measure_shape(pipe, shape, names, briefly):
    """Prepare some ops at one shape, say so, and time them when the copy bandwidth comes: the work of one process."""
    with concurrent.futures.ThreadPoolExecutor() as threads:
        prepared = {name: threads.submit(prepare, name, shape, briefly) for name in names}
    pipe.send("ready")
    copy_rate = pipe.recv()
    for name in names:
        try:
            made = prepared[name].result()
            figures = (
                time_jax(made[0], made[1], shape, copy_rate) if name in ("ours", "jla") else time_torch(name, shape)
            )
        except Exception as error:  # one that does not serve the shape, or finds no memory
            figures = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        if name == "fla":
            figures["tuned"] = "briefly" if briefly else "fully"
        pipe.send((name, figures))


def measure_chip(pipe):
    """Measure what the chip can do, then single tokens."""
    pipe.send("ready")
    pipe.recv()
    rates = ceilings()
    pipe.send({"device": jax.devices()[0].device_kind, "jax": jax.__version__, **rates})
    for shape in STEPS:
        pipe.send({"B, H, K, V": shape, **time_step(shape, rates["copy_TBps"])})


def start(context, function, *arguments):
    """Start a process; return it and our end of the pipe to it."""
    pipe, its_end = context.Pipe()
    process = context.Process(target=function, args=(its_end, *arguments), daemon=True)
    process.start()
    its_end.close()
    return process, pipe


def wait_until_ready(jobs, patience):
    """Wait for every process to say that it is ready; end those that are not in so many seconds."""
    began, waiting = time.monotonic(), {pipe: name for name, (_, pipe) in jobs.items()}
    while waiting:
        left = began + patience - time.monotonic()
        ready = multiprocessing.connection.wait(list(waiting), max(left, 0.0))
        for pipe in (pipe for pipe in waiting.copy() if pipe in ready):
            name = waiting.pop(pipe)
            try:
                state = pipe.recv()
            except (EOFError, OSError):  # which `ask` finds out as well
                state = "died"
            print(f"{time.monotonic() - began:4.0f} s: {name} {state}, {len(waiting)} to come", flush=True)
        if not ready:
            for name in waiting.values():
                print(f"{name} not ready in {patience:.0f} s: left out", flush=True)
                jobs[name][0].kill()
            return


def ask(job, copy_rate):
    """Tell a process to go on; yield what it sends until it ends."""
    process, pipe = job
    with contextlib.suppress(EOFError, OSError):
        pipe.send(copy_rate)
        while True:
            yield pipe.recv()
    process.join()  # and with it goes its memory


def main():
    """Time everything and write the JSON, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rivals", default="cudnn,flash_attention_2,jla", help="which of them to time, if installed")
    parser.add_argument("--shapes", help="which rows to time, by number from 0, e.g. 0,3; all by default")
    parser.add_argument("--briefly", action="store_true", help="let fla tune itself among few of Triton's choices")
    parser.add_argument("--patience", type=float, default=1200, help="seconds for compiling and tuning")
    options = parser.parse_args()
    names = ["ours", *(name for name in options.rivals.split(",") if name)]
    unknown = [name for name in names if name not in PACKAGES]
    if unknown:
        parser.error(f"--rivals names {unknown[0]!r}; it must be of {', '.join(list(PACKAGES)[1:])}.")
    missing = [name for name in names if importlib.util.find_spec(PACKAGES[name]) is None]
    for name in missing:
        print(f"{name} is not installed: left out", flush=True)
    names = [name for name in names if name not in missing]
    shapes = SHAPES if options.shapes is None else [SHAPES[int(i)] for i in options.shapes.split(",")]

    context = multiprocessing.get_context("spawn")
    jobs = {"the chip": start(context, measure_chip)}
    together = [name for name in names if name != "fla"]
    for shape in shapes:
        jobs[f"{shape}"] = start(context, measure_shape, shape, together, options.briefly)
    for shape in shapes if "fla" in names else ():
        jobs[f"{shape} fla"] = start(context, measure_shape, shape, ["fla"], options.briefly)
    wait_until_ready(jobs, options.patience)

    report: dict[str, Any] = {"device": "unknown", "copy_TBps": math.nan, "shapes": [], "steps": []}
    write = lambda: options.output.write_text(json.dumps(report, indent=1))
    for part in ask(jobs["the chip"], None):
        if "device" in part:
            report |= part
        else:
            report["steps"].append(part)
        print(*part.items(), flush=True)
    for shape in shapes:
        row: dict[str, Any] = {"B, T, H, K, V": shape}
        report["shapes"].append(row)
        for job in (f"{shape}", f"{shape} fla"):
            for name, figures in ask(jobs[job], report["copy_TBps"]) if job in jobs else ():
                row[name] = figures
                print(shape, name, *([figures["error"]] if "error" in figures else times(figures)), flush=True)
                write()
    write()
    failed = [f"{row['B, T, H, K, V']}" for row in report["shapes"] if "forward" not in row.get("ours", {})]
    sys.exit(f"Ours failed at {', '.join(failed)}." if failed else None)


def times(figures):
    """Return milliseconds, forward and with backward."""
    return [figures[name]["ms"] for name in ("forward", "forward_backward")]


if __name__ == "__main__":
    main()
