"""The momentum benchmark: no time for a wrong count, what it counts, and what it compares."""

import copy
import json
import os

import pytest
import torch

from austeer import Pair
from bench import compare, large, momentum, naive, offloaded, pair_sets, report, ways
from bench.graphs import WrongResultError
from bench.peers import SITES
from bench.ways import OURS, PUBLIC, STACKED, UNSHARED, WAYS, Run
from places import SHARED_DATA as DATA

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded():
    return momentum.small(True, CPU)


@pytest.fixture(scope="module")
def pairs():
    return pair_sets.demo_pairs().pairs[:12]


@pytest.fixture(scope="module")
def gate(loaded, pairs):
    return naive.Gate(*loaded, pairs)


@pytest.fixture(autouse=True)
def loud():
    yield
    report.quiet = False


# --- the gate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(WAYS))
def test_every_way_passes_on_all_pairs_and_on_fewer(loaded, pairs, gate, name):
    for count in (5, 12):
        assert gate.check(name, WAYS[name](*loaded, pairs[:count]).counts, range(count)) <= 2


def test_a_count_that_no_near_tie_explains_is_refused(loaded, pairs, gate):
    counts = WAYS[STACKED](*loaded, pairs).counts
    for side, what in enumerate(("positive", "negative")):
        wrong = copy.deepcopy(counts)
        wrong["ffn"][side][1, 7] += 1 + int(gate.near["ffn"].sum(0)[1, 7])
        with pytest.raises(WrongResultError, match=rf"mine: ffn, layer 1, AU 7: found a {what} count of \d+, expected"):
            gate.check("mine", wrong, range(12))
    with pytest.raises(WrongResultError, match="a wrong result gets no time"):
        gate.check("other pairs", counts, range(11))


def test_counts_may_differ_by_their_near_ties_but_not_everywhere(loaded, pairs):
    gate = naive.Gate(*loaded, pairs)
    right = {site: ((d > 0).sum(0), (d < 0).sum(0)) for site, d in gate.delta.items()}
    assert gate.check("mine", right, range(12)) == 0
    gate.near["ffn"][3, 1, 7] = True
    one = copy.deepcopy(right)
    one["ffn"][0][1, 7] += 1 if gate.delta["ffn"][3, 1, 7] <= 0 else -1
    assert gate.check("mine", one, range(12)) == 1
    for site in SITES:
        gate.near[site][:] = True
    all_of_them = {site: tuple((t + 1).clamp(max=12) for t in sides) for site, sides in right.items()}
    with pytest.raises(WrongResultError, match=r"mine: \d+ of 256 counts differ"):
        gate.check("mine", all_of_them, range(12))


def test_a_batch_that_moves_activations_is_refused(loaded, pairs, monkeypatch):
    real = naive.stacked_momentum.activations

    def first_not_last(model, tokenizer, pairs):
        turned = [Pair(p.prompt, p.positive + " and", p.negative + " and") for p in pairs]
        return real(model, tokenizer, turned)

    monkeypatch.setattr(naive.stacked_momentum, "activations", first_not_last)
    with pytest.raises(WrongResultError, match=r"a batch moves activations by up to .* more than rounding"):
        naive.Gate(*loaded, pairs)


def test_pairs_that_tell_nothing_are_refused(loaded):
    # In a batch of sixteen the same text differs from itself by rounding, and everything is a near tie.
    same = [Pair("The soup was", " good", " good")] * 9 + [
        Pair("Everyone at our table thought that it", " was", " was")
    ]
    with pytest.raises(WrongResultError, match="these pairs cannot tell right from wrong"):
        naive.Gate(*loaded, same)


def test_no_time_for_a_way_that_is_wrong_only_when_it_is_timed(loaded, pairs, gate):
    runs = []

    def sloppy(model, tokenizer, some):
        runs.append(1)
        run = WAYS[STACKED](model, tokenizer, some)
        if len(runs) > 1:
            run.counts["attention"][0][0, 0] = 13
        return run

    pair_set = pair_sets.PairSet("some", pairs, False, 12, 12)
    listed = {STACKED: WAYS[STACKED], "sloppy": sloppy}
    with pytest.raises(WrongResultError, match="sloppy: attention, layer 0, AU 0: found a positive count of 13"):
        compare.compare(*loaded, pair_set, listed, dict.fromkeys(listed, 12), gate, 2, (STACKED,))


