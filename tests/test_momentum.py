"""Momentum: merging, files."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import austeer
from austeer import Counters, FileFormatError, Momentum, SelectionError
from austeer.sites import Fingerprint
from naive_momentum import assert_like, numbered_pairs


def test_site_that_was_not_measured(demo_momentum):
    with pytest.raises(SelectionError, match=r"'layer' was not measured; found attention, ffn\. Measure it: sites="):
        demo_momentum.counters("layer")


# --- merging ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 11), max_size=4, unique=True), st.randoms())
def test_shards_in_any_order_equal_the_whole(tiny64, demo, cuts, random):
    pairs = numbered_pairs(12)
    bounds = [0, *sorted(cuts), 12]
    shards = [austeer.measure(tiny64, demo[1], pairs[a:b]) for a, b in itertools.pairwise(bounds)]
    random.shuffle(shards)
    while len(shards) > 1:  # any order and any grouping
        i = random.randrange(len(shards) - 1)
        shards[i : i + 2] = [shards[i].merge(shards[i + 1])]
    assert_like(shards[0], austeer.measure(tiny64, demo[1], pairs))


@st.composite
def momenta(draw, layers=2, width=3):
    """Momentum of random counters that fit."""
    pairs = draw(st.integers(1, 50))
    shape = (layers, width)
    positive = torch.tensor(draw(st.lists(st.integers(0, pairs), min_size=6, max_size=6))).view(shape)
    negative = torch.tensor([draw(st.integers(0, pairs - p)) for p in positive.flatten().tolist()]).view(shape)
    values = st.floats(-1e6, 1e6, allow_nan=False)
    sums = torch.tensor(draw(st.lists(values, min_size=6, max_size=6)), dtype=torch.float64).view(shape)
    model = Fingerprint("llama", layers, {"ffn": width}, "name", None)
    counters = Counters(positive, negative, sums, sums.square())
    sources = tuple(sorted(draw(st.sets(st.sampled_from(["a.jsonl", "b.jsonl", "c – ü.jsonl"]), min_size=1))))
    return Momentum({"ffn": counters}, pairs, model, False, draw(st.integers(0, 9)), draw(st.integers(0, 9)), sources)


@settings(max_examples=100, deadline=None)
@given(momenta(), momenta(), momenta())
def test_merge_is_commutative_and_associative(a, b, c):
    assert_like(a.merge(b), b.merge(a))
    assert_like(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert a.merge(b).pairs == a.pairs + b.pairs


def test_merge_changes_neither(tiny, demo):
    a, b = (austeer.measure(tiny, demo[1], numbered_pairs(n)) for n in (2, 3))
    copies = copy.deepcopy(a), copy.deepcopy(b)
    a.merge(b)
    assert_like(a, copies[0])
    assert_like(b, copies[1])


def test_merge_refuses_what_is_not_alike(tiny, demo, tiny_of):
    pairs = numbered_pairs(2)
    found = austeer.measure(tiny, demo[1], pairs, ["ffn"])
    with pytest.raises(SelectionError, match=r"merge: found model .*qwen2.*, expected .*llama"):
        found.merge(austeer.measure(tiny_of("qwen2"), demo[1], pairs, ["ffn"]))
    with pytest.raises(SelectionError, match=r"merge: found sites \['attention', 'ffn'\], expected \['ffn'\]"):
        found.merge(austeer.measure(tiny, demo[1], pairs))


# --- files -----------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(momenta())
def test_file_gives_back_what_was_saved(tmp_path_factory, momentum):
    path = momentum.save(tmp_path_factory.mktemp("files") / "new folder" / "a.safetensors")
    loaded = Momentum.load(path)
    assert_like(loaded, momentum)
    for name, t in momentum.counters("ffn").tensors().items():
        assert torch.equal(loaded.counters("ffn").tensors()[name], t), "sums too, bit for bit"


def test_loaded_momentum_merges_and_selects(demo_momentum, tmp_path):
    loaded = Momentum.load(demo_momentum.save(tmp_path / "m.safetensors"))
    assert loaded.merge(demo_momentum).pairs == 128
    assert loaded.select("ffn", k=7) == demo_momentum.select("ffn", k=7)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.sites["ffn"].positive.add_(m.pairs),
        lambda m: m.sites["ffn"].negative.sub_(m.pairs + 1),
        lambda m: setattr(m.sites["ffn"], "positive", m.sites["ffn"].positive.int()),
        lambda m: setattr(m.sites["ffn"], "delta_sum", m.sites["ffn"].delta_sum[:1]),
        lambda m: m.model.widths.update(ffn=33),
        lambda m: m.model.widths.pop("ffn"),
        lambda m: object.__setattr__(m, "pairs", "4"),
        lambda m: object.__setattr__(m, "sources", None),
    ],
)
def test_inconsistent_file(tiny, demo, tmp_path, change):
    momentum = austeer.measure(tiny, demo[1], numbered_pairs(4), ["ffn"])
    change(momentum)
    try:
        path = momentum.save(tmp_path / "m.safetensors")
    except TypeError:  # what JSON cannot hold is not written
        assert list(tmp_path.iterdir()) == []
        return
    with pytest.raises(FileFormatError, match=r"m\.safetensors: inconsistent content"):
        Momentum.load(path)
