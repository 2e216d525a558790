"""A shift in a bias while the model is changed, cast, shared, copied or forgotten inside the block."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch.nn.utils import prune

import austeer
from austeer.steering import bias
from austeer.steering.sharing import is_marked
from dense_formula import assert_unchanged, formula_logits, logits, random_plan, shift_plan, snapshot
from tiny_models import ids_of_rows, tiny_model

IDS = ids_of_rows()


def biased(**changes):
    return tiny_model("llama", mlp_bias=True, attention_bias=True, **changes)


def downs(model):
    return [layer.mlp.down_proj for layer in model.model.layers]


def takes_biases(model, plan):
    """The formula holds at each site, by a bias, and the model is what it was."""
    before, expected = snapshot(model), formula_logits(model, IDS, plan, 1.0)
    with austeer.steer(model, plan, 1.0) as steering:
        torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-4, atol=1e-4)
        paths = {row.path for row in steering.report()}
    assert_unchanged(model, before)
    return paths == {"bias"}


# --- numbers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_an_existing_bias_that_is_not_finite(value):
    model = biased()
    with torch.no_grad():
        downs(model)[1].bias[3] = value
    kept, plan = downs(model)[1].bias.clone(), shift_plan(model)
    with austeer.steer(model, plan, 1.0) as steering:
        for steering.alpha in (2.0, 0.0, -1.0):
            now = downs(model)[1].bias
            assert torch.equal(now.isfinite(), kept.isfinite())
        with torch.no_grad():
            now += 1
        steering.alpha = 0.5
    torch.testing.assert_close(downs(model)[1].bias, kept + 1, equal_nan=True)


@pytest.mark.parametrize("mode", ["fold", "bias", "fused", "columns", "dense"])
@pytest.mark.parametrize("site", ["ffn", "layer"])
def test_an_inf_in_an_unsteered_column_stays_one(mode, site):
    model = biased()
    operation = "scale" if mode == "fold" else "shift"
    plan = random_plan(model, site, 30, operation)
    if site == "layer" and mode in ("fold", "fused"):
        pytest.skip("no such path")
    plan = plan.take(((plan.layer == 1) & (plan.index != 5)).nonzero().flatten())
    with torch.no_grad():
        downs(model)[1].bias[5] = torch.inf
    caught, layer = [], model.model.layers[1]
    steered = layer.mlp if site == "ffn" else layer
    handle = steered.register_forward_hook(lambda m, args, out: caught.append(out.clone()))
    logits(model, IDS)
    with austeer.steer(model, plan, 1.0, mode=mode):
        logits(model, IDS)
    handle.remove()
    torch.testing.assert_close(caught[1][..., 5], caught[0][..., 5], rtol=0, atol=0, equal_nan=True)
    assert not caught[0][..., 5].isfinite().all() and not torch.equal(caught[0][..., :5], caught[1][..., :5])
    assert caught[1][..., :5].isfinite().all()


def test_an_inf_in_a_weight_of_an_au_that_is_not_steered_now():
    model = tiny_model()
    plan = shift_plan(model, "neuron", 30)
    layer, index = int(plan.layer[-1]), int(plan.index[-1])
    down = downs(model)[layer]
    with torch.no_grad():
        down.weight[4, index] = torch.inf
    with austeer.steer(model, plan, 1.0, check=False) as steering:
        assert not down.bias.isfinite().all()
        steering.k = len(plan) - 1
        assert down.bias.isfinite().all()
        steering.k, steering.alpha = len(plan), 0.0
        assert torch.equal(down.bias, torch.zeros(32))


# --- changed inside --------------------------------------------------------------------------------------------------


def test_an_optimizers_step_on_an_existing_bias_stays():
    model, plain = biased(), biased()
    plan = shift_plan(model, ("ffn", "layer"))
    with austeer.steer(model, plan, 1.0) as steering:
        for one in (model, plain):
            bias = downs(one)[0].bias
            optimizer = torch.optim.SGD([bias], 0.1)
            bias.grad = torch.arange(32.0)
            optimizer.step()
            bias.data.add_(1.0)  # shows in no version counter
        torch.testing.assert_close(logits(model, IDS), formula_logits(plain, IDS, plan, 1.0), rtol=1e-4, atol=1e-4)
        steering.alpha = -0.5
        torch.testing.assert_close(logits(model, IDS), formula_logits(plain, IDS, plan, -0.5), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(downs(model)[0].bias, downs(plain)[0].bias)
    assert torch.equal(downs(model)[2].bias, downs(plain)[2].bias)


def test_a_checkpoint_loaded_inside_the_block_stays_as_it_is():
    """What was steered before is not taken from what was loaded."""
    model, plan = biased(), shift_plan(biased(), ("ffn", "attention"))
    state, before = copy.deepcopy(model.state_dict()), snapshot(model)
    with austeer.steer(model, plan, 1.0) as steering:
        model.load_state_dict(state)
        steering.alpha = 0.5
        expected = formula_logits(biased(), IDS, plan, 0.5)
        torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-4, atol=1e-4)
        model.load_state_dict(state)
    assert_unchanged(model, before)


@torch.no_grad()
def test_a_weight_that_changed_is_read_again_with_the_next_strength():
    model, plain = tiny_model(), tiny_model()
    plan = shift_plan(model, ("neuron", "attention"))
    with austeer.steer(model, plan, 1.0) as steering:
        for one in (model, plain):
            for module in downs(one):
                module.weight.mul_(1.5)
        steering.alpha = 0.9
        torch.testing.assert_close(logits(model, IDS), formula_logits(plain, IDS, plan, 0.9), rtol=1e-4, atol=1e-4)
    assert_unchanged(model, snapshot(plain))


def replace(module):
    module.bias = nn.Parameter(torch.ones(32))


def none(module):
    module.bias = None


def in_place(module):
    with torch.no_grad():
        module.bias += 1


def data(module):
    module.bias.data += 1


def offload(module):
    cpu_offload(module, execution_device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "of_its_own"),
    [  # what is done in place to a bias of its own is a training step, see above
        *((change, False) for change in (replace, none, in_place, data, offload)),
        *((change, True) for change in (replace, none, offload)),
    ],
)
def test_a_bias_that_is_changed_inside_the_block(change, of_its_own):
    """Said at the next change of strength and on leaving; the other layers are restored, the next block is right."""
    model = biased() if of_its_own else tiny_model()
    plan, before = shift_plan(model, ("ffn", "neuron", "attention"), 40), snapshot(model)
    down = downs(model)[1]
    steering = austeer.steer(model, plan, 1.0).attach()
    change(down)
    if change is offload and not of_its_own:
        steering.alpha = 2.0
        steering.detach()
    else:
        with pytest.raises(austeer.SteeringError, match="Linear: found another bias"):
            steering.alpha = 2.0
        with pytest.raises(austeer.SteeringError, match=r"could not be restored.*layers\.1\.mlp.*another bias"):
            steering.detach()
    assert not austeer.is_steered(model) and not any(map(is_marked, model.modules()))
    expected = torch.ones(32) if change is replace else before[0].get("model.layers.1.mlp.down_proj.bias")
    expected = None if change is none else expected
    if change is not offload:
        assert down.bias is expected is None or torch.equal(down.bias, expected)
        assert "bias" in down._parameters and "bias" not in down._buffers
    after = snapshot(model)[0]
    assert all(torch.equal(after[name], value) for name, value in before[0].items() if "layers.1.mlp.down" not in name)
    plain = copy.deepcopy(model)
    expected = formula_logits(plain, IDS, plan, 1.5)
    with austeer.steer(model, plan, 1.5):
        torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-4, atol=1e-4)


def test_a_weight_that_is_pruned_inside_the_block():
    """Its name changes; what is ours goes all the same, and the next block begins anew."""
    model = tiny_model()
    plan, unsteered = shift_plan(model, "ffn"), logits(model, IDS)
    with austeer.steer(model, plan, 1.0):
        for module in downs(model):
            prune.identity(module, "weight")
    assert torch.equal(logits(model, IDS), unsteered)
    for module in downs(model):
        prune.remove(module, "weight")
        assert list(module._parameters) == ["bias", "weight"]
    assert takes_biases(model, plan)
    assert all(list(module._parameters) == ["bias", "weight"] for module in downs(model))


@pytest.mark.parametrize("make", [tiny_model, biased])
def test_a_cast_inside_and_between_blocks(make):
    model, plain = make(), make()
    plan, other = shift_plan(model), shift_plan(model, seed=1)
    with austeer.steer(model, plan, 1.0) as steering:
        model.double(), plain.double()
        for steering.alpha in (1.0, 0.5):
            expected = formula_logits(plain, IDS, plan, steering.alpha)
            torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-5, atol=1e-5)
    assert_unchanged(model, snapshot(plain))
    for one in (model, plain):
        one.bfloat16()
    with austeer.steer(model, other, 1.0):
        assert downs(model)[0].bias.dtype == torch.bfloat16
        assert (logits(model, IDS) - formula_logits(plain, IDS, other, 1.0)).norm() < 2
    assert_unchanged(model, snapshot(plain))
    for one in (model, plain):
        one.float()
    assert takes_biases(model, plan)


def test_a_module_that_is_replaced_inside_the_block():
    model = tiny_model()
    plan, before = shift_plan(model, "ffn", 40), snapshot(model)
    old = downs(model)[1]
    with pytest.warns(austeer.SteeringWarning, match="replaced"), austeer.steer(model, plan, 1.0):
        logits(model, IDS)
        model.model.layers[1].mlp.down_proj = nn.Linear(48, 32, bias=False)
    assert old.bias is None and list(old._parameters) == ["weight", "bias"]
    model.model.layers[1].mlp.down_proj = old
    assert_unchanged(model, before)


@pytest.mark.parametrize("make", [tiny_model, biased])
@pytest.mark.parametrize("inside", [True, False])
def test_inference_mode_around_the_block_or_the_other_way_round(make, inside):
    model, plan = make(), shift_plan(tiny_model())
    plain, before = copy.deepcopy(model), snapshot(model)
    steering = austeer.steer(model, plan, 1.0)
    for first in (inside, not inside, inside):  # entered in one, changed in the other, left in the first
        with torch.inference_mode(first):
            steering.attach()
        with torch.inference_mode(not first):
            steering.alpha, steering.k = 0.3, 60
            expected = formula_logits(plain, IDS, plan.top(60), 0.3)
            torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-4, atol=1e-4)
        with torch.inference_mode(first):
            steering.detach()
        steering.k = len(plan)
    assert_unchanged(model, before)
    model(**IDS).logits.sum().backward()


@pytest.mark.parametrize("operation", ["shift", "scale"])
@pytest.mark.parametrize("around", ["autocast", "block"])
@pytest.mark.parametrize("sites", [("ffn",), ("ffn", "neuron", "attention")])
@pytest.mark.parametrize("make", [tiny_model, biased])
def test_autocast_whose_cache_holds_the_weights_already(make, sites, around, operation):
    """Its copies of weights and biases are those of before the block, of another alpha, or of inside it."""
    model, plain = make(), make()
    plan = random_plan(model, sites, 25, operation)

    def of(alpha):
        with torch.autocast("cpu", torch.bfloat16):
            return formula_logits(plain, IDS, plan, alpha)

    wanted = {alpha: of(alpha) for alpha in (0.0, 1.0, -2.0)}

    def check(alpha):
        error = (logits(model, IDS).float() - wanted[alpha].float()).norm()
        assert error < 0.1 * (wanted[1.0] - wanted[0.0]).float().norm(), (alpha, error)

    if around == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            check(0.0)
            with austeer.steer(model, plan, 1.0) as steering:
                check(1.0)
                steering.alpha = -2.0
                check(-2.0)
            check(0.0)
    else:
        with austeer.steer(model, plan, 1.0) as steering:
            with torch.autocast("cpu", torch.bfloat16):
                check(1.0)
                steering.alpha = -2.0
                check(-2.0)
            with torch.autocast("cpu", torch.bfloat16):
                check(-2.0)
    assert_unchanged(model, snapshot(plain))


def test_autocast_does_not_round_what_is_added():
    model = tiny_model()
    plan, exact = shift_plan(model, "neuron", 60), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), austeer.steer(model, plan, 1.0):
            exact.append([module.bias.clone() for module in downs(model)])
    assert all(torch.equal(*pair) for pair in zip(*exact))


# --- shared, copied, forgotten ---------------------------------------------------------------------------------------


def test_models_that_share_a_layer():
    model, other = tiny_model(), tiny_model()
    other.model.layers[1].mlp = model.model.layers[1].mlp
    plan, before = shift_plan(model, "ffn", 40), snapshot(other)
    with austeer.steer(model, plan, 1.0):
        for mode in ("bias", "auto", "columns"):
            with pytest.raises(austeer.SteeringError, match="steered already"):
                austeer.steer(other, plan, 1.0, mode=mode).attach()
        assert not austeer.is_steered(other)
    assert_unchanged(other, before)
    assert takes_biases(other, plan)


def test_a_copy_made_inside_lives_on_by_itself():
    model = tiny_model()
    plan, unsteered = shift_plan(model), logits(model, IDS)
    with austeer.steer(model, plan, 1.0) as steering:
        steered = logits(model, IDS)
        twin = copy.deepcopy(model)
        steering.alpha = 0.0
        assert torch.equal(logits(twin, IDS), steered)
    assert torch.equal(logits(twin, IDS), steered) and torch.equal(logits(model, IDS), unsteered)
    assert twin.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(austeer.SteeringError, match="copied"):
        austeer.steer(twin, plan, 1.0, mode="columns").attach()


def test_a_forgotten_steering_keeps_nothing_alive():
    model = tiny_model()
    gc.collect()
    known = len(bias._slots)
    austeer.steer(model, shift_plan(model), 1.0).attach()
    assert len(bias._slots) == known + 6  # two linear layers in each of three
    gone = [weakref.ref(model), weakref.ref(downs(model)[0]), weakref.ref(downs(model)[0].bias)]
    del model
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3 and len(bias._slots) == known


def test_a_model_is_free_after_its_block():
    model = tiny_model()
    with austeer.steer(model, shift_plan(model), 1.0) as steering:
        logits(model, IDS)
    gone = weakref.ref(model)
    del model, steering
    gc.collect()
    assert gone() is None


def test_threads_that_change_alpha_and_run():
    """Each pass sees whole biases; the last strength is the one that stays."""
    model, plain = tiny_model(), tiny_model()
    plan = shift_plan(model)
    wrong = []
    with austeer.steer(model, plan, 0.0) as steering:

        def change():
            for i in range(40):
                steering.alpha = float(i % 3)

        def run():
            for _ in range(20):
                if not logits(model, IDS).isfinite().all():
                    wrong.append(1)

        threads = [threading.Thread(target=target) for target in (change, change, run, run)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        steering.alpha = 0.7
        torch.testing.assert_close(logits(model, IDS), formula_logits(plain, IDS, plan, 0.7), rtol=1e-4, atol=1e-4)
    assert not wrong
    assert_unchanged(model, snapshot(plain))
