"""Checkpoints: read on any mesh, complete or passed over, the newest and the best kept."""

import functools
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gla_jax.config import CheckpointConfig, ConfigError, MeshConfig
from gla_jax.parallel.mesh import make_mesh
from gla_jax.training.checkpoint import CheckpointWriter, restore_params, restore_state
from gla_jax.training.state import TrainState

FSDP_TENSOR = MeshConfig(fsdp=4, tensor=2)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mask={"a": True, "b": {"c": False}}))


def make_state(step: int, *, averaged: bool = False) -> TrainState:
    """Make a state on the current mesh whose every number depends on the step."""
    params = {"a": jnp.arange(64 * 64, dtype=jnp.float32).reshape(64, 64), "b": {"c": jnp.arange(3.0)}}
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=OPTIMIZER.init(params),
        rng=jax.random.key_data(jax.random.key(0)),
        ema=params if averaged else None,
    )
    state = jax.tree.map(lambda x: x + np.asarray(step, x.dtype), state)
    return jax.device_put(state, jax.tree.map(sharding, state), may_alias=False)


def sharding(leaf: Any) -> NamedSharding:
    spec = PartitionSpec("fsdp", "tensor") if leaf.ndim == 2 else PartitionSpec()
    return NamedSharding(jax.sharding.get_mesh(), spec)


def described(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save(
    folder: Path, steps: dict[int, float | None], *, keep: int = 3, start: int = 0, averaged: bool = False
) -> None:
    """Save a state for each step, with its evaluation loss."""
    with CheckpointWriter(folder, CheckpointConfig(keep=keep), start=start) as writer:
        for step, loss in steps.items():
            writer.save(make_state(step, averaged=averaged), step=step, data_fingerprint="abc", eval_loss=loss)


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_equal(found: Any, expected: Any) -> None:
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), found, expected)


def refuse(sentence: str) -> None:
    raise AssertionError(sentence)


def test_what_is_read_on_another_mesh_is_what_was_saved(tmp_path: Path) -> None:
    with jax.set_mesh(make_mesh(FSDP_TENSOR)):
        save(tmp_path, {7: None}, averaged=True)
    for mesh in (MeshConfig(data=4, fsdp=2), MeshConfig(data=1, fsdp=1, tensor=2)):
        devices = jax.devices()[: 8 if mesh.data == 4 else 2]
        with jax.set_mesh(make_mesh(mesh, devices)):
            expected = make_state(7, averaged=True)
            restored = restore_state(tmp_path, described(expected), refuse)
            assert restored is not None
            assert_equal(*map(jax.device_get, (restored[0], expected)))
            assert jax.tree.map(jax.typeof, restored[0]) == jax.tree.map(jax.typeof, expected)
            assert restored[1] == {"fingerprint": "abc", "next_step": 7}


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    with jax.set_mesh(make_mesh(FSDP_TENSOR)):
        assert restore_state(tmp_path / "nowhere", described(make_state(0)), refuse) is None
        with pytest.raises(ConfigError, match="holds no checkpoint yet"):
            restore_params(tmp_path / "nowhere", described(make_state(0)).params, refuse)


def test_a_folder_may_be_named_from_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with jax.set_mesh(make_mesh(FSDP_TENSOR)):
        save(Path("runs/checkpoints"), {5: None})
        assert restore_state(Path("runs/checkpoints"), described(make_state(0)), refuse) is not None


def test_a_state_may_be_given_up_while_it_is_still_being_written(tmp_path: Path) -> None:
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
    with jax.set_mesh(make_mesh(FSDP_TENSOR)):
        with CheckpointWriter(tmp_path, CheckpointConfig(), start=0) as writer:
            state = make_state(5)
            writer.save(state, step=5, data_fingerprint="abc")
            for _ in range(5):
                state = jax.block_until_ready(overwrite(state))
        restored = restore_state(tmp_path, described(make_state(5)), refuse)
        assert restored is not None
        assert_equal(*map(jax.device_get, (restored[0], make_state(5))))


def test_the_newest_and_the_best_are_kept_over_several_runs(tmp_path: Path) -> None:
    with jax.set_mesh(make_mesh(FSDP_TENSOR)):
        save(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: None}, keep=2)
        assert kept(tmp_path) == ["00000002", "00000004", "00000005"]
        save(tmp_path, {6: 1.5, 7: None, 8: None}, keep=2, start=5)
        assert kept(tmp_path) == ["00000002", "00000007", "00000008"]
        save(tmp_path, {9: 0.5, 10: None, 11: None}, keep=2, start=8)
        assert kept(tmp_path) == ["00000009", "00000010", "00000011"]


