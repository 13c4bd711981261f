"""Time training steps of whole models: tokens per second, share of the peak, memory, and where the time goes.

    python benchmarks/training.py --models=gla_1p3b,transformer_1p3b --shapes=8x2048,1x16384 --output=training.json
    python benchmarks/plot.py training.json training.png

A model is a file in `configs/`, as it is but for the rows of a step and without recomputation of layers, which
`--set=model.remat=full` brings back. The step is the trainer's own: compiled, donated, AdamW, float32 parameters,
bfloat16 compute. Tokens are random, each row one document, or `--documents` of equal length. As in the trainer, a step
is dispatched before the metrics of the one before it are fetched; a step's time is that between two fetches. FLOPs are
the model's: matrix products and the mixers' own, nothing for recomputation. On GPUs, kernels are launched one by one
and not as CUDA graphs, whose kernels a trace cannot attribute; the time of a step is the same. All programs are
compiled at once: for the time that one takes to compile, give one.
`--profile=FOLDER` keeps the trace, which xprof and Perfetto open.
"""

import argparse
import concurrent.futures
import contextlib
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.kernel_times import read_kernels, read_op_names
from gla_jax.config import Config, load
from gla_jax.hardware import GIB, peak_flops
from gla_jax.models import abstract_model, bind
from gla_jax.parallel.mesh import make_mesh, place_batch
from gla_jax.parallel.program import read_memory
from gla_jax.training.optimizer import make_optimizer
from gla_jax.training.planning import abstract_batch
from gla_jax.training.state import abstract_state, init_state
from gla_jax.training.step import make_train_step

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TRACED_STEPS = 3


def make_config(model: str, shape: str, settings: Mapping[str, str]) -> Config:
    """Return the config of a model at a shape "8x2048": rows by tokens."""
    rows, length = shape.split("x")
    overrides = {"model.remat": "none", "data.batch_size": rows, "data.sequence_length": length}
    return load(str(CONFIGS / f"{model}.py"), overrides | dict(settings))


def random_batch(config: Config, documents: int) -> dict[str, Any]:
    """Return a batch of random tokens on the devices; with one document a row it says nothing of documents."""
    rows, length = config.data.batch_size, config.data.sequence_length
    tokens = np.random.default_rng(0).integers(config.model.vocab_size, size=(rows, length + 1), dtype=np.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((rows, length), np.float32)}
    if documents > 1:
        positions = np.arange(length, dtype=np.int32) % -(-length // documents)
        document = np.cumsum(positions == 0, dtype=np.int32)
        batch |= {"positions": np.tile(positions, (rows, 1)), "segment_ids": np.tile(document, (rows, 1))}
    return place_batch(batch, rows)


def lower_step(config: Config, documents: int) -> Any:
    """Trace the training step for the current mesh, ready to be compiled."""
    graphdef, params = abstract_model(config.model, config.dtype)
    optimizer = make_optimizer(config.optimizer, config.steps)
    batch = abstract_batch(config)
    if documents == 1:
        del batch["segment_ids"], batch["positions"]
    step: Any = make_train_step(config, graphdef, optimizer)
    return step.lower(abstract_state(config, optimizer, params), batch)


def compile_step(config: Config, documents: int, options: Mapping[str, Any]) -> tuple[Any, dict[str, float]]:
    """Compile the training step; return it and the seconds that tracing and compiling took."""
    start = time.perf_counter()
    with jax.set_mesh(make_mesh(config.mesh)):
        lowered = lower_step(config, documents)
    traced = time.perf_counter()
    graphs = {"xla_gpu_enable_command_buffer": ""} if jax.default_backend() == "gpu" else {}
    compiled = lowered.compile(compiler_options=graphs | dict(options))
    return compiled, {"trace": round(traced - start, 2), "compile": round(time.perf_counter() - traced, 2)}


def run_steps(step: Any, state: Any, batch: Any, count: int) -> tuple[Any, list[float], list[float]]:
    """Run steps as the trainer does; return the state, every loss, and the seconds between one and the next."""
    losses, stamps, newest = [], [], None
    for _ in range(count):
        state, metrics = step(state, batch)
        if newest is not None:
            losses.append(float(newest["loss"]))
            stamps.append(time.perf_counter())
        newest = metrics
    assert newest is not None
    losses.append(float(newest["loss"]))
    stamps.append(time.perf_counter())
    return state, losses, np.diff(stamps).tolist()


@contextlib.contextmanager
def trace_folder(folder: Path | None) -> Iterator[Path]:
    """Provide a folder for a trace: the one that is wanted, or one that goes away."""
    if folder is not None:
        yield folder
    else:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)


