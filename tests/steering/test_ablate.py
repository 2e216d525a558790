"""Directional ablation on a live model: what is its own; the rest is with the other operations, in their tests."""

import pytest
import torch

import austeer
from dense_formula import assert_unchanged, formula_at, logits, snapshot


@pytest.mark.parametrize("mode", ["auto", "fold", "columns"])
def test_a_direction_of_a_real_model_is_removed(demo, measured, tiny_ids, mode):
    model = demo[0]
    plan, ids = measured.select("ffn", k=60, operation="ablate"), {"input_ids": torch.tensor([[504, 905, 314, 253]])}
    before = snapshot(model)
    with formula_at(model, plan, 1.0):
        expected = logits(model, ids)
    with austeer.steer(model, plan, 1.0, mode=mode) as steering:
        found = logits(model, ids)
        assert {row.path for row in steering.report()} == {"columns" if mode == "columns" else "fold"}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(model, ids)).abs().max() > 0.01
    assert_unchanged(model, before)
