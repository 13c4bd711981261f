"""What a person sees, at a terminal and elsewhere."""

import io
import sys

import pytest

from gla_jax.training.display import BarDisplay, LineDisplay, open_display

METRICS = {"loss": 2.5, "grad_norm": 0.123456, "learning_rate": 3e-4}
TIMINGS = {"seconds": 1.0, "data_seconds": 0.25, "tokens_per_second": 12345.6, "mfu": None}


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with open_display(200) as display:
        assert isinstance(display, LineDisplay)
        display.say("hello")
        display.begin(0)
        display.advance(5, 3.0)
        display.report(10, METRICS, TIMINGS)
        display.report(20, METRICS, {**TIMINGS, "mfu": 0.413})
        display.report(20, {"eval/loss": 2.25, "eval/bits_per_byte": 3.2}, {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "hello"
    assert lines[1].startswith(
        "step  10/200  loss 2.5  grad_norm 0.1235  learning_rate 0.0003  12,346 tokens/s  mfu n/a"
    )
    assert lines[1].endswith("waited 0.2 s for data  0:00:00 left")
    assert "mfu 41.3%" in lines[2]
    assert lines[3] == "step  20/200  eval/loss 2.25  eval/bits_per_byte 3.2"
    assert len(lines) == 4 and not any("\x1b" in line for line in lines)


def test_a_bar_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with open_display(200) as display:
        assert isinstance(display, BarDisplay)
        display.say("hello [not markup]")
        display.begin(40)
        display.advance(50, 2.71828)
        display.report(50, METRICS, {**TIMINGS, "mfu": 0.413})
        display.report(50, {"eval/loss": 2.25}, {})
    shown = terminal.getvalue()
    assert "hello [not markup]" in shown
    assert "step 50/200" in shown and "loss 2.7183" in shown and "12,346 tokens/s  mfu 41.3%" in shown
    assert "step 50  eval/loss 2.2500" in shown
    assert "grad_norm" not in shown, "a terminal is not flooded with every report"


def test_other_processes_show_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with open_display(200) as display:
        display.say("hello")
        display.begin(0)
        display.advance(5, 3.0)
        display.report(10, METRICS, TIMINGS)
    assert capsys.readouterr() == ("", "")
