"""ITI: probes equal to scikit-learn's, heads ranked and shifted as the paper says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import softplus

import austeer
from austeer import CaptureError, Pairs, SelectionError
from austeer.baselines import arms
from austeer.baselines.heads import attention_sites, head_size
from austeer.baselines.iti import rank_heads, train_half
from austeer.baselines.pair_activations import PairActivations, pair_activations
from austeer.baselines.probes import fit
from austeer.demo.demo import load_data
from austeer.models.sites import find_sites
from baseline_material import IDS, PAIRS, hooked, material_of, reference_activations
from dense_formula import logits

# --- probes ----------------------------------------------------------------------------------------------------------


def data(groups, texts, width, scale=1.0, shift=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    positive = torch.rand(texts, generator=generator) < 0.5
    positive[:2] = torch.tensor([True, False])
    x = torch.randn(groups, texts, width, generator=generator)
    return (x + shift * positive[:, None] * torch.randn(groups, 1, width, generator=generator)) * scale, positive


@pytest.mark.parametrize("shape, scale, shift", [
    ((3, 60, 5), 1.0, 0.5),  # classes overlap
    ((2, 40, 12), 1.0, 5.0),  # separable
    ((2, 20, 30), 1.0, 0.0),  # more dimensions than texts
    ((3, 50, 4), 0.01, 1.0),  # small activations
    ((3, 50, 4), 100.0, 1.0),  # large ones
    ((1, 30, 1), 1.0, 1.0),
])  # fmt: skip
def test_probes_equal_scikit_learns(shape, scale, shift):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, positive = data(*shape, scale, shift)
    probes = fit(x, positive)
    for group in range(len(x)):
        reference = linear_model.LogisticRegression(tol=1e-12, max_iter=100_000, solver="newton-cholesky")
        reference.fit(x[group].double().numpy(), positive.numpy())
        weight = torch.from_numpy(reference.coef_[0])
        torch.testing.assert_close(probes.weight[group], weight, rtol=1e-4, atol=1e-5 * float(weight.abs().max()))
        assert float(probes.bias[group]) == pytest.approx(float(reference.intercept_[0]), rel=1e-4, abs=1e-5)
        assert float(probes.accuracy(x, positive)[group]) == pytest.approx(reference.score(x[group].double(), positive))


@pytest.mark.parametrize("width", [255, 256, 300])  # with the bias one more
def test_probes_of_wide_heads_with_several_threads(width):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # batched LU fails with them on oneMKL
    try:
        expect_least_loss(*data(4, 40, width, 1.0, 0.2), 1.0)
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(2, 25), st.floats(0, 20), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_probes_are_at_the_least_loss(width, texts, shift, scale, seed):
    expect_least_loss(*data(2, texts, width, scale, shift, seed), scale)


def expect_least_loss(x, positive, scale):
    probes, texts = fit(x, positive), len(positive)
    weight = probes.weight.clone().requires_grad_()
    bias = probes.bias.clone().requires_grad_()
    logit = torch.einsum("gnw,gw->gn", x.double(), weight) + bias[:, None]
    loss = softplus(torch.where(positive, -logit, logit)).sum() + 0.5 * weight.square().sum()
    loss.backward()
    # a convex function: where its gradient is zero, it is least
    assert float(weight.grad.abs().max()) < 1e-5 * texts * max(scale, 1)
    assert float(bias.grad.abs().max()) < 1e-5 * texts


def test_loss_is_the_cross_entropy():
    x, positive = data(2, 30, 4)
    probes = fit(x, positive)
    chance = torch.sigmoid(probes.logit(x))
    expected = -torch.where(positive, chance, 1 - chance).log().mean(-1)
    torch.testing.assert_close(probes.loss(x, positive), expected)


# --- heads -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def material(request, tiny_of, demo):
    return material_of(tiny_of(request.param), demo[1])


def by_hand(material):
    """(order of heads, shift [heads, size]) from activations read text by text, head by head."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    sides = reference_activations(material.model, material.tokenizer, PAIRS, "attention")
    count = material.model.config.num_attention_heads
    train = train_half(PAIRS, range(len(PAIRS)))
    ranks, shifts = [], []
    for layer in range(sides[0].shape[1]):
        for head in range(count):
            size = sides[0].shape[2] // count
            positive, negative = (side[:, layer, head * size : (head + 1) * size].numpy() for side in sides)
            texts = np.concatenate([positive, negative])
            direction = positive.mean(0) - negative.mean(0)
            direction /= np.linalg.norm(direction)
            shifts.append(np.std(texts @ direction) * direction)
            labels = [1] * int(train.sum()) + [0] * int(train.sum())
            probe = linear_model.LogisticRegression(tol=1e-12, max_iter=100_000)
            probe.fit(np.concatenate([positive[train], negative[train]]), labels)
            rest = np.concatenate([positive[~train], negative[~train]])
            truth = np.array([1] * int((~train).sum()) + [0] * int((~train).sum()))
            log_chance = probe.predict_log_proba(rest)[np.arange(len(truth)), truth]
            ranks.append((-probe.score(rest, truth), -log_chance.mean(), len(ranks)))
    return [rank[2] for rank in sorted(ranks)], torch.tensor(np.stack(shifts))


