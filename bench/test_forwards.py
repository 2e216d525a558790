"""Whole steered forward passes, a prefill and a decoding step, under every way that can be had here.

The ratios that are published come from ``austeer bench``, which takes turns token by token. These show a pull request
what it does to each way: compare it with main by ``--benchmark-compare``.
"""

import pytest
import torch

from bench.catalogue import WAYS
from bench.lineup import MEASURED


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other would show what else the machine does, and the model is small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.benchmark(max_time=0.4, min_rounds=5, disable_gc=True)
@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("k", [10, 100])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@torch.no_grad()
def test_forward(to_its_end, device, lineup_of, phase, batch, k, way):
    lineup = lineup_of(batch, k)
    if not WAYS[way].module:
        pytest.skip(f"{way} only generates as a whole; austeer bench times it")
    row = lineup.rows[way]
    if row["status"] == "skipped":
        pytest.skip(row["reason"])
    assert row["status"] == MEASURED, f"{row['reason']}: a wrong result gets no time"
    with lineup.made[way].active():
        cache = lineup.prefill(way)

        def decode():
            lineup.decode(way, cache)
            cache.crop(-1)

        run = decode if phase == "decode" else lambda: lineup.prefill(way)
        to_its_end(run, group=f"{phase}, batch {batch}, k={k}, {device}", way=way, **row)
