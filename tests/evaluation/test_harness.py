"""The adapter to lm-evaluation-harness, on tasks made here."""

import functools
import json
import re

import jax
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("lm_eval", reason="extra `eval`")

from gla_jax.config import ConfigError, MeshConfig, build
from gla_jax.data.tokenizer import ByteTokenizer
from gla_jax.evaluation.harness import HarnessModel, Journal, run_tasks
from gla_jax.evaluation.scoring import Scorer, padded_length
from gla_jax.models import abstract_model, bind
from gla_jax.models.language_model import room_for_tokens
from gla_jax.parallel.mesh import make_mesh

TOKENIZER = ByteTokenizer()
TEXTS = [
    "Let there be light: and there was light.",
    "the evening and the morning were two",
    "was void",
    "a" * 38,
    "Ä and B.",
]
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "documents": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 20, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def model():
    return make_model()


def make_model(**fields):
    settings = {"vocab_size": 256, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16}
    settings["mixers"] = {"gla": {"implementation": "reference"}}
    config = build({"model": settings | fields, "dtype": {"compute": "float32"}})
    graphdef, abstract = abstract_model(config.model, config.dtype)
    random = np.random.default_rng(0)
    draw = lambda leaf: jax.device_put(random.normal(0.1, 0.5, leaf.shape).astype(leaf.dtype), leaf.sharding)
    return bind(graphdef, jax.tree.map(draw, abstract))


@pytest.fixture
def tasks(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = [json.dumps({"text": text, "choices": [" light", " darkness", " x"]}) for text in TEXTS]
    (folder / "data.jsonl").write_text("\n".join(lines))
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}}}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **data, **task}))
    return folder


def harness(model, *, batch_size=4, path=None, begin=True, room=None):
    journal = Journal(path, "me")
    return HarnessModel(model, TOKENIZER, batch_size=batch_size, journal=journal, begin_documents=begin, room=room)


class Request:
    """What the adapter sees of an `lm_eval.api.instance.Instance`."""

    def __init__(self, *args):
        self.args = args


LENGTH = 64


@functools.partial(jax.jit, static_argnums=0)
def all_scores(graphdef, params, tokens):
    return jax.nn.log_softmax(nnx.merge(graphdef, params)(tokens[None])[0][0])


def scores_after(model, tokens):
    """Return the log-probabilities of what comes after each token, by the plain formula: [tokens, vocabulary]."""
    padded = np.zeros(LENGTH, np.int32)
    padded[: len(tokens)] = tokens
    return np.asarray(all_scores(*nnx.split(model), padded), np.float64)[: len(tokens)]


def directly(model, context, continuation):
    """Return the log-likelihood of a continuation, and whether it is what greedy decoding gives."""
    targets = TOKENIZER.encode(continuation)
    tokens = np.concatenate([[0], TOKENIZER.encode(context), targets])
    rows = scores_after(model, tokens[:-1])[-len(targets) :]
    return rows[np.arange(len(targets)), targets].sum(), bool(np.all(rows.argmax(-1) == targets))


def test_loglikelihoods_equal_a_direct_computation_whatever_the_batch(model):
    pairs = [(text[:at], text[at:]) for text in TEXTS for at in (0, 3, 7)] + [("x", chr(97 + i)) for i in range(5)]
    expected = [directly(model, *pair) for pair in pairs]
    for batch_size in (1, 16):
        found = harness(model, batch_size=batch_size).loglikelihood([Request(*pair) for pair in pairs])
        np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=1e-5)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert len({round(total, 3) for total, _ in expected}) > 15


def test_long_documents_are_read_in_segments_with_the_state_carried(model):
    rows = [np.random.default_rng(i).integers(0, 256, length).astype(np.int32) for i, length in enumerate((150, 40, 2))]
    whole, parts = Scorer(model, 4)(rows), Scorer(model, 4, segment=32)(rows)
    for row, (expected, expected_greedy), (found, greedy) in zip(rows, whole, parts, strict=True):
        assert len(found) == len(row) - 1
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)
        np.testing.assert_array_equal(greedy, expected_greedy)


