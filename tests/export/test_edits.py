"""What plans do to each linear layer, told from the structure of a model."""

import copy
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from austeer import PlanError
from austeer.export.edits import (
    ExportError,
    ExportWarning,
    describe,
    edits_of,
    warn_of_another_model,
    with_alphas,
)
from austeer.models.sites import find_sites
from dense_formula import WEIGHT_SITES, keep_layers, random_plan
from tiny_models import tiny_model


def by_path(model, *plans):
    return {edit.path: edit for edit in edits_of(model, plans)}


def test_both_sides_of_one_layer_are_one_edit(model):
    plan = random_plan(model, ("ffn", "neuron"), 40)
    edits = by_path(model, (plan, 1.0))
    assert list(edits) == [f"model.layers.{n}.mlp.down_proj" for n in range(3)]
    for edit in edits.values():
        assert edit.sites == ["ffn", "neuron"]
        assert edit.rank == len(edit.input) + len(edit.output)


@settings(max_examples=40, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 50), min_size=1, max_size=4),
    alphas=st.lists(st.floats(-8, 8, width=16), min_size=4, max_size=4),
)
def test_strengths_of_several_plans_add_up(model, seeds, alphas):
    plans = [(random_plan(model, WEIGHT_SITES, 25, seed=seed), alpha) for seed, alpha in zip(seeds, alphas)]
    expected = {}
    for plan, alpha in plans:
        for au in plan:
            key = au.site, au.layer, au.index
            gamma = float(torch.tensor(alpha, dtype=torch.float32) * torch.tensor(au.beta, dtype=torch.float32))
            expected[key] = expected.get(key, 0.0) + gamma
    found = {}
    for edit in edits_of(model, plans):
        for site in edit.sites:
            side = edit.output if site == "ffn" else edit.input
            assert side.index.tolist() == sorted(set(side.index.tolist()))
            found |= {(site, edit.layer, i): g for i, g in zip(side.index.tolist(), side.gamma.tolist())}
    assert found.keys() == expected.keys()
    assert all(found[key] == pytest.approx(expected[key], rel=1e-12, abs=1e-12) for key in found)


def test_an_au_that_cancels_out_takes_no_rank(model):
    plan = random_plan(model, "ffn", 10)
    both = by_path(model, (plan, 2.0), (plan.take(torch.arange(4)), -2.0))
    assert sum(edit.rank for edit in both.values()) == 6
    assert sum(map(len, (edit.output for edit in both.values()))) == 10


def test_a_direction_takes_a_rank_for_each_plan_and_side(model):
    plan, other = (random_plan(model, ("ffn", "neuron"), 40, "ablate", seed=seed) for seed in range(2))
    both = by_path(model, (plan, 1.0), (other, 0.5), (random_plan(model, "ffn", 1), 1.0))
    assert sorted(edit.rank for edit in both.values()) == [4, 4, 5]
    assert {edit.rank for edit in by_path(model, (plan, 1.0), (other, 0.0)).values()} == {2}


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "site, operation, reason",
    [
        ("layer", "scale", r"site 'layer'.*with_operation\('shift'\).*'attention'"),
        ("layer", "push", r"site 'layer'.*'push'.*with_operation\('shift'\)"),
        ("layer", "ablate", r"site 'layer'.*'ablate'.*with_operation\('shift'\).*'attention'"),
        ("ffn", "push", r"'push'.*with_operation\('scale' or 'shift'\)"),
    ],
)
def test_what_is_no_edit_of_weights_is_refused(model, site, operation, reason):
    with pytest.raises(ExportError, match=reason):
        edits_of(model, [(random_plan(model, site, 3, operation), 1.0)])


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_next"])
def test_shift_in_a_mixture_without_plain_shared_experts_is_refused(family):
    mixture = tiny_model(family)
    with pytest.raises(ExportError, match=r"'ffn' of layer \d.*'shift'.*mixture.*with_operation\('scale'\)"):
        edits_of(mixture, [(keep_layers(random_plan(mixture, "ffn", 60, "shift"), {1}), 1.0)])
    assert edits_of(mixture, [(random_plan(mixture, "attention", 3, "shift"), 1.0)])


