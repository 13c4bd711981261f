"""Moments in the host's memory: the same run to the bit, on disk too, and less on the devices in the meantime."""

from pathlib import Path

import jax
import pytest
from tiny_config import get_config

from gla_jax.config import Config, build, override
from gla_jax.training import loop
from gla_jax.training.planning import make_plan

SETTINGS = {
    "steps": 6,
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "checkpoint.every": 3,
    "eval.every": 6,
    "log.every": 1,
    "sample.tokens": 0,
    "optimizer.accumulation_steps": 2,
    "optimizer.ema_decay": 0.9,
    "optimizer.spike_policy": "skip",
}


def config(**overrides: object) -> Config:
    settings = get_config()
    for name, value in (SETTINGS | overrides).items():
        override(settings, name, str(value))
    return build(settings)


def train(workdir: Path, **overrides: object) -> loop.Outcome:
    return loop.train(config(**overrides), str(workdir), devices=jax.devices()[:4])


def kinds(tree: object) -> set[str | None]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}


@pytest.mark.long
def test_a_run_is_the_same_and_may_change_sides(tmp_path: Path) -> None:
    here = train(tmp_path / "here")
    train(tmp_path / "there", steps=3, **{"optimizer.offload": True, "optimizer.schedule": "constant"})
    train(tmp_path / "plain", steps=3, **{"optimizer.schedule": "constant"})
    assert kinds(here.state.opt_state) == {"device"}
    moved = train(tmp_path / "moved", **{"optimizer.offload": True})
    assert kinds(moved.state.opt_state) == {"pinned_host"} and kinds(moved.state.params) == {"device"}
    read = lambda name: (tmp_path / name / "metrics.jsonl").read_text()
    assert read("moved") == read("here") and read("there") == read("plain")
    # Each goes on from the other's checkpoint.
    for name, offload in (("there", False), ("plain", True)):
        outcome = train(tmp_path / name, **{"optimizer.offload": offload, "optimizer.schedule": "constant"})
        assert kinds(outcome.state.opt_state) == {"pinned_host" if offload else "device"}
    assert read("there") == read("plain") and read("there").count("\n") > 6


@pytest.mark.long
def test_a_plan_counts_the_moments_as_the_hosts() -> None:
    plans = [
        make_plan(config(**{"model.vocab_size": 256, "optimizer.offload": offload}), jax.devices()[:4], lambda _: None)
        for offload in (False, True)
    ]
    here, moved = (plan.memory for plan in plans)
    assert here["host"] == 0 and moved["host"] == pytest.approx(2 * moved["parameters"], rel=0.05)
    assert here["optimizer"] - moved["optimizer"] == moved["host"]
    assert moved["peak"] == sum(moved[name] for name in ("parameters", "optimizer", "batch", "temporary", "program"))
    assert 0 < moved["batch"] <= here["batch"] and moved["temporary"] > 0
    assert plans[0].collectives["all-gather"]["count"] == plans[1].collectives["all-gather"]["count"]
