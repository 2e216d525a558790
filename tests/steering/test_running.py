"""However a model is placed, rounded, trained or copied: it is steered as the definition says, and then as it was."""

import copy
import io
import threading

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import AutoModelForCausalLM

import austeer
from dense_formula import SITES, assert_unchanged, formula_at, formula_logits, logits, random_plan, snapshot
from tiny_models import ids_of_rows, left_padded, tiny_model

IDS = ids_of_rows()
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
NO_FOLD = ["auto", "fused", "columns", "dense"]


def sites_for(mode):
    """``fused`` needs a projection, and takes one site of each."""
    return ("attention", "neuron") if mode == "fused" else SITES


def text_of(model, inputs=IDS, **options):
    return model.generate(**inputs, **(GREEDY | options))


def text_of_formula(model, plan, alpha, inputs=IDS):
    with formula_at(model, plan, alpha):
        return text_of(model, inputs, use_cache=False)


# --- placed in several places ----------------------------------------------------------------------------------------

MAP = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
PLACES = {
    "cpu and disk": MAP | {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"},
    "disk only": dict.fromkeys(MAP, "disk") | {f"model.layers.{i}": "disk" for i in range(3)},
    "parts of a layer": MAP
    | {"model.layers.0": "cpu", "model.layers.2": "disk"}
    | {"model.layers.1.self_attn": "disk", "model.layers.1.mlp": "cpu"}
    | {"model.layers.1.input_layernorm": "cpu", "model.layers.1.post_attention_layernorm": "cpu"},
}


def placed(how, folder):
    model = tiny_model()
    if how == "cpu offload":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    if how == "disk offload":
        disk_offload(model, folder, execution_device=torch.device("cpu"))
        return model
    if how == "from_pretrained":
        model.save_pretrained(folder / "model")
        return AutoModelForCausalLM.from_pretrained(
            folder / "model", device_map=PLACES["cpu and disk"], offload_folder=folder / "offload"
        ).eval()
    return dispatch_model(model, PLACES[how], main_device="cpu", offload_dir=folder)


@pytest.mark.parametrize("mode", NO_FOLD)
@pytest.mark.parametrize("how", [*PLACES, "cpu offload", "disk offload", "from_pretrained"])
def test_a_model_in_several_places(tmp_path, how, mode):
    """Logits, and text with a cache; afterwards it is where it was, and the weights are as they were."""
    plain, model = tiny_model(), placed(how, tmp_path)
    plan = random_plan(plain, sites_for(mode), 25)
    devices = {name: p.device for name, p in model.named_parameters()}
    attributes = snapshot(model)[1]
    before = logits(model, IDS)
    torch.testing.assert_close(before, logits(plain, IDS))
    with austeer.steer(model, plan, 0.7, mode=mode) as steering:
        torch.testing.assert_close(logits(model, IDS), formula_logits(plain, IDS, plan, 0.7), rtol=1e-4, atol=1e-4)
        assert torch.equal(text_of(model), text_of_formula(plain, plan, 0.7))
        steering.alpha = -0.4
        torch.testing.assert_close(logits(model, IDS), formula_logits(plain, IDS, plan, -0.4), rtol=1e-4, atol=1e-4)
        report = steering.report()
    assert torch.equal(logits(model, IDS), before)
    assert {name: p.device for name, p in model.named_parameters()} == devices
    assert snapshot(model)[1] == attributes
    if mode == "auto":
        on_meta = {
            row.layer for row in report if devices[f"model.layers.{row.layer}.mlp.down_proj.weight"].type == "meta"
        }
        for row in report:
            if row.site == "ffn":
                assert row.path == ("columns" if row.layer in on_meta else "fold")
                assert ("offloaded" in row.reason) == (row.layer in on_meta)


@pytest.mark.parametrize("scope", ["generation", (2, 5)])
def test_a_scope_on_an_offloaded_model(tmp_path, scope):
    plain, model = tiny_model(), placed("cpu and disk", tmp_path)
    plan, inputs = random_plan(plain, SITES, 25), left_padded([[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15]])
    with austeer.steer(plain, plan, 0.7, scope=scope):
        expected = text_of(plain, inputs)
    with austeer.steer(model, plan, 0.7, scope=scope):
        assert torch.equal(text_of(model, inputs), expected)
    assert torch.equal(text_of(model, inputs), text_of(plain, inputs))


# --- rounded ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["auto", *NO_FOLD[1:]])
def test_a_model_in_half_precision(mode, dtype):
    """No further from the same weights in float64 than twice the definition in that precision."""
    wide = tiny_model().to(dtype).double()
    model = copy.deepcopy(wide).to(dtype)
    plan = random_plan(model, sites_for(mode), 25)
    exact = formula_logits(wide, IDS, plan, 0.7)
    own_error = (formula_logits(model, IDS, plan, 0.7).double() - exact).norm()
    before = snapshot(model)
    with austeer.steer(model, plan, 0.7, mode=mode):
        error = (logits(model, IDS).double() - exact).norm()
        assert text_of(model).shape[1] > IDS["input_ids"].shape[1]
    assert error <= 2 * own_error < 0.2 * (exact - logits(wide, IDS)).norm()
    assert_unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["auto", "columns", "dense"])
def test_under_autocast(mode, dtype):
    model = tiny_model()
    plan, plain = random_plan(model, SITES, 25), copy.deepcopy(model)
    exact = formula_logits(copy.deepcopy(model).double(), IDS, plan, 0.7)
    with torch.autocast("cpu", dtype):
        own_error = (formula_logits(plain, IDS, plan, 0.7).double() - exact).norm()
        with austeer.steer(model, plan, 0.7, mode=mode):
            error = (logits(model, IDS).double() - exact).norm()
    assert error <= 2 * own_error < 0.2 * (exact - logits(plain, IDS)).norm()


