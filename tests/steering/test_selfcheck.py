"""The self-check: silent about what is right, in every dtype and at every strength, and loud about what is not."""

import copy

import pytest
import torch

import austeer
from austeer.steering import bias, columns, fold, fused, path_choice, selfcheck
from austeer_kernels import reference
from dense_formula import OPERATIONS, PATHS, POSSIBLE, assert_unchanged, logits, random_plan, snapshot
from tiny_models import tiny_model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mode", PATHS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_right_passes(tiny, tiny_ids, mode, operation, dtype):
    """At strengths from nothing to far too much: rounding must not be mistaken for a mistake."""
    model = copy.deepcopy(tiny).to(dtype)
    sites = ("attention", "neuron") if mode in ("fold", "fused") else ("attention", "ffn", "layer", "neuron")
    if operation not in POSSIBLE[mode]:
        pytest.skip("refused")
    for alpha in (1e-3, -30.0, 1000.0):
        with austeer.steer(model, random_plan(model, sites, 20, operation), alpha, mode=mode):
            logits(model, tiny_ids)


def broken_columns(path, *args, steer=columns.Columns.apply):
    y = steer(path, *args)
    y[..., int(path.table.index[0, 0])] *= 1.01
    return y


def broken_neighbour(path, *args, steer=columns.Columns.apply):
    y = steer(path, *args)
    y[..., (int(path.table.index[0, 0]) + 1) % y.shape[-1]] += 0.01
    return y


@pytest.mark.parametrize("broken", [broken_columns, broken_neighbour, lambda path, x, *_: x])
@pytest.mark.parametrize("site", ["attention", "ffn", "layer"])
def test_a_wrong_sparse_kernel_is_found_on_the_first_forward(tiny, tiny_ids, monkeypatch, broken, site):
    before = snapshot(tiny)
    monkeypatch.setattr(columns.Columns, "apply", broken)
    plan = random_plan(tiny, site, 20)
    plan = plan.take((plan.index < 31).nonzero().flatten())
    with (
        pytest.raises(austeer.SteeringError, match=f"columns.*'{site}'.*layer 0.*check=False"),
        austeer.steer(tiny, plan, 2.0, mode="columns"),
    ):
        logits(tiny, tiny_ids)
    assert_unchanged(tiny, before)
    with austeer.steer(tiny, plan, 2.0, mode="columns", check=False):
        logits(tiny, tiny_ids)


@pytest.mark.parametrize("site", ["attention", "ffn"])
def test_a_wrong_fused_kernel_is_found(tiny, tiny_ids, monkeypatch, site):
    right = reference.steered_linear  # what runs on a CPU where gradients are wanted
    wrong = {
        "no steering": lambda x, w, b, g, s, *rest: right(x, w, b, g * 0, s, *rest),
        "a column": lambda *args: right(*args).index_add(1, torch.tensor([5]), torch.full((14, 1), 0.01)),
    }
    for make in wrong.values():
        monkeypatch.setattr(reference, "steered_linear", make)
        with (
            pytest.raises(austeer.SteeringError, match=r"self-check.*fused"),
            austeer.steer(tiny, random_plan(tiny, site, 60), 2.0, mode="fused"),
        ):
            tiny(**tiny_ids)


@pytest.mark.parametrize("kernel", ["sparse", "steered_linear_op"])
@pytest.mark.parametrize("named", [False, True])
def test_a_wrong_kernel_is_found_before_a_graph_is_captured(tiny, monkeypatch, kernel, named):
    """In eager mode neither runs here, and nothing can be looked at during a capture."""
    monkeypatch.setattr(path_choice, "measured_limit", lambda *_: 64)
    for module in (fused, columns):
        monkeypatch.setattr(module, "capturable", lambda device: True)
    if kernel == "sparse":
        monkeypatch.setattr(columns, "sparse", lambda x, *_: x)
    else:
        right = fused.steered_linear_op
        monkeypatch.setattr(fused, "steered_linear_op", lambda x, w, b, g, s, *rest: right(x, w, b, g * 0, s, *rest))
    plan = random_plan(tiny, "ffn", 60, "push")
    for check in (False, True):
        with austeer.steer(tiny, {"a": plan} if named else plan, 2.0, check=check) as steering:
            if named:
                steering.rows("a")
            if not check:
                logits(tiny, {"input_ids": torch.tensor([[7]])})
                continue
            with pytest.raises(austeer.SteeringError, match=r"self-check.*fused"):
                logits(tiny, {"input_ids": torch.tensor([[7]])})


