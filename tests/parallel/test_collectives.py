"""What devices say to each other in a layer, read from the compiled training step: what one would write by hand.

A layer's collectives are those that run once for every layer. On CPUs a sum of gradients that is left sharded is an
all-reduce of which each device keeps a part; compilers for GPUs and TPUs make one reduce-scatter of the two.
"""

import jax
import numpy as np
import pytest

from gla_jax.config import Config, DataConfig, DtypeConfig, MeshConfig, ModelConfig
from gla_jax.models import abstract_model
from gla_jax.parallel.mesh import make_mesh
from gla_jax.parallel.program import read_collectives
from gla_jax.parallel.sharding import named_sharding
from gla_jax.training.optimizer import make_optimizer
from gla_jax.training.state import abstract_state
from gla_jax.training.step import make_train_step

B, D, H, LAYERS = 8, 32, 4, 3
BYTES = 4  # of a float32


def layer_collectives(mixer, length, **mesh):
    """Return the collectives of each layer in a training step, and how many of its weights are cut by fsdp."""
    config = Config(
        steps=10,
        model=ModelConfig(
            mixer=mixer,
            vocab_size=24,
            hidden_size=D,
            num_layers=LAYERS,
            num_heads=H,
            intermediate_size=48,
            mixers={} if mixer == "attention" else {mixer: {"chunk_size": 1}},  # compiled sooner
        ),
        data=DataConfig(sequence_length=length, batch_size=B),
        mesh=MeshConfig(**({"fsdp": 1} | mesh)),
        dtype=DtypeConfig(compute="float32"),
    )
    with jax.set_mesh(make_mesh(config.mesh, jax.devices()[:8])):
        graphdef, params = abstract_model(config.model, config.dtype)
        optimizer = make_optimizer(config.optimizer, config.steps)
        place = lambda dtype: jax.ShapeDtypeStruct((B, length), dtype, sharding=named_sharding("batch", "time"))
        batch = {name: place(np.int32) for name in ("inputs", "targets", "segment_ids", "positions")}
        step = make_train_step(config, graphdef, optimizer)
        lowered = step.lower(abstract_state(config, optimizer, params), batch | {"weights": place(np.float32)})
    text = lowered.compile().as_text()
    gathered = sum("fsdp" in leaf.sharding.spec for leaf in jax.tree.leaves(params["layers"]))
    return [found for found in read_collectives(text) if found.count == LAYERS], gathered


def check_tensor_and_fsdp(mixer, floats_per_token):
    length, local_rows = 16, B // 2
    found, weights = layer_collectives(mixer, length, fsdp=2, tensor=4)
    over = lambda size, kind: [each for each in found if each.kind == kind and each.group_size == size]
    # fsdp: each weight is gathered once on the way forward and once on the way back; all gradients go in one exchange.
    assert len(over(2, "all-gather")) == 2 * weights
    assert len(over(2, "all-reduce")) == 1
    # tensor: what mixer and MLP return on the way forward, the gradients of what they take on the way back.
    summed = sum(each.bytes for each in over(4, "all-reduce"))
    expected = (4 * D + floats_per_token) * local_rows * length * BYTES
    assert 0 <= summed - expected <= 256, (summed, expected)  # and the gradient of a norm's scale
    assert len(found) == 2 * weights + 1 + len(over(4, "all-reduce")), found


def test_gla_under_tensor_and_fsdp_parallelism():
    check_tensor_and_fsdp("gla", 16)  # the gradient of the gate's low-rank inputs


@pytest.mark.long
@pytest.mark.parametrize(
    ("mixer", "floats_per_token"),
    [
        ("retention", 0),
        ("linear_attention", 0),
        ("attention", 0),
        ("mamba", 2 * (D // 16 + 2 * 16)),  # step size, B and C, which all channels make and all channels use
    ],
)
def test_other_mixers_under_tensor_and_fsdp_parallelism(mixer, floats_per_token):
    check_tensor_and_fsdp(mixer, floats_per_token)


@pytest.mark.parametrize(
    ("mixer", "decay", "state"),
    [
        ("gla", D // 2, D // 2 * D // H),  # H K and H K V
        pytest.param("retention", 0, D * 2 * D // H, marks=pytest.mark.long),  # decays are alike in all layers
        pytest.param("mamba", 2 * D * 16, 2 * D * 16, marks=pytest.mark.long),
    ],
)
def test_parts_of_a_row_exchange_states_and_nothing_that_grows(mixer, decay, state):
    found, _ = layer_collectives(mixer, 64, sequence=8)
    gathers = [each for each in found if each.kind == "all-gather"]
    # Forwards the decays and states of all parts; backwards the gradients of the states.
    assert sorted(each.bytes for each in gathers) == sorted(8 * B * n * BYTES for n in (decay, state, state) if n)
    weights, borders = ([each for each in found if each.kind == kind] for kind in ("all-reduce", "collective-permute"))
    assert all("transpose" in each.name for each in weights), "nothing is summed on the way forward"
    # A short convolution wants 3 tokens of the part before and gives their gradients back.
    assert [each.bytes for each in borders] == ([B * 3 * 2 * D * BYTES] * 2 if mixer == "mamba" else [])
    assert len(found) == len(gathers) + len(weights) + len(borders)
