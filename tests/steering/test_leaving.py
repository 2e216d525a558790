"""Leaving a block: steering always ends, and what it could not see to is told."""

import warnings
from contextlib import ExitStack

import pytest
import torch
import torch._inductor.config as inductor
from torch.nn import functional as F

import austeer
from austeer.models.structure import decoder_of
from austeer.steering import sharing
from austeer.steering.sharing import is_marked
from dense_formula import assert_unchanged, formula_logits, random_plan, shift_plan, snapshot
from tiny_models import ids_of_rows, tiny_model


def test_steering_ends_also_where_the_decoders_forward_cannot_be_restored():
    model, ids = tiny_model(), ids_of_rows()
    plan, decoder = shift_plan(model, ("ffn",)), decoder_of(model)
    before = model(**ids).logits
    with (
        pytest.raises(austeer.SteeringError, match="another forward"),
        austeer.steer(model, plan, scope="generation"),
    ):
        inner = decoder.forward
        decoder.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    assert not austeer.is_steered(model) and not any(map(is_marked, model.modules()))
    assert torch.equal(model(**ids).logits, before)  # through the wrapper, which calls our forward still
    del decoder.forward
    with austeer.steer(model, plan):
        assert not torch.equal(model(**ids).logits, before)


def test_steering_ends_also_where_a_warning_is_an_error():
    model = tiny_model()
    before = snapshot(model)
    with (
        ExitStack() as later,
        warnings.catch_warnings(),
        pytest.raises(austeer.SteeringWarning, match="freezing"),
        austeer.steer(model, random_plan(model, ("ffn",), 9)),
    ):
        warnings.simplefilter("error", austeer.SteeringWarning)
        later.enter_context(inductor.patch("freezing", True))
    assert not austeer.is_steered(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("late", ["after the block", "after alpha"])
def test_a_late_backward_pass_of_a_fold_whose_input_has_no_gradient_is_told(late):
    model, ids = tiny_model().requires_grad_(False), ids_of_rows()
    model.model.layers[2].mlp.down_proj.weight.requires_grad_()  # nothing below, so that autograd saved no weight
    with austeer.steer(model, random_plan(model, ("ffn",), 25), 2.0) as steering:
        loss = model(**ids).logits.square().mean()
        if late == "after alpha":
            steering.alpha = 1.0
            with pytest.warns(austeer.SteeringWarning, match="of a forward pass from before"):
                loss.backward()
    if late == "after the block":
        with pytest.warns(austeer.SteeringWarning, match="of a forward pass from before"):
            loss.backward()
    del loss
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**ids).logits.square().mean().backward()


def test_a_backward_pass_in_time_is_not_told_of(recwarn):
    model, ids = tiny_model(), ids_of_rows()
    with austeer.steer(model, random_plan(model, ("ffn",), 25), 2.0):
        loss = model(**ids).logits.square().mean()
        loss.backward()
    model(**ids).logits.square().mean().backward()
    assert loss.grad_fn is not None and not [w for w in recwarn if w.category is austeer.SteeringWarning]


def test_gradients_that_are_wanted_inside_the_block_are_told():
    model = tiny_model().requires_grad_(False)
    with (
        pytest.warns(austeer.SteeringWarning, match="requires_grad"),
        austeer.steer(model, random_plan(model, ("ffn",), 9)),
    ):
        model.requires_grad_()
        model(**ids_of_rows())


def test_a_weight_that_is_changed_under_a_shift_of_its_input_is_told():
    model = tiny_model()
    with (
        pytest.warns(austeer.SteeringWarning, match="changed inside the block"),
        austeer.steer(model, shift_plan(model, ("neuron",)), mode="bias"),
        torch.no_grad(),
    ):
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(2)
        model(**ids_of_rows())


def test_a_block_that_multiplies_by_the_weight_itself_is_not_shifted_by_a_bias(monkeypatch):
    model = tiny_model()
    kind = type(model.model.layers[0].mlp)

    def fused(mlp, x):
        return F.linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight)

    plan = shift_plan(model, ("neuron",))
    with austeer.steer(model, plan) as steering:
        assert {site.path for site in steering.report()} == {"bias"}
        found = model(**ids_of_rows()).logits
    torch.testing.assert_close(found, formula_logits(model, ids_of_rows(), plan, 1.0), rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(kind, "forward", fused)
    with pytest.warns(austeer.SteeringWarning, match="never ran"), austeer.steer(model, plan) as steering:
        assert {site.path for site in steering.report()} == {"columns"}
        model(**ids_of_rows())


def test_files_that_are_mapped_may_have_any_name(monkeypatch, tmp_path):
    maps = tmp_path / "maps"
    maps.write_bytes(b"7f00-7f10 rw-s 00000000 00:00 0 /tmp/caf\xe9\n")
    monkeypatch.setattr(sharing, "FilePath", lambda path: maps)
    assert sharing._shared_mappings() == [(torch.device("cpu"), 0x7F00, 0x7F10)]