def test_fused_says_that_it_cannot_run_under_autocast():
    model = tiny_model()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(austeer.SteeringError, match=r"autocast.*mode='columns'"),
        austeer.steer(model, random_plan(model, "neuron", 9), 1.0, mode="fused"),
    ):
        logits(model, IDS)


@pytest.mark.parametrize("mode", ["auto", *NO_FOLD[1:]])
def test_in_inference_mode(mode):
    model = tiny_model()
    plan, plain, before = random_plan(model, sites_for(mode), 25), copy.deepcopy(model), snapshot(model)
    with torch.inference_mode(), austeer.steer(model, plan, 0.7, mode=mode) as steering:
        torch.testing.assert_close(model(**IDS).logits, formula_logits(plain, IDS, plan, 0.7), rtol=1e-4, atol=1e-4)
        steering.alpha = 0.2
        torch.testing.assert_close(model(**IDS).logits, formula_logits(plain, IDS, plan, 0.2), rtol=1e-4, atol=1e-4)
    assert_unchanged(model, before)
    model(**IDS).logits.sum().backward()  # what was put back can be trained


# --- trained ---------------------------------------------------------------------------------------------------------


def gradients(model, run=None):
    model.zero_grad()
    (run or model)(**IDS, use_cache=False).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", ["columns", "dense", "fused"])
def test_what_is_computed_anew_in_the_backward_pass_is_steered_too(mode, reentrant):
    model = tiny_model().train()
    plan, plain = random_plan(model, sites_for(mode), 25), copy.deepcopy(model)
    with formula_at(plain, plan, 0.7):
        expected = gradients(plain)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with austeer.steer(model, plan, 0.7, mode=mode) as steering:
        got = gradients(model)
        assert max(row.calls for row in steering.report()) == 2
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    assert not torch.allclose(gradients(model)["lm_head.weight"], got["lm_head.weight"])


# --- copied and shared -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", *NO_FOLD[1:]])
def test_a_copy_of_a_steered_model_is_a_steered_model_of_its_own(mode):
    model = tiny_model()
    plan, before = random_plan(model, sites_for(mode), 25), logits(model, IDS)
    with austeer.steer(model, plan, 0.7, mode=mode) as steering:
        steered = logits(model, IDS)
        other = copy.deepcopy(model)
        steering.alpha = 0.0
        assert torch.equal(logits(other, IDS), steered)
    assert torch.equal(logits(model, IDS), before)
    assert torch.equal(logits(other, IDS), steered)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(model.parameters(), other.parameters()))


@pytest.mark.parametrize("scope", ["generation", "prompt"])
def test_a_copy_made_under_a_scope_generates_by_itself(scope):
    model = tiny_model()
    with austeer.steer(model, random_plan(model, SITES, 25), 0.7, scope=scope):
        steered = text_of(model)
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(text_of(other), steered)


@pytest.mark.parametrize("mode", ["auto", "columns"])
def test_what_is_saved_inside_the_block(mode, tmp_path):
    """Fold is in the weights, and so in a checkpoint; hooks are not."""
    model = tiny_model()
    plan, before = random_plan(model, ("attention", "ffn"), 25), logits(model, IDS)
    with austeer.steer(model, plan, 0.7, mode=mode):
        steered = logits(model, IDS)
        model.save_pretrained(tmp_path)
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
    saved = logits(AutoModelForCausalLM.from_pretrained(tmp_path), IDS)
    torch.testing.assert_close(saved, steered if mode == "auto" else before)
    buffer.seek(0)
    other = tiny_model()
    other.load_state_dict(torch.load(buffer))
    torch.testing.assert_close(logits(other, IDS), saved)


@pytest.mark.parametrize("mode", ["auto", *NO_FOLD[1:]])
def test_threads_share_a_steered_model(mode):
    """One plan for every token: each thread's forward passes have nothing in common."""
    model = tiny_model()
    plan, plain = random_plan(model, sites_for(mode), 25), copy.deepcopy(model)
    inputs = [ids_of_rows(rows=1 + i, length=5 + 3 * i) for i in range(4)]
    expected = [formula_logits(plain, ids, plan, 0.7) for ids in inputs]
    wrong = []

    def run(i):
        for _ in range(15):
            if not torch.allclose(logits(model, inputs[i]), expected[i], rtol=1e-4, atol=1e-4):
                wrong.append(i)

    with austeer.steer(model, plan, 0.7, mode=mode, check=False):
        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_threads_under_a_scope_are_right_or_refused():
    """A scope belongs to the forward pass at hand: two at once must not be mixed up in silence."""
    model = tiny_model()
    plan = random_plan(model, SITES, 25)
    inputs = [ids_of_rows(rows=1 + i, length=5 + 3 * i) for i in range(4)]
    outcomes, lock = [], threading.Lock()
    with austeer.steer(model, plan, 0.7, scope="generation", check=False):
        expected = [text_of(model, ids, use_cache=True) for ids in inputs]

        def run(i):
            for _ in range(6):
                try:
                    outcome = torch.equal(text_of(model, inputs[i]), expected[i])
                except austeer.SteeringError:
                    outcome = "refused"
                except Exception as error:
                    outcome = repr(error)
                with lock:
                    outcomes.append(outcome)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [torch.equal(text_of(model, ids), text) for ids, text in zip(inputs, expected)] == [True] * 4
    assert True in outcomes and set(outcomes) <= {True, "refused"}
