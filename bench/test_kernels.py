"""The three operations beside the plain PyTorch that they stand in for, group by group."""

import pytest
import torch
from torch.nn.functional import linear

import austeer_kernels as ak
from austeer_kernels import reference

DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}


def steering(width, k, device):
    index = torch.randperm(width, device=device)[None, :k]
    gamma = torch.rand(1, k, device=device) - 0.5
    return index, gamma, torch.zeros_like(gamma)


@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize("shape", [(1, 576), (512, 576), (1, 4096), (512, 4096)], ids=str)
@pytest.mark.parametrize("form", ["ours", "dense", "indexing"])
def test_steer_columns(timed, device, shape, k, form):
    y = torch.randn(shape, device=device, dtype=DTYPE[device.type])
    index, gamma, shift = steering(shape[1], k, device)
    factor = torch.ones(shape[1], device=device).index_copy_(0, index[0], 1 + gamma[0]).to(y.dtype)
    expected = y * factor

    def ours():
        return ak.steer_columns_(y.clone(), index, gamma, shift)

    def indexing():
        steered = y.clone()
        steered[:, index[0]] *= 1 + gamma[0].to(y.dtype)
        return steered

    forms = {"ours": ours, "dense": lambda: y.clone().mul_(factor), "indexing": indexing}
    timed(forms[form], expected, group=f"steer {shape} k={k} {device}")


@pytest.mark.parametrize("tokens", [1, 16, 512])
@pytest.mark.parametrize("form", ["fused", "linear", "linear then columns"])
def test_steered_linear(timed, device, tokens, form):
    dtype = DTYPE[device.type]
    x, weight = (torch.randn(rows, 1536, device=device, dtype=dtype) for rows in (tokens, 576))
    index, gamma, shift = steering(576, 100, device)
    dense = torch.zeros(1, 576, device=device).index_copy_(1, index[0], gamma)
    none = torch.zeros_like(dense)
    plain = reference.steered_linear(x, weight, None, none, none, False, False, None)
    steered = reference.steered_linear(x, weight, None, dense, none, False, False, None)
    forms = {
        "fused": (lambda: ak.steered_linear(x, weight, None, dense, none), steered),
        "linear": (lambda: linear(x, weight), plain),
        "linear then columns": (lambda: ak.steer_columns_(linear(x, weight), index, gamma, shift), steered),
    }
    timed(*forms[form], group=f"linear 1536 -> 576, {tokens} tokens, {device}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(256, 17280), (1000, 4096), (128, 327680)], ids=str)
@pytest.mark.parametrize("form", ["ours", "whole tensors", "plain read"])
def test_momentum_update(timed, device, shape, dtype, form):
    positive, negative = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    counters = ak.momentum_counters(shape[1], device)
    more = (positive > negative).sum(0)

    def ours():
        counters[0].zero_()
        ak.momentum_update(positive, negative, *counters)
        return counters[0]

    def whole_tensors():
        finite = positive.isfinite() & negative.isfinite()
        delta = torch.where(finite, positive.double() - negative.double(), 0.0)
        found = (delta > 0).sum(0)
        return found, (delta < 0).sum(0), delta.sum(0), delta.square().sum(0), (~finite).int().argmax(0)

    def plain_read():
        return positive.sum(0, dtype=torch.float32) + negative.sum(0, dtype=torch.float32)

    function, expected = {
        "ours": (ours, more),
        "whole tensors": (lambda: whole_tensors()[0], more),
        "plain read": (plain_read, positive.double().sum(0) + negative.double().sum(0)),
    }[form]
    timed(function, expected, group=f"momentum {shape} {dtype} {device}", rtol=0.5 / shape[0])
