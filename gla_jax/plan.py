"""Say what a training step will need of hardware that is not here: its memory, its collectives, whether it fits.

    python -m gla_jax.plan --config=configs/gla_1p3b.py --topology=v5e:16x16 --config.mesh.data=16

Compiles the step that `train.py` would run, with the same shardings and donation, for a TPU slice (`--topology`, which
needs libtpu but no TPU) or for simulated CPUs that stand in for GPUs (`--devices`). All figures are the compiler's.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from gla_jax import command_line
from gla_jax.config import ConfigError
from gla_jax.hardware import DEVICES, GIB

if TYPE_CHECKING:
    import jax

    from gla_jax.training.planning import Plan

_GPUS = {kind.removeprefix("NVIDIA "): kind for kind in DEVICES if kind.startswith("NVIDIA ")}

_CONFIG = flags.DEFINE_string("config", None, "Python file whose get_config() returns the config.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice to compile for, generation:shape, e.g. v5e:16x16.")
_DEVICES = flags.DEFINE_integer("devices", None, "Compile for so many simulated CPUs instead, standing in for GPUs.")
_GPU = flags.DEFINE_enum("gpu", "H100", sorted(_GPUS), "With --devices: the GPUs that they stand in for.")
_FIT = flags.DEFINE_bool("fit", False, "Find the largest data.batch_size that fits: compiles several times.")
_JSON = flags.DEFINE_bool("json", False, "Print one line of JSON.")
_FAST = flags.DEFINE_bool("fast", False, "For TPUs, compile with less effort: sooner, with more memory, less overlap.")


def main(overrides: dict[str, str]) -> int:
    """Compile, and print what the compiler says."""
    if _CONFIG.value is None:
        raise ConfigError("--config=FILE is missing: what should be planned? The folder configs/ has some.")
    if (_TOPOLOGY.value is None) == (_DEVICES.value is None):
        raise ConfigError("Give one of --topology=v5e:16x16 (a TPU slice) and --devices=8 (GPUs).")
    from gla_jax.config import load

    config = load(_CONFIG.value, overrides)
    devices = _open_devices()
    from gla_jax.training.planning import DoesNotFitError, largest_batch, make_plan

    stands_for = None if _DEVICES.value is None else _GPUS[_GPU.value]
    say = lambda text: print(text, file=sys.stderr, flush=True)
    make = largest_batch if _FIT.value else make_plan
    try:
        plan = make(config, devices, say, stands_for=stands_for, fast=_FAST.value)
    except DoesNotFitError as error:
        if not _JSON.value:
            raise
        print(json.dumps({"fits": False, "needed": error.needed, "reason": str(error)}))
        return 2
    print(json.dumps({"fits": True} | dataclasses.asdict(plan)) if _JSON.value else describe(plan))
    return 0


def _open_devices() -> "Sequence[jax.Device]":
    import jax

    # Accelerators that are here are not needed, and may be busy; a cached program would take no time to compile.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    if _DEVICES.value is not None:
        if _DEVICES.value < 1:
            raise ConfigError(f"--devices={_DEVICES.value} must be at least 1.")
        jax.config.update("jax_num_cpu_devices", _DEVICES.value)
        return jax.devices()
    # libtpu must not look for a TPU, wait for others that compile, or leave logs behind.
    os.environ |= {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_LOG_DIR": "disabled",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    from gla_jax.parallel.topology import tpu_devices

    return tpu_devices(_TOPOLOGY.value or "")


def describe(plan: "Plan") -> str:
    """Return the plan as a text of a few lines."""
    memory, available = plan.memory, plan.memory.get("available")
    rows = {
        "parameters": memory["parameters"],
        "optimizer": memory["optimizer"],
        "batch, and padding of these": memory["batch"],
        "activations, gradients and all else": memory["temporary"],
        "program": memory["program"],
    }
    limit = "" if available is None else f" of {available / GIB:.2f}, {memory['peak'] / available:.0%}"
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    lines = [
        f"Compiler output, nothing was run: {versions}, {plan.effort} effort, {plan.compile_seconds:.0f} s to compile.",
        f"{plan.devices} x {plan.stands_for or plan.compiled_for}, mesh "
        + " x ".join(f"{name} {size}" for name, size in plan.mesh.items()),
        f"{plan.parameters:,} parameters; {plan.batch_size} rows x {plan.sequence_length} = {plan.tokens:,} tokens a "
        f"step, {plan.rows_per_device} row{'s' * (plan.rows_per_device > 1)} per device"
        + (f" in each of {plan.accumulation_steps} microbatches" if plan.accumulation_steps > 1 else ""),
        "",
        "memory of one device                      GiB",
        *(f"  {name:<36} {size / GIB:6.2f}" for name, size in rows.items()),
        f"  {'in all':<36} {memory['peak'] / GIB:6.2f}{limit}",
        *([f"  {'besides, in the memory of its host':<36} {memory['host'] / GIB:6.2f}"] if memory.get("host") else []),
        "",
        "collectives of one step       times   a device sends   while it computes",
        *(
            f"  {kind:<24} {found['count']:8,} {found['bytes_sent'] / 1e9:13.3f} GB"
            f" {found['bytes_sent_overlapped'] / max(found['bytes_sent'], 1):19.0%}"
            for kind, found in plan.collectives.items()
        ),
        *([] if plan.collectives else ["  none"]),
    ]
    runs = ", ".join(f"{name} {count:,} times" for name, count in plan.kernels.items())
    lines += ["", f"Pallas kernels in it: {runs or 'none'}."]
    if plan.seconds_at_peak is not None:
        lines += [
            f"No step is faster than {plan.seconds_at_peak:.3g} s: {plan.flops:.3g} FLOPs of the model at the "
            "peak of the devices.",
        ]
    if plan.stands_for is not None:
        lines += [
            "",
            f"Compiled for CPUs that stand in for {plan.stands_for}. What that cannot know: the kernels for",
            "GPUs (plain JAX is compiled in their place), what XLA fuses, combines and overlaps there, NCCL's buffers,",
            "what a process may have of the memory (XLA_PYTHON_CLIENT_MEM_FRACTION); and CPUs multiply bfloat16 in",
            "float32. So parameters, optimizer and batch are exact, activations a rough guess, collectives a draft.",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    command_line.run(main)
