"""What is held and what a run needs at its peak, in bytes."""

import pytest
import torch

from bench import footprint

CPU = torch.device("cpu")
MIB = 1 << 20


def test_what_is_held_is_counted_once_however_it_is_looked_at():
    old = torch.ones(70)
    with footprint.Held() as held:
        kept = torch.zeros(1000, dtype=torch.float64)
        views = kept[:10], kept.view(10, 100), kept.detach(), old[:5], old.add_(1)
        parameter = torch.nn.Parameter(torch.zeros(50))
        meta = torch.zeros(1000, device="meta")
        torch.zeros(3000)
    assert held.bytes == 8000 + 200
    assert len(views) == 5 and parameter.is_leaf and meta.is_meta
    del kept, views
    assert held.bytes == 200


def test_the_peak_is_what_was_there_at_once():
    def run():
        big = torch.ones(64 * MIB, dtype=torch.uint8)
        del big
        torch.ones(16 * MIB, dtype=torch.uint8)

    run()
    try:
        found = footprint.peak(run, CPU)
    except OSError:
        pytest.skip("this system does not count peaks")
    assert 56 * MIB <= found <= 72 * MIB
    assert footprint.peak(lambda: None, CPU) < 8 * MIB
