"""Rank the TPU kernels' sizes by the compiler's estimates: `python benchmarks/tpu_kernels.py --chips=v5e,v6e`.

No TPU is needed, only libtpu (extra `tpu`): every candidate is compiled for the chip by a process of its own, and
its time is estimated as max(cycles / clock, bytes / HBM bandwidth), cycles by the compiler's own model of the
schedule. These are compiler estimates, good for ranking; nothing here was measured. Results are added to a JSON
file, and what it already holds, of the kernels as they are now, is not compiled again. `--table` prints the best
sizes of every chip and shape, for block_sizes.py.

The estimate counts both branches of a conditional, so the form for unbounded gates, which a trained layer's gates
do not take, is left out; what runs at the first and last grid step only is counted at every step.

`--rivals` compiles the same job, whole calls from [B, T, H, K] on, as others do it: the `chunked` form by XLA, and
`chunk_gla` of deltanet-tpu (pip install deltanet-tpu; K = V = 128 only). A call's time is the sum over its
operations, each as often as its loop runs: XLA's estimate of a fusion; for a Pallas kernel, as above. For v6e alone:
on the other chips the compiler aborts once it has written the estimate of the first kernel.
"""

import dataclasses
import glob
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from absl import app, flags

_CHIPS = flags.DEFINE_list("chips", ["v5e", "v5p", "v6e", "tpu7x"], "The chips to compile for.")
_SHAPES = flags.DEFINE_list("shapes", ["64x64", "128x128", "128x256", "256x512"], "K x V.")
_KERNELS = flags.DEFINE_list("kernels", ["forward", "training_forward", "backward"], "The kernels.")
_CHUNKS = flags.DEFINE_list("chunks", ["128", "256"], "Candidates: C.")
_STEPS = flags.DEFINE_list("steps", ["512", "1024"], "Candidates: tokens of a grid step.")
_HEADS = flags.DEFINE_list("heads", ["2", "4", "8"], "Candidates: heads of a grid step.")
_UNROLLS = flags.DEFINE_list("unrolls", ["1", "2", "4"], "Candidates: chunks in a straight line.")
_OUTPUT = flags.DEFINE_string("output", "benchmarks/tpu_kernels.json", "The JSON file to add results to.")
_RIVALS = flags.DEFINE_bool("rivals", False, "Compile the same job as others do it, in place of our kernels.")
_TABLE = flags.DEFINE_bool("table", False, "Compile nothing; print the best sizes in the JSON file.")
_CHILD = flags.DEFINE_string(
    "child", None, "One candidate as JSON: compile it in this process (used by the script itself)."
)

HEADS, TIME = 16, 2048
RIVALS = ("chunked forward", "chunked both", "deltanet-tpu forward", "deltanet-tpu both")
KERNELS = pathlib.Path(__file__).parents[1] / "pallas_kernels" / "gated_linear_attention"


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip: its topology's name, clock (inferred from peak FLOP/s; Hz) and HBM bandwidth of one device (bytes/s)."""

    topology: str
    clock: float
    bandwidth: float


