"""Counts of operations, bytes and arithmetic, against sums done by hand and PyTorch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from austeer_kernels import steer_columns_, steered_linear
from bench.counted_ops import CountedOps, count
from tiny_models import ids_of_rows, tiny_model


def counted(run):
    with torch.no_grad(), CountedOps() as found:
        run()
    return found


def only(run):
    found = counted(run)
    assert found.launches == 1, [call.name for call in found.calls]
    return found.read, found.written, found.operations


@pytest.fixture
def x():
    return torch.ones(4, 10)


def test_views_and_allocations_are_no_work(x):
    found = counted(
        lambda: (x.view(2, 20).t()[1:], x.expand(3, 4, 10), torch.empty(9), x.detach(), x.split(2), x.shape)
    )
    assert (found.launches, found.read, found.written, found.operations) == (0, 0, 0, 0)


def test_arithmetic_by_hand(x):
    gamma = torch.ones(10)
    assert only(lambda: x * gamma) == (160 + 40, 160, 40)
    assert only(lambda: x + x) == (160, 160, 40), "the same values given twice are read once"
    assert only(lambda: x.addcmul_(x, gamma)) == (200, 160, 80)
    assert only(lambda: x.add_(gamma)) == (200, 160, 40)
    assert only(lambda: x.copy_(torch.empty(4, 10))) == (160, 160, 0)
    assert only(lambda: x.zero_()) == (0, 160, 0)
    assert only(lambda: x[:, :3] * 2) == (48, 48, 12), "a view counts as what it shows"
    assert only(lambda: gamma.expand(50, 10).abs()) == (40, 2000, 500), "repeated values are read once"
    assert only(lambda: x.to(torch.bfloat16)) == (160, 80, 0)


def test_gathers_and_scatters_count_what_is_selected(x):
    index = torch.tensor([1, 5, 7])
    assert only(lambda: x.index_select(1, index)) == (48 + 24, 48, 0)
    assert only(lambda: x[..., index]) == (48 + 24, 48, 0)
    assert only(lambda: x.index_copy_(1, index, torch.empty(4, 3))) == (48 + 24, 48, 0)
    assert only(lambda: x.index_put_((torch.tensor([0, 1]), torch.tensor([2, 3])), torch.empty(2))) == (8 + 32, 8, 0)
    found = counted(lambda: x[..., index].mul_(2))
    assert [call.name for call in found.calls] == ["aten::index", "aten::mul_"]


def test_products_by_hand_and_weights_apart():
    layer = torch.nn.Linear(6, 8)
    x = torch.ones(5, 6)
    found = count(layer, lambda: layer(x))
    assert (found.launches, found.written, found.operations) == (1, 160, 2 * 5 * 6 * 8)
    assert found.weights == 4 * (48 + 8) and found.read == found.weights + 120
    table = torch.nn.Embedding(100, 6)
    found = count(table, lambda: table(torch.tensor([3, 4])))
    assert (found.read, found.weights, found.written) == (48 + 16, 48, 48)
    assert count(table, lambda: layer(x)).weights == 0, "another model's"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_composite_operations_are_taken_apart(mode):
    layer, x = torch.nn.Linear(6, 8), torch.ones(2, 5, 6)
    with mode(), CountedOps(layer) as found:
        layer(x)
    assert [call.name for call in found.calls] == ["aten::addmm"]


def test_our_operations_on_a_cpu_are_what_they_consist_of(x):
    index, gamma, shift = torch.tensor([[1, 5]]), torch.full((1, 2), 0.5), torch.zeros(1, 2)
    found = counted(lambda: steer_columns_(x, index, gamma, shift))
    names = [call.name.removeprefix("aten::") for call in found.calls]
    assert names == ["index_select", "add", "addcmul", "index_copy_"]
    assert x[0].tolist() == [1, 1.5, 1, 1, 1, 1.5, 1, 1, 1, 1], "it was steered, and once"
    weight, dense = torch.ones(8, 10), torch.zeros(1, 8)
    found = counted(lambda: steered_linear(x, weight, None, dense, dense))
    assert [call.name for call in found.calls] == ["aten::mm", "aten::add", "aten::addcmul"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_products_of_models_are_those_of_torch_s_counter(family):
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    ids = ids_of_rows()
    with FlopCounterMode(display=False) as theirs, torch.no_grad():
        before = model(**ids).logits
    after = []
    found = count(model, lambda: after.append(model(**ids).logits))
    products = [call for call in found.calls if call.name.removeprefix("aten::") in ("mm", "addmm", "bmm", "baddbmm")]
    assert torch.equal(after[0], before), "counting changes nothing"
    assert sum(call.operations for call in products) == theirs.get_total_flops() < found.operations


@pytest.mark.parametrize("heads", [8, 2])
def test_attention_with_fewer_keys_than_queries_is_counted(heads):
    query, keys, values = torch.ones(3, 8, 5, 16), torch.ones(3, heads, 7, 16), torch.ones(3, heads, 7, 16)
    attention = torch.nn.functional.scaled_dot_product_attention
    found = counted(lambda: attention(query, keys, values, enable_gqa=heads != 8))
    assert found.operations >= 2 * 3 * 8 * 5 * 7 * 16 * 2
    assert sum(call.operations for call in found.calls if "attention" in call.name or "bmm" in call.name) == (
        2 * 3 * 8 * 5 * 7 * 16 * 2
    )
