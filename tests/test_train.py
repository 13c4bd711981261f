"""train.py as a person meets it: processes, signals, exit codes, and files on a real disk."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "tests" / "tiny_config.py"
STEPS = 120
"""More than the tiny config has, so that there is time to strike."""


class Command:
    """Runs commands of the project on one CPU device, compiling each program once for all of them."""

    def __init__(self, cache: Path):
        self._environment = {
            **os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "error", "XLA_FLAGS": "",
        }  # fmt: skip

    def start(self, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
        environment = self._environment | (environment or {})
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def train(workdir: Path, *overrides: str) -> list[str]:
    return ["train.py", f"--config={CONFIG}", f"--workdir={workdir}", f"--config.steps={STEPS}", *overrides]


def newest_step(workdir: Path) -> int:
    file = workdir / "metrics.jsonl"
    steps = re.findall(r'"step": (\d+),', file.read_text()) if file.exists() else []
    return int(steps[-1]) if steps else 0


def strike(process: subprocess.Popen[str], workdir: Path, step: int, number: signal.Signals) -> None:
    """Send a signal once the metrics of a step have been written."""
    while newest_step(workdir) < step and process.poll() is None:
        time.sleep(0.002)
    assert process.poll() is None, "".join(process.communicate())
    process.send_signal(number)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    return Command(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def finished(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("finished")
    done = command.run(*train(workdir))
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith(f"step   1/{STEPS}  loss ") for line in lines)
    assert any(re.match(rf"step {STEPS}/{STEPS}  eval/loss .* eval/bits_per_byte", line) for line in lines)
    return workdir


def assert_same_run(workdir: Path, finished: Path) -> None:
    for name in ("metrics.jsonl", "samples.txt"):
        assert (workdir / name).read_bytes() == (finished / name).read_bytes()


def kill_and_resume(command: Command, workdir: Path, finished: Path, kills: int, seed: int) -> None:
    steps = sorted(random.Random(seed).sample(range(1, STEPS - 10), kills))
    print(f"killing at steps {steps} of seed {seed}")
    for step in steps:
        process = command.start(*train(workdir))
        strike(process, workdir, step, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    done = command.run(*train(workdir))
    assert done.returncode == 0, done.stderr
    assert_same_run(workdir, finished)


def test_a_run_killed_twice_is_the_run_that_was_not(command: Command, finished: Path, tmp_path: Path) -> None:
    kill_and_resume(command, tmp_path, finished, kills=2, seed=time.time_ns())


@pytest.mark.long
def test_a_run_killed_ten_times_is_the_run_that_was_not(command: Command, finished: Path, tmp_path: Path) -> None:
    kill_and_resume(command, tmp_path, finished, kills=10, seed=time.time_ns())


def test_sigterm_ctrl_c_and_a_damaged_checkpoint(command: Command, finished: Path, tmp_path: Path) -> None:
    # SIGTERM: a checkpoint, the command that resumes, exit code 0.
    process = command.start(*train(tmp_path))
    strike(process, tmp_path, 20, signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert err == "\nStopping after this step, with a checkpoint. Ctrl-C leaves at once.\n"
    stopped = re.search(r"Stopped and saved at step (\d+)\. To resume:\n    (.*)\n$", out)
    assert stopped is not None
    assert stopped[2] == "python " + " ".join(train(tmp_path))
    newest = lambda: max(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert newest() == int(stopped[1]) < STEPS

    # Ctrl-C: the same, with the exit code that shells expect.
    process = command.start(*train(tmp_path))
    strike(process, tmp_path, newest_step(tmp_path) + 20, signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert f"Resuming {tmp_path} at step {stopped[1]} of {STEPS}." in out and "To resume:" in out

    # A checkpoint cut short on disk: the one before it, and the log says so.
    step = newest()
    data = max((tmp_path / "checkpoints" / f"{step:08}" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(data, data.stat().st_size // 2)
    done = command.run(*train(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"Checkpoint {step} cannot be read (params/" in done.stdout
    assert f"Resuming {tmp_path} at step {step // 6 * 6 if step % 6 else step - 6} of {STEPS}." in done.stdout
    assert_same_run(tmp_path, finished)


def test_a_finished_run_can_be_evaluated(command: Command, finished: Path) -> None:
    done = command.run("-m", "gla_jax.evaluate", f"--workdir={finished}", "--batches=2")
    assert done.returncode == 0 and not done.stderr, done.stderr
    last = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert json.loads(done.stdout) == last, "the last evaluation of the run scored the same two batches"

    texts = ("--by-position", "--data=kjv", "--length=40", "--batches=1", "--batch_size=2")
    done = command.run("-m", "gla_jax.evaluate", f"--workdir={finished}", *texts)
    assert done.returncode == 0, done.stderr
    buckets = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(one["from"], one["to"], one["rows"]) for one in buckets] == [(0, 16, 2), (16, 32, 2), (32, 40, 2)]
    assert done.stderr.split()[-4] == "32-39"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config.model.hiden_size=3"], "the config has no field model.hiden_size; did you mean model.hidden_size?"),
        (["--config.steps=many"], "steps='many' must be a whole number."),
        (["--config.steps"], "--config.steps has no value; write --config.steps=VALUE."),
        (["--stpes=3"], "Unknown command line flag 'stpes'"),
        (["more"], "'more' is no flag; flags are written --name=value."),
        (["--distributed=on"], "--distributed=on, but no cluster was found"),
        (["--process=0/2"], "--coordinator=None must be address:port of process 0, e.g. 192.168.1.10:9876."),
        (["--coordinator=host:1", "--process=2/2"], "--process=2/2 must be index/count, e.g. 0/2 and 1/2"),
        (["--config.mesh.fsdp=3"], "does not fit the number of devices, 1"),
        (["--workdir=/proc/run"], "--workdir=/proc/run cannot be written: No such file or directory."),
    ],
)
def test_a_mistake_costs_one_sentence_and_exit_code_2(
    arguments: list[str], sentence: str, command: Command, tmp_path: Path
) -> None:
    done = command.run(*train(tmp_path / "run", *arguments))
    assert done.returncode == 2
    assert sentence in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_required_flags_are_asked_for(command: Command) -> None:
    done = command.run("train.py")
    assert (done.returncode, done.stderr) == (2, "--config=... is missing; --help says what it is.\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a disk")
def test_a_disk_that_fills_up_is_said_in_one_sentence_and_spoils_nothing(command: Command, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        done = command.run(*train(disk / "run", "--config.checkpoint.keep=100"))
        assert done.returncode == 2
        assert "MB left on its disk and a checkpoint takes" in done.stderr and done.stderr.count("\n") == 1
        saved = [path.name for path in (disk / "run" / "checkpoints").iterdir()]
        assert saved and all(name.isdigit() for name in saved)
        (disk / "ballast").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize))
        before = (disk / "run" / "metrics.jsonl").read_bytes()
        done = command.run(*train(disk / "run"))
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert (disk / "run" / "metrics.jsonl").read_bytes() == before
    finally:
        subprocess.run(["umount", disk], check=True)


def test_help(command: Command) -> None:
    done = command.run("train.py", "--help")
    assert done.returncode == 0 and not done.stderr
    for text in ("python train.py --config=", "--workdir", "--config.model.hidden_size=256", "Model dimension D."):
        assert text in done.stdout
