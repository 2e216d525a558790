"""Gradients are those of the forward pass as it was steered, or the backward pass is refused."""

import copy
from functools import partial

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.checkpoint import checkpoint

import austeer
from dense_formula import OPERATIONS, assert_unchanged, formula_at, random_plan, snapshot
from tiny_models import ids_of_rows, tiny_model

IDS = ids_of_rows()
SITES = ("attention", "ffn", "neuron")  # inside what is checkpointed


def loss_of(model):
    return model(**IDS, use_cache=False).logits.square().mean()


def gradients(model):
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def expected_gradients(plan, *alphas):
    """Of the sum of a loss for each alpha."""
    plain = tiny_model()
    for alpha in alphas:
        with formula_at(plain, plan, alpha):
            loss_of(plain).backward()
    return gradients(plain)


def assert_alike(got, expected):
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def checkpointed(how):
    """A model in training that computes its layers anew."""
    model = tiny_model().train()
    if how == "wrapper":
        apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ == "LlamaDecoderLayer")
    else:
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    return model


HOW = ["reentrant", "not reentrant", "wrapper"]


def inside(steering, loss, model, plan):
    loss.backward()


def after(steering, loss, model, plan):
    steering.detach()
    loss.backward()


def in_a_second_block(steering, loss, model, plan):
    steering.detach()
    with austeer.steer(model, plan, -2.0, mode="columns"):
        loss.backward()


def after_another_alpha(steering, loss, model, plan):
    steering.alpha = -2.0
    loss.backward()


def after_another_k(steering, loss, model, plan):
    steering.k = 5
    loss.backward()


def after_other_passes(steering, loss, model, plan):
    """Passes in between change nothing, and a second loss has gradients of its own."""
    with torch.no_grad():
        model(**IDS)
    other = loss_of(model)
    loss.backward()
    model.zero_grad()
    other.backward()


RIGHT, CHANGED = [inside, after_other_passes], [after, in_a_second_block, after_another_alpha, after_another_k]


@pytest.mark.parametrize("backward", RIGHT + CHANGED)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("operation", "mode"), [*((op, "auto") for op in OPERATIONS), ("scale", "dense")])
def test_activation_checkpointing(how, operation, mode, backward):
    model = checkpointed(how)
    plan, before = random_plan(model, SITES, 25, operation), snapshot(model)
    steering = austeer.steer(model, plan, 0.7, mode=mode)
    with steering:
        loss = loss_of(model)
        if backward in CHANGED:
            with pytest.raises(austeer.SteeringError, match=r"activation checkpointing.*backward\(\) inside the block"):
                backward(steering, loss, model, plan)
            return
        backward(steering, loss, model, plan)
    got = {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in gradients(model).items()}
    assert_alike(got, expected_gradients(plan, 0.7))
    assert_unchanged(model, before)
    loss_of(model).backward()  # the model's own functions are back


@pytest.mark.parametrize("how", HOW[:2])
def test_a_checkpointed_forward_pass_before_the_block(how):
    model = checkpointed(how)
    loss = loss_of(model)
    with (
        pytest.raises(austeer.SteeringError, match="forward pass before the block"),
        austeer.steer(model, random_plan(model, "attention", 25), 0.7),
    ):
        loss.backward()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_of_the_users_own(reentrant, training):
    """It cannot be told whether it will be run anew inside the block, so it is refused before anything is wrong."""
    model = tiny_model().train(training)
    plan = random_plan(model, "ffn", 25, "shift")
    embeddings = model.get_input_embeddings()(IDS["input_ids"]).detach().requires_grad_()
    with austeer.steer(model, plan, 0.7, mode="columns"):
        with pytest.raises(austeer.SteeringError, match=r"checkpoint that steering does not know of.*\.gradient_check"):
            run = partial(model.model, use_cache=False)
            hidden = checkpoint(lambda x: run(inputs_embeds=x)[0], embeddings, use_reentrant=reentrant)
            hidden.sum().backward()  # one that is re-entrant shows in evaluation mode only as it is run anew
        loss_of(model).backward()


def test_checkpointing_switched_on_inside():
    model = tiny_model().train()
    with austeer.steer(model, random_plan(model, "ffn", 25), 0.7):
        model.gradient_checkpointing_enable()
        with pytest.raises(austeer.SteeringError, match="before the block"):
            loss_of(model)
        model.gradient_checkpointing_disable()
        loss_of(model).backward()


def test_a_copy_of_a_checkpointed_model_is_watched_by_itself():
    model = checkpointed("not reentrant")
    plan = random_plan(model, SITES, 25)
    with austeer.steer(model, plan, 0.7, mode="columns") as steering:
        other = copy.deepcopy(model)
        loss = loss_of(other)
        steering.alpha = 0.2
    loss.backward()
    assert_alike(gradients(other), expected_gradients(plan, 0.7))