CHIPS = {
    "v5e": Chip("v5e:2x2", 1.5e9, 0.82e12),
    "v5p": Chip("v5p:2x2x1", 1.75e9, 2.46e12),
    "v6e": Chip("v6e:2x2", 1.75e9, 1.64e12),
    "tpu7x": Chip("tpu7x:2x2x1", 2.2e9, 3.7e12),
}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is compiled: one of our kernels, or one of RIVALS, whose sizes are 0 as they choose their own."""

    chip: str
    kernel: str
    key_dim: int
    value_dim: int
    chunk: int
    step: int
    heads: int
    unroll: int


def compile_candidate(candidate: Candidate) -> None:
    """Compile a candidate for its chip in this process."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from pallas_kernels.gated_linear_attention import mosaic_tpu_backward, mosaic_tpu_chunk, mosaic_tpu_forward

    mosaic_tpu_chunk.when_unbounded = lambda flag: lambda function: None
    key_dim, value_dim = candidate.key_dim, candidate.value_dim
    parts = 2 if key_dim % 128 or value_dim % 128 else 1
    sizes = mosaic_tpu_chunk.Sizes(
        scale=key_dim**-0.5, chunk=candidate.chunk, step=candidate.step, unroll=candidate.unroll, heads=HEADS,
        units=candidate.heads // parts, parts=parts, group=1, key_dim=key_dim, value_dim=value_dim,
        dtype=jnp.bfloat16, gate="channel", shared_gates=False, packed=False,
    )  # fmt: skip
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[candidate.chip].topology)
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    keys, values = array(1, TIME, HEADS * key_dim), array(1, TIME, HEADS * value_dim)
    if candidate.kernel == "backward":
        saved = array(1, TIME // sizes.step, HEADS // parts, parts * value_dim, parts * key_dim)
        final = array(1, HEADS, key_dim, value_dim, dtype=jnp.float32)
        run = lambda q, k, v, g, *rest: mosaic_tpu_backward.backward(
            sizes, q, k, v, g, None, *rest, has_initial=False, interpret=False
        )
        arguments = keys, keys, values, keys, saved, values, final
    else:
        save = candidate.kernel == "training_forward"
        run = lambda *a: mosaic_tpu_forward.forward(sizes, *a, None, None, save_states=save, interpret=False)
        arguments = keys, keys, values, keys
    jax.jit(run).trace(*arguments).lower().compile()


def moved(candidate: Candidate, states: bool = True) -> int:
    """Return the bytes that a kernel moves through HBM; without the saved states, the floor of the job."""
    key_dim, value_dim = candidate.key_dim, candidate.value_dim
    forward, backward = 3 * key_dim + 2 * value_dim, 6 * key_dim + 3 * value_dim
    per_token = 2 * {"backward": backward, "both": forward + backward}.get(candidate.kernel.split()[-1], forward)
    if candidate.kernel in RIVALS:
        return HEADS * (TIME * per_token + 4 * key_dim * value_dim * (2 if "both" in candidate.kernel else 1))
    saved = 2 * key_dim * value_dim * (2 if key_dim % 128 or value_dim % 128 else 1) * (TIME // candidate.step)
    final = 4 * key_dim * value_dim
    return HEADS * (TIME * per_token + final + (saved if states and candidate.kernel != "forward" else 0))


def compile_rival(candidate: Candidate, profile: str) -> None:
    """Compile a rival in this process and print the cycles of its call, the bytes its kernels move and their number.

    Args:
        candidate: One of RIVALS.
        profile: The folder where the compiler puts its estimates of Pallas kernels.
    """
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    if candidate.kernel.startswith("chunked"):
        from pallas_kernels import gated_linear_attention

        call = lambda *a: gated_linear_attention(*a, implementation="chunked")[0]
    else:
        jax.default_backend = lambda: "tpu"  # what it asks whether to interpret its kernels
        from deltanet_tpu import chunk_gla

        call = lambda *a: chunk_gla(*a, is_inference=candidate.kernel.endswith("forward"))
    train = lambda q, k, v, g, dout: (lambda out, pull: (out, *pull(dout)))(*jax.vjp(call, q, k, v, g))
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[candidate.chip].topology)
    # A mesh tells what is compiled for to whoever asks.
    mesh = jax.sharding.Mesh(topology.devices[:1], "chip", axis_types=(jax.sharding.AxisType.Auto,))
    jax.set_mesh(mesh)
    sharding = jax.sharding.NamedSharding(mesh, jax.P())
    array = lambda dim: jax.ShapeDtypeStruct((1, TIME, HEADS, dim), jnp.bfloat16, sharding=sharding)
    keys, values = array(candidate.key_dim), array(candidate.value_dim)
    arguments = (keys, keys, values, keys, values)
    both = candidate.kernel.endswith("both")
    compiled = jax.jit(train if both else call).trace(*arguments[: None if both else 4]).lower().compile()
    cycles = {}
    for path in glob.glob(f"{profile}/*"):
        found = re.findall(r'hlo_op_name: "([^"]*)"\s+estimated_cycles: (\d+)', pathlib.Path(path).read_text())
        cycles |= {name: int(number) for name, number in found}
    print(json.dumps(walk_program(compiled.as_text(), cycles, CHIPS[candidate.chip])))


def walk_program(text: str, cycles: dict[str, int], chip: Chip) -> dict:
    """Add up a compiled program's estimates.

    Args:
        text: The optimised HLO.
        cycles: By name, those of the Pallas kernels.
        chip: The chip that it is compiled for.

    Returns:
        seconds, and how many Pallas calls and other estimated operations they are made of.
    """
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line)
        if head:
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif name and line.startswith("  "):
            computations[name].append(line.strip())
    total = {"seconds": 0.0, "pallas_calls": 0, "operations": 0}
    size = lambda shape: math.prod(int(x) for x in shape[1].split(",") if x) * {"f32": 4, "bf16": 2}.get(shape[0], 4)

    def walk(name: str, times: int) -> None:
        shapes = {}
        for line in computations[name]:
            if not (found := re.match(r"(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)", line)):
                continue
            result, shape, operation, rest = found.groups()
            shapes[result] = sum(map(size, re.findall(r"\b(\w+)\[([\d,]*)\]", shape)))
            if operation == "while":
                body, condition = (re.search(rf"{word}=%([\w.\-]+)", line)[1] for word in ("body", "condition"))
                walk(body, times * max(int(x) for x in re.findall(r"constant\((\d+)\)", str(computations[condition]))))
            elif "tpu_custom_call" in line:
                moved = shapes[result] + sum(shapes.get(x, 0) for x in re.findall(r"%([\w.\-]+)", rest.split(")")[0]))
                total["seconds"] += times * max(cycles[result] / chip.clock, moved / chip.bandwidth)
                total["pallas_calls"] += times
            elif estimated := re.search(r'"estimated_cycles":"(\d+)"', line):
                total["seconds"] += times * int(estimated[1]) / chip.clock
                total["operations"] += times

    walk(entry, 1)
    return total