# --- what is counted -------------------------------------------------------------------------------------------------


def test_rates_with_a_fixed_cost():
    run = Run({}, seconds=3.0, fixed=1.0)
    assert run.a_pair(4) == pytest.approx(0.75)
    assert run.a_pair(4, at=1000) == pytest.approx(0.5 + 0.001)
    assert Run({}, 3.0).a_pair(4, at=1000) == run.a_pair(4)


def test_ratios_are_taken_round_by_round(loaded, pairs, monkeypatch):
    """With made-up times: public 4 s for 2 pairs, its loop 1 s of them; ours 3 s for 12, of which 0.6 s are fixed."""
    times = {PUBLIC: (4.0, 1.0), STACKED: (6.0, 0.0), OURS: (3.0, 0.6)}
    made_up = {name: lambda m, t, p, s=s: Run({}, *s) for name, s in times.items()}

    class Lenient:
        near_share = 0.0

        def check(self, *_):
            return 0

    pair_set = pair_sets.PairSet("some", pairs, False, 2, 12)
    found = compare.compare(
        *loaded, pair_set, made_up, {PUBLIC: 2, STACKED: 12, OURS: 12}, Lenient(), 3, (PUBLIC, STACKED)
    )
    row = found["ways"][OURS]
    assert row["pairs_a_second"] == pytest.approx(4)
    assert row["faster_than"][PUBLIC]["median"] == pytest.approx(2 / 0.25)
    assert row["faster_than"][STACKED]["median"] == pytest.approx(2)
    assert row["faster_than_at_1000"][PUBLIC]["median"] == pytest.approx((1.5 + 0.001) / (0.2 + 0.0006))
    assert row["tokens_run"] == 0
    assert found["ways"][PUBLIC]["pairs"] == 2 and set(found["ways"][PUBLIC]["faster_than"]) == {STACKED}


def test_fewer_pairs_are_as_long_as_all():
    assert compare.evenly([9, 1, 5, 3, 7], 5) == [0, 1, 2, 3, 4]
    lengths = [(7 * i) % 100 for i in range(100)]
    chosen = compare.evenly(lengths, 4)
    assert chosen == sorted(set(chosen)) and sorted(lengths[i] for i in chosen) == [12, 37, 62, 87]


def test_tokens_that_run(loaded, pairs):
    model, tokenizer = loaded
    many = pair_sets.demo_pairs().pairs[:60]
    lengths = ways.tokens_of(tokenizer, pairs)
    assert len(lengths) == 24

    def run(name, some=pairs):
        with ways.TokensRun(model) as counted:
            WAYS[name](model, tokenizer, some)
        return counted.count

    assert run(PUBLIC) == sum(lengths)
    assert sum(lengths) < run(STACKED) <= 24 * max(lengths)
    assert sum(lengths) <= run(UNSHARED) <= 24 * max(lengths)
    assert run(OURS, many) < 0.8 * run(UNSHARED, many)
    assert WAYS[UNSHARED](model, tokenizer, pairs).report["tokens_padded"] == run(UNSHARED)
    assert not model.get_input_embeddings()._forward_pre_hooks


def test_peak_memory_sees_what_a_way_allocates(loaded, monkeypatch):
    def hungry(model, tokenizer, pairs):
        torch.ones(len(pairs), 4 << 20)
        return Run({}, 0.0)

    monkeypatch.setitem(WAYS, "hungry", hungry)
    found = momentum.extra_memory(*loaded, "hungry", 6)
    assert found["pairs"] == 6 and found["tokens"] > 60
    assert 0.98 <= found["bytes"] / (6 * 16 << 20) < 1.2


@pytest.mark.parametrize("each_pass", [True, False])
def test_weights_are_forgotten_before_a_run_or_before_each_pass(loaded, pairs, tmp_path, monkeypatch, each_pass):
    forgotten = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *rest: forgotten.append(rest))
    weights = [tmp_path / name for name in "ab"]
    for path in weights:
        path.write_bytes(b"weights")
    way = offloaded.forgetful(WAYS[STACKED], weights, each_pass)
    way(*loaded, pairs)  # 24 texts are two passes
    assert forgotten == [(0, 0, os.POSIX_FADV_DONTNEED)] * 2 * (3 if each_pass else 1)
    assert not loaded[0].get_decoder()._forward_pre_hooks


