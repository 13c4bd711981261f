"""Time training steps on one GPU and on two: rows shared out, long rows cut in two, and one too long for a single GPU.

    python benchmarks/scaling.py --output=scaling.json --plot=scaling.png

- `rows`: GLA-340M, as many rows on each device: one device, two by `mesh.data`, two by `mesh.fsdp`.
- `row`: GLA-1.3B, one row of 131072 tokens: on one device, and cut in two by `mesh.sequence`.
- `longer`: the same with rows so long that one device has no room for them.

The step is the trainer's own, of the files in `configs/`: compiled, donated, AdamW, layers recomputed. Tokens are
random. All programs are compiled at once and before anything runs. A step is dispatched before the metrics of the one
before it are fetched, as in the trainer; its time is that between two fetches, their median counts. `speedup` is by
tokens per second over the one device of the same group.
"""

import argparse
import dataclasses
import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.training import CONFIGS, lower_step, parse_settings, random_batch, run_steps
from gla_jax.config import Config, load
from gla_jax.hardware import GIB, find_device
from gla_jax.parallel.mesh import make_mesh
from gla_jax.parallel.program import read_collectives, read_memory, summarize
from gla_jax.training.optimizer import make_optimizer
from gla_jax.training.state import init_state

AXES = {
    "one": {},
    "data": {"data": "2", "fsdp": "1"},
    "fsdp": {"fsdp": "2"},
    "sequence": {"sequence": "2", "fsdp": "1"},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One step to time."""

    group: str
    axis: str
    """One of `AXES`."""
    config: Config

    @property
    def devices(self) -> list[jax.Device]:
        """What it runs on."""
        return jax.devices()[: 1 if self.axis == "one" else 2]

    @property
    def name(self) -> str:
        """What it is called on the command line, without the length of its rows."""
        return f"{self.group}:{self.axis}"


def make_cases(short: str, length: int, longer: Sequence[int], settings: Mapping[str, str]) -> list[Case]:
    """Return every case in the order in which they run.

    Args:
        short: rows on each device by tokens in them, "16x2048".
        length: tokens in the long row.
        longer: tokens in rows that may be too long for one device.
        settings: fields of the configs, over all else.
    """

    def case(group: str, axis: str, model: str, batch_size: int, tokens: int) -> Case:
        fields = {"data.batch_size": str(batch_size), "data.sequence_length": str(tokens)}
        fields |= {f"mesh.{name}": size for name, size in AXES[axis].items()} | dict(settings)
        return Case(group, axis, load(str(CONFIGS / f"{model}.py"), fields))

    rows, tokens = (int(part) for part in short.split("x"))
    return [
        case("rows", "one", "gla_340m", rows, tokens),
        *(case("rows", axis, "gla_340m", 2 * rows, tokens) for axis in ("fsdp", "data")),
        *(case("row", axis, "gla_1p3b", 1, length) for axis in ("one", "sequence")),
        *(case("longer", axis, "gla_1p3b", 1, size) for size in longer for axis in ("sequence", "one")),
    ]


def compile_case(case: Case, options: Mapping[str, Any]) -> Any:
    """Compile the step of a case; return the program, or the error that its compiler raised."""
    try:
        with jax.set_mesh(make_mesh(case.config.mesh, case.devices)):
            return lower_step(case.config, 1).compile(compiler_options=dict(options) or None)
    except jax.errors.JaxRuntimeError as error:
        return error


def run_case(case: Case, program: Any, steps: int) -> dict[str, Any]:
    """Run a step several times; return what is found, or why it does not run."""
    config = case.config
    tokens = config.data.batch_size * config.data.sequence_length
    kind = case.devices[0].device_kind
    row: dict[str, Any] = {
        "group": case.group,
        "axis": case.axis,
        "devices": len(case.devices),
        "rows": config.data.batch_size,
        "length": config.data.sequence_length,
    }
    if isinstance(program, Exception):
        return row | {"error": str(program).splitlines()[0][:300]}
    memory, device = read_memory(program), find_device(kind)
    row |= {"memory_GiB": round(memory.peak / GIB, 2), "collectives": summarize(read_collectives(program.as_text()))}
    if device is not None and memory.peak > device.memory:
        return row | {"error": f"needs {memory.peak / GIB:.1f} GiB of the {device.memory / GIB:.1f} that a {kind} has"}
    try:
        with jax.set_mesh(make_mesh(config.mesh, case.devices)):
            state, batch = init_state(config, make_optimizer(config.optimizer, config.steps)), random_batch(config, 1)
            state, first_losses, _ = run_steps(program, state, batch, 2)
            state, losses, times = run_steps(program, state, batch, steps + 1)
    except jax.errors.JaxRuntimeError as error:
        return row | {"error": str(error).splitlines()[0][:300]}
    median = statistics.median(times)
    return row | {
        "step_ms": round(1e3 * median, 2),
        "slowest_ms": round(1e3 * max(times), 2),
        "tokens_per_second": round(tokens / median),
        "losses": [round(loss, 5) for loss in first_losses + losses],
    }


def add_speedups(rows: Sequence[dict[str, Any]]) -> None:
    """Say of every row how many times the tokens per second of one device it reaches, where that one ran."""
    key = lambda row: (row["group"], row["length"])
    alone = {key(row): row["tokens_per_second"] for row in rows if row["axis"] == "one" and "tokens_per_second" in row}
    for row in rows:
        if "tokens_per_second" in row and key(row) in alone:
            row["speedup"] = round(row["tokens_per_second"] / alone[key(row)], 3)


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw the speedups as bars."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = [row for row in report["rows"] if row["devices"] > 1 and "speedup" in row]
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    labels = [f"{row['axis']}=2\n{row['rows']} x {row['length']:,}" for row in rows]
    bars = axes.bar(range(len(rows)), [row["speedup"] for row in rows], width=0.6, color="tab:blue")
    axes.bar_label(bars, fmt="%.2f")
    axes.axhline(2, color="gray", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(rows)), labels)
    axes.set_ylabel("tokens per second, times one device")
    axes.set_title(f"Training on two {report['device']}", fontsize=10)
    figure.savefig(path, dpi=160)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile every case, run them one after the other, and write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="16x2048", help="rows on each device x tokens in them")
    parser.add_argument("--length", type=int, default=131072, help="tokens in the long row")
    parser.add_argument("--longer", default="262144", help="tokens in rows too long for one device, by comma")
    parser.add_argument("--cases", help="only these, by comma: rows:one,rows:fsdp,..")
    parser.add_argument("--steps", type=int, default=5, help="timed steps; 2 of the longer rows")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the configs")
    parser.add_argument("--xla", action="append", default=[], metavar="NAME=VALUE", help="an option of the compiler")
    parser.add_argument("--output", type=Path, required=True, help="the JSON")
    parser.add_argument("--plot", type=Path, help="the picture, too")
    options = parser.parse_args(arguments)
    if jax.device_count() < 2:
        sys.exit(f"Two devices are needed; here is {jax.device_count()}.")
    longer = [int(length) for length in options.longer.split(",") if length]
    cases = make_cases(options.rows, options.length, longer, parse_settings(options.set))
    if options.cases:
        cases = [case for case in cases if case.name in options.cases.split(",")]
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "set": options.set,
        "xla": options.xla,
        "rows": [],
    }
    start = time.perf_counter()
    booleans = {"true": True, "false": False}
    compiler = {name: booleans.get(value, value) for name, value in parse_settings(options.xla).items()}
    with ThreadPoolExecutor(len(cases)) as pool:
        programs = list(pool.map(functools.partial(compile_case, options=compiler), cases))
    print(f"{time.perf_counter() - start:.0f} s to compile", flush=True)
    for case, program in zip(cases, programs, strict=True):
        row = run_case(case, program, 2 if case.group == "longer" else options.steps)
        gc.collect()
        report["rows"].append(row)
        add_speedups(report["rows"])
        shown = {name: value for name, value in row.items() if name not in ("losses", "collectives")}
        print(f"{time.perf_counter() - start:.0f} s", shown, flush=True)
        options.output.write_text(json.dumps(report, indent=1))
    if options.plot:
        plot(report, options.plot)


if __name__ == "__main__":
    main()