# --- without checkpointing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [inside, after_other_passes, *CHANGED])
@pytest.mark.parametrize("mode", ["fold", "bias", "columns", "dense"])
def test_what_autograd_keeps(mode, backward):
    """Strengths are copied; of a weight that was edited autograd knows that it is another one by now."""
    model = tiny_model()
    plan = random_plan(model, "ffn", 25, "shift" if mode == "bias" else "scale")
    steering = austeer.steer(model.requires_grad_(mode != "fold"), plan, 0.7, mode=mode)
    model.get_input_embeddings().requires_grad_()
    with steering:
        loss = loss_of(model)
        if mode == "fold" and backward in CHANGED:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                backward(steering, loss, model, plan)
            return
        backward(steering, loss, model, plan)
    got = gradients(model)
    expected = expected_gradients(plan, 0.7)
    assert_alike(got, {name: expected[name] for name in got})


@pytest.mark.parametrize("mode", ["fold", "bias", "columns"])
def test_saved_elsewhere(mode):
    """What is saved is a copy, of the weights as they were as well."""
    model = tiny_model()
    plan = random_plan(model, "ffn", 25, "shift" if mode == "bias" else "scale")
    weight = model.model.layers[0].self_attn.q_proj.weight
    with austeer.steer(model, plan, 0.7, mode=mode), saved_tensors_hooks(torch.clone, torch.clone):
        loss = loss_of(model)
    got = torch.autograd.grad(loss, weight)[0]
    expected = expected_gradients(plan, 0.7)["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def test_gradients_of_several_passes_add_up():
    model = checkpointed("not reentrant")
    plan = random_plan(model, SITES, 25)
    with austeer.steer(model, plan, 0.7) as steering:
        for alpha in (0.7, -0.4):
            steering.alpha = alpha
            loss_of(model).backward()
    assert_alike(gradients(model), expected_gradients(plan, 0.7, -0.4))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_second_derivatives(checkpointing):
    model = checkpointed("not reentrant") if checkpointing else tiny_model().train()
    model.config._attn_implementation = "eager"
    plain = tiny_model(attn_implementation="eager")
    plan = random_plan(plain, SITES, 25, "push")

    def second(model):
        weight = model.model.layers[0].self_attn.q_proj.weight
        first = torch.autograd.grad(loss_of(model), weight, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), weight)[0]

    with formula_at(plain, plan, 0.7):
        expected = second(plain)
    with austeer.steer(model, plan, 0.7):
        torch.testing.assert_close(second(model), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_gradient_of_a_folded_weight(family):
    """It is the model's own weight's, not that of the scaled one."""
    model, plain = tiny_model(family), tiny_model(family)
    sites = ("ffn",) if family == "mixtral" else SITES  # ffn and neuron meet in one weight
    plan = random_plan(model, sites, 25)
    with formula_at(plain, plan, 0.7):
        loss_of(plain).backward()
    with austeer.steer(model, plan, 0.7) as steering:
        assert {row.path for row in steering.report()} == {"fold"}
        loss_of(model).backward()
    assert_alike(gradients(model), gradients(plain))
    hooked = [name for name, p in model.named_parameters() if p._backward_hooks]
    assert not hooked


@pytest.mark.parametrize("found_by", ["leaving", "alpha"])
def test_a_training_step_on_folded_weights_is_told(found_by):
    """As by a trainer that puts the model into training mode inside the block."""
    model = tiny_model()
    steering = austeer.steer(model, random_plan(model, ("ffn", "neuron"), 25), 0.7).attach()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()
    steering.alpha = 0.3  # our own writing is none
    loss_of(model).backward()
    optimizer.step()
    steps = {name: p.detach().clone() for name, p in model.named_parameters() if "down_proj" not in name}
    with pytest.raises(austeer.SteeringError, match=r"down_proj|mlp.*changed inside the block"):
        if found_by == "alpha":
            steering.alpha = 0.5
        else:
            steering.detach()
    steering.detach()
    assert not austeer.is_steered(model)
    assert all(torch.equal(p, steps[name]) for name, p in model.named_parameters() if name in steps)


def test_training_trains_what_is_steered():
    """As the definition does: by hooks, and on leaving the steps stay."""
    model, plain = tiny_model().train(), tiny_model().train()
    plan = random_plan(model, (*SITES, "layer"), 25)
    for one, steered in ((model, austeer.steer(model, plan, 0.7)), (plain, formula_at(plain, plan, 0.7))):
        optimizer = torch.optim.SGD(one.parameters(), 0.1)
        with steered:
            for _ in range(2):
                one.zero_grad()
                loss_of(one).backward()
                optimizer.step()
    for (name, got), expected in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5, msg=name)
