"""Models with attention in some layers only: the site is in those, and every other one in all."""

import pytest
import torch

import austeer
from austeer import SiteError, find_sites
from austeer.costs.steering import steering_cost
from austeer.models.sites import fingerprint, site_at
from dense_formula import formula_logits, logits
from letter_tokens import Letters, letter_pairs
from small_plans import plan_of
from tiny_models import ids_of_rows, tiny_model

#: Family -> the layers with attention, and the attention's output projection.
FOUND = {
    "jamba": ((1,), "self_attn.o_proj"),
    "bamba": ((1,), "self_attn.o_proj"),
    "lfm2": ((1,), "self_attn.out_proj"),
    "recurrent_gemma": ((2,), "temporal_block.o_proj"),
    "falcon_h1": ((0, 1, 2), "self_attn.o_proj"),  # beside a state space, in each
}


@pytest.mark.parametrize("family", FOUND)
def test_the_site_is_in_the_layers_that_have_it(family):
    model = tiny_model(family)
    layers, path = FOUND[family]
    sites = find_sites(model)
    assert tuple(site.layer for site in sites["attention"]) == layers
    assert all(site.path.endswith(f".{site.layer}.{path}") for site in sites["attention"])
    assert all([site.layer for site in sites[name]] == [0, 1, 2] for name in ("ffn", "layer"))
    assert fingerprint(model, {"attention": sites["attention"]}).layers == 3
    assert site_at(sites["attention"], layers[-1]).layer == layers[-1]
    for name in sites:
        keys = [(name, site.layer, unit) for site in sites[name] for unit in (1, 3, 8)]
        plan = plan_of(keys, "shift", fingerprint(model, sites))
        ids = ids_of_rows()
        with austeer.steer(model, plan, 2.0) as steering:
            got = logits(model, ids)
            assert {row.layer for row in steering.report()} == {site.layer for site in sites[name]}
        torch.testing.assert_close(got, formula_logits(model, ids, plan, 2.0), rtol=1e-4, atol=1e-4)
        assert (got - logits(model, ids)).abs().max() > 1e-2


def test_counters_keep_the_numbers_of_their_layers(tmp_path):
    model, pairs = tiny_model("jamba"), letter_pairs(9)
    everywhere = austeer.measure(model, Letters(), pairs, "ffn")
    found = austeer.measure(model, Letters(), pairs, "attention")
    assert everywhere.layers == (0, 1, 2) and found.layers == (1,) and found.model.layers == 3
    assert found.sites["attention"].positive.shape == (1, find_sites(model)["attention"][0].width)
    plan = austeer.Momentum.load(found.save(tmp_path / "m")).select("attention", k=4)
    assert set(plan.layer.tolist()) == {1}
    both = plan + everywhere.select("ffn", k=4)
    with austeer.steer(model, both, 1.0):
        got = logits(model, ids_of_rows())
    torch.testing.assert_close(got, formula_logits(model, ids_of_rows(), both, 1.0), rtol=1e-4, atol=1e-4)
    one = austeer.measure(model, Letters(), pairs, ["attention", "ffn"], layers=[1])
    assert torch.equal(one.sites["attention"].positive, found.sites["attention"].positive)
    assert torch.equal(one.sites["ffn"].positive[0], everywhere.sites["ffn"].positive[1])


def test_layers_without_a_site_are_named():
    model, pairs = tiny_model("jamba"), letter_pairs(9)
    for sites, layers in ((["ffn", "attention"], None), ("attention", [0, 1])):
        with pytest.raises(SiteError, match=r"layers: found 0 .*'attention', which layers 1 have"):
            austeer.measure(model, Letters(), pairs, sites, layers=layers)
    plan = plan_of([("attention", 0, 1)], model=fingerprint(model, find_sites(model)))
    with pytest.raises(SiteError, match=r"'attention'.*layer 0.*: 1"):
        austeer.steer(model, plan)
    with pytest.raises(SiteError, match=r"costs: .*layers 1 of 3"):
        steering_cost(model.config, "ffn", k=4)


@pytest.mark.parametrize("family, found", [("mamba", "mixer"), ("zamba2", "mamba"), ("granitemoehybrid", "shared_mlp")])
def test_what_is_not_understood_is_refused_by_name(family, found):
    with pytest.raises(SiteError, match=f"(?s){family}.*{found}"):
        find_sites(tiny_model(family))