def test_the_best_heads_are_shifted_along_the_mean_difference(material):
    model = material.model
    order, shift = by_hand(material)
    count = model.config.num_attention_heads
    width = shift.shape[1] * count
    found = arms("iti", material, sites=["ffn"], ks=[1], heads=[1, 5])
    assert [(arm.k, arm.detail) for arm in found] == [(shift.shape[1], "1 head"), (5 * shift.shape[1], "5 heads")]
    for arm, heads in zip(found, (order[:1], order[:5])):
        plan = arm.plan.top(arm.k)
        flat = plan.layer.long() * width + plan.index
        assert flat.unflatten(0, (-1, shift.shape[1]))[:, 0].div(shift.shape[1]).int().tolist() == heads
        torch.testing.assert_close(plan.delta.double(), shift[heads].flatten(), rtol=1e-3, atol=1e-5)
    # the first head alone, added by hand before the projection
    layer, head = divmod(order[0], count)
    added = torch.zeros(count, shift.shape[1]).index_fill(0, torch.tensor([head]), 1) * shift[order[0]].float()
    site = find_sites(model, ["attention"])["attention"][layer]
    expected = hooked(model, site, lambda x: x + 15 * added.flatten())
    with austeer.steer(model, found[0].plan, 15, k=found[0].k):
        torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-3, atol=1e-3)


def test_the_real_model_has_heads_that_tell_the_sides_apart(demo):
    pairs = load_data().momentum[:32]
    momentum = austeer.measure(*demo, pairs[:2], ["ffn"], progress=False)
    sites, _ = attention_sites(demo[0], momentum)
    found = pair_activations(*demo, pairs, sites)
    ranking = rank_heads(found, train_half(pairs, found.number), 64)
    assert ranking.accuracy.shape == (270,)
    best, worst = ranking.accuracy[ranking.order[0]], ranking.accuracy[ranking.order[-1]]
    assert best > 0.9 and best - worst > 0.2
    assert (ranking.accuracy[ranking.order].diff() <= 0).all()


def test_wide_heads_of_a_model_with_several_threads(tiny_of, demo):
    """Gemma 3 270M's shape at its attention site: four heads of 256."""
    model = tiny_of("gemma3_text", head_dim=256, num_key_value_heads=1, num_hidden_layers=2)
    material = material_of(model, demo[1], PAIRS[:10], ["ffn"])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (arm,) = arms("iti", material, sites=["ffn"], ks=[1], heads=[3])
    finally:
        torch.set_num_threads(threads)
    assert arm.k == 3 * 256 and len({int(i) // 256 + 4 * int(at) for i, at in zip(arm.plan.index, arm.plan.layer)}) == 3


# --- halves, errors --------------------------------------------------------------------------------------------------


def test_halves_keep_prompts_together():
    pairs = Pairs.of([(f"prompt {i // 3}", f" yes {i}", f" no {i}") for i in range(30)])
    train = train_half(pairs, range(30))
    assert 13 <= int(train.sum()) <= 17
    assert all(len({bool(train[i]) for i in range(30) if i // 3 == group}) == 1 for group in range(10))


def test_halves_of_one_prompt_go_by_answers():
    pairs = Pairs.of([("prompt", f" yes {i}", f" no {i}") for i in range(9)])
    assert 4 <= int(train_half(pairs, range(9)).sum()) <= 5


def test_too_few_pairs(tiny_of, demo):
    few = material_of(tiny_of("llama"), demo[1], PAIRS[:3], ["ffn"])
    with pytest.raises(SelectionError, match=r"'iti'.* 3 pairs.* 3 groups"):
        arms("iti", few, sites=["ffn"], ks=[1])


def test_heads_that_are_no_slices(tiny_of):
    model = tiny_of("llama")
    assert head_size(model, 48) == 12
    with pytest.raises(SelectionError, match=r"4 heads.*50"):
        head_size(model, 50)


def test_broken_activations(tiny_of, demo):
    model = tiny_of("llama")
    material = material_of(model, demo[1], PAIRS[:6], ["ffn"])
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(CaptureError, match=r"NaN.*'attention'"):
        arms("iti", material, sites=["ffn"], ks=[1])


def test_equal_activations_count_for_neither_side():
    found = PairActivations(torch.tensor([[[1.0, 2.0, 1.0]]]), torch.tensor([[[1.0, 1.0, 2.0]]]), [0]).counters()
    assert found.positive.tolist() == [[0, 1, 0]] and found.negative.tolist() == [[0, 0, 1]]
