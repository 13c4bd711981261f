"""The loop, end to end on the tiny config: what it leaves behind, how it stops, and that stopping changes nothing."""

import dataclasses
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_config import get_config

from gla_jax.config import Config, ConfigError, build, override
from gla_jax.data import Data
from gla_jax.training import DivergedError, Outcome, loop
from gla_jax.training.display import LineDisplay
from gla_jax.training.workdir import read_config

STEPS, LOG, EVAL, CHECKPOINT = 40, 3, 8, 6


def tiny(**overrides: str) -> Config:
    settings = get_config()
    for name, text in overrides.items():
        override(settings, name.replace("__", "."), text)
    return build(settings)


def train(workdir: Path, devices: int = 1, **overrides: str) -> Outcome:
    return loop.train(tiny(**overrides), str(workdir), devices=jax.devices()[:devices])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Do something in the middle of a run: when this step's loss has arrived, and the next step is on its way."""

    def advance(self: LineDisplay, now: int, loss: float) -> None:
        if now == step:
            action()

    monkeypatch.setattr(LineDisplay, "advance", advance)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("finished")
    outcome = train(workdir)
    assert (outcome.step, outcome.stopped_by) == (STEPS, None)
    return workdir


def test_metrics_have_a_line_for_every_interval_and_evaluation(finished: Path) -> None:
    logged = {1, *range(LOG, STEPS + 1, LOG), STEPS}
    evaluated = set(range(EVAL, STEPS + 1, EVAL))
    metrics = lines(finished / "metrics.jsonl")
    assert [(line["step"], "eval/loss" in line) for line in metrics] == sorted(
        [(step, False) for step in logged] + [(step, True) for step in evaluated]
    )
    for line in metrics:
        names = ["step", *(["eval/loss", "eval/perplexity", "eval/bits_per_byte", "eval/accuracy"]
                 if "eval/loss" in line else ["loss", "grad_norm", "learning_rate"])]  # fmt: skip
        assert list(line) == names
    timings = lines(finished / "timings.jsonl")
    assert [line["step"] for line in timings] == sorted(logged)
    assert list(timings[0]) == ["step", "seconds", "data_seconds", "tokens_per_second", "mfu"]
    assert timings[0]["tokens_per_second"] is None and timings[1]["tokens_per_second"] > 0
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert losses[-1] < losses[0]


def test_the_folder_holds_the_run(finished: Path) -> None:
    config = read_config(finished)
    assert config.model.vocab_size == 256 and config.steps == STEPS
    samples = (finished / "samples.txt").read_text()
    assert samples.count("=== step ") == STEPS // EVAL and samples.startswith("=== step 8 ===\n1 2")
    kept = {int(path.name) for path in (finished / "checkpoints").iterdir()}
    assert {30, 36, 40} <= kept and len(kept) <= 4
    assert list((finished / "tensorboard").glob("events.*"))


