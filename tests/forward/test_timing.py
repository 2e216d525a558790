"""Interleaved timing: every variant runs in every round, inside its own context."""

import time
from collections import Counter
from contextlib import contextmanager, nullcontext

from austeer.forward.timing import decode_times


def test_each_variant_runs_once_a_round_and_slower_ones_show(demo, tiny):
    entered = Counter()

    @contextmanager
    def slow():
        entered["slow"] += 1

        def wait(module, args):
            time.sleep(0.02)

        handle = tiny.model.layers[0].register_forward_pre_hook(wait)
        try:
            yield
        finally:
            handle.remove()

    rounds = []
    times = decode_times(
        tiny,
        demo[1],
        {"plain": nullcontext, "slow": slow},
        prompt="one two three",
        tokens=2,
        rounds=4,
        on_round=lambda: rounds.append(1),
    )
    assert list(times) == ["plain", "slow"]
    assert entered["slow"] == 5 and len(rounds) == 5  # one round warms up
    assert times["plain"].ratio == times["plain"].low == times["plain"].high == 1.0
    assert times["slow"].rounds == 4
    assert times["slow"].seconds >= 0.02
    assert 1 < times["slow"].low <= times["slow"].ratio <= times["slow"].high
