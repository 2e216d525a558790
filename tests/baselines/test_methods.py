"""Methods behind one interface: every one gives plans that steer accepts, nested where several share one."""

from dataclasses import replace

import pytest
import torch

import austeer
from austeer import SelectionError
from austeer.baselines import HEADS, METHODS, arms, sites_needed
from austeer.baselines.newton import newton_step
from austeer.baselines.ranked import SEEDS
from baseline_material import PAIRS, material_of
from dense_formula import formula_at, logits

SITES, OPERATIONS, KS = ("attention", "ffn"), ("scale", "shift", "ablate"), (3, 20)


@pytest.fixture(scope="module")
def material(tiny_of, demo):
    return material_of(tiny_of("llama"), demo[1], profiled=True)


def made(material, method, **changes):
    return arms(method, material, **({"sites": SITES, "operations": OPERATIONS, "ks": KS} | changes))


def promising(material, count):
    """The layers whose Newton step has the largest predicted effect."""
    steps = [newton_step(material.momentum, material.profile, layer)[1] for layer in range(3)]
    return sorted(range(3), key=lambda layer: -steps[layer])[:count]


@pytest.mark.parametrize("method", METHODS)
def test_every_arm_steers(material, method):
    ids = {"input_ids": torch.tensor([[5, 6, 7, 300]])}
    plain = logits(material.model, ids)
    found = made(material, method)
    assert len({arm.name for arm in found}) == len(found) > 0
    for arm in found:
        assert arm.method == method and arm.k <= len(arm.plan)
        with austeer.steer(material.model, arm.plan, 0.5, k=arm.k):
            steered = logits(material.model, ids)
        with formula_at(material.model, arm.plan.top(arm.k), 0.5):
            expected = logits(material.model, ids)
        assert not torch.equal(steered, plain)
        torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_arms_name_what_can_be_chosen(material, method):
    chosen = {(arm.site, arm.operation, arm.k, arm.detail) for arm in made(material, method)}
    grid = {(site, operation, k, "") for site in SITES for operation in OPERATIONS for k in KS}
    # the tiny Llama: 3 layers, 32 wide, of 4 heads of 12
    by_heads = {("attention", "shift", 12 * n, f"{n} head{'s' if n > 1 else ''}") for n in HEADS if n <= 12}
    assert chosen == {
        "momentum": grid,
        "difference": grid,
        "standardised": grid,
        "effect": {(site, "shift", k, step) for site in SITES for k in KS for step in ("difference", "newton")},
        "newton": {("layer", "shift", 32, f"layer {layer}") for layer in range(3)},
        "trained": {("layer", "shift", 32, f"layer {layer}") for layer in promising(material, 2)},
        "random": {(*arm[:3], f"seed {seed}") for arm in grid for seed in SEEDS},
        "all": {("attention", operation, 3 * 48, "") for operation in OPERATIONS}
        | {("ffn", operation, 3 * 32, "") for operation in OPERATIONS},
        "caa": {("layer", "shift", 32, f"layer {layer}") for layer in range(3)},
        "ablation": {("layer", "ablate", 32, f"layer {layer}") for layer in range(3)},
        "iti": by_heads,
        "sadi": {("ffn", "scale", k, "") for k in KS} | {(a, "scale", k, d) for a, _, k, d in by_heads},
    }[method]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_smaller_k_is_the_beginning_of_a_larger_one(material, method):
    everything = made(material, method)
    for arm in everything:
        alike = [other for other in everything if (other.site, other.operation) == (arm.site, arm.operation)]
        together = [other for other in alike if method in ("iti", "sadi") or other.detail == arm.detail]
        if arm.detail != "newton":  # whose steps are solved for all that are chosen
            assert all(other.plan == arm.plan for other in together)
    # the largest alone chooses no other AUs
    if method not in ("caa", "ablation", "newton", "trained", "iti", "all", "sadi"):
        small, large = (made(material, method, ks=[k]) for k in KS)
        assert all(a.plan.keys() == b.plan.top(KS[0]).keys() for a, b in zip(small, large))
        if method != "effect":
            assert all(a.plan == b.plan.top(KS[0]) for a, b in zip(small, large))


def test_sites_needed():
    assert sites_needed(["momentum", "random"], ["attention", "neuron"]) == ("attention", "neuron")
    assert set(sites_needed(["momentum", "caa"], ["ffn"])) == {"ffn", "layer"}
    assert sites_needed(["iti"], ["ffn"]) == ()
    with pytest.raises(SelectionError, match=r"method.*'cca'.*momentum, random"):
        sites_needed(["cca"], ["ffn"])


@pytest.mark.parametrize(
    "method, changes, message",
    [
        ("best", {}, "method.*'best'.*momentum, random"),
        ("momentum", {"ks": []}, "ks.*none"),
        ("momentum", {"ks": [0]}, "k: .* 0"),
        ("momentum", {"ks": [1, 97], "sites": ["ffn"]}, r"k: .*97.* 96.*'ffn'"),
        ("random", {"ks": [97], "sites": ["ffn"]}, "k: .*97"),
        ("sadi", {"ks": [97], "sites": ["ffn"]}, "k: .*97"),
        ("difference", {"operations": ["add"]}, "operation.*'add'.*scale, push, shift"),
        ("caa", {"layers": [3]}, r"'caa'.*layer 3.*\[0, 1, 2\]"),
        ("iti", {"heads": [13]}, r"'iti'.*13.*heads.* 12"),
        ("sadi", {"heads": [13]}, r"'sadi'.*13.*heads.* 12"),
    ],
)
def test_complaints(material, method, changes, message):
    with pytest.raises(SelectionError, match=message):
        made(material, method, **changes)


@pytest.mark.parametrize(
    "method", ["momentum", "random", "all", "difference", "effect", "caa", "ablation", "newton", "sadi"]
)
def test_an_unmeasured_site_is_named_with_the_method(tiny_of, demo, method):
    few = material_of(tiny_of("llama"), demo[1], PAIRS[:3], ["neuron"])
    site = "layer" if method in ("caa", "ablation", "newton") else "ffn"
    with pytest.raises(SelectionError, match=f"'{method}'.*'{site}'.*neuron"):
        arms(method, few, sites=["ffn"], operations=["scale"], ks=[2])


def test_iti_needs_no_measured_site(tiny_of, demo):
    few = material_of(tiny_of("llama"), demo[1], PAIRS[:6], ["neuron"])
    found = arms("iti", few, sites=["neuron"], ks=[2], heads=[2])
    assert [(arm.site, arm.k) for arm in found] == [("attention", 24)]
    other = made(material_of(tiny_of("llama"), demo[1], PAIRS[:6]), "iti", heads=[2])[0].plan
    assert list(found[0].plan) == list(other)


def test_only_measured_layers_are_chosen(tiny_of, demo):
    model = tiny_of("llama")
    sites = ["attention", "layer"]
    part = austeer.measure(model, demo[1], PAIRS, sites, layers=[0, 2], effects=True, progress=False)
    material = replace(material_of(model, demo[1], PAIRS, sites, profiled=True), momentum=part)
    for method in METHODS:
        layers = {layer for arm in made(material, method, sites=["attention"]) for layer in arm.plan.layer.tolist()}
        assert layers <= {0, 2}, method