@pytest.mark.parametrize("operation", ["scale", "shift", "push", "ablate"])
def test_a_layer_with_a_norm_behind_its_projection_is_refused(operation):
    for model in (tiny_model("gemma2"), tiny_model("opt", do_layer_norm_before=False)):
        with pytest.raises(ExportError, match=rf"'layer' of layer \d.*'{operation}'.*'attention'"):
            edits_of(model, [(random_plan(model, "layer", 3, operation), 1.0)])


# --- shift goes where it does at run time ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "glm4_moe", "llama4_text"])
def test_shift_in_a_mixture_is_in_the_shared_experts_and_scale_in_all(family):
    mixture = tiny_model(family)
    number = next(site.layer for site in find_sites(mixture, "ffn")["ffn"] if site.projection is None)
    one, other, third = (
        keep_layers(random_plan(mixture, name, 40, operation), {number})
        for name, operation in (("ffn", "scale"), ("ffn", "shift"), ("layer", "shift"))
    )
    edits = by_path(mixture, (one, 1.0), (other, 1.0), (third, 1.0))
    site = find_sites(mixture, "ffn")["ffn"][number]
    assert set(edits) == set(site.parts) and site.bias in edits
    for path, edit in edits.items():
        assert edit.output.gamma.count_nonzero() == len(one)
        assert edit.shifts == (path == site.bias)
        assert edit.sites == (["ffn", "layer"] if edit.shifts else ["ffn"])


def test_a_layer_s_shift_is_divided_by_what_its_projection_is_multiplied_by():
    model = tiny_model("granite", residual_multiplier=0.5)
    plan = keep_layers(random_plan(model, "layer", 40, "shift"), {1})
    other = replace(plan, site=("ffn",) * len(plan), model=replace(plan.model, widths={"ffn": 32}))
    (edit,) = edits_of(model, [(plan, 1.0), (other, 1.0)])
    assert edit.path == "model.layers.1.mlp.down_proj" and edit.sites == ["layer", "ffn"] and edit.rank == 0
    order = plan.index.argsort()
    assert edit.output.index.tolist() == plan.index[order].tolist()
    assert torch.equal(edit.output.shift, 3 * plan.delta[order].double())


def test_a_plan_for_another_architecture_is_refused(model):
    wider = tiny_model("llama", hidden_size=64)
    with pytest.raises(PlanError, match=r"'ffn': 64.*'ffn': 32"):
        edits_of(model, [(random_plan(model, "ffn", 3), 1.0), (random_plan(wider, "ffn", 3), 1.0)])


def test_a_wrapped_layer_is_refused(model):
    config = peft.LoraConfig(target_modules=["down_proj"], r=2)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    plan = random_plan(model, "ffn", 3)
    with pytest.raises(ExportError, match="down_proj: Linear"):
        edits_of(wrapped.get_base_model(), [(plan, 1.0)])


@pytest.mark.parametrize("kind", ["pruned", "normalised", "bias"])
def test_weights_that_are_made_anew_are_refused(kind):
    model = tiny_model("llama", mlp_bias=True)
    plan, layer = random_plan(model, "ffn", 60), model.model.layers[1].mlp.down_proj
    if kind == "normalised":
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(layer)
    else:
        prune.random_unstructured(layer, "bias" if kind == "bias" else "weight", amount=0.5)
    with pytest.raises(
        ExportError, match=rf"layers\.1\.mlp\.down_proj.*{'bias' if kind == 'bias' else 'weight'}.*prun"
    ):
        edits_of(model, [(plan, 1.0)])
    if kind == "pruned":
        prune.remove(layer, "weight")
        assert edits_of(model, [(plan, 1.0)])


class Doubled(nn.Module):
    """An MLP of an unknown family that does more to its output than its projection does."""

    def __init__(self, mlp):
        super().__init__()
        self.down_proj, self.up_proj = mlp.down_proj, mlp.up_proj

    def forward(self, x):
        return 2 * self.down_proj(self.up_proj(x))


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_a_block_that_does_more_than_its_projection_is_refused(place):
    model = tiny_model()
    model.config.model_type = "unknown"
    assert edits_of(copy.deepcopy(model).to(place), [(random_plan(model, "ffn", 3), 1.0)])
    for layer in model.model.layers:
        layer.mlp = Doubled(layer.mlp)
    plan = random_plan(model, "ffn", 3)
    with pytest.raises(ExportError, match=r"'ffn'.*projection"):
        edits_of(model.to(place), [(plan, 1.0)])


