"""The summary of a momentum file or a plan: numbers that add up, and verdicts that are true."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from scipy import stats

import austeer
from austeer import Counters, FileFormatError, Momentum, SelectionError
from austeer.models.sites import Fingerprint
from austeer.overview.overview import KS, of_file, of_momentum, of_plan
from austeer.plans.hub import HubError
from austeer.statistics import (
    DetectableRate,
    adjusted_p_values,
    effect_size,
    p_values,
    ranking,
    signed_rate,
    stability,
)
from local_hub import local_hub
from made_momentum import momentum_of, signal
from naive_momentum import numbered_pairs
from small_plans import EVIDENCE, KNOWN

# --- momentum --------------------------------------------------------------------------------------------------------


def test_momentum_in_numbers(demo_momentum):
    overview = of_momentum(demo_momentum, "ffn", 12)
    counters = demo_momentum.counters("ffn")
    assert re.search("momentum.* 64 pairs .*HuggingFaceTB/SmolLM2-135M-Instruct", overview.origin)
    assert overview.site == "ffn"
    assert overview.units == list(demo_momentum.select("ffn", k=12))
    assert len(overview.by_layer) == 30 and sum(overview.by_layer) == 12
    lists = (overview.effect, overview.p, overview.q, overview.low, overview.high)
    for unit, effect, p, q, low, high in zip(overview.units, *lists, strict=True):
        place = unit.layer, unit.index
        assert effect == float(effect_size(counters, 64)[place])
        assert (p, q) == (float(p_values(counters)[place]), float(adjusted_p_values(counters)[place]))
        most = int(max(counters.positive[place], counters.negative[place]))
        assert (low, high) == pytest.approx(tuple(stats.binomtest(most, 64).proportion_ci(0.95, "exact")), rel=1e-7)
        assert low < abs(unit.beta) < high and overview.by_layer[unit.layer] >= 1
    found, expected = overview.beta_histogram
    beta = signed_rate(counters, 64).abs().flatten()
    assert len(overview.beta_edges) == len(found) + 1
    assert found == np.histogram(beta, bins=40, range=(0, 1))[0].tolist()
    assert sum(expected) == pytest.approx(30 * 576)


def test_ties_and_the_levels_around_the_cut(demo_momentum):
    overview = of_momentum(demo_momentum, "attention", 30)
    beta = signed_rate(demo_momentum.counters("attention"), 64).abs()
    cut = abs(overview.units[-1].beta)
    assert overview.ties.tied == int((beta == cut).sum()) > overview.ties.inside, "64 pairs have ties everywhere"
    levels = overview.levels
    assert [level for level, _, _ in levels] == sorted({level for level, _, _ in levels}, reverse=True)
    for level, count, inside in levels:
        assert count == int((beta == level).sum()) > 0
        assert inside == sum(abs(unit.beta) == level for unit in overview.units)
    assert cut in [level for level, _, _ in levels]


def test_ranks_and_layers(demo_momentum):
    """The bins do not depend on how many AUs are looked at."""
    overview = of_momentum(demo_momentum, "ffn", 7)
    assert overview.ranks == [(1, 10), (11, 30), (31, 100), (101, 300), (301, 1000)]
    layers = (ranking(demo_momentum, "ffn") // 576).tolist()
    for (first, last), row in zip(overview.ranks, overview.by_rank, strict=True):
        assert row == np.bincount(layers[first - 1 : last], minlength=30).tolist()


def test_all_sites_in_brief(demo_momentum):
    overview = of_momentum(demo_momentum, "attention", 10)
    assert [brief.site for brief in overview.sites] == ["attention", "ffn"]
    assert overview.significance == overview.sites[0].significance
    for brief in overview.sites:
        found = stability(demo_momentum, brief.site, KS)
        assert (brief.k, brief.overlap, brief.chance) == (found.k, found.overlap, found.chance)
        whole, counters = brief.significance, demo_momentum.counters(brief.site)
        assert whole.size == 17280 and whole.fdr == 0.05
        assert whole.discoveries == len(demo_momentum.select(brief.site, max_fdr=0.05))
        assert whole.below == int((p_values(counters) <= 0.05).sum()) > whole.chance > 0
        assert whole.beta == float(signed_rate(counters, 64).abs().max())


def test_stability_and_power(demo_momentum):
    overview = of_momentum(demo_momentum, "ffn", 47)
    assert {*KS, 47} <= set(overview.stability.k)
    found = stability(demo_momentum, "ffn", overview.stability.k)
    assert overview.stability == found and overview.stability.pairs == (30, 34)
    assert overview.power == DetectableRate.of(64, 17280, overview.significance.discoveries)


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_a_stable_ranking_is_called_stable():
    overview = of_momentum(momentum_of(signal(400, 0.5)), "ffn", 300)
    place = overview.stability.k.index(300)
    assert overview.stability.score[place] >= 0.5
    again = f"400 pairs.* {overview.stability.expected[place] * 100:.0f} % .*again"
    assert re.search(f"top 300 is stable.* 200 and 200 pairs.*{again}", overview.verdict)


def test_a_ranking_of_noise_is_called_chance():
    verdict = of_momentum(momentum_of(signal(100, 0.0)), "ffn", 100).verdict
    assert re.search("ranking is chance.* 50 and 50 pairs.*by chance 2.5 %.*no AU", verdict)


def test_what_is_in_between_is_said_to_be():
    verdict = of_momentum(momentum_of(signal(100, 0.2)), "ffn", 300).verdict
    assert "top 300 is settled only in part" in verdict
    coins = torch.rand(100, 10, 90, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    alike = torch.where(coins < 0.9, 1.0, -1.0)  # 900 AUs of one rate: which of them come first is luck
    momentum = momentum_of(torch.cat([signal(100, 0.0), alike], 2))
    assert "top 30 is not settled" in of_momentum(momentum, "ffn", 30).verdict


def test_one_answer_that_is_right_more_often_is_no_ranking():
    """Each AU follows which of two answers is right; the first one is, in two pairs of three."""
    order = torch.randperm(600, generator=torch.Generator().manual_seed(1))
    answer = torch.where(order % 3 == 0, -1.0, 1.0)
    overview = of_momentum(momentum_of(answer[:, None, None] + signal(600, 0.0) * 0.9), "ffn", 100)
    assert overview.significance.discoveries > 3000, "nearly all AUs pass"
    assert re.search(f"ranking is chance.* {overview.significance.discoveries} AUs.*alike", overview.verdict)


def test_agreement_on_the_aus_and_not_on_their_signs_is_told():
    """One half is of one answer and the other half of the other."""
    delta = signal(200, 0.5)
    delta[1::2] *= -1
    verdict = of_momentum(momentum_of(delta), "ffn", 300).verdict
    assert re.search("ranking is chance.*opposite signs", verdict)
    delta = signal(200, 0.0)
    delta[torch.rand(delta.shape, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 0.9, 400)] = 0
    assert "as often with opposite signs" in of_momentum(momentum_of(delta), "ffn", 300).verdict


def test_momentum_without_halves(demo_momentum):
    overview = of_momentum(replace(demo_momentum, half=None, half_pairs=0), "ffn", 5)
    assert overview.stability is None and "not known" in overview.verdict
    assert "Measure again" in overview.notes[0] and all(brief.overlap == () for brief in overview.sites)


# --- small, and odd --------------------------------------------------------------------------------------------------


def test_one_pair_is_enough():
    model = Fingerprint("llama", 1, {"ffn": 3}, "name", None)
    sums = torch.tensor([[0.5, -1.0, 0.0]], dtype=torch.float64)
    counters = Counters(torch.tensor([[1, 0, 0]]), torch.tensor([[0, 1, 0]]), sums, sums.square())
    overview = of_momentum(Momentum({"ffn": counters}, 1, model), "ffn", 3)
    assert [unit.beta for unit in overview.units] == [1, -1, 0]
    found, expected = overview.beta_histogram
    assert (found[0], found[-1], sum(found)) == (1, 2, 3) and expected[-1] == 2
    assert overview.power.rate is None and overview.significance.discoveries == 0
    nothing = of_momentum(Momentum({"ffn": counters - counters}, 1, model, identical=1), "ffn", 3)
    assert nothing.power is None and nothing.significance.beta == 0


def test_all_aus(demo_momentum):
    overview = of_momentum(demo_momentum, "ffn", 10**9)
    assert len(overview.units) == 17280 and overview.ties.inside == overview.ties.tied
    assert overview.stability.overlap[-1] == 1


def test_first_site_by_default(demo_momentum):
    assert of_momentum(demo_momentum, None, 5).site == "attention"
    both = demo_momentum.select("ffn", k=3) + demo_momentum.select("attention", k=2)
    assert of_plan(both, None, 9).site == "attention" and len(of_plan(both, None, 9).units) == 2


def test_layers_that_were_not_measured(tiny, demo):
    overview = of_momentum(austeer.measure(tiny, demo[1], numbered_pairs(8), "ffn", layers=[0, 2]), "ffn", 20)
    assert len(overview.by_layer) == 3 and overview.by_layer[1] == 0 and sum(overview.by_layer) == 20


def test_site_that_is_not_there(demo_momentum):
    with pytest.raises(SelectionError, match="'layer'"):
        of_momentum(demo_momentum, "layer", 5)
    with pytest.raises(SelectionError, match=r"'ffn'.*plan.*attention"):
        of_plan(demo_momentum.select("attention", k=5), "ffn", 5)


# --- plans, files, the Hub -------------------------------------------------------------------------------------------


def test_plan_in_numbers(demo_momentum):
    ffn, attention = (demo_momentum.select(site, k=k, operation="push") for site, k in (("ffn", 20), ("attention", 5)))
    plan = ffn + attention
    overview = of_plan(plan, "ffn", 7)
    assert re.search("plan.* 25 AUs.*push.* 64 pairs .*HuggingFaceTB/SmolLM2-135M-Instruct", overview.origin)
    assert overview.units == [unit for unit in plan if unit.site == "ffn"][:7]
    assert sum(overview.by_layer) == 7 and len(overview.by_layer) == 30
    assert overview.ranks == [(1, 10), (11, 20)] and [sum(row) for row in overview.by_rank] == [10, 10]
    assert (overview.effect, overview.p, overview.beta_histogram, overview.stability) == ([], [], None, None)
    assert overview.evidence is None and "strength" in overview.notes[0]


def test_a_plan_shows_its_evidence():
    overview = of_plan(KNOWN, None, 5)
    assert overview.evidence == EVIDENCE and overview.notes == []
    assert json.loads(json.dumps(overview.to_json()))["evidence"]["tested"][1]["effect"] == 0.9


def test_files_of_either_kind(demo_momentum, tmp_path):
    plan = demo_momentum.select("ffn", k=5)
    path = demo_momentum.save(tmp_path / "m.safetensors")
    folder = plan.save_pretrained(tmp_path / "plan").parent
    renamed = Path(plan.save_pretrained(tmp_path / "other")).rename(tmp_path / "renamed.safetensors")
    for name in (path, str(path)):
        assert of_file(name, "ffn", 4) == of_momentum(demo_momentum, "ffn", 4)
    for source in (folder, str(folder), folder / "austeer_plan.safetensors", renamed):
        assert of_file(source, None, 4) == of_plan(plan, None, 4)


def test_a_plan_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with local_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        KNOWN.push_to_hub("user/kind", token="hf_user")
        assert of_file("user/kind", None, 4) == of_file("user/kind@main", None, 4) == of_plan(KNOWN, None, 4)
        with pytest.raises(HubError, match="user/unkind"):
            of_file("user/unkind", None, 4)
        assert hub.requests
        asked = len(hub.requests)
        KNOWN.save_pretrained(tmp_path / "user" / "kind")
        assert of_file("user/kind", None, 4) == of_plan(KNOWN, None, 4)
        assert len(hub.requests) == asked, "a folder is first"


def test_file_of_neither_kind(tmp_path):
    with pytest.raises(FileFormatError, match=r"missing: .*austeer-momentum"):
        of_file(tmp_path / "missing", None, 5)
    (tmp_path / "text").write_text("text")
    with pytest.raises(FileFormatError, match=r"text: .*austeer-momentum"):
        of_file(tmp_path / "text", None, 5)
    with pytest.raises(FileFormatError, match=rf"{tmp_path}.*austeer-plan"):
        of_file(tmp_path, None, 5)