def test_a_finished_run_has_nothing_left_to_do_until_steps_are_raised(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    assert train(finished).step == STEPS
    assert "There is nothing left to do" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(("first", "second"), [(4, 17), (24, 31)])
def test_stopping_and_resuming_changes_nothing(
    first: int, second: int, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for step, number in ((first, signal.SIGTERM), (second, signal.SIGINT)):
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda number=number: os.kill(os.getpid(), number))
            outcome = train(tmp_path)
        assert outcome.stopped_by == number and outcome.step == step + 1
        assert (tmp_path / "checkpoints" / f"{step + 1:08}").is_dir()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "handlers are put back"
    outcome = train(tmp_path)
    assert outcome.stopped_by is None and outcome.step == STEPS
    assert f"Resuming {tmp_path} at step {second + 1} of {STEPS}." in capsys.readouterr().out
    for file in ("metrics.jsonl", "samples.txt"):
        assert (tmp_path / file).read_bytes() == (finished / file).read_bytes()


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, 4, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    assert not list((tmp_path / "checkpoints").glob("0*"))


def test_a_run_can_go_on_on_another_mesh(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 30, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(tmp_path)
    outcome = train(tmp_path, devices=4, mesh__fsdp="2", mesh__tensor="2")
    assert outcome.state.params["layers"]["mlp"]["up"]["kernel"].sharding.mesh.size == 4
    expected = {line["step"]: line for line in lines(finished / "metrics.jsonl") if "loss" in line}
    for line in lines(tmp_path / "metrics.jsonl"):
        if "loss" in line:
            assert line == pytest.approx(expected[line["step"]], rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_and_spoils_nothing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Data.train_batches

    def poisoned(self: Data, start: int = 0) -> Iterator[dict[str, np.ndarray]]:
        for number, batch in enumerate(batches(self, start), start=start):
            yield batch | {"weights": batch["weights"] * (np.nan if number == 11 else 1)}

    with monkeypatch.context() as patch:
        patch.setattr(Data, "train_batches", poisoned)
        with pytest.raises(DivergedError, match="Step 12 has loss nan and gradient norm nan"):
            train(tmp_path)
    # Step 12 is one that would be saved.
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000006"]
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path / "metrics.jsonl") if "loss" in line)
    train(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_a_new_run_may_start_with_the_parameters_of_another(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, init_from=str(finished))
    said = capsys.readouterr().out
    assert f"Starting with the parameters of {finished} at step {STEPS}." in said
    end, beginning = lines(finished / "metrics.jsonl")[-2], lines(tmp_path / "metrics.jsonl")[0]
    assert beginning["step"] == 1 and beginning["loss"] < end["loss"] + 0.1
    train(tmp_path, init_from=str(finished))
    assert "at step 40 of 40, so init_from is not used." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "overrides", "sentence"),
    [
        ("", {"model__intermediate_size": "48"}, "layers/mlp/down/kernel is (2, 32, 16) there, (2, 48, 16) here"),
        ("", {"model__tie_embeddings": "false"}, "head/kernel is None there, (16, 256) here"),
        ("checkpoints", {}, "is not the folder of a run"),
    ],
)
def test_parameters_of_another_model_are_refused(
    source: str, overrides: dict[str, str], sentence: str, finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        train(tmp_path, init_from=str(finished / source), **overrides)
    assert sentence in str(caught.value)
    assert not (tmp_path / "config.json").exists()


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Every program that is compiled, or taken from the cache, while the test runs."""
    seen: list[str] = []

    def listen(event: str, _: float, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    ("overrides", "devices", "sentence"),
    [
        ({"model__hidden_size": "32"}, 1, "belongs to a run with another model.hidden_size (16 there, 32 here)"),
        ({"steps": "30"}, 1, "steps=30 is behind"),
        ({"mesh__fsdp": "3"}, 8, "does not fit the number of devices, 8"),
        ({"mesh__fsdp": "-1", "data__batch_size": "12"}, 8, "data.batch_size=12 does not divide"),
        ({"mesh__tensor": "4"}, 4, "mesh.tensor=4 does not divide model.num_heads=2"),
        ({"model__vocab_size": "300"}, 1, "model.vocab_size (256 there, 300 here)"),
        ({"data__path": "nowhere"}, 1, "nowhere"),
        ({"data__corpus": "kvj"}, 1, "kvj"),
    ],
)
def test_mistakes_are_found_before_anything_is_compiled_or_written(
    overrides: dict[str, str], devices: int, sentence: str, finished: Path, compilations: list[str]
) -> None:
    content = lambda: {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    before = content()
    with pytest.raises(ConfigError) as caught:
        train(finished, devices, **overrides)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert not compilations
    assert content() == before


def test_data_that_changed_under_a_run_are_refused(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_dataset = loop.open_dataset
    other = lambda *arguments, **options: dataclasses.replace(open_dataset(*arguments, **options), fingerprint="other")
    monkeypatch.setattr(loop, "open_dataset", other)
    with pytest.raises(ConfigError, match="was trained on other data"):
        train(finished, steps="50")


def test_the_devices_never_wait_for_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str]
) -> None:
    """What a step measured is fetched once the next step is on its way, and nothing is compiled anew."""
    events: list[str] = []
    compiled: list[int] = []
    make_train_step, device_get = loop.make_train_step, jax.device_get

    def recorded_step(*arguments: Any) -> Callable[..., Any]:
        step = make_train_step(*arguments)

        def call(state: Any, batch: Any) -> Any:
            before = len(compilations)
            results = step(state, batch)
            compiled.append(len(compilations) - before)
            events.append("step")
            return results

        return call

    def recorded_get(x: Any) -> Any:
        events.append("fetch")
        return device_get(x)

    monkeypatch.setattr(loop, "make_train_step", recorded_step)
    monkeypatch.setattr(jax, "device_get", recorded_get)
    train(tmp_path, steps="7", eval__every="0", checkpoint__every="100")
    assert events == ["step", *["step", "fetch"] * 6, "fetch"]
    assert compiled == [1, 0, 0, 0, 0, 0, 0]


def test_a_hidden_transfer_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "place_batch", lambda batch, _: batch)
    with pytest.raises(RuntimeError, match="Disallowed host-to-device transfer"):
        train(tmp_path)


def test_a_window_of_steps_can_be_traced(tmp_path: Path) -> None:
    train(tmp_path, steps="7", eval__every="0", profile__start="3", profile__steps="2")
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