# --- the pairs -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the data sets beside the checkout")
def test_every_set_has_pairs_that_fit(demo):
    found = {s.name: s for s in pair_sets.load_all(pair_sets.NAMES, DATA)}
    assert list(found) == list(pair_sets.NAMES)
    lengths = {name: ways.tokens_of(demo[1], s.pairs) for name, s in found.items()}
    assert max(map(max, lengths.values())) <= 512, "the public algorithm would cut them"
    for name, s in found.items():
        assert len(s.pairs) > 350 and s.pairs.identical == 0
        assert s.long == (sum(lengths[name]) / len(lengths[name]) > 100)
    assert "ethanol" in found["boolq"].pairs[0].prompt and found["boolq"].pairs[0].positive == " no"
    assert found["boolq"].pairs[1].positive == " yes"
    assert found["persona"].pairs[1].positive == " No"


def test_without_the_data_the_demos_own_pairs_serve(demo, tmp_path):
    short, long = pair_sets.load_all(["boolq"], tmp_path / "none")
    assert (short.name, short.long, long.name, long.long) == ("demo", False, "long demo", True)
    for a, b in zip(short.pairs, long.pairs):
        assert b.prompt.endswith(a.prompt) and b.positive == a.positive
    lengths = ways.tokens_of(demo[1], long.pairs)
    assert min(lengths) > 90 and max(lengths) < 512


# --- the kernel ------------------------------------------------------------------------------------------------------


def test_the_kernel_is_timed_beside_eager_operations():
    found = large.kernel(7, 130, torch.bfloat16, CPU, 2)
    assert found["bytes"] == 2 * 7 * 130 * 2 + 2 * 5 * 8 * 130
    assert set(found["seconds"]) == {large.KERNEL, large.EAGER}
    expected = found["bytes"] / found["seconds"][large.KERNEL]["median"] / found["bandwidth"]
    assert found["of_bandwidth"] == pytest.approx(expected)


@pytest.mark.parametrize("counter, message", [(0, "counts differ"), (1, "counts differ"), (2, "a sum"), (3, "a sum")])
def test_a_wrong_kernel_gets_no_time(monkeypatch, counter, message):
    real = large.eager_update

    def wrong(positive, negative, counters):
        real(positive, negative, counters)
        counters[counter][-1] += 1

    monkeypatch.setattr(large, "eager_update", wrong)
    with pytest.raises(WrongResultError, match=f"eager: .*{message}"):
        large.kernel(7, 130, torch.float32, CPU, 2)


# --- the program -----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert momentum.main(["--quick", "--out", str(tmp_path), "--data", str(tmp_path / "none")]) == 0
    printed = capsys.readouterr()
    assert "no such folder; the demo's own pairs are used" in printed.err
    for text in (
        "Peak memory",
        "these times mean nothing",
        "Weights come from the disk",
        "of what the fastest plain operation moves",
    ):
        assert text in " ".join(printed.out.split())
    (file,) = (tmp_path / "cpu").glob("momentum-quick-*.json")
    found = json.loads(file.read_text())
    assert found["quick"] and found["data"] == "demo pairs" and found["environment"]["packages"]["torch"]
    assert [s["set"] for s in found["sets"]] == ["demo", "long demo"]
    for row in (*found["sets"], *found["large"]["sets"], *found["offloaded"]["cases"].values()):
        for way in row["ways"].values():
            seconds = way["seconds"]
            assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"] and seconds["rounds"] == 2
            assert way["tokens_run"] >= way["tokens"] / 2
    assert set(found["sets"][0]["ways"]) == set(WAYS)
    assert set(found["offloaded"]["cases"]) == {offloaded.CACHED, offloaded.FROM_DISK}
    assert found["complete"]


def test_a_machine_without_the_demo_model_is_told_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(momentum, "small", lambda quick, device: None)
    assert momentum.main(["--out", str(tmp_path), "--data", str(tmp_path / "none")]) == 0
    assert "the demo model is not installed: nothing is measured on it" in capsys.readouterr().err
