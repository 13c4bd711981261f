"""A loader that stands still is reported while it does, and how long it took when it is over."""

import re
import time

from gla_jax.training.stalls import StallWatch


def test_a_long_wait_is_reported_and_short_ones_are_not() -> None:
    said: list[str] = []
    with StallWatch(said.append, after=0.1) as watch:
        for step in range(1, 4):
            with watch.waiting(step):
                time.sleep(0.02)
        assert not said
        with watch.waiting(4):
            time.sleep(0.35)
        with watch.waiting(5):
            time.sleep(0.02)
    assert len(said) >= 2
    assert all(re.match(r"Step 4 has waited \d+ s for its data: the disk or the network", text) for text in said[:-1])
    assert re.fullmatch(r"Step 4 waited \d+ s for its data\.", said[-1])