def measure(
    config: Config, program: tuple[Any, dict[str, float]], steps: int, documents: int = 1, profile: Path | None = None
) -> dict[str, Any]:
    """Run, time and trace the training step of a config.

    Args:
        config: the run.
        program: what `compile_step` returned for it.
        steps: timed ones, after three to warm up.
        documents: in each row.
        profile: where the trace is kept; None: nowhere.
    """
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        step, seconds = program
        state = init_state(config, make_optimizer(config.optimizer, config.steps))
        batch = random_batch(config, documents)
        state, first_losses, _ = run_steps(step, state, batch, 3)
        state, losses, times = run_steps(step, state, batch, steps + 3)
        # What comes first also waits for the device to begin. After the last no step is launched, which otherwise keeps
        # the host for as long as the device's queue is full.
        times = times[1:-1]
        with trace_folder(profile) as folder:
            with jax.profiler.trace(str(folder)):
                state, _, _ = run_steps(step, state, batch, TRACED_STEPS)
                jax.block_until_ready(state)
            kernels = read_kernels(folder, read_op_names(step.as_text()), TRACED_STEPS)
        graphdef, params = abstract_model(config.model, config.dtype)
        flops = 3 * bind(graphdef, params).flops_per_token(config.data.sequence_length)
    devices, memory, tokens = mesh.devices.flat, read_memory(step), config.data.batch_size * config.data.sequence_length
    peak, median = peak_flops(devices[0].device_kind), statistics.median(times)
    in_use = (devices[0].memory_stats() or {}).get("peak_bytes_in_use")
    rate = lambda seconds: round(tokens / seconds)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "step_ms": round(1e3 * median, 3),
        "tokens_per_second": {"median": rate(median), "least": rate(max(times)), "most": rate(min(times))},
        "gflops_per_token": round(flops / 1e9, 3),
        "mfu": None if peak is None else round(flops * tokens / median / peak / len(devices), 4),
        "memory_GiB": {
            "program": round(memory.peak / GIB, 2),
            "arguments": round(memory.arguments / GIB, 2),
            "process_so_far": None if in_use is None else round(in_use / GIB, 2),
        },
        "compile_seconds": seconds,
        "losses": [round(loss, 5) for loss in first_losses + losses],
        "kernels": kernels,
    }


def parse_settings(pairs: Sequence[str]) -> dict[str, str]:
    """Turn "NAME=VALUE" texts into a dict."""
    return dict(pair.split("=", 1) for pair in pairs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every model at every shape and write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="gla_1p3b,transformer_1p3b,gla_340m", help="files in configs/, by comma")
    parser.add_argument("--shapes", default="8x2048", help="rows x tokens of a step, by comma")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--documents", type=int, default=1, help="documents in each row")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the config")
    parser.add_argument("--xla", action="append", default=[], metavar="NAME=VALUE", help="an option of the compiler")
    parser.add_argument("--cache", help="folder of compiled programs to use and to fill")
    parser.add_argument("--profile", type=Path, help="folder to keep the traces in")
    parser.add_argument("--output", type=Path, required=True, help="the JSON")
    options = parser.parse_args(arguments)
    if options.cache:
        jax.config.update("jax_compilation_cache_dir", options.cache)
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "set": options.set,
        "xla": options.xla,
        "documents": options.documents,
        "rows": [],
    }
    cases = [
        (model, shape, make_config(model, shape, parse_settings(options.set)))
        for model in options.models.split(",")
        for shape in options.shapes.split(",")
    ]
    xla = parse_settings(options.xla)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = [pool.submit(compile_step, config, options.documents, xla) for _, _, config in cases]
        concurrent.futures.wait(programs)
    for (model, shape, config), program in zip(cases, programs, strict=True):
        row: dict[str, Any] = {"model": model, "shape": shape}
        folder = None if options.profile is None else options.profile / f"{model}_{shape}"
        try:
            row |= measure(config, program.result(), options.steps, options.documents, folder)
        except jax.errors.JaxRuntimeError as error:  # most of all, one that does not fit
            row["error"] = str(error).splitlines()[0][:300]
        gc.collect()
        report["rows"].append(row)
        print({name: value for name, value in row.items() if name not in ("losses", "kernels")}, flush=True)
        options.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
