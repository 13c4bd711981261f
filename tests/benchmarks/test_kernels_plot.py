"""What was measured of the Hopper kernels can be drawn and printed, and a rival that failed is left out."""

import json

from benchmarks import kernels_plot


def test_draws_and_prints(tmp_path, capsys):
    timed = {"ms": 0.2, "floor_ms": 0.1, "share_of_floor": 0.5, "peak_MiB": 7, "call_ms": 0.25}
    rows = [
        {"B, T, H, K, V": [2, 64, 1, 64, 64], "ours": {"forward": timed, "forward_backward": timed}, "jla": jla}
        for jla in ({"error": "no"}, {"forward": {"ms": 0.3}, "forward_backward": {"ms": 0.5}})
    ]
    rows.append({"B, T, H, K, V": [4, 64, 1, 64, 64], "ours": {"error": "no memory"}})
    report, picture = tmp_path / "report.json", tmp_path / "report.png"
    report.write_text(json.dumps({"device": "a GPU", "shapes": rows}))
    kernels_plot.main([str(report), f"--output={picture}"])
    assert picture.stat().st_size > 5_000
    forward, both, under_load, _ = capsys.readouterr().out.split("\n\n")
    _, _, first, second = forward.splitlines()
    assert first == "| 2, 64, 1, 64, 64 | **0.200** | 50% |  | 7 |"
    assert second == "| 2, 64, 1, 64, 64 | **0.200** | 50% | 0.300 | 7 |"
    assert "| 0.500 | 7 |" in both
    assert under_load.splitlines()[2:] == ["| 2, 64, 1, 64, 64 | 0.250 | 0.250 |"] * 2
