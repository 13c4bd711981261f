"""The command `python -m gla_jax.plan`: its text, its JSON, its sentences; and, marked `tpu`, the real compiler."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from gla_jax import plan as command
from gla_jax.config import ConfigError
from gla_jax.training import planning
from gla_jax.training.planning import DoesNotFitError, Plan

GIB = 2**30
PLAN = Plan(
    compiled_for="TPU v5 lite",
    stands_for=None,
    devices=16,
    mesh={"data": 1, "fsdp": 16, "sequence": 1, "tensor": 1},
    parameters=341_700_000,
    batch_size=64,
    sequence_length=2048,
    accumulation_steps=2,
    rows_per_device=2,
    flops=3e14,
    seconds_at_peak=0.0952,
    memory={
        "parameters": GIB // 4,
        "optimizer": GIB // 2,
        "batch": GIB // 100,
        "temporary": 2 * GIB,
        "program": GIB // 50,
        "peak": round(2.78 * GIB),
        "available": round(15.75 * GIB),
    },
    collectives={"all-gather": {"count": 1200, "bytes_sent": 4_000_000_000, "bytes_sent_overlapped": 3_000_000_000}},
    kernels={"gla_forward": 48, "gla_backward": 24},
    effort="fast",
    compile_seconds=61.4,
    versions={"jax": "0.11.2", "libtpu": "0.0.48"},
)


def test_a_plan_is_said_in_a_few_lines() -> None:
    assert command.describe(PLAN).splitlines() == [
        "Compiler output, nothing was run: jax 0.11.2, libtpu 0.0.48, fast effort, 61 s to compile.",
        "16 x TPU v5 lite, mesh data 1 x fsdp 16 x sequence 1 x tensor 1",
        "341,700,000 parameters; 64 rows x 2048 = 131,072 tokens a step, 2 rows per device in each of 2 microbatches",
        "",
        "memory of one device                      GiB",
        "  parameters                             0.25",
        "  optimizer                              0.50",
        "  batch, and padding of these            0.01",
        "  activations, gradients and all else    2.00",
        "  program                                0.02",
        "  in all                                 2.78 of 15.75, 18%",
        "",
        "collectives of one step       times   a device sends   while it computes",
        "  all-gather                  1,200         4.000 GB                 75%",
        "",
        "Pallas kernels in it: gla_forward 48 times, gla_backward 24 times.",
        "No step is faster than 0.0952 s: 3e+14 FLOPs of the model at the peak of the devices.",
    ]


def test_what_waits_in_the_hosts_memory_is_said() -> None:
    plan = dataclasses.replace(PLAN, memory=PLAN.memory | {"host": GIB // 4})
    added = set(command.describe(plan).splitlines()) - set(command.describe(PLAN).splitlines())
    assert added == {"  besides, in the memory of its host     0.25"}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Return a function from flags to exit code and output, where plans are made by `make_plan` of the test."""

    def run(make_plan, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(planning, "make_plan", make_plan)
        monkeypatch.setattr(command, "_open_devices", jax.devices)
        with flagsaver.flagsaver():
            flags.FLAGS(["plan", "--config=tests/tiny_config.py", *arguments])
            code = command.main({"data.batch_size": "64"})
        return code, capsys.readouterr().out

    return run


def test_json_is_one_line_with_everything(run) -> None:
    code, printed = run(lambda config, devices, say, **_: PLAN, "--devices=8", "--json")
    assert code == 0 and printed.count("\n") == 1
    figures = json.loads(printed)
    assert figures.pop("fits") is True
    assert Plan(**figures) == PLAN


def test_what_is_asked_for_is_what_is_planned(run) -> None:
    asked = {}

    def make_plan(config, devices, say, **options):
        asked.update(options, devices=len(devices), batch_size=config.data.batch_size)
        return PLAN

    code, printed = run(make_plan, "--devices=8", "--gpu=H200", "--fast")
    assert (code, printed) == (0, command.describe(PLAN) + "\n")
    assert asked == {"devices": 8, "batch_size": 64, "stands_for": "NVIDIA H200", "fast": True}


def test_what_does_not_fit_is_one_sentence_and_for_scripts_json(run) -> None:
    def refuse(config, devices, say, **options):
        raise DoesNotFitError("It does not fit.", 17)

    with pytest.raises(DoesNotFitError, match=r"^It does not fit\.$"):  # of which command_line.run makes exit code 2
        run(refuse, "--devices=8")
    code, printed = run(refuse, "--devices=8", "--json")
    assert code == 2 and json.loads(printed) == {"fits": False, "needed": 17, "reason": "It does not fit."}


@pytest.mark.parametrize("arguments", [(), ("--devices=8", "--topology=v5e:2x2")])
def test_hardware_is_named_once(run, arguments: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="Give one of --topology=v5e:16x16"):
        run(lambda *_: PLAN, *arguments)


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gla_jax.plan", "--config=tests/tiny_config.py", *arguments]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True, check=False)


def test_a_mistake_is_one_sentence_and_exit_code_2() -> None:
    child = call("--topology=v5e:4x5")
    assert child.returncode == 2 and child.stdout == ""
    assert child.stderr == "--topology=v5e:4x5 is no TPU slice; did you mean v5e:4x4 or v5e:4x8 or v5e:2x4?\n"


MODEL = ("--config.model.hidden_size=256", "--config.model.num_heads=2", "--config.model.vocab_size=512")
ROWS = ("--config.mesh.fsdp=-1", "--config.data.sequence_length=256", "--config.dtype.compute=bfloat16")


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_real_step_is_compiled_with_the_tpu_kernels(topology: str) -> None:
    pytest.importorskip("libtpu")
    child = call(f"--topology={topology}", "--fast", "--json", "--config.data.batch_size=8", *MODEL, *ROWS)
    assert child.returncode == 0, child.stderr[-3000:]
    plan = json.loads(child.stdout)
    layers = 2
    assert plan["kernels"] == {"gla_forward": layers, "gla_backward": layers}
    assert plan["collectives"] and plan["stands_for"] is None and "libtpu" in plan["versions"]
    memory = plan["memory"]
    assert memory["peak"] == sum(memory[name] for name in ("parameters", "optimizer", "batch", "temporary", "program"))
    assert memory["batch"] >= 0 and memory["peak"] < memory["available"]


@pytest.mark.tpu
def test_what_layers_start_from_is_kept_off_the_tpu() -> None:
    pytest.importorskip("libtpu")
    arguments = ("--topology=v5e:2x2", "--fast", "--json", "--config.data.batch_size=64", *MODEL, *ROWS)
    plans = {}
    for remat in ("full", "offload"):
        child = call(*arguments, "--config.model.num_layers=8", f"--config.model.remat={remat}")
        assert child.returncode == 0, child.stderr[-3000:]
        plans[remat] = json.loads(child.stdout)["memory"]
    inputs = 8 * (64 // 4) * 256 * 256 * 2  # layers, rows of a device, tokens, channels, bytes
    assert plans["full"]["host"] == 0 and plans["offload"]["host"] >= inputs
    assert plans["offload"]["peak"] <= plans["full"]["peak"] - 0.9 * inputs


@pytest.mark.tpu
def test_the_real_compiler_refuses_what_does_not_fit() -> None:
    pytest.importorskip("libtpu")
    child = call("--topology=v5e:2x2", "--fast", "--config.data.batch_size=16384", *MODEL, *ROWS)
    assert child.returncode == 2, child.stderr[-3000:]
    sentence = child.stderr.splitlines()[-1]
    assert sentence.startswith("The step does not fit into a TPU v5 lite: with 4096 rows per device it needs ")
    assert "more than the 15.75 there are" in sentence and "--config.model.remat=full" in sentence


@pytest.mark.tpu
def test_a_mesh_that_the_torus_cannot_hold_is_refused() -> None:
    pytest.importorskip("libtpu")
    child = call("--topology=v6e:16x16", "--config.mesh.data=8", "--config.mesh.fsdp=32")
    assert child.returncode == 2
    assert "cannot be laid out on the torus of 256 TPU v6 lite" in child.stderr
    assert "mesh.data=16 with mesh.fsdp=16" in child.stderr