def estimate(candidate: Candidate) -> dict:
    """Compile a candidate in a child process and return the compiler's estimates."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("profile", "listing"):
            os.mkdir(f"{folder}/{name}")
        dumps = f"--xla_jf_dump_static_llo_profile_to={folder}/profile --xla_jf_dump_to={folder}/listing"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled",
            "LIBTPU_INIT_ARGS": dumps, "PYTHONPATH": str(pathlib.Path(__file__).parents[1]),
        }  # fmt: skip
        job = json.dumps([dataclasses.asdict(candidate), f"{folder}/profile"])
        command = [sys.executable, __file__, f"--child={job}"]
        child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        reason = re.findall(r"^.*(?:Error|RESOURCE_EXHAUSTED|Mosaic failed).*$", child.stderr, re.MULTILINE)
        error = {"error": (reason or child.stderr.splitlines() or ["no output"])[-1][:300]}
        floor = moved(candidate, states=False) / CHIPS[candidate.chip].bandwidth
        if candidate.kernel in RIVALS:
            if child.returncode:
                return error
            total = json.loads(child.stdout.splitlines()[-1])
            seconds = total.pop("seconds")
            return {"estimated_us": seconds * 1e6, "floor_us": floor * 1e6, "ratio": seconds / floor} | total
        # On most chips the compiler aborts after it has written the estimate: what counts is whether it did.
        profiles = [pathlib.Path(path).read_text() for path in glob.glob(f"{folder}/profile/*gla*")]
        cycles = [int(x) for profile in profiles for x in re.findall(r"estimated_cycles: (\d+)", profile)]
        listings = glob.glob(f"{folder}/listing/*gla*-final_hlo-static-per-bundle-utilization.txt")
        if not cycles or not listings:
            return error
        lines = pathlib.Path(listings[0]).read_text().splitlines()
    header = next(line for line in lines if line.startswith("MXU"))
    rows = [[int(x) for x in line.split()] for line in lines if re.fullmatch(r"\s*\d+(\s+\d+)+\s*", line)][1:]
    used = dict(zip((name.strip() for name in header.split(",")), map(sum, zip(*rows, strict=True)), strict=True))
    chip = CHIPS[candidate.chip]
    seconds = max(max(cycles) / chip.clock, moved(candidate) / chip.bandwidth)
    return {
        "cycles": max(cycles), "estimated_us": seconds * 1e6, "floor_us": floor * 1e6, "ratio": seconds / floor,
        "bundles": len(rows), "vector_spills": used["VSTORE:SPILL"], "vector_fills": used["VLOAD:FILL"],
        "mxu_slots": used["MXU"], "vmem_bytes": vmem_bytes(candidate),
    }  # fmt: skip


def vmem_bytes(candidate: Candidate) -> int:
    """Return the VMEM that the kernel asks for: blocks twice, for the copies under way, and scratch once."""
    key_dim, value_dim, heads, step = candidate.key_dim, candidate.value_dim, candidate.heads, candidate.step
    parts = 2 if key_dim % 128 or value_dim % 128 else 1
    state = 4 * parts * key_dim * value_dim
    blocks = moved(candidate) * heads * step // (HEADS * TIME)
    scratch = state + 4 * step * key_dim
    if candidate.kernel == "backward":
        scratch += state + state // 2 * (step // candidate.chunk)
    return 2 * blocks + 2 * heads * state + heads * scratch


def candidates() -> list[Candidate]:
    """Return the candidates that the flags ask for and the shapes allow."""
    found = []
    whole = lambda flag: [int(x) for x in flag.value]
    for chip, shape, kernel in itertools.product(
        _CHIPS.value, _SHAPES.value, RIVALS if _RIVALS.value else _KERNELS.value
    ):
        key_dim, value_dim = map(int, shape.split("x"))
        if kernel in RIVALS:
            if kernel.startswith("chunked") or key_dim == value_dim == 128:
                found.append(Candidate(chip, kernel, key_dim, value_dim, 0, 0, 0, 0))
            continue
        for sizes in itertools.product(whole(_CHUNKS), whole(_STEPS), whole(_HEADS), whole(_UNROLLS)):
            candidate = Candidate(chip, kernel, key_dim, value_dim, *sizes)
            straight = candidate.heads * candidate.chunk * candidate.unroll * key_dim * value_dim
            if candidate.step % (candidate.chunk * candidate.unroll) or vmem_bytes(candidate) > 48 * 2**20:
                continue
            if straight <= 2**27:  # more is code of ten thousand instructions and minutes of compilation
                found.append(candidate)
    return found


def print_table(results: list[dict]) -> None:
    """Print the best candidate of every chip, shape and kernel."""
    name = lambda result: (result["chip"], result["key_dim"], result["value_dim"], result["kernel"])
    good = sorted((r for r in results if "ratio" in r), key=lambda r: (*name(r), r["estimated_us"]))
    for _, group in itertools.groupby(good, key=name):
        best = next(group)
        sizes = tuple(best[field] for field in ("chunk", "step", "heads", "unroll"))
        details = f", {best['vector_spills']} spills, (chunk, step, heads, unroll) = {sizes}" if any(sizes) else ""
        print(
            f"{best['chip']:6} {best['key_dim']}x{best['value_dim']:<4} {best['kernel']:20} "
            f"{best['estimated_us']:7.1f} us = {best['ratio']:.2f} x floor{details}"
        )


def main(_: list[str]) -> None:
    """Compile the candidates, or the one of a child."""
    if _CHILD.value:
        fields, profile = json.loads(_CHILD.value)
        candidate = Candidate(**fields)
        if candidate.kernel in RIVALS:
            compile_rival(candidate, profile)
        else:
            compile_candidate(candidate)
        return
    path = pathlib.Path(_OUTPUT.value)
    results = json.loads(path.read_text()) if path.exists() else []
    if not _TABLE.value:
        sources = [KERNELS / f"mosaic_tpu_{name}.py" for name in ("chunk", "forward", "backward")]
        made_of = {
            "jax": importlib.metadata.version("jax"), "libtpu": importlib.metadata.version("libtpu"),
            "kernels": hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12],
        }  # fmt: skip
        results = [r for r in results if r["kernel"] in RIVALS or r.get("kernels") == made_of["kernels"]]
        fields = [field.name for field in dataclasses.fields(Candidate)]
        known = {
            tuple(r[f] for f in fields) for r in results if all(r[name] == made_of[name] for name in ("jax", "libtpu"))
        }
        for candidate in candidates():
            if dataclasses.astuple(candidate) in known:
                continue
            result = {"kind": "compiler estimate"} | made_of | dataclasses.asdict(candidate) | estimate(candidate)
            results.append(result)
            path.write_text(json.dumps(results, indent=1) + "\n")
            print(json.dumps({key: x for key, x in result.items() if key not in made_of}), flush=True)
    print_table(results)


if __name__ == "__main__":
    app.run(main)
