"""Import, export, and what is said of directories that cannot be read."""

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gla_jax import load_model
from gla_jax.config import ConfigError, MeshConfig, as_dict, build, default_config
from gla_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from gla_jax.interop import export_model, import_model
from gla_jax.interop.folder import flatten, open_model
from gla_jax.interop.safetensors import FolderWriter, open_folder
from gla_jax.interop.translation import read_config, write_config
from gla_jax.loading import load_config
from gla_jax.parallel.mesh import make_mesh
from gla_jax.training.workdir import read_config as read_run_config

FIXTURES = Path(__file__).parents[1] / "fixtures" / "interop"
QUICK = ("gla_convolution", "gla_hybrid", "transformer", "llama")
WRITTEN = [
    pytest.param(path.name, marks=() if path.name in QUICK else pytest.mark.long)
    for path in sorted(FIXTURES.iterdir())
    if path.name != "gla_original"  # read only
]
MODEL = "model.safetensors"


def tensors_of(folder):
    return {name: tensor.read() for name, tensor in open_folder(folder).items()}


def rewrite(folder, tensors, dtype=np.float32, **options):
    """Replace the tensors of a directory."""
    for path in folder.glob("model*"):
        path.unlink()
    shapes = {name: array.shape for name, array in tensors.items()}
    FolderWriter(folder, shapes, np.dtype(dtype), **options).write(tensors.items())


def copied(name, tmp_path):
    return Path(shutil.copytree(FIXTURES / name, tmp_path / name))


def read_all(folder):
    """Return our parameters, read from a directory."""
    params = open_model(folder)[2]
    return {name: parameter.read((slice(None),) * len(parameter.shape)) for name, (_, parameter) in flatten(params)}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        bits = lambda array: np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        np.testing.assert_array_equal(bits(found[name]), bits(array), err_msg=name)


@pytest.mark.parametrize("name", WRITTEN)
def test_import_then_export_is_the_identity_bit_for_bit(name, tmp_path):
    config = import_model(FIXTURES / name, tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "out", architecture="transformer" if name == "transformer" else None)
    expected = tensors_of(FIXTURES / name)
    if name in ("gla_convolution", "gla_hybrid", "retnet"):  # with the norm and the gate apart; we write them together
        expected = {name.replace("g_norm.", "g_norm_swish_gate."): array for name, array in expected.items()}
    assert_same(tensors_of(tmp_path / "out"), expected)
    assert read_config(tmp_path / "out")[0].model == read_config(FIXTURES / name)[0].model == config.model
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_a_run_in_bfloat16_goes_out_and_comes_back_bit_for_bit(tmp_path):
    folder = copied("gla_tied", tmp_path)
    rewrite(folder, tensors_of(folder), jnp.bfloat16)
    config = import_model(folder, tmp_path / "run")
    assert (config.dtype.params, config.dtype.compute) == ("bfloat16", "bfloat16")
    export_model(tmp_path / "run", tmp_path / "out")
    assert_same(tensors_of(tmp_path / "out"), tensors_of(folder))
    export_model(tmp_path / "run", tmp_path / "wide", dtype="float32")
    assert_same(tensors_of(tmp_path / "wide"), {name: x.astype(np.float32) for name, x in tensors_of(folder).items()})


