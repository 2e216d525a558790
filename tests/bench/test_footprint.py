"""What is held and what a run needs at its peak, in bytes."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import footprint
from bench.our_ways import WAYS
from bench.plans import spread_plan
from bench.steered import twin
from tiny_models import tiny_model

CPU = torch.device("cpu")
MIB = 1 << 20


def test_what_is_added_is_counted_once_however_it_is_looked_at():
    before = footprint.storages()
    kept = torch.zeros(1000, dtype=torch.float64)
    views = kept[:10], kept.view(10, 100), kept.detach()
    parameter = torch.nn.Parameter(torch.zeros(50))
    assert footprint.added(before) == 8000 + 200
    assert len(views) == 3 and parameter.is_leaf
    del kept, views
    assert footprint.added(before) == 200


def test_a_twin_holds_nothing_and_folding_what_it_saves():
    model = tiny_model()
    plan = spread_plan(model, "ffn", 30)
    before = footprint.storages()
    other = twin(model)
    assert footprint.added(before) == 0
    steered = {way.name: way for way in WAYS}["fold"].make(other, plan, 4.0)
    saved = 30 * 48 * 4  # the rows of 30 AUs: as wide as the MLP, float32
    assert saved <= footprint.added(before) <= 1.5 * saved + 4096
    steered.close()


def test_stand_ins_without_memory_are_passed_over():
    before = footprint.storages()
    with FakeTensorMode():
        fake, guarded = torch.zeros(1000), torch.zeros(1000)
    torch._C._set_throw_on_mutable_data_ptr(guarded)  # as of those that a compiler leaves
    meta = torch.zeros(1000, device="meta")
    assert footprint.added(before) == 0 and fake.shape == guarded.shape == meta.shape


def test_the_peak_is_what_was_there_at_once():
    def run():
        big = torch.ones(64 * MIB, dtype=torch.uint8)
        del big
        torch.ones(16 * MIB, dtype=torch.uint8)

    run()
    found = footprint.peak(run, CPU)
    if found is None:
        pytest.skip("this system does not count peaks")
    assert 56 * MIB <= found <= 72 * MIB
    assert footprint.peak(lambda: None, CPU) < 8 * MIB


def test_a_system_that_counts_no_peaks_gives_none(monkeypatch):
    def refuse():
        raise OSError

    ran = []
    monkeypatch.setattr(footprint, "forget_peak", refuse)
    assert footprint.peak(lambda: ran.append(1), CPU) is None
