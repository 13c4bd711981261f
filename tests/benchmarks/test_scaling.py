"""The benchmark of two devices, at a tiny size on simulated ones: cases run, and losses are the same on each mesh."""

import json

import numpy as np
import pytest

from benchmarks import scaling
from gla_jax.hardware import Device

TINY = {
    "model.hidden_size": 32,
    "model.intermediate_size": 32,
    "model.num_heads": 2,
    "model.num_layers": 1,
    "model.vocab_size": 64,
    "dtype.compute": "float32",
}


def run(folder, *arguments):
    settings = [f"--set={name}={value}" for name, value in TINY.items()]
    sizes = ["--rows=1x32", "--length=64", "--longer=128", "--steps=1"]
    scaling.main([*settings, *sizes, f"--output={folder}/scaling.json", *arguments])
    return {(row["group"], row["axis"]): row for row in json.loads((folder / "scaling.json").read_text())["rows"]}


@pytest.mark.long
def test_two_devices_are_set_against_one(tmp_path):
    rows = run(tmp_path, "--cases=row:one,row:sequence", f"--plot={tmp_path}/scaling.png")
    one, two = rows["row", "one"], rows["row", "sequence"]
    assert (one["devices"], two["devices"], one["length"], two["length"]) == (1, 2, 64, 64)
    assert one["speedup"] == 1
    np.testing.assert_allclose(two["speedup"], one["step_ms"] / two["step_ms"], rtol=1e-2)
    np.testing.assert_allclose(one["losses"], two["losses"], rtol=1e-4)
    assert not one["collectives"] and two["collectives"]["all-gather"]["count"]
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_every_case_runs(tmp_path):
    rows = run(tmp_path)
    assert [row["devices"] for row in rows.values()] == [1, 2, 2, 1, 2, 2, 1]
    assert all(row["tokens_per_second"] > 0 for row in rows.values())
    np.testing.assert_allclose(rows["rows", "data"]["losses"], rows["rows", "fsdp"]["losses"], rtol=1e-4)


def test_a_step_that_does_not_fit_is_a_row_that_says_so(monkeypatch):
    settings = {name: str(value) for name, value in TINY.items()}
    case = scaling.make_cases("1x16", 64, [], settings)[0]
    program = scaling.compile_case(case, {})
    monkeypatch.setattr(scaling, "find_device", lambda _: Device(1e12, 1000))
    row = scaling.run_case(case, program, 1)
    assert "needs" in row["error"] and "tokens_per_second" not in row
