"""The folder of a run: whose it is, who may write it, what a resumed run keeps of it."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from gla_jax.config import Config, ConfigError, build, default_config, override
from gla_jax.training.workdir import Workdir, read_config


def config(**changes: str) -> Config:
    settings = default_config()
    for name, text in changes.items():
        override(settings, name.replace("__", "."), text)
    return build(settings)


def claim(path: Path, ours: Config) -> None:
    with Workdir(str(path)) as folder:
        folder.check_config(ours)
        folder.write_config(ours)


def test_the_config_can_be_read_back(tmp_path: Path) -> None:
    claim(tmp_path / "made" / "anew", config(steps="7"))
    assert read_config(tmp_path / "made" / "anew") == config(steps="7")


def test_another_config_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    claim(tmp_path, config())
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        claim(tmp_path, config(model__hidden_size="128", optimizer__learning_rate="0.1", steps="5"))
    sentence = str(caught.value)
    assert (
        "another model.hidden_size (256 there, 128 here), optimizer.learning_rate (0.0003 there, 0.1 here);" in sentence
    )
    assert "steps" not in sentence and "--config.init_from" in sentence
    assert (tmp_path / "config.json").read_bytes() == before


def test_some_fields_may_change(tmp_path: Path) -> None:
    claim(tmp_path, config())
    changed = config(
        steps="5", log__every="1", eval__every="3", checkpoint__keep="9", mesh__fsdp="1", sample__tokens="4",
        profile__steps="2", data__prefetch="1", model__remat="full", optimizer__accumulation_steps="2",
        optimizer__offload="true", model__mixers__gla__chunk_size="16", init_from="x",
    )  # fmt: skip
    claim(tmp_path, changed)
    assert read_config(tmp_path) == changed


def test_results_of_unknown_origin_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("precious\n")
    with pytest.raises(ConfigError, match=r"has results but no config\.json"):
        claim(tmp_path, config())
    assert (tmp_path / "metrics.jsonl").read_text() == "precious\n"


def test_one_trainer_at_a_time(tmp_path: Path) -> None:
    with Workdir(str(tmp_path)), pytest.raises(ConfigError, match="in use by another trainer"):
        Workdir(str(tmp_path)).__enter__()
    with Workdir(str(tmp_path)):
        pass


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("{file}/run", "Not a directory"),
        ("/proc/run", "cannot be written"),
        ("s3://bucket/run", "give a folder, or gs://BUCKET/FOLDER"),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused(path: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=sentence):
        Workdir(path.format(file=tmp_path / "file")).__enter__()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written: Permission denied"):
        Workdir(str(tmp_path)).__enter__()


def test_a_folder_that_is_no_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not the folder of a run: it has no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"steps": 1')
    with pytest.raises(ConfigError, match=r"config\.json is damaged"):
        read_config(tmp_path)


def test_what_was_written_about_later_steps_is_dropped(tmp_path: Path) -> None:
    with Workdir(str(tmp_path)) as folder:
        lines = [json.dumps({"step": step, "loss": 1.5}) + "\n" for step in (1, 2, 2, 3)]
        folder.metrics.write_text("".join(lines) + '{"step": 2, "lo')
        folder.timings.write_text("".join(lines))
        for step, text in ((1, "first\n\nstep 9\n"), (2, "=== not a heading ==="), (3, "third")):
            folder.add_sample(step, text)
        folder.rewind(2)
        assert folder.metrics.read_text() == folder.timings.read_text() == "".join(lines[:3])
        assert folder.samples.read_text() == (
            "=== step 1 ===\nfirst\n\nstep 9\n=== step 2 ===\n=== not a heading ===\n"
        )
        folder.rewind(0)
        assert folder.metrics.read_text() == folder.samples.read_text() == ""


def test_a_config_of_a_new_version_of_the_code_may_have_more_fields(tmp_path: Path) -> None:
    claim(tmp_path, config())
    values = json.loads((tmp_path / "config.json").read_text())
    del values["optimizer"]["z_loss"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    claim(tmp_path, config())
    with pytest.raises(ConfigError, match=r"another optimizer\.z_loss \(0\.0 there"):
        claim(tmp_path, dataclasses.replace(config(), optimizer=dataclasses.replace(config().optimizer, z_loss=0.1)))
