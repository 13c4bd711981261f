"""A run that times the Hopper kernels loses the process that dies or never gets ready, and nothing else."""

import multiprocessing
import threading
import types

from benchmarks import kernels


def job(work):
    """Return a process and our end of its pipe, as `start` does, but a thread; to kill it is to close its end."""
    ours, its = multiprocessing.Pipe()

    def run():
        work(its)
        its.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return types.SimpleNamespace(join=thread.join, kill=its.close), ours


def test_times_who_is_ready_and_leaves_out_who_is_not(capsys):
    over = threading.Event()

    def good(pipe):
        pipe.send("ready")
        pipe.send(("ours", {"ms": 2 * pipe.recv()}))

    jobs = {"good": job(good), "dead": job(lambda pipe: None), "slow": job(lambda pipe: over.wait(10))}
    kernels.wait_until_ready(jobs, patience=0.3)
    over.set()
    assert {name: list(kernels.ask(jobs[name], 1.5)) for name in jobs} == {
        "good": [("ours", {"ms": 3.0})],
        "dead": [],
        "slow": [],
    }
    said = capsys.readouterr().out
    assert "good ready" in said and "dead died" in said and "slow not ready in 0 s: left out" in said