def test_rows_are_padded_by_a_half_at_most():
    for length in range(1, 3000):
        assert length <= padded_length(length) <= max(16, 1.5 * length)


@pytest.mark.long
def test_a_run_that_is_killed_and_given_again_ends_with_the_same_results(model, tasks, tmp_path, monkeypatch):
    def results(folder):
        (path,) = folder.glob("results_*.json")
        found = json.loads(path.read_text())
        return {name: found[name] for name in ("results", "configs", "n-samples", "task_hashes")}

    def samples(folder):
        return {path.name.split("_2")[0]: path.read_text() for path in folder.glob("samples_*.jsonl")}

    run = lambda folder: run_tasks(
        harness(model, path=folder / "answers.jsonl"), list(TASKS), folder, include_path=tasks
    )
    _, table = run(tmp_path / "at once")
    assert all(re.search(rf"\|{name}\s*\|", table) for name in TASKS)
    expected = results(tmp_path / "at once")
    assert set(expected["results"]) == set(TASKS)

    calls = []
    real = Scorer.__call__

    def call_and_die(self, rows):
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, rows)

    monkeypatch.setattr(Scorer, "__call__", call_and_die)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed")
    answers = tmp_path / "killed" / "answers.jsonl"
    assert len(answers.read_text().splitlines()) == 1 + 4 + 4  # whose they are, and two batches
    answers.write_text(answers.read_text() + '{"request": "torn')
    run(tmp_path / "killed")
    assert results(tmp_path / "killed") == expected
    assert samples(tmp_path / "killed") == samples(tmp_path / "at once")
    done = len(calls)
    run(tmp_path / "killed")
    assert len(calls) == done  # nothing was computed again


def test_answers_of_another_model_are_dropped(tmp_path):
    path = tmp_path / "answers.jsonl"
    Journal(path, "one").add({"a": 1})
    assert Journal(path, "one").answers == {"a": 1}
    assert Journal(path, "another").answers == {}


@pytest.mark.long
def test_generation_ends_at_stop_strings_and_is_greedy(model):
    requests = [Request(text, {"until": ["e", "zz"], "max_gen_toks": 20}) for text in TEXTS]
    found = harness(model).generate_until(requests)
    for text, continuation in zip(TEXTS, found, strict=True):
        tokens = np.concatenate([[0], TOKENIZER.encode(text)])
        drawn = []
        for _ in range(20):
            drawn.append(int(scores_after(model, np.concatenate([tokens, drawn]))[-1].argmax()))
            if drawn[-1] == 0 or TOKENIZER.decode(drawn).find("e") >= 0:
                break
        assert continuation == TOKENIZER.decode(drawn).split("e")[0].split("zz")[0]


@pytest.mark.long
def test_a_model_with_a_cache_reads_windows_of_it():
    model = make_model(mixer="attention", mixers={"attention": {"cache_length": 24}})
    assert room_for_tokens(build({"model": {"mixer": "attention"}}).model) == 2048
    text = TEXTS[0] + TEXTS[1]
    (found,) = harness(model, room=24).loglikelihood_rolling([Request(text)])
    tokens = np.concatenate([[0], TOKENIZER.encode(text)])
    expected = 0.0
    for start in range(0, len(tokens) - 1, 24):
        stop = min(start + 24, len(tokens) - 1)
        first = min(start, stop - 24)
        scores = scores_after(model, tokens[first:stop])[start - first :]
        expected += scores[np.arange(stop - start), tokens[start + 1 : stop + 1]].sum()
    assert len(text) % 24
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.long
def test_on_a_mesh_the_answers_are_the_same(model):
    requests = [Request(text[:4], text[4:]) for text in TEXTS]
    expected = harness(model).loglikelihood(requests)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        meshed = harness(make_model())
        found = meshed.loglikelihood(requests)
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=1e-4)


def test_unknown_tasks_are_named(model, tasks, tmp_path):
    with pytest.raises(ConfigError, match=r"--include_path=.*nowhere is not a folder"):
        run_tasks(harness(model), ["choices"], tmp_path, include_path=tmp_path / "nowhere")
