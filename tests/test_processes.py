"""Several processes that train as one, as SLURM would start them, on one machine: together, killed, and fewer later."""

import json
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from test_train import Command, newest_step, train

DEVICES = 4
PATIENCE = 150
"""Seconds within which the rest must end when one is killed: those of `join_cluster`, and some to end in, on a machine
that others may keep busy."""
TRIES = 10
TOO_LATE = "Gloo context initialization failed"
"""What the exchange between CPUs says when a process meets the others more than 30 s late, as happens where processes
have to share a core: nothing is wrong then, and the same command goes on."""
MESH = ("--distributed=on", "--config.mesh.data=2", "--config.mesh.fsdp=2")
pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]

Processes = list[subprocess.Popen[str]]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    return Command(tmp_path_factory.mktemp("compiled"))


def start(
    command: Command, workdir: Path, count: int, mesh: Sequence[str] = MESH, last: Sequence[str] = ()
) -> Processes:
    """Start so many processes, which share the devices and find each other on the loopback device.

    Args:
        command: starts each.
        workdir: of all.
        count: of processes.
        mesh: arguments for all.
        last: arguments for the last of them alone.
    """
    job = {
        "SLURM_JOB_ID": str(random.randrange(1, 4000)), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": str(count),
        "JAX_NUM_CPU_DEVICES": str(DEVICES // count),
    }  # fmt: skip
    place = lambda index: {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}
    arguments = lambda index: train(workdir, *mesh, *(last if index == count - 1 else ()))
    return [command.start(*arguments(index), environment=job | place(index)) for index in range(count)]


def finish(processes: Processes, timeout: float = 600) -> list[tuple[str, str]]:
    """Wait for all, and return what each wrote to standard output and to standard error."""
    deadline = time.monotonic() + timeout
    try:
        return [process.communicate(timeout=deadline - time.monotonic()) for process in processes]
    finally:
        for process in processes:
            process.kill()


def complete(start_all: Callable[[], Processes]) -> list[str]:
    """Start processes and wait for all, who must succeed; return what each said, of all tries together."""
    outputs: list[str] = []
    for _ in range(TRIES):
        processes = start_all()
        said = finish(processes)
        outputs = [before + out for before, (out, _) in zip(outputs or [""] * len(said), said, strict=True)]
        if not met_too_late(said):
            break
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return outputs


def met_too_late(said: Sequence[tuple[str, str]]) -> bool:
    return any(TOO_LATE in err for _, err in said)


def strike_one(start_all: Callable[[], Processes], victim: int, workdir: Path, step: int, number: int) -> Processes:
    """Start processes, and send one of them a signal once they have written the metrics of a step."""
    file = workdir / "metrics.jsonl"
    written = lambda: file.stat().st_mtime_ns if file.exists() else 0
    for _ in range(TRIES):
        before, processes = written(), start_all()
        # Those that were here before may have come further; nothing is written before all have met.
        ready = lambda before=before: written() != before and newest_step(workdir) >= step
        while not ready() and all(process.poll() is None for process in processes):
            time.sleep(0.002)
        if ready() and processes[victim].poll() is None:
            processes[victim].send_signal(number)
            return processes
        said = finish(processes, PATIENCE)
        assert met_too_late(said), said
    raise AssertionError(f"{TRIES} times some process met the others too late; this machine is too busy")


def figures(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_close(workdir: Path, expected: Path) -> None:
    """Compare losses whose rounding differs from the first step on, which training magnifies."""
    ours, theirs = figures(workdir), figures(expected)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, other in zip(ours, theirs, strict=True):
        for name in {"loss", "eval/loss"} & set(other):
            assert line[name] == pytest.approx(other[name], rel=1e-5 if line["step"] == 1 else 5e-3)


@pytest.fixture(scope="module")
def finished(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one process that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("finished")
    done = command.run(*train(workdir))
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.parametrize("count", [2, 4])
def test_a_run_that_loses_processes_is_the_run_that_did_not(
    count: int, command: Command, finished: Path, tmp_path: Path
) -> None:
    undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "killed"
    complete(lambda: start(command, undisturbed, count))
    assert_close(undisturbed, finished)

    seed = time.time_ns()
    chance = random.Random(seed)
    steps = sorted(chance.sample(range(1, 110), 5))
    print(f"killing at steps {steps} of seed {seed}")
    for step in steps:
        victim = chance.randrange(count)
        processes = strike_one(lambda: start(command, workdir, count), victim, workdir, step, signal.SIGKILL)
        said = finish(processes, PATIENCE)
        for index, process in enumerate(processes):
            assert process.returncode != 0
            if index != victim:
                assert "another task died" in said[index][1], said[index][1]
        # Process 0 keeps the list of those that live, and names who is gone if an exchange has not broken off before.
        named, broken = f"stopped sending heartbeats):\n{victim}\n", "If this is about a connection"
        assert victim == 0 or named in said[0][1] or broken in said[0][1], said[0][1]
    complete(lambda: start(command, workdir, count))
    for name in ("metrics.jsonl", "samples.txt"):
        assert (workdir / name).read_bytes() == (undisturbed / name).read_bytes()


def test_sigterm_stops_all_and_half_as_many_go_on(command: Command, finished: Path, tmp_path: Path) -> None:
    processes = strike_one(lambda: start(command, tmp_path, 4), 3, tmp_path, 20, signal.SIGTERM)
    said = finish(processes)
    assert [process.returncode for process in processes] == [0] * 4, said
    stopped = [re.search(r"Stopped and saved at step (\d+)\. To resume:\n    (.*)\n$", out) for out, _ in said]
    steps = {int(match[1]) for match in stopped if match}
    assert all(stopped) and len(steps) == 1 and newest_step(tmp_path) <= max(steps) < 120
    said = complete(lambda: start(command, tmp_path, 2))
    assert f"Resuming {tmp_path} at step {max(steps)} of 120." in said[0] and "Resuming" not in said[1]
    assert_close(tmp_path, finished)


def test_rows_may_be_cut_across_processes_that_are_told_of_each_other(
    command: Command, finished: Path, tmp_path: Path
) -> None:
    """As on two laptops; both read the same rows, and each has half of their tokens."""
    told = f"--coordinator=127.0.0.1:{random.randrange(20_000, 30_000)}"
    arguments = train(tmp_path, "--config.mesh.sequence=2", "--config.mesh.tensor=2", told)
    devices = {"JAX_NUM_CPU_DEVICES": str(DEVICES // 2)}
    complete(lambda: [command.start(*arguments, f"--process={index}/2", environment=devices) for index in range(2)])
    assert_close(tmp_path, finished)


def test_a_process_that_fails_takes_the_others_along(command: Command, tmp_path: Path) -> None:
    """One host lacks the data: it says so, and nobody waits for it for ever."""
    processes = start(command, tmp_path, 2, last=["--config.data.path=/nowhere/tokens"])
    (_, waiting), (_, failing) = finish(processes, PATIENCE)
    assert processes[1].returncode == 2 and "/nowhere/tokens" in failing
    assert processes[0].returncode != 0 and "another task died" in waiting
