"""Plans: the real step, compiled without its devices; what does not fit is refused, and the largest that does found."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from gla_jax.config import Config, ConfigError, load
from gla_jax.hardware import Device
from gla_jax.models import abstract_model
from gla_jax.parallel.mesh import make_mesh, place_batch
from gla_jax.training import planning
from gla_jax.training.loop import open_data
from gla_jax.training.optimizer import make_optimizer
from gla_jax.training.planning import DoesNotFitError, Plan, abstract_batch, largest_batch, make_plan, most_rows
from gla_jax.training.state import abstract_state, init_state

OVERRIDES = {
    "model.mixer": "linear_attention",
    "model.num_layers": "3",
    "model.vocab_size": "256",
    "mesh.data": "2",
    "mesh.fsdp": "2",
}
H100 = "NVIDIA H100"


def config_of(**overrides: str) -> Config:
    return load("tests/tiny_config.py", OVERRIDES | overrides)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(config_of(), jax.devices()[:4], print, stands_for=H100)


def test_memory_is_that_of_the_state_on_one_device(plan: Plan) -> None:
    assert plan.parameters == 256 * 16 + 16 + 3 * (2 * 16 + 4 * 16 * 16 + 3 * 16 * 32 + 8)
    memory = plan.memory
    # Matrices are cut in two by fsdp; the scales of norms lie whole on each device.
    assert plan.parameters * 4 / 2 <= memory["parameters"] <= plan.parameters * 4 * 0.6
    assert 2 * memory["parameters"] <= memory["optimizer"] <= 2 * memory["parameters"] + 64
    assert memory["peak"] == sum(memory[name] for name in ("parameters", "optimizer", "batch", "temporary", "program"))
    assert memory["available"] == planning.find_device(H100).memory


def test_collectives_are_those_of_fully_sharded_layers(plan: Plan) -> None:
    weights = 7  # of a layer: query, key, value, output, and three of the SwiGLU
    assert plan.collectives["all-gather"]["count"] >= 2 * 3 * weights  # forward and backward
    assert {"reduce-scatter", "all-reduce"} & set(plan.collectives)


def test_the_rest_is_said_and_goes_into_json(plan: Plan) -> None:
    assert (plan.compiled_for, plan.stands_for, plan.devices) == ("cpu", H100, 4)
    assert plan.mesh == {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 1}
    assert (plan.batch_size, plan.rows_per_device, plan.tokens) == (8, 2, 128)
    assert plan.seconds_at_peak == pytest.approx(plan.flops / 4 / 989e12)
    assert set(plan.versions) == {"jax", "jaxlib"} and plan.compile_seconds > 0
    assert Plan(**json.loads(json.dumps(dataclasses.asdict(plan)))) == plan


def test_the_step_is_compiled_for_the_arrays_that_training_has() -> None:
    """So a plan is of the program that a run would compile: abstract and real arguments are alike."""
    config = config_of()
    with jax.set_mesh(make_mesh(config.mesh, jax.devices()[:4])):
        config, data = open_data(config)
        optimizer = make_optimizer(config.optimizer, config.steps)
        real = init_state(config, optimizer), place_batch(next(data.train_batches(0)), config.data.batch_size)
        params = abstract_model(config.model, config.dtype)[1]
        described = abstract_state(config, optimizer, params), abstract_batch(config)
        assert jax.tree.map(jax.typeof, real) == jax.tree.map(jax.typeof, described)


def test_mistakes_are_refused_before_anything_is_compiled() -> None:
    with pytest.raises(ConfigError, match=r"data.batch_size=6 does not divide by mesh.data\*mesh.fsdp=4; try 4 or 8"):
        make_plan(config_of(**{"data.batch_size": "6"}), jax.devices()[:4], print)
    with pytest.raises(ConfigError, match="does not fit the number of devices, 8"):
        make_plan(config_of(), jax.devices(), print)
    with pytest.raises(ConfigError, match="how much memory a 'cpu' has"):
        largest_batch(config_of(), jax.devices()[:4], print)


@pytest.mark.parametrize(
    ("error", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (19.50G) "
            "exceeds available HBM (15.75G). HLO module: jit_train_step.",
            19.5 * 2**30 + 1000,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.25G of 15.75G hbm.", 16.25 * 2**30),
        ("RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom", None),
    ],
)
def test_the_need_is_read_from_the_compilers_refusal(error: str, needed: float | None) -> None:
    assert planning._needed(error, arguments=1000) == needed


@pytest.mark.parametrize(
    ("overrides", "arguments", "cures"),
    [
        # 8 rows on a device, of which 4 and a bit fit
        (
            {"data.batch_size": "32"},
            20,
            "--config.model.remat=full, or --config.mesh.data=1 --config.mesh.fsdp=4, "
            "or --config.optimizer.accumulation_steps=2, or --config.data.batch_size=16.",
        ),
        (
            {"data.batch_size": "32", "model.remat": "full", "mesh.data": "1", "mesh.fsdp": "4"},
            10,
            "--config.model.remat=offload, or --config.optimizer.accumulation_steps=2, or --config.data.batch_size=16.",
        ),
        # parameters and optimizer alone are too large
        (
            {"data.batch_size": "32", "model.remat": "full", "mesh.data": "1", "mesh.fsdp": "4"},
            90,
            "more than 4 devices.",
        ),
    ],
)
def test_a_refusal_says_by_how_much_and_what_would_help(overrides: dict[str, str], arguments: int, cures: str) -> None:
    config = config_of(**overrides)
    mesh = {"data": config.mesh.data, "fsdp": config.mesh.fsdp, "sequence": 1, "tensor": 1}
    gib = 2**30
    refusal = planning._refuse(config, mesh, 8, "TPU v5 lite", arguments * gib, 100 * gib, 60 * gib)
    assert refusal.needed == 100 * gib
    assert str(refusal) == (
        "The step does not fit into a TPU v5 lite: with 8 rows per device it needs 100.00 GiB, 40.00 more than the "
        f"60.00 there are ({arguments}.00 of it for parameters, optimizer and batch); what would help: {cures}"
    )


def test_what_takes_more_than_there_is_is_refused(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> None:
    monkeypatch.setattr(planning, "find_device", lambda _: Device(1e12, plan.memory["peak"] - 1))
    with pytest.raises(DoesNotFitError, match="with 2 rows per device it needs") as refusal:
        make_plan(config_of(), jax.devices()[:4], print, stands_for=H100)
    assert refusal.value.needed == plan.memory["peak"]


@pytest.mark.parametrize("fixed", [0, 300, 999, 1000])
@pytest.mark.parametrize("per_row", [1.0, 7.3, 400.0])
@pytest.mark.parametrize("first", [1, 16, 4000])
def test_the_most_rows_are_found_in_few_tries(fixed: int, per_row: float, first: int) -> None:
    tries: list[int] = []

    def needed(rows: int) -> int:
        tries.append(rows)
        assert rows >= 1
        return int(fixed + per_row * rows + 0.01 * per_row * np.sin(rows))

    most = most_rows(needed, 1000, first)
    assert most == 0 or needed(most) <= 1000
    assert needed(most + 1) > 1000
    assert len(tries) <= 2 + 6


def test_the_largest_batch_is_found(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> None:
    """By plans whose memory grows by 10 bytes a row, of which 95 are there."""

    limit = 95

    def fake(config: Config, devices, say, **options) -> Plan:
        rows = config.data.batch_size // 4
        if 12 + 10 * rows > limit:
            raise DoesNotFitError(f"{rows} are too many", 12 + 10 * rows)
        return dataclasses.replace(plan, rows_per_device=rows, memory={"peak": 12 + 10 * rows})

    monkeypatch.setattr(planning, "find_device", lambda _: Device(1e12, limit))
    monkeypatch.setattr(planning, "make_plan", fake)
    said: list[str] = []
    assert largest_batch(config_of(), jax.devices()[:4], said.append, stands_for=H100).rows_per_device == 8
    assert said[0].startswith("2 rows per device: ")
    limit = 21
    with pytest.raises(DoesNotFitError, match="1 are too many"):
        largest_batch(config_of(), jax.devices()[:4], said.append, stands_for=H100)
