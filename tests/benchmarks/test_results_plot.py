"""The figures of docs/results.md are drawn from what sweeps and evaluations write."""

import json

import pytest

from benchmarks import results_plot


def recall_line(mixer, size, length, accuracies, steps=5):
    return {
        "solved": False,
        "steps": steps,
        "point": {"model.mixer": mixer, "model.hidden_size": size},
        "evaluations": [{"eval/accuracy": each} for each in accuracies],
        "settings": {"data.sequence_length": length, "data.pairs": length // 16, "steps": 5},
    }


def buckets(*losses):
    return [{"from": 256 * i, "to": 256 * (i + 1), "loss": loss} for i, loss in enumerate(losses)]


def drawn(tmp_path, figure, **files):
    """Draw into a picture, and return the lines of the figure by panel and label."""
    panels = []
    tmp_path.joinpath("in").mkdir()
    paths = []
    for name, lines in files.items():
        paths.append(tmp_path / "in" / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    close = results_plot.plt.close

    def keep(figure):
        panels.extend({line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in figure.axes)
        close(figure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results_plot.plt, "close", keep)
        results_plot.main([figure, *map(str, paths), f"--output={tmp_path / 'out.png'}"])
    assert (tmp_path / "out.png").stat().st_size > 5_000
    return panels


def test_recall_shows_the_best_of_all_evaluations_and_rates(tmp_path):
    lines = [
        recall_line("gla", 64, 256, [[0.1, None], [0.2, 0.8]]),
        recall_line("gla", 64, 256, [[0.3]]),
        recall_line("gla", 128, 256, [[1.0]]),
        recall_line("attention", 64, 512, [[0.5]]),
        recall_line("attention", 128, 512, [[0.6]], steps=4),
        recall_line("attention", 256, 512, [[0.7]], steps=4) | {"solved": True},
    ]
    short, long = drawn(tmp_path, "recall", points=lines)
    assert short["GLA"] == [[64, 80], [128, 100]]
    assert long["attention"] == [[64, 50], [128, 60], [256, 70]]
    assert long["attention, stopped early"] == [[128, 60]]


def test_recall_keeps_convolutions_apart(tmp_path):
    plain, convolved = recall_line("gla", 64, 256, [[0.1]]), recall_line("gla", 64, 256, [[0.9]])
    convolved["settings"]["model.mixers.gla.use_short_conv"] = True
    (panel,) = drawn(tmp_path, "recall", points=[plain, convolved])
    assert (panel["GLA"], panel["GLA, short convolution"]) == ([[64, 10]], [[64, 90]])


def test_gates_are_shown_against_those_of_four_heads(tmp_path):
    fields = "model.mixer", "model.mixers.linear_attention.gate", "model.num_heads"
    line = lambda gate, losses: {
        "point": dict(zip(fields, gate, strict=True)),
        "evaluations": [{"loss": [9.0] * len(losses)}, {"loss": losses}],
    }
    lines = [line(("gla", "none", 4), [2.0, 1.0]), line(("retention", "none", 4), [2.5, 1.125])]
    (panel,) = drawn(tmp_path, "gates", points=lines)
    assert panel["ours, a point for each seed"] == [[0, 0.5], [0, 0.125]]
    assert panel["the paper's, 340M"] == [[0, 0.114], [1, 0.0]]


def test_position_has_a_line_for_each_file(tmp_path):
    (panel,) = drawn(tmp_path, "position", GLA=buckets(2.0, 1.5), attention=buckets(1.9, 4.0))
    assert panel == {"GLA": [[128, 2.0], [384, 1.5]], "attention": [[128, 1.9], [384, 4.0]]}