@pytest.mark.parametrize("site", ["attention", "ffn"])
def test_what_runs_beyond_the_fused_kernels_tokens_is_checked_too(tiny, monkeypatch, site):
    ids = {"input_ids": torch.randint(3, 999, (5, 20), generator=torch.Generator().manual_seed(0))}
    monkeypatch.setattr(columns.Columns, "apply", lambda path, x, *_: x)
    with (
        pytest.raises(austeer.SteeringError, match=r"self-check.*fused"),
        austeer.steer(tiny, random_plan(tiny, site, 60), 2.0, mode="fused"),
    ):
        tiny(**ids)


@pytest.mark.parametrize("operation", POSSIBLE["fold"])
@pytest.mark.parametrize("site", ["attention", "ffn"])
def test_a_fold_that_does_not_reach_the_output_is_found_and_undone(tiny, monkeypatch, site, operation):
    wrong = {
        "scale": lambda table, *place: fold.Scaling(table.gamma[0] / 2, *place),
        "ablate": lambda table, *place: fold.Ablation(table.direction[0], table.strength[0] / 2, *place),
    }
    before, plan = snapshot(tiny), random_plan(tiny, site, 20, operation)
    monkeypatch.setattr(fold, "change_of", wrong[operation])
    with pytest.raises(austeer.SteeringError, match=r"self-check.*fold"):
        austeer.steer(tiny, plan, 2.0).attach()
    assert_unchanged(tiny, before)
    austeer.steer(tiny, plan, 2.0, check=False).attach().detach()
    assert_unchanged(tiny, before)


def test_it_looks_once_at_one_site_of_each_path(tiny, tiny_ids, monkeypatch):
    seen, steered = [], selfcheck.steered
    monkeypatch.setattr(selfcheck, "steered", lambda x, *rest: seen.append(len(x)) or steered(x, *rest))
    plan = random_plan(tiny, ("ffn", "layer"), 20)
    with austeer.steer(tiny, plan, 2.0):
        for _ in range(3):
            logits(tiny, tiny_ids)
    assert sorted(seen) == [4, 14]  # the rows that a fold is tried on, and the tokens of a forward pass
    seen.clear()
    with austeer.steer(tiny, plan, 2.0, check=False):
        logits(tiny, tiny_ids)
    assert seen == []


def test_mixed_rows_are_checked_by_their_own_plans(tiny, tiny_ids, monkeypatch):
    plans = {"a": random_plan(tiny, "ffn", 20), "b": random_plan(tiny, "ffn", 20, "push", seed=1)}
    with austeer.steer(tiny, plans, 2.0) as steering, steering.rows(["b", None]):
        logits(tiny, tiny_ids)
    right = columns.Columns.apply
    monkeypatch.setattr(columns.Columns, "apply", lambda path, x, rows: right(path, x, rows.roll(7)))
    with (
        pytest.raises(austeer.SteeringError, match=r"self-check.*columns"),
        austeer.steer(tiny, plans, 2.0) as steering,
        steering.rows(["b", None]),
    ):
        logits(tiny, tiny_ids)


def test_what_is_not_finite_is_not_a_mistake_of_steering(tiny, tiny_ids):
    with torch.no_grad():
        tiny.model.layers[0].mlp.down_proj.weight[3] = torch.inf
    with austeer.steer(tiny, random_plan(tiny, "ffn", 60), 2.0, mode="columns"):
        logits(tiny, tiny_ids)


def test_a_scope_of_one_token_among_many_is_checked_there(tiny, monkeypatch):
    monkeypatch.setattr(columns.Columns, "apply", lambda path, x, *_: x)
    ids = {"input_ids": torch.arange(240).view(2, 120)}
    with (
        pytest.raises(austeer.SteeringError, match=r"self-check.*columns"),
        austeer.steer(tiny, random_plan(tiny, "ffn", 20), 2.0, scope=(50, 51)),
    ):
        logits(tiny, ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_strong_shift_folded_into_a_bias_passes(dtype):
    model = tiny_model("opt").to(dtype)
    for site in ("attention", "neuron"):
        for alpha in (1.0, 100.0, 1e4):
            with austeer.steer(model, random_plan(model, site, 40, "shift"), alpha, mode="bias"):
                model(input_ids=torch.tensor([[3, 4, 5]]))


@pytest.mark.parametrize("site", ["attention", "ffn", "layer", "neuron"])
def test_a_bias_that_is_not_what_the_formula_says_is_found_and_undone(tiny, monkeypatch, site):
    before, added = snapshot(tiny), bias.Bias.added
    monkeypatch.setattr(bias.Bias, "added", lambda path: added(path) * 0.5)
    with pytest.raises(austeer.SteeringError, match=r"self-check.*bias"):
        austeer.steer(tiny, random_plan(tiny, site, 20, "shift"), 2.0).attach()
    assert_unchanged(tiny, before)
    austeer.steer(tiny, random_plan(tiny, site, 20, "shift"), 2.0, check=False).attach().detach()
    assert_unchanged(tiny, before)
