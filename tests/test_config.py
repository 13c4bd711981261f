"""Configs: what files, flags and JSON may say, and the sentence that answers everything else."""

import dataclasses
import json
from pathlib import Path

import pytest

from gla_jax.config import Config, ConfigError, as_dict, build, default_config, describe, flat, load, override
from gla_jax.layers import MIXERS


def built(**overrides: str) -> Config:
    settings = default_config()
    for name, text in overrides.items():
        override(settings, name, text)
    return build(settings)


def test_defaults_build_to_the_dataclasses_own_defaults() -> None:
    config = build(default_config())
    assert dataclasses.replace(config, model=dataclasses.replace(config.model, mixers={})) == Config()
    assert config.model.mixers == {name: mixer.Options() for name, mixer in MIXERS.items()}


def test_a_config_survives_json() -> None:
    config = built(**{"model.mixer": "gla,attention", "model.num_layers": "2", "model.mixers.gla.expand_k": "1"})
    assert config.model.mixer == ("gla", "attention")
    assert build(json.loads(json.dumps(as_dict(config)))) == config


def test_json_of_an_older_version_gets_the_defaults_of_new_fields() -> None:
    values = as_dict(build(default_config()))
    del values["optimizer"]["z_loss"], values["sample"]
    assert build(values) == build(default_config())


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("steps", "1_000", 1000),
        ("optimizer.learning_rate", "3", 3.0),
        ("model.tie_embeddings", "False", False),
        ("model.vocab_size", "none", None),
        ("model.vocab_size", "300", 300),
        ("data.path", "some/where", "some/where"),
        ("model.mixer", "gla", "gla"),
        ("model.mixer", "('gla', 'gla', 'gla', 'gla')", ("gla",) * 4),
        ("model.mixers.gla.gate_logit_normalizer", "8", 8.0),
    ],
)
def test_text_becomes_a_value_of_the_fields_type(name: str, text: str, value: object) -> None:
    found = flat(built(**{name: text}))[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("model.hiden_size", "3", "the config has no field model.hiden_size; did you mean model.hidden_size?"),
        ("hidden_size", "3", "the config has no field hidden_size; did you mean model.hidden_size?"),
        ("optimiser.b1", "0.9", "did you mean optimizer.b1?"),
        ("model.mixers.gla.expandk", "1", "did you mean model.mixers.gla.expand_k?"),
        ("qqqqqq", "1", "--help"),
        ("model", "3", "model='3' must be set field by field, such as model.mixer."),
        ("steps", "many", "steps='many' must be a whole number."),
        ("steps", "1.5", "steps='1.5' must be a whole number."),
        ("optimizer.learning_rate", "fast", "optimizer.learning_rate='fast' must be a number."),
        ("optimizer.learning_rate", "nan", "optimizer.learning_rate=nan must be a number."),
        ("model.tie_embeddings", "maybe", "model.tie_embeddings='maybe' must be true or false."),
        ("model.vocab_size", "x", "model.vocab_size='x' must be a whole number or None."),
        ("steps", "0", "steps=0 must be at least 1."),
        ("optimizer.schedule", "cosin", "optimizer.schedule='cosin' is unknown; choose one of 'cosine', 'wsd'"),
        ("dtype.compute", "fp8", "dtype.compute='fp8' is unknown"),
        ("optimizer.learning_rate", "-1", "optimizer.learning_rate=-1.0 must be above 0."),
        ("optimizer.final_learning_rate", "1", "optimizer.final_learning_rate=1.0 exceeds optimizer.learning_rate="),
        ("optimizer.b2", "1", "optimizer.b2=1.0 must be at least 0 and below 1."),
        ("optimizer.decay_fraction", "0", "optimizer.decay_fraction=0.0 must be above 0"),
        ("optimizer.accumulation_steps", "3", "does not divide data.batch_size=16; try 2 or 4."),
        ("model.num_heads", "3", "model.num_heads=3 does not divide model.hidden_size"),
        ("model.mixer", "glaa", "did you mean 'gla'?"),
        ("log.wandb_project", "mine", "pip install 'gla-jax[wandb]'"),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(
    name: str, text: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)  # no wandb, whoever runs this
    with pytest.raises(ConfigError) as caught:
        built(**{name: text})
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("c.model.hiden_size = 3", "line 5: the config has no field hiden_size; did you mean model.hidden_size?"),
        ("c.modle.hidden_size = 3", "line 5: the config has no field modle; did you mean model?"),
        ("c.model.hidden_size = 'big'", "model.hidden_size='big' must be a whole number."),
        ("c.model.tie_embeddings = 1", "model.tie_embeddings=1 must be true or false."),
        ("c.model = 3", "model=3 must be set field by field"),
        ("c = 3", "returned int, not a ConfigDict"),
    ],
)
def test_a_mistake_in_a_config_file_names_the_place(body: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from gla_jax.config import default_config\n\n"
        f"def get_config():\n    c = default_config()\n    {body}\n    return c\n"
    )
    with pytest.raises(ConfigError) as caught:
        load(str(file))
    assert sentence in str(caught.value)


def test_a_config_file_may_take_an_argument(tmp_path: Path) -> None:
    file = tmp_path / "sized.py"
    file.write_text(
        "from gla_jax.config import default_config\n\n"
        "def get_config(layers='2'):\n    c = default_config()\n    c.model.num_layers = int(layers)\n    return c\n"
    )
    assert load(str(file)).model.num_layers == 2
    assert load(f"{file}:7").model.num_layers == 7
    assert load(f"{file}:7", {"model.num_layers": "3"}).model.num_layers == 3


def test_errors_of_a_config_files_own_are_not_hidden(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("def get_config():\n    return None.missing\n")
    with pytest.raises(AttributeError, match="missing"):
        load(str(file))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.py: there is no such file"):
        load(str(tmp_path / "nowhere.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match=r"no function get_config\(\)"):
        load(str(tmp_path / "empty.py"))


def test_help_lists_every_field_with_its_default_and_meaning() -> None:
    lines = describe().splitlines()
    assert len(lines) == len(flat(build(default_config())))
    assert any(line.split()[0] == "--config.steps=1000" for line in lines)
    assert any("--config.optimizer.z_loss=0.0" in line and "Coefficient" in line for line in lines)


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.parent.glob("configs/*.py")), ids=lambda path: path.stem)
def test_every_config_in_the_repository_builds(path: Path) -> None:
    assert load(str(path)).steps > 0
