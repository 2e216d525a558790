"""Measuring on a GPU: the counts of a CPU, no wait for the device between two checks, and batches that do not fit."""

import copy

import pytest
import torch

import austeer
from austeer import CaptureError
from austeer.forward.capture import LastTokens
from austeer.measuring.counting import Tally
from letter_tokens import Letters, letter_pairs
from tiny_models import tiny_model

pytestmark = pytest.mark.gpu

PAIRS = 40


@pytest.fixture
def tiny():
    return tiny_model("llama")


@pytest.fixture
def on_gpu(tiny):
    return copy.deepcopy(tiny).cuda()


def differing(found, expected):
    """The share of AUs with another count."""
    changed = [found.sites[name].positive != counters.positive for name, counters in expected.sites.items()]
    return torch.cat([c.flatten() for c in changed]).double().mean().item()


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("strategy", ["resident", "layerwise"])
def test_counts_are_those_of_a_cpu(tiny, on_gpu, share, strategy):
    pairs = letter_pairs(PAIRS)
    found = austeer.measure(on_gpu, Letters(), pairs, share_prompts=share, strategy=strategy, block_pairs=16)
    expected = austeer.measure(tiny, Letters(), pairs, share_prompts=share, block_pairs=16)
    assert found.report.shared_prompts == share
    assert differing(found, expected) < 0.01, "more than near ties"


def test_a_model_in_the_cpus_memory_is_run_on_the_gpu_layer_by_layer(tiny):
    pairs = letter_pairs(PAIRS)
    found = austeer.measure(tiny, Letters(), pairs, device="cuda", block_pairs=16)
    assert found.report.strategy == "layerwise" and found.report.weights_read > 0
    assert all(p.device.type == "cpu" for p in tiny.parameters())
    assert differing(found, austeer.measure(tiny, Letters(), pairs, block_pairs=16)) < 0.01


def test_nothing_waits_for_the_device_between_two_checks(on_gpu, monkeypatch):
    """PyTorch raises at every operation that would wait."""
    austeer.measure(on_gpu, Letters(), letter_pairs(PAIRS))  # kernels are compiled, buffers are made
    plain_run, plain_add, blocks = LastTokens.run, Tally.add, []

    def without_waiting(work):
        def run(*args):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return work(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run

    monkeypatch.setattr(LastTokens, "run", without_waiting(plain_run))
    monkeypatch.setattr(Tally, "add", without_waiting(lambda *args: (blocks.append(1), plain_add(*args))[1]))
    austeer.measure(on_gpu, Letters(), letter_pairs(PAIRS), block_pairs=8)
    assert len(blocks) == PAIRS // 8


def test_a_batch_that_does_not_fit_is_halved(on_gpu, monkeypatch):
    pairs, plain, refused = letter_pairs(PAIRS), LastTokens.run, []
    expected = austeer.measure(on_gpu, Letters(), pairs, share_prompts=False, batch_tokens=4096)

    def run(self, batch):
        if batch.ids.shape[0] > 3:
            refused.append(batch.ids.shape[0])
            raise torch.cuda.OutOfMemoryError("made up")
        plain(self, batch)

    monkeypatch.setattr(LastTokens, "run", run)
    found = austeer.measure(on_gpu, Letters(), pairs, share_prompts=False, batch_tokens=4096)
    assert refused and differing(found, expected) < 0.01
    monkeypatch.setattr(LastTokens, "run", lambda *args: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("always")))
    with pytest.raises(CaptureError, match=r"\d+ tokens.*cuda:0.*max_length"):
        austeer.measure(on_gpu, Letters(), pairs, share_prompts=False)
