"""The summary of a momentum file or a plan: numbers that add up, and notes that are true."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from austeer import Counters, FileFormatError, Momentum, SelectionError
from austeer.overview import _beta_histogram, of_file, of_momentum, of_plan
from austeer.selection import effect_size, p_values, signed_rate
from austeer.sites import Fingerprint


def test_momentum_in_numbers(demo_momentum):
    overview = of_momentum(demo_momentum, "ffn", 12)
    counters = demo_momentum.counters("ffn")
    assert overview.origin == "momentum of 64 pairs on HuggingFaceTB/SmolLM2-135M-Instruct" and overview.site == "ffn"
    assert overview.units == list(demo_momentum.select("ffn", k=12))
    assert len(overview.by_layer) == 30 and sum(overview.by_layer) == 12
    for unit, effect, p in zip(overview.units, overview.effect, overview.p, strict=True):
        assert effect == float(effect_size(counters, 64)[unit.layer, unit.index])
        assert p == float(p_values(counters)[unit.layer, unit.index])
        assert overview.by_layer[unit.layer] >= 1
    found, expected = overview.beta_histogram
    beta = signed_rate(counters, 64).abs().flatten()
    assert found == np.histogram(beta, bins=20, range=(0, 1))[0].tolist()
    assert sum(expected) == pytest.approx(30 * 576)


def test_notes_count_ties_and_discoveries(demo_momentum):
    overview = of_momentum(demo_momentum, "attention", 3)
    beta = signed_rate(demo_momentum.counters("attention"), 64).abs()
    cut = abs(overview.units[-1].beta)
    tied, inside = int((beta == cut).sum()), sum(abs(unit.beta) == cut for unit in overview.units)
    assert tied > inside, "64 pairs have ties everywhere"
    passing = len(demo_momentum.select("attention", max_fdr=0.05))
    assert overview.notes == [
        f"{tied} AUs share |beta| = {cut:.3f} at the cut; {inside} of them are in, by effect size",
        f"{passing} of 17280 AUs pass a sign test at a false discovery rate of 5 %",
    ]


def test_no_note_of_ties_where_all_are_in(demo_momentum):
    overview = of_momentum(demo_momentum, "ffn", 10**9)
    assert len(overview.units) == 17280 and len(overview.notes) == 1


def test_first_site_by_default(demo_momentum):
    assert of_momentum(demo_momentum, None, 5).site == "attention"
    both = demo_momentum.select("ffn", k=3) + demo_momentum.select("attention", k=2)
    assert of_plan(both, None, 9).site == "attention" and len(of_plan(both, None, 9).units) == 2


def test_plan_in_numbers(demo_momentum):
    plan = demo_momentum.select("ffn", k=20, operation="push") + demo_momentum.select(
        "attention", k=5, operation="push"
    )
    overview = of_plan(plan, "ffn", 7)
    assert overview.origin == "plan of 25 AUs, push, from 64 pairs on HuggingFaceTB/SmolLM2-135M-Instruct"
    assert overview.units == [unit for unit in plan if unit.site == "ffn"][:7]
    assert sum(overview.by_layer) == 7 and len(overview.by_layer) == 30
    assert (overview.effect, overview.p, overview.beta_histogram, overview.notes) == ([], [], None, [])


def test_site_that_is_not_there(demo_momentum):
    with pytest.raises(SelectionError, match="site 'layer' was not measured"):
        of_momentum(demo_momentum, "layer", 5)
    with pytest.raises(SelectionError, match="site 'ffn' is not in the plan; found attention"):
        of_plan(demo_momentum.select("attention", k=5), "ffn", 5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(0, 2**31))
def test_histogram_of_fair_coins_is_as_expected(pairs, seed):
    positive = torch.from_numpy(np.random.default_rng(seed).binomial(pairs, 0.5, size=(4, 500)))
    counters = Counters(positive, pairs - positive, *torch.zeros(2, 4, 500).double())
    found, expected = _beta_histogram(signed_rate(counters, pairs).flatten().abs(), pairs)
    assert sum(found) == 2000 and sum(expected) == pytest.approx(2000)
    assert not any(found[:9]), "without ties, |beta| is at least one half"
    for count, mean in zip(found, expected):
        assert abs(count - mean) <= 6 * max(mean * (1 - mean / 2000), 1) ** 0.5 + 1e-6


def test_files_of_either_kind(demo_momentum, tmp_path):
    plan = demo_momentum.select("ffn", k=5)
    path = demo_momentum.save(tmp_path / "m.safetensors")
    folder = plan.save_pretrained(tmp_path / "plan").parent
    renamed = Path(plan.save_pretrained(tmp_path / "other")).rename(tmp_path / "renamed.safetensors")
    assert of_file(path, "ffn", 4) == of_momentum(demo_momentum, "ffn", 4)
    for source in (folder, folder / "austeer_plan.safetensors", renamed):
        assert of_file(source, None, 4) == of_plan(plan, None, 4)


def test_file_of_neither_kind(tmp_path):
    with pytest.raises(FileFormatError, match="no such file; expected an austeer-momentum file"):
        of_file(tmp_path / "missing", None, 5)
    (tmp_path / "text").write_text("text")
    with pytest.raises(FileFormatError, match="damaged or not an austeer-momentum file"):
        of_file(tmp_path / "text", None, 5)
    with pytest.raises(FileFormatError, match="no such file; expected an austeer-plan file"):
        of_file(tmp_path, None, 5)


def test_json_holds_everything(demo_momentum):
    overview = of_momentum(demo_momentum, "ffn", 3)
    data = json.loads(json.dumps(overview.to_json()))
    assert data["units"][0] == vars(overview.units[0]) and data["notes"] == overview.notes
    assert data["by_layer"] == overview.by_layer and data["beta_histogram"][0] == overview.beta_histogram[0]
    assert replace(overview, units=[]).to_json()["units"] == []


def test_one_pair_is_enough():
    model = Fingerprint("llama", 1, {"ffn": 3}, "name", None)
    sums = torch.tensor([[0.5, -1.0, 0.0]], dtype=torch.float64)
    counters = Counters(torch.tensor([[1, 0, 0]]), torch.tensor([[0, 1, 0]]), sums, sums.square())
    overview = of_momentum(Momentum({"ffn": counters}, 1, model), "ffn", 3)
    assert [unit.beta for unit in overview.units] == [1, -1, 0]
    assert overview.beta_histogram == ([1] + [0] * 18 + [2], [0.0] * 19 + [3.0])
