"""Gradients by shifts: equal to differences between shifted forward passes, in every family and at every site."""

import pytest
import torch
from accelerate import disk_offload

from austeer import CaptureError, SteeringError, find_sites, steer
from austeer.forward.gradients import ShiftGradients
from austeer.models.sites import layers_path
from austeer.models.structure import decoder_of
from dense_formula import assert_unchanged, hook, modules_of, shift_plan, snapshot
from tiny_models import FAMILIES, tiny_model, wide_model

#: A step after which a router's choice and a ReLU's side are as before.
STEP = 1e-3


def same(x):
    return x


def two_rows():
    ids = torch.randint(3, 30, (2, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return ids, mask


def found_by_gradient(model, sites, ids, mask, outward, recomputed=()):
    gradients = ShiftGradients(model, sites, recomputed)
    with gradients.attached():
        hidden = gradients.hidden_states(ids, mask)
        return gradients.backward(hidden, outward)


def shifted(model, site, index, step, ids, mask, outward):
    def change(x):
        x = x.clone()
        x[..., index] += step
        return x

    handle = hook(model, site, change)
    try:
        with torch.no_grad():
            hidden = decoder_of(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    finally:
        handle.remove()
    return (hidden * outward).sum((1, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_differences_that_shifts_make(family):
    model = wide_model(family)  # norms compute in float32 even there
    sites, (ids, mask) = find_sites(model), two_rows()
    outward = torch.randn(2, 6, decoder_of(model)(input_ids=ids).last_hidden_state.shape[-1]) * mask[..., None]
    found = found_by_gradient(model, sites, ids, mask, outward)
    for name, all_ in sites.items():
        for row in (0, len(all_) - 1):
            site, index = all_[row], all_[row].width // 2
            up, down = (shifted(model, site, index, step, ids, mask, outward) for step in (STEP, -STEP))
            torch.testing.assert_close(
                found[name][:, row, index], ((up - down) / (2 * STEP)).float(), rtol=0.02, atol=0.02
            )
    before, layers = modules_of(model), model.get_submodule(layers_path(model)).children()
    again = found_by_gradient(model, sites, ids, mask, outward, list(layers))
    assert all(torch.equal(again[name], values) for name, values in found.items())
    assert modules_of(model) == before


@pytest.mark.parametrize("family", ["falcon", "llama", "gpt_neox"])
def test_a_site_by_itself(family):
    model = tiny_model(family)
    sites, (ids, mask) = find_sites(model), two_rows()
    outward = torch.randn(2, 6, 32) * mask[..., None]
    together = found_by_gradient(model, sites, ids, mask, outward)
    for name, all_ in sites.items():
        for row in (0, len(all_) - 1):
            alone = found_by_gradient(model, {name: [all_[row]]}, ids, mask, outward)
            torch.testing.assert_close(alone[name][:, 0], together[name][:, row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gradients_in_other_dtypes(dtype):
    plain, model = tiny_model(), tiny_model().to(dtype)
    ids, mask = two_rows()
    outward = torch.randn(2, 6, 32) * mask[..., None]
    expected = found_by_gradient(plain, find_sites(plain), ids, mask, outward)
    found = found_by_gradient(model, find_sites(model), ids, mask, outward.to(dtype))
    for name, values in found.items():
        assert values.dtype == torch.float32
        error = (values - expected[name]).norm() / expected[name].norm()
        assert error < (0.1 if dtype == torch.bfloat16 else 1e-5)


def test_padding_and_batch_do_not_show():
    model = tiny_model()
    ids, mask = two_rows()
    outward = torch.randn(2, 6, 32) * mask[..., None]
    together = found_by_gradient(model, find_sites(model), ids, mask, outward)
    alone = found_by_gradient(model, find_sites(model), ids[1:, :4], mask[1:, :4], outward[1:, :4])
    for name in together:
        torch.testing.assert_close(together[name][1:], alone[name], rtol=1e-4, atol=1e-5)


def test_the_model_stays_as_it_was_also_after_an_error():
    model = tiny_model().train()
    model.lm_head.weight.requires_grad_(False)
    before, wanting = snapshot(model), [p.requires_grad for p in model.parameters()]
    gradients = ShiftGradients(model, find_sites(model))
    with pytest.raises(IndexError), gradients.attached():
        gradients.hidden_states(torch.full((1, 3), 10**6), torch.ones(1, 3))
    assert_unchanged(model, before)
    assert [p.requires_grad for p in model.parameters()] == wanting and model.training
    assert all(p.grad is None for p in model.parameters())


def test_under_inference_mode_and_with_checkpointed_activations():
    model = tiny_model()
    ids, mask = two_rows()
    outward = torch.randn(2, 6, 32) * mask[..., None]
    expected = found_by_gradient(model, find_sites(model), ids, mask, outward)
    with torch.inference_mode():
        found = found_by_gradient(model, find_sites(model), ids, mask, outward)
    model.gradient_checkpointing_enable()
    again = found_by_gradient(model, find_sites(model), ids, mask, outward)
    for name, values in expected.items():
        assert torch.equal(found[name], values) and torch.equal(again[name], values)


def test_recomputed_layers_keep_little_and_serve_several_backward_passes():
    model, kept = tiny_model(), []
    ids, mask = two_rows()
    for recomputed in ((), decoder_of(model).layers):
        sizes = []
        gradients = ShiftGradients(model, find_sites(model), recomputed)
        with gradients.attached():
            with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, same):
                hidden = gradients.hidden_states(ids, mask)
            outward = torch.randn(hidden.shape) * mask[..., None]
            first = gradients.backward(hidden, outward, again=True)
            second = gradients.backward(hidden, 2 * outward)
        assert all(torch.equal(second[name], 2 * values) for name, values in first.items())
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 10


@pytest.mark.parametrize("recompute", [False, True])
def test_offloaded_weights(recompute, tmp_path):
    ids, mask = two_rows()
    outward = torch.randn(2, 6, 32) * mask[..., None]
    expected = found_by_gradient(tiny_model(), find_sites(tiny_model()), ids, mask, outward)
    model = tiny_model()
    disk_offload(model, tmp_path, torch.device("cpu"))
    layers = decoder_of(model).layers
    before = [layer.forward for layer in layers]
    found = found_by_gradient(model, find_sites(model), ids, mask, outward, layers if recompute else ())
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    assert [layer.forward for layer in layers] == before  # accelerate's
    assert all(p.requires_grad and p.is_meta for p in model.parameters())


def test_a_steered_model_is_refused():
    model = tiny_model()
    with steer(model, shift_plan(model, ("ffn",))), pytest.raises(SteeringError, match="steered"):
        ShiftGradients(model, find_sites(model))


def test_a_gradient_that_is_not_finite_is_named():
    model = tiny_model()
    ids, mask = two_rows()
    with pytest.raises(CaptureError, match="NaN or infinite"):
        found_by_gradient(model, find_sites(model), ids, mask, torch.full((2, 6, 32), torch.inf))


def test_a_product_without_a_derivative_is_refused():
    """Gradients go around it by the residual stream: wrong, not missing. bitsandbytes' 4 bits on some CPUs are such."""
    library = torch.library.Library("austeer_tests", "DEF")
    library.define("double(Tensor x) -> Tensor")
    library.impl("double", lambda x: 2 * x, "CPU")
    model, (ids, mask) = tiny_model(), two_rows()
    decoder_of(model).layers[1].mlp.down_proj.register_forward_hook(
        lambda module, args, out: torch.ops.austeer_tests.double(out)
    )
    with pytest.raises(CaptureError, match="estimate_kl"):
        found_by_gradient(model, {"ffn": find_sites(model, "ffn")["ffn"][:1]}, ids, mask, torch.ones(2, 6, 32))
