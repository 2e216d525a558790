"""Signs pair by pair against the naive loop, and what they say of lengths."""

import numpy as np
import pytest
import torch

from austeer.forward.tokens import tokenise
from austeer.making import momentum_signs as signs
from austeer.making.momentum_signs import following, momentum_signs
from naive_momentum import naive_activations, numbered_pairs


@pytest.mark.parametrize("block", [4, 64])
def test_signs_are_those_of_the_naive_loop(tiny64, demo, monkeypatch, block):
    monkeypatch.setattr(signs, "BLOCK", block)
    pairs = numbered_pairs(11)
    found = tokenise(demo[1], pairs, 100)
    layers, indices = [1, 0, 1, 1], [3, 15, 0, 15]
    for site in ("attention", "ffn"):
        sides = [
            naive_activations(tiny64, demo[1], [p.prompt + getattr(p, side) for p in pairs])[site]
            for side in ("positive", "negative")
        ]
        expected = (sides[0] - sides[1]).sign()[:, layers, indices]
        result = momentum_signs(tiny64, found.positive, found.negative, site, layers, indices, progress=False)
        assert result.dtype == np.int8 and torch.from_numpy(result).double().equal(expected)
        assert not (expected == 0).all() and len(set(expected.flatten().tolist())) == 2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny64.modules()), "the model is as it was"


def test_what_follows_the_side_and_what_follows_the_length():
    rng = np.random.default_rng(0)
    differences = [3] * 40 + [-2] * 40 + [0] * 20
    length = np.sign(differences)
    side = np.ones(100)
    noise = np.where(rng.random(100) < 0.1, -1, 1)
    columns = [side * noise, -side * noise, length * noise, -length * noise, rng.choice([-1, 1], 100), np.zeros(100)]
    found = following(np.stack(columns, 1).astype(np.int8), np.array([0.9, -0.9, 0.6, -0.6, 0.5, 0.0]), differences)
    assert (found.longer, found.shorter) == (40, 40)
    assert found.depends.tolist() == found.turns.tolist() == [False, False, True, True, False, False]
    assert found.agree[0].min() > 0.75 and found.agree[1].min() > 0.75
    assert found.agree[2, 0] > 0.75 and found.agree[2, 1] < 0.25 and found.agree[3, 0] > 0.75
    assert found.agree[5].tolist() == [0.5, 0.5], "no difference anywhere"


def test_a_sign_may_depend_on_length_without_turning():
    differences = [1] * 60 + [-1] * 60
    signs = np.ones((120, 1), dtype=np.int8)
    signs[60:84] = -1  # the plan's sign in 36 of 60 where the negative side is longer
    found = following(signs, np.array([0.8]), differences)
    assert found.depends.tolist() == [True] and found.turns.tolist() == [False]
    assert found.agree[0].tolist() == [1.0, 0.6]