@pytest.mark.parametrize("site, reason", [("ffn", "projection"), ("layer", r"layers\.\d\.mlp is not Transformers'")])
def test_other_code_in_a_known_family_is_refused(site, reason):
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp = Doubled(layer.mlp)
    with pytest.raises(ExportError, match=rf"'{site}' of layer \d.*{reason}"):
        edits_of(model, [(random_plan(model, site, 3, "shift"), 1.0)])


def test_a_projection_in_several_layers_is_refused():
    model = tiny_model()
    plan = keep_layers(random_plan(model, "layer", 60, "shift"), {0})
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(ExportError, match=r"layers\.0\.mlp\.down_proj.*several"):
        edits_of(model, [(plan, 1.0)])


def test_a_model_in_training_is_no_other_model():
    """Its dropout is not in the checkpoint."""
    model = tiny_model("gpt2").train()
    for site in ("ffn", "layer"):
        assert edits_of(model, [(random_plan(model, site, 3, "shift"), 1.0)])


# --- plans and alphas ------------------------------------------------------------------------------------------------


def test_plans_are_given_alone_or_together_with_alphas_or_without(model):
    a, b = random_plan(model, "ffn", 3), random_plan(model, "attention", 2)
    assert with_alphas(a, 2) == [(a, 2.0)]
    assert with_alphas([a, (b, np.float32(0.5))], 2.0) == [(a, 2.0), (b, 0.5)]
    assert with_alphas((a, b), 3) == [(a, 3.0), (b, 3.0)]
    assert with_alphas([a + b], {"ffn": 2, "attention": -1}) == [(a, 2.0), (b, -1.0)]
    assert with_alphas([(a, {"ffn": 2}), b], 3) == [(a, 2.0), (b, 3.0)]


@pytest.mark.parametrize(
    "plans, alpha, reason",
    [
        ([], 1.0, "plans.*none"),
        ("plan", 1.0, "plans.*str"),
        (..., "2", "alpha.*'2'"),
        (..., True, "alpha.*True"),
        (..., float("nan"), "alpha.*nan"),
        (..., 1e39, r"alpha.*1e\+39"),
        (..., 10**400, "alpha.*1000"),
        (..., {"ffn": 1e39}, r"alpha.*1e\+39"),
        (..., {"ffn": 1.0, "layer": 1.0}, r"alpha.*\['ffn', 'layer'\].*\['ffn'\]"),
        (..., {}, r"alpha.*\[\].*\['ffn'\]"),
    ],
)
def test_bad_plans_and_alphas_are_named(model, plans, alpha, reason):
    plans = random_plan(model, "ffn", 3) if plans is ... else plans
    with pytest.raises(PlanError, match=reason):
        with_alphas(plans, alpha)


def test_another_name_of_the_model_is_a_warning(model, recwarn):
    plan = random_plan(model, "ffn", 3)
    named = replace(plan, model=replace(plan.model, name="meta/Llama-3-8B"))
    warn_of_another_model([(named, 1.0)], "meta/Llama-3-8B")
    warn_of_another_model([(named, 1.0)], "/data/models/llama-3-8b/")
    assert not recwarn
    with pytest.warns(ExportWarning, match=r"meta/Llama-3-8B.*me/tuned"):
        warn_of_another_model([(named, 1.0), (named, 2.0)], "me/tuned")


def test_a_digest_tells_plans_apart(model):
    plan = random_plan(model, WEIGHT_SITES, 5)
    others = [
        plan.top(14),
        plan.with_operation("shift"),
        replace(plan, delta=-plan.delta),
        plan.take(torch.arange(14, -1, -1)),
    ]
    found = {one.digest for one in [plan, *others]}
    assert len(found) == 5
    assert describe([(plan, 2)])[0]["digest"] == plan.take(torch.arange(15)).digest
