"""Momentum: merging, files."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import austeer
from austeer import Counters, FileFormatError, Momentum, SelectionError
from austeer.models.sites import Fingerprint
from austeer.momentum.momentum import ascending
from austeer.utils import files
from naive_momentum import assert_like, numbered_pairs


@settings(max_examples=12, deadline=None)
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
    momentum = Momentum(
        {"ffn": counters}, pairs, model, False, draw(st.integers(0, 9)), draw(st.integers(0, 9)), sources
    )
    if not draw(st.booleans()):
        return momentum
    half_pairs = draw(st.integers(0, pairs))
    # Of each AU's pairs of either sign, a part that leaves no more of them than the other half has pairs.
    part = [[], []]
    for most, least in zip(positive.flatten().tolist(), negative.flatten().tolist()):
        inside = draw(st.integers(max(0, most + least - (pairs - half_pairs)), min(half_pairs, most + least)))
        ups = draw(st.integers(max(0, inside - least), min(inside, most)))
        part[0].append(ups)
        part[1].append(inside - ups)
    half = Counters(*(torch.tensor(p).view(shape) for p in part), sums / 3, sums.square() / 3)
    return replace(momentum, half={"ffn": half}, half_pairs=half_pairs)


@settings(max_examples=100, deadline=None)
@given(momenta(), momenta(), momenta())
def test_merge_is_commutative_and_associative(a, b, c):
    assert_like(a.merge(b), b.merge(a))
    assert_like(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert a.merge(b).pairs == a.pairs + b.pairs
    assert (a.merge(b).half is None) == (a.half is None or b.half is None), "without the halves of one there are none"


@settings(max_examples=100, deadline=None)
@given(momenta())
def test_halves_add_up(momentum):
    if momentum.half is None:
        with pytest.raises(SelectionError, match=r"halves: .*older version"):
            momentum.halves()
    elif momentum.half_pairs in (0, momentum.pairs):
        with pytest.raises(SelectionError, match=rf"halves: .* {momentum.pairs} pairs in one half"):
            momentum.halves()
    else:
        half, rest = momentum.halves()
        assert half.pairs == momentum.half_pairs and half.half is rest.half is None
        for what, t in momentum.counters("ffn").tensors().items():
            found = half.counters("ffn").tensors()[what] + rest.counters("ffn").tensors()[what]
            if what in ("positive", "negative"):
                assert torch.equal(found, t), what
        counts = rest.counters("ffn").positive + rest.counters("ffn").negative
        assert not rest.counters("ffn").delta_sum[counts == 0].any(), "what no pair is left of has no sum either"


@settings(max_examples=50, deadline=None)
@given(momenta())
def test_file_gives_back_what_was_saved(tmp_path_factory, momentum):
    path = momentum.save(tmp_path_factory.mktemp("files") / "new folder" / "a.safetensors")
    loaded = Momentum.load(path)
    assert_like(loaded, momentum)
    for name, t in momentum.counters("ffn").tensors().items():
        assert torch.equal(loaded.counters("ffn").tensors()[name], t), "sums too, bit for bit"
        if momentum.half:
            assert torch.equal(loaded.half["ffn"].tensors()[name], momentum.half["ffn"].tensors()[name])


def test_a_file_of_version_1_has_no_halves(demo_momentum, tmp_path):
    """Written as that version wrote it."""
    header = {name: getattr(demo_momentum, name) for name in ("pairs", "chat_template", "cut", "identical")}
    header |= {"model": demo_momentum.model.to_json(), "sites": ["attention", "ffn"]}
    header |= {"sources": list(demo_momentum.sources), "layers": list(demo_momentum.layers)}
    tensors = {f"{site}.{name}": t for site, c in demo_momentum.sites.items() for name, t in c.tensors().items()}
    path = tmp_path / "old.momentum"
    files.write(path, "austeer-momentum", 1, header, tensors)
    loaded = Momentum.load(path)
    assert_like(loaded, replace(demo_momentum, half=None, half_pairs=0))
    assert loaded.select("ffn", k=30) == demo_momentum.select("ffn", k=30)
    assert loaded.merge(demo_momentum).half is None
    assert Momentum.load(loaded.save(tmp_path / "new.momentum")).half is None, "and none when it is saved again"
    files.write(path, "austeer-momentum", 1, {**header, "half_pairs": 30}, tensors)
    with pytest.raises(FileFormatError, match=r"old.momentum: .*'half_pairs'.*version 1"):
        Momentum.load(path)
    files.write(path, "austeer-momentum", 4, header, tensors)
    with pytest.raises(FileFormatError, match=r"old.momentum: .*version '4'.*3.*--upgrade austeer"):
        Momentum.load(path)


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
        lambda m: object.__setattr__(m, "half_pairs", 1),
        lambda m: object.__setattr__(m, "half_pairs", 6),
        lambda m: m.half["ffn"].positive.sub_(7),
        lambda m: m.half["ffn"].negative.copy_(m.sites["ffn"].negative + 1),
    ],
)
def test_inconsistent_file(tiny, demo, tmp_path, change):
    momentum = austeer.measure(tiny, demo[1], numbered_pairs(6), ["ffn"])
    assert momentum.half_pairs == 4
    change(momentum)
    try:
        path = momentum.save(tmp_path / "m.safetensors")
    except TypeError:  # what JSON cannot hold is not written
        assert list(tmp_path.iterdir()) == []
        return
    with pytest.raises(FileFormatError, match=r"m\.safetensors: inconsistent"):
        Momentum.load(path)


@pytest.mark.parametrize("layers", [[], [1, 0], [0, 0], [0, 10**9], [-1], [True], [0.0]])
def test_layers_of_a_file_ascend_below_the_models(layers):
    """Also of a header that claims more layers than memory has room for."""
    assert ascending([0, 2, 10**9 - 1], 10**9) == (0, 2, 10**9 - 1)
    with pytest.raises(ValueError, match=r"layers"):
        ascending(layers, 10**9)
