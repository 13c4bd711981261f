"""Steps that leap are found, counted, and make no update if the config says so."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_loop import lines, tiny, train

from gla_jax.data import Data
from gla_jax.training import DivergedError, loop
from gla_jax.training.display import LineDisplay
from gla_jax.training.spikes import WINDOW, notice_spikes


def feed(optimizer, figures):
    """Make a step for each (loss, gradient norm); return the parameter and the count of spikes after each of them."""
    params = {"w": jnp.float32(0)}
    update = jax.jit(optimizer.update)
    state, seen = optimizer.init(params), []
    for loss, norm in figures:
        gradient = {"w": jnp.float32(norm)}
        updates, state = update(gradient, state, params, loss=jnp.float32(loss), grad_norm=jnp.float32(norm))
        params = optax.apply_updates(params, updates)
        seen.append((float(params["w"]), int(state.spikes)))
    return seen, state


def usual(count, seed=0, loss=3.0):
    random = np.random.default_rng(seed)
    return [(loss + 0.1 * random.normal(), 1 + 0.05 * random.normal()) for _ in range(count)]


@pytest.mark.parametrize("strike", [(9.0, 1.0), (3.0, 5.0), (np.nan, 1.0), (3.0, np.inf)])
def test_a_step_that_leaps_makes_no_update(strike):
    figures = [*usual(100), strike, *usual(100, seed=1)]
    seen, state = feed(notice_spikes(optax.trace(0.9), 6.0, skip=True), figures)
    without, _ = feed(notice_spikes(optax.trace(0.9), 6.0, skip=True), figures[:100] + figures[101:])
    assert [spikes for _, spikes in seen] == [0] * 100 + [1] * 101
    assert seen[100][0] == seen[99][0]
    assert [w for w, _ in seen[101:]] == [w for w, _ in without[100:]], "nor does it leave anything in the state"
    assert np.all(np.isfinite(state.losses)) and np.all(np.isfinite(state.grad_norms))


def test_a_step_may_be_counted_only():
    seen, _ = feed(notice_spikes(optax.sgd(1.0), 6.0, skip=False), [*usual(100), (9.0, 2.0)])
    assert seen[-1] == (pytest.approx(seen[-2][0] - 2.0), 1)


def test_the_first_steps_and_a_new_height_are_no_spikes_for_long():
    seen, _ = feed(notice_spikes(optax.sgd(1.0), 6.0, skip=True), [(100.0, 50.0), *usual(WINDOW // 2 - 2)])
    assert seen[-1][1] == 0
    seen, _ = feed(notice_spikes(optax.sgd(1.0), 6.0, skip=True), [*usual(200), *usual(200, loss=6.0)])
    assert 0 < seen[-1][1] < 20 and seen[-1][1] == seen[-100][1]


def test_the_policy_decides_what_becomes_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    def see(policy, *figures, start=0):
        log = loop._StepLog(tiny(optimizer__spike_policy=policy), start, None, LineDisplay(40), None)
        for step, (loss, spikes) in enumerate(figures, start=start + 1):
            log._check(step, {"loss": loss, "grad_norm": 1.0, "spikes": float(spikes)})

    see("skip", (3.0, 0), (9.0, 1), (3.0, 1), (np.nan, 2), (3.0, 2))
    assert [line[:18] for line in capsys.readouterr().out.splitlines()] == ["Step 2 is skipped:", "Step 4 is skipped:"]
    see("skip", (3.0, 7), (3.0, 7), start=20)  # those counted before a run was resumed are no news
    assert not capsys.readouterr().out
    with pytest.raises(DivergedError, match="The last 32 steps were all skipped"):
        see("skip", *((9.0, count) for count in range(1, 33)))
    with pytest.raises(DivergedError, match="Step 2 has loss 9 and gradient norm 1, which leap: training stops"):
        see("stop", (3.0, 0), (9.0, 1))
    with pytest.raises(DivergedError, match="Step 1 has loss nan and gradient norm 1: training stops"):
        see("stop", (np.nan, 1))


@pytest.mark.long
def test_a_run_skips_a_poisoned_batch_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = Data.train_batches

    def poisoned(self: Data, start: int = 0) -> Iterator[dict[str, np.ndarray]]:
        for number, batch in enumerate(batches(self, start), start=start):
            yield batch | {"weights": batch["weights"] * (np.nan if number == 11 else 1)}

    monkeypatch.setattr(Data, "train_batches", poisoned)
    assert train(tmp_path, steps="16", eval__every="0", optimizer__spike_policy="skip").step == 16
    assert "Step 12 is skipped: it has loss nan and gradient norm nan, which leap." in capsys.readouterr().out
    found = {line["step"]: line for line in lines(tmp_path / "metrics.jsonl")}
    assert (found[12]["loss"], found[12]["spikes"]) == (None, 1) and (found[9]["spikes"], found[15]["spikes"]) == (0, 1)
    assert all(np.isfinite(found[step]["loss"]) for step in (9, 15, 16))