def test_gate_and_up_in_one_tensor_as_in_old_files(tmp_path):
    folder = copied("gla_feature_map", tmp_path)
    tensors = tensors_of(folder)
    for layer in range(2):
        gate, up = (f"model.layers.{layer}.mlp.{name}_proj.weight" for name in ("gate", "up"))
        tensors[gate] = np.concatenate([tensors[gate], tensors.pop(up)])
    rewrite(folder, tensors, most_file_bytes=20_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert_same(read_all(folder), read_all(FIXTURES / "gla_feature_map"))


def test_parts_of_parameters_are_read_by_the_devices_that_hold_them():
    folder = FIXTURES / "gla_convolution"
    expected = read_all(folder)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        found = dict(flatten(params_of(load_model(folder))))
        assert "fsdp" in str(found["layers/mlp/gate/kernel"].sharding.spec)
    assert_same({name: np.asarray(array) for name, array in found.items()}, expected)


def params_of(model):
    from flax import nnx

    return nnx.to_pure_dict(nnx.state(model))


def test_an_imported_run_loads_on_a_mesh(tmp_path):
    import_model(FIXTURES / "retnet", tmp_path / "run")
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        found = dict(flatten(params_of(load_model(tmp_path / "run"))))
    assert_same({name: np.asarray(array) for name, array in found.items()}, read_all(FIXTURES / "retnet"))


def test_bytes_are_written_as_a_tokeniser_that_gives_the_same_ids(tmp_path):
    config = import_model(FIXTURES / "gla_tied", tmp_path / "run")
    settings = as_dict(config) | {"data": as_dict(config)["data"] | {"tokenizer": "bytes"}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    export_model(tmp_path / "run", tmp_path / "out")
    written, ours = load_tokenizer(str(tmp_path / "out" / "tokenizer.json")), ByteTokenizer()
    text = "In the beginning\n\t  … ÄÖ 漢字 \x01\x7f"
    assert written.encode(text).tolist() == ours.encode(text).tolist()
    assert written.decode(ours.encode(text)) == text
    assert (written.vocab_size, written.end_of_document) == (256, 0)
    theirs = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (theirs["bos_token_id"], theirs["eos_token_id"]) == (0, 0)
    again = import_model(tmp_path / "out", tmp_path / "again")
    assert Path(again.data.tokenizer) == tmp_path / "again" / "tokenizer.json"
    assert load_config(tmp_path / "out").data.tokenizer == str(tmp_path / "out" / "tokenizer.json")


# What cannot be read -------------------------------------------------------------------------------------------------

Q = "model.layers.1.attn.q_proj.weight"


def cut_short(folder):
    path = folder / MODEL
    path.write_bytes(path.read_bytes()[:-1000])
    return rf"{MODEL} is cut short: it has [\d,]+ of [\d,]+ bytes"


def foreign(folder):
    (folder / MODEL).write_bytes(b"\x80\x02}q\x00(X\x05\x00\x00\x00model")
    return rf"{MODEL} is no safetensors file"


def garbled(folder):
    path = folder / MODEL
    data = bytearray(path.read_bytes())
    data[20:40] = b"x" * 20
    path.write_bytes(data)
    return rf"{MODEL} is no safetensors file: its header"


def pickled(folder):
    (folder / MODEL).rename(folder / "pytorch_model.bin")
    return "pytorch_model.bin, a pickle"


def empty(folder):
    (folder / MODEL).unlink()
    return "has neither model.safetensors nor"


def without_config(folder):
    (folder / "config.json").unlink()
    return "has no config.json"


def changed(folder, sentence, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return sentence


def replaced(folder, sentence, config):
    (folder / "config.json").write_text(json.dumps(config))
    return sentence


def with_tensors(folder, sentence, change):
    tensors = tensors_of(folder)
    change(tensors)
    rewrite(folder, tensors)
    return sentence


DAMAGES = {
    "cut short": cut_short,
    "foreign": foreign,
    "garbled": garbled,
    "pickled": pickled,
    "empty": empty,
    "without config": without_config,
    "missing tensor": lambda folder: with_tensors(
        folder, rf"has no tensor {Q} of shape \(16, 32\)", lambda tensors: tensors.pop(Q)
    ),
    "wrong shape": lambda folder: with_tensors(
        folder,
        rf"{MODEL}: the tensor {Q} has shape \(16, 31\), which config.json makes \(16, 32\)",
        lambda tensors: tensors.update({Q: tensors[Q][:, :31]}),
    ),
    "extra tensor": lambda folder: with_tensors(
        folder,
        rf"{MODEL} holds the tensor model.extra.weight of shape \(3,\), for which",
        lambda tensors: tensors.update({"model.extra.weight": np.ones(3)}),
    ),
    "unknown model": lambda folder: changed(folder, "model_type='bert'", model_type="bert"),
    "a run of ours": lambda folder: replaced(folder, "a run of gla-jax already", as_dict(build(default_config()))),
    "unknown field": lambda folder: changed(folder, "magic=3, which is not known", magic=3),
    "other activation": lambda folder: changed(
        folder, "hidden_act='powlu', which is not supported", hidden_act="powlu"
    ),
    "residual attention": lambda folder: changed(folder, "attnres_block_size=4", attnres_block_size=4),
    "no text": lambda folder: changed(folder, "cannot be made into a model: model.num_heads='a'", num_heads="a"),
    "heads that do not divide": lambda folder: changed(folder, "model.num_heads=3 does not divide", num_heads=3),
    "other heads in hybrid": lambda folder: changed(folder, "attn.num_heads=4", attn={"layers": [0], "num_heads": 4}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_sentence_says_what_is_wrong_and_nothing_is_left(damage, tmp_path):
    folder = copied("gla_tied", tmp_path)
    sentence = damage(folder)
    with pytest.raises(ConfigError, match=sentence) as caught:
        import_model(folder, tmp_path / "run")
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["gla_tied"]


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters=.* only plain rotary"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling=.* only plain rotary"),
        ("llama", {"head_dim": 16}, "head_dim=16, which is not supported unless it is"),
        ("llama", {"attention_bias": True}, "attention_bias=True, which is not supported"),
        ("transformer", {"qk_norm": True}, "qk_norm=True, which is not supported"),
    ],
)
def test_options_that_are_not_supported(name, fields, sentence, tmp_path):
    folder = copied(name, tmp_path)
    changed(folder, "", **fields)
    with pytest.raises(ConfigError, match=sentence):
        open_model(folder)


def test_a_missing_shard_and_a_shard_without_its_tensor(tmp_path):
    folder = copied("llama", tmp_path)
    first = min(folder.glob("model-*.safetensors"))
    first.rename(tmp_path / "aside")
    with pytest.raises(ConfigError, match=f"{first.name} is missing, though model.safetensors.index.json names it"):
        open_model(folder)
    shutil.copyfile(max(folder.glob("model-*.safetensors")), first)
    with pytest.raises(ConfigError, match=f"{first.name} does not hold the tensor .*which model.safetensors.index"):
        open_model(folder)


@pytest.mark.parametrize(
    ("options", "architecture", "sentence"),
    [
        ({"gate_logit_normalizer": 8.0}, None, "A gla has no place for model.mixers.gla.gate_logit_normalizer=8.0"),
        ({"conv_bias": True}, None, "A gla has no place for model.mixers.gla.conv_bias=True"),
        ({}, "llama", "A llama has no layers of model.mixer='gla'"),
        ({}, "gpt", "--architecture=gpt is unknown"),
        ({}, "gla-original", "is read and not written"),
    ],
)
def test_models_that_no_library_has(options, architecture, sentence, tmp_path):
    settings = as_dict(read_config(FIXTURES / "gla_tied")[0])
    (tmp_path / "run").mkdir()  # without checkpoints, which are not looked at before the config
    settings["model"]["mixers"]["gla"].update(options)
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=sentence):
        export_model(tmp_path / "run", tmp_path / "out", architecture=architecture)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_how_a_model_began_is_not_written():
    settings = as_dict(read_config(FIXTURES / "gla_tied")[0])
    plain = write_config(build(settings), "gla", "float32")
    settings["model"]["mixers"]["gla"] |= {"longest_half_life": 64.0, "half_life_skew": 2.0}
    assert write_config(build(settings), "gla", "float32") == plain


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    with pytest.raises(ConfigError, match="exists and is not empty"):
        import_model(FIXTURES / "gla_tied", tmp_path / "run")


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"run takes 0\.\d MB, and its disk has 0\.0 MB left"):
        import_model(FIXTURES / "gla_tied", tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_hugging_face_directory_in_the_place_of_a_run():
    with pytest.raises(ConfigError, match="gla_tied is a Hugging Face directory; make the folder of a run of it"):
        read_run_config(FIXTURES / "gla_tied")


def test_the_command_ends_with_2_and_a_sentence(tmp_path):
    command = [sys.executable, "-m", "gla_jax.convert", "import", f"--from={tmp_path}", f"--workdir={tmp_path / 'run'}"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert result.returncode == 2
    assert result.stderr == f"{tmp_path} is not a Hugging Face directory: it has no config.json.\n"
