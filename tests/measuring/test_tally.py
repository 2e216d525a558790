"""What is counted so far: pairs, counters of each site, the pair at fault, and going on from a checkpoint."""

from dataclasses import replace

import pytest
import torch

from austeer import CaptureError, Pair, Pairs
from austeer.forward.capture import LastTokens
from austeer.measuring.blocks import Blocks
from austeer.measuring.checkpoint import Checkpoint
from austeer.measuring.counting import Tally
from austeer.models.sites import find_sites
from austeer.pairs.halves import half_of
from letter_tokens import Letters, letter_pairs
from tiny_models import tiny_model

CPU = torch.device("cpu")
SAME = Pair("the soup was", " good", " good")
PAIRS = [*Pairs.of(letter_pairs(9)), SAME, *Pairs.of(letter_pairs(15))]


def blocks_of(pairs=PAIRS, **options):
    given = {"source": "p.jsonl", "chat_template": False, "vocabulary": 64, "max_length": 20, "block_pairs": 4}
    return Blocks(Letters(), pairs, **(given | {"batch_tokens": 64, "share": False} | options))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def sites(model):
    found = find_sites(model, ["attention", "ffn"])
    return {name: [site for site in all_ if site.layer != 1] for name, all_ in found.items()}


def run(model, tally, blocks):
    capture = LastTokens(model, tally.sites, 8)
    with capture.attached():
        for block in blocks:
            for batch in block.batches:
                capture.run(batch)
            tally.add(block, capture.buffers)
    return tally


def assert_same(state, other):
    assert replace(state, sites={}, half={}) == replace(other, sites={}, half={})
    for mine, theirs in ((state.sites, other.sites), (state.half, other.half)):
        assert list(mine) == list(theirs)
        for name, counters in mine.items():
            for what, t in counters.tensors().items():
                assert torch.equal(t, theirs[name].tensors()[what]), (name, what, "sums too, bit for bit")


def test_pairs_are_counted(model, sites):
    tally = run(model, Tally(sites, CPU), blocks_of())
    whole = list(blocks_of())
    assert (tally.pairs, tally.identical) == (25, 1)
    assert tally.cut == sum(block.cut for block in whole) > 0
    assert (tally.block, tally.digest) == (len(whole), whole[-1].digest)
    tally.check(blocks_of())
    for counters in tally.state().sites.values():
        assert counters.positive.shape[0] == 2 and ((counters.positive + counters.negative) <= 24).all()
        assert (counters.positive + counters.negative).max() == 24


def test_the_half_is_that_of_the_prompts(model, sites):
    """As if its pairs were measured alone; pairs of equal texts are in neither count of it."""
    tally = run(model, Tally(sites, CPU), blocks_of())
    chosen = [pair for pair in PAIRS if half_of(pair.prompt) and pair is not SAME]
    assert tally.half_pairs == len(chosen) and 0 < len(chosen) < 24
    alone = run(model, Tally(sites, CPU), blocks_of(chosen)).state()
    for name, counters in tally.state().half.items():
        assert torch.equal(counters.positive, alone.sites[name].positive)
        assert torch.equal(counters.negative, alone.sites[name].negative)
        torch.testing.assert_close(counters.delta_sum, alone.sites[name].delta_sum, rtol=1e-4, atol=1e-5)


def test_a_block_of_equal_texts_alone(model, sites):
    tally = run(model, Tally(sites, CPU), blocks_of([SAME] * 4))
    assert (tally.block, tally.pairs, tally.identical) == (1, 4, 4)
    assert not any(t.any() for counters in tally.state().sites.values() for t in counters.tensors().values())


@pytest.mark.parametrize("done", [0, 1, 3, 6, 7])
@pytest.mark.parametrize("part", [(0, 1), (1, 2)])
def test_going_on_is_as_if_never_interrupted(model, sites, tmp_path, done, part):
    whole = run(model, Tally(sites, CPU), blocks_of(part=part))
    mine = [block for block in blocks_of(part=part) if block.number < done]
    before = run(model, Tally(sites, CPU), mine)
    checkpoint = Checkpoint(tmp_path / "c", {"a": 1}, part)
    checkpoint.save(before.state(tree=None, batch_tokens=64))

    state = Checkpoint(tmp_path / "c", {"a": 1}, part).load()
    assert_same(state, before.state(tree=None, batch_tokens=64))
    assert state.extra == {"tree": None, "batch_tokens": 64}
    after = Tally(sites, CPU)
    after.restore(state)
    run(model, after, blocks_of(part=part, first=after.block, known=after.digest))
    assert_same(after.state(), whole.state())


def test_a_state_does_not_change_with_the_tally(model, sites):
    tally = run(model, Tally(sites, CPU), list(blocks_of())[:2])
    before = tally.state()
    kept = {name: counters.positive.clone() for name, counters in before.sites.items()}
    run(model, tally, list(blocks_of())[2:])
    assert all(torch.equal(before.sites[name].positive, t) for name, t in kept.items())
    assert before.block == 2 and before.pairs == 8


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("share", [False, True])
def test_the_pair_at_fault(sites, value, share):
    # Pair 10 of all: behind a pair of equal texts, in the third block.
    broken = tiny_model("llama")
    broken.model.embed_tokens.weight.data[Letters()("!")["input_ids"][0][0]] = value
    pairs = [*PAIRS[:10], Pair("here it is", " fine", " bad!"), *PAIRS[11:]]
    blocks = blocks_of(pairs, share=share)
    tally = run(broken, Tally(sites, CPU), blocks)
    message = r"'attention', layer 0, AU 0.*pair 10 of p\.jsonl.*'here it is'"
    with pytest.raises(CaptureError, match=message + (".*like it" if share else r"\W*;")):
        tally.check(blocks)


def test_the_layer_at_fault_is_the_models(sites):
    broken = tiny_model("llama")
    broken.model.layers[2].mlp.down_proj.weight.data[5, 3] = float("nan")
    tally = run(broken, Tally(sites, CPU), blocks_of())
    with pytest.raises(CaptureError, match=r"'ffn', layer 2, AU 5.*pair 0 of p\.jsonl"):
        tally.check(blocks_of())