def test_what_is_evaluated_is_the_average_where_there_is_one(tmp_path: Path) -> None:
    with jax.set_mesh(make_mesh(FSDP_TENSOR)):
        state = make_state(3, averaged=True)
        state = TrainState(state.step, state.params, state.opt_state, state.rng, jax.tree.map(lambda x: -x, state.ema))
        for folder, ema, expected in (("with", state.ema, state.ema), ("without", None, state.params)):
            state = TrainState(state.step, state.params, state.opt_state, state.rng, ema)
            with CheckpointWriter(tmp_path / folder, CheckpointConfig(), start=0) as writer:
                writer.save(state, step=3, data_fingerprint="abc")
            params, step = restore_params(tmp_path / folder, described(state).params, refuse)
            assert_equal(*map(jax.device_get, (params, expected)))
            assert step == 3


def damage(checkpoint: Path, how: str) -> None:
    data = max((checkpoint / "params").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    if how == "cut":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    elif how == "emptied":
        data.write_bytes(b"")
    elif how == "gone":
        data.unlink()
    elif how == "list cut":
        (checkpoint / "file_sizes.json").write_text("{")


@pytest.mark.parametrize("how", ["cut", "emptied", "gone", "list cut"])
def test_a_damaged_checkpoint_is_passed_over_and_said_so(how: str, tmp_path: Path) -> None:
    said: list[str] = []
    with jax.set_mesh(make_mesh(FSDP_TENSOR)):
        save(tmp_path, {1: None, 2: None})
        damage(tmp_path / "00000002", how)
        restored = restore_state(tmp_path, described(make_state(0)), said.append)
        assert restored is not None and restored[1]["next_step"] == 1
        assert_equal(*map(jax.device_get, (restored[0], make_state(1))))
        assert len(said) == 1 and said[0].startswith("Checkpoint 2 cannot be read (")
        # Training on from step 1 comes past step 2 again.
        save(tmp_path, {2: None}, start=1)
        restored = restore_state(tmp_path, described(make_state(0)), refuse)
        assert restored is not None
        assert_equal(*map(jax.device_get, (restored[0], make_state(2))))
        assert kept(tmp_path) == ["00000001", "00000002", "unreadable-00000002.0"]


def test_one_without_a_list_of_sizes_is_read(tmp_path: Path) -> None:
    with jax.set_mesh(make_mesh(FSDP_TENSOR)):
        save(tmp_path, {1: None})
        (tmp_path / "00000001" / "file_sizes.json").unlink()
        assert restore_state(tmp_path, described(make_state(0)), refuse) is not None


def test_nothing_is_started_anew_over_checkpoints_none_of_which_can_be_read(tmp_path: Path) -> None:
    with jax.set_mesh(make_mesh(FSDP_TENSOR)):
        save(tmp_path, {1: None, 2: None})
        for step in (1, 2):
            damage(tmp_path / f"0000000{step}", "cut")
        with pytest.raises(ConfigError, match="holds 2 checkpoints, none of which can be read: params/"):
            restore_state(tmp_path, described(make_state(0)), lambda _: None)


def test_one_that_was_being_written_is_not_found(tmp_path: Path) -> None:
    with jax.set_mesh(make_mesh(FSDP_TENSOR)):
        save(tmp_path, {1: None})
        unfinished = tmp_path / "00000002.orbax-checkpoint-tmp"
        unfinished.mkdir()
        restored = restore_state(tmp_path, described(make_state(0)), refuse)
        assert restored is not None and restored[1]["next_step"] == 1
        save(tmp_path, {2: None}, start=1)
        assert kept(tmp_path) == ["00000001", "00000002"]


def test_a_disk_without_room_is_said_so_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with jax.set_mesh(make_mesh(FSDP_TENSOR)):
        save(tmp_path, {1: None})
        monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=1_000_000))
        with pytest.raises(
            ConfigError, match=r"has 1\.0 MB left on its disk and a checkpoint takes 1\.1 MB; free some"
        ):
            save(tmp_path, {2: None}, start=1)
        assert kept(tmp_path) == ["00000001"]
