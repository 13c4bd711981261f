"""Tokens per second, and the share of the hardware's peak."""

import pytest

from gla_jax.training.throughput import Throughput


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def perf_counter(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("gla_jax.training.throughput.time", clock)
    return clock


def test_only_steady_steps_count(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gla_jax.training.throughput.peak_flops", lambda _: 1e6)
    throughput = Throughput(tokens_per_step=100, flops_per_token=1e4, device_kind="some", device_count=4)
    clock.now += 30  # compilation
    assert throughput.read(1) == {"seconds": 30, "data_seconds": 0, "tokens_per_second": None, "mfu": None}
    clock.now += 4
    with throughput.waiting_for_data():
        clock.now += 1
    figures = throughput.read(11)
    assert figures["seconds"] == 5 and figures["data_seconds"] == 1 and figures["tokens_per_second"] == 10 * 100 / 5
    assert figures["mfu"] == pytest.approx(200 * 1e4 / (1e6 * 4))
    clock.now += 60  # an evaluation
    throughput.restart(11)
    clock.now += 1
    assert throughput.read(13)["tokens_per_second"] == 200


def test_no_utilisation_on_unknown_hardware(clock: Clock) -> None:
    throughput = Throughput(tokens_per_step=100, flops_per_token=1e4, device_kind="cpu", device_count=1)
    throughput.restart(0)
    clock.now += 1
    assert throughput.read(1)["mfu"] is None
