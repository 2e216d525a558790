"""The vLLM plugin inside a model: which row each token has, and what the layers add to it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from austeer.errors import SiteError
from austeer.models.sites import Fingerprint
from austeer.plans.plan import Plan
from austeer.steering.scope import parse_scope
from austeer.vllm.layers import Steer, Tables, install, site_module
from austeer.vllm.sets import ServingError
from austeer.vllm.slots import RowBuffer, RowOf, Slots
from austeer.vllm.tables import Structure, lists_of

SCOPES = {"all": "all", "generation": "generation", "prompt": "prompt", "last": "last_prompt_token", "range": (2, 5)}
SCOPES["from last"] = "from_last_prompt_token"
INSIDE = {
    "all": lambda position, prompt: True,
    "generation": lambda position, prompt: position >= prompt,
    "prompt": lambda position, prompt: position < prompt,
    "last": lambda position, prompt: position == prompt - 1,
    "from last": lambda position, prompt: position >= prompt - 1,
    "range": lambda position, prompt: 2 <= position < 5,
}
NAMES = [None, *SCOPES]
COUNT = 5  # slots


def slots():
    return Slots(COUNT)


def steering(name, prompt):
    """What the scheduler tells of a request for a scope by name."""
    if name is None:
        return None
    start, stop = parse_scope(SCOPES[name]).interval(prompt, 0, 0)
    return RowOf(list(SCOPES).index(name), name, "", start, stop)


REQUEST = st.tuples(st.sampled_from(NAMES), st.integers(1, 6), st.integers(0, 7), st.integers(1, 4))


@given(st.lists(REQUEST, max_size=COUNT), st.permutations(range(COUNT)), st.integers(0, 3))
@settings(deadline=None)
def test_each_token_has_the_row_of_its_request_where_its_scope_says_so(requests, order, padding):
    """Requests of (set, prompt length, tokens computed so far, tokens in this batch), each in any slot."""
    found = slots()
    for slot in range(COUNT):
        found.put(slot, steering("all", 3))  # of requests that are gone
    expected = []
    for slot, (name, prompt, computed, tokens) in zip(order, requests):
        found.put(slot, steering(name, prompt))
        for position in range(computed, computed + tokens):
            steered = name is not None and INSIDE[name](position, prompt)
            expected.append(list(SCOPES).index(name) if steered else -1)
    batch = np.array(order[: len(requests)], dtype=np.int64)
    first, lengths = (np.array([r[i] for r in requests], dtype=np.int64) for i in (2, 3))
    rows = found.batch(batch, lengths, first, len(expected) + padding).rows
    assert rows.dtype == np.int32 and rows.tolist() == [*expected, *[-1] * padding]


def rows_of_all(found):
    one = np.ones(COUNT, dtype=np.int64)
    return found.batch(np.arange(COUNT), one, 9 * one, COUNT).rows.tolist()


def test_requests_move_between_slots():
    found = slots()
    found.put(0, steering("all", 1))
    found.put(3, steering("generation", 1))
    assert rows_of_all(found) == [0, -1, -1, 1, -1]
    found.move(0, 3, swap=True)
    assert rows_of_all(found) == [1, -1, -1, 0, -1]
    found.move(3, 1, swap=False)
    assert rows_of_all(found) == [1, 0, -1, -1, -1]
    found.move(2, 0, swap=False)  # one that is not steered takes the place of one that is
    assert rows_of_all(found) == [-1, 0, -1, -1, -1]
    found.put(1, None)
    assert rows_of_all(found) == [-1] * COUNT


def test_the_row_buffer_stays_where_it_is_and_forgets_longer_batches():
    buffer = RowBuffer(6, torch.device("cpu"))
    place = buffer.tensor.data_ptr()
    for rows in ([1, 2, 3, 4], [2, 1], [2, 1], [], [5, 5, 5, 5, 5, 5]):
        with torch.inference_mode():
            buffer.write(np.array(rows, dtype=np.int32))
        assert buffer.tensor.tolist() == rows + [-1] * (6 - len(rows)) and buffer.tensor.data_ptr() == place


def test_the_row_buffer_does_not_share_what_it_was_given():
    buffer, rows = RowBuffer(2, torch.device("cpu")), np.array([1, 2], dtype=np.int32)
    buffer.write(rows)
    rows[0] = 7
    buffer.write(rows)
    assert buffer.tensor.tolist() == [7, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operations", [["push"], ["shift"], ["scale", "shift"], ["scale", "push", "shift"]])
@pytest.mark.parametrize("in_place", [False, True])
def test_the_formula_at_aus_where_plans_of_a_set_meet(seed, dtype, operations, in_place):
    plans = [plan("neuron", operation) for operation in operations]
    plans = [replace(p, beta=p.beta / 4) for p in plans]  # a scale of about -1 beside push is refused
    sets = [[(p, alpha) for p in plans] for alpha in (1.5, -2.0)]
    rows = torch.tensor([-1, 1, 0, 0, 1, 0, 0], dtype=torch.int32)
    x = torch.randn(5, 10, dtype=dtype)
    exact = x.double()
    for p in plans:
        alpha = torch.tensor([0.0, -2.0, 1.5, 1.5, -2.0]).double()[:, None]
        of = {"scale": x.double() * p.beta, "push": x.double().abs() * p.beta, "shift": p.delta.double()}[p.operation]
        exact = exact + alpha * of
    steer = steer_of(sets, rows)
    assert len(steer.kinds) == 1 + ("push" in operations and len(operations) > 1)
    steer.in_place = in_place  # as on a GPU
    found = steer(x.clone())
    assert found.dtype == dtype and torch.equal(found[0], x[0])
    assert (found.double() - exact).abs().max() <= len(steer.kinds) * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_direction_is_removed_before_what_else_a_row_does(seed, dtype):
    ablate, shift = plan("neuron", "ablate").top(6), plan("neuron", "shift")
    rows = torch.tensor([1, -1, 0, 2], dtype=torch.int32)
    steer = steer_of([[(ablate, 1.0)], [(ablate, 0.5), (shift, 2.0)], [(shift, 1.0)]], rows)
    x = torch.randn(4, 10).to(dtype)
    found = steer(x.clone())
    d = torch.zeros(10, dtype=torch.float64)
    d[ablate.index.long()] = ablate.delta.double()
    d /= d.norm()
    ablated = x.double() - torch.tensor([0.5, 0, 1, 0]).double()[:, None] * d * (x.double() @ d)[:, None]
    exact = ablated + torch.tensor([2.0, 0, 0, 1]).double()[:, None] * shift.delta.double()
    assert torch.equal(found[1], x[1])
    assert (found.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()


def test_a_direction_over_several_processes_is_refused():
    ablate = plan("attention", "ablate")
    with pytest.raises(ServingError, match=r"'ablate' at site 'attention'.*2 processes"):
        installed(Decoder(part=2), [[(ablate, 1.0)]], torch.zeros(4, dtype=torch.int32), part=(0, 2))


def test_a_tensor_that_is_no_activation_is_refused():
    steer = steer_of([[(plan("neuron", "shift"), 1.0)]], torch.zeros(8, dtype=torch.int32))
    for x in (
        *(torch.zeros(5, 10, dtype=dtype) for dtype in (torch.int8, torch.float64)),
        *(torch.zeros(5, 8), torch.zeros(1, 5, 10)),
    ):
        with pytest.raises(SiteError, match=r"\[tokens, 10\]"):
            steer(x)


def test_what_no_set_steers_keeps_its_bits_at_a_layer():
    """Its sum with the residual is rounded by the next layer's norm, and not here."""
    model, p = Decoder(layers=1), replace(plan("layer", "shift", layer=0).top(2), delta=torch.tensor([2.0, 3.0]))
    rows = torch.tensor([-1, 0], dtype=torch.int32)
    installed(model, [[(p, 1.0)]], rows, range(1))
    hidden, residual = torch.randn(2, 6).bfloat16(), 100 * torch.randn(2, 6).bfloat16()
    hidden[1, 5] = torch.inf
    hook = next(iter(model.model.layers[0]._forward_hooks.values()))
    found, same = hook(model.model.layers[0], (), (hidden.clone(), residual))
    assert same is residual and torch.equal(found[0], hidden[0])
    chosen = p.index.long()
    others = [c for c in range(6) if c not in chosen.tolist()]
    assert torch.equal(found[1, others], hidden[1, others])
    torch.testing.assert_close(found[1, chosen].float(), hidden[1, chosen].float() + p.delta, rtol=2**-8, atol=0)


def structure(sets, model=None):
    """The room that rows of (plan, alpha)s need."""
    room = {}
    for parts in sets:
        for place, (index, _, _) in lists_of(parts).items():
            room[place] = max(room.get(place, 0), len(index))
    fingerprint = model or sets[0][0][0].model
    return Structure(
        fingerprint, len(sets), dict(sorted(room.items(), key=lambda item: (item[0][2] != "push", item[0])))
    )


def steer_of(sets, rows, width=10):
    """A module with the AUs of all sets at their one site and layer."""
    found = structure(sets)
    steer = Steer({kind: count for (_, _, kind), count in found.room.items()}, len(sets), rows, width)
    tables = Tables({place[:2]: steer for place in found.room}, found.places)
    for number, parts in enumerate(sets):
        tables.fill(number, found.row(parts))
    return steer


def installed(model, sets, rows, layers=range(2), part=(0, 1)):
    found = structure(sets)
    tables = install(model, found, layers, rows, part)
    for number, parts in enumerate(sets):
        tables.fill(number, found.row(parts))
    return tables


class Projection(nn.Module):
    """Like vLLM's linear layers: knows its sizes, returns its bias apart."""

    def __init__(self, inputs, outputs, part=1):
        super().__init__()
        self.input_size, self.output_size = inputs, outputs
        self.linear = nn.Linear(inputs // part, outputs, bias=False)

    def forward(self, x):
        return self.linear(x), None


class Decoder(nn.Module):
    """Llama's structure in vLLM, with its residual that is added late; no attention between tokens."""

    def __init__(self, layers=2, width=6, inner=10, part=1):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Layer(width, inner, part) for _ in range(layers))

    def forward(self, hidden):
        residual = torch.zeros_like(hidden)
        for layer in self.model.layers:
            hidden, residual = layer(hidden, residual)
        return hidden + residual


class Layer(nn.Module):
    def __init__(self, width, inner, part):
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), Mlp(width, inner)
        self.self_attn.o_proj = Projection(8, width, part)
        self.attention = nn.Linear(width, 8 // part, bias=False)

    def forward(self, hidden, residual):
        residual = hidden + residual
        hidden = self.self_attn.o_proj(self.attention(residual).tanh())[0]
        residual = hidden + residual
        return self.mlp(residual), residual


class Mlp(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.up, self.down_proj = nn.Linear(width, inner, bias=False), Projection(inner, width)

    def forward(self, x):
        return self.down_proj(self.up(x).tanh())[0]


WIDTHS = {"attention": 8, "ffn": 6, "layer": 6, "neuron": 10}


def plan(site, operation, layer=1, model_type="llama", layers=2, widths=WIDTHS):
    count = widths[site]
    fingerprint = Fingerprint(model_type, layers, widths, "a model", None)
    index, layer = torch.arange(count).int(), torch.full((count,), layer).int()
    beta, delta = torch.rand(count) * 2 - 1, torch.randn(count)
    return Plan((site,) * count, layer, index, beta, delta, operation, fingerprint, pairs=4)


def by_hand(model, plan, alpha, hidden):
    """The model's arithmetic, with the plan's steering at its site."""

    def steered(x, site, layer):
        if site != plan.site[0] or layer != plan.layer[0]:
            return x
        return {
            "scale": x + alpha * plan.beta * x,
            "push": x + alpha * plan.beta * x.abs(),
            "shift": x + alpha * plan.delta,
        }[plan.operation]

    for i, layer in enumerate(model.model.layers):
        z = steered(layer.attention(hidden).tanh(), "attention", i)
        hidden = hidden + layer.self_attn.o_proj.linear(z)
        inner = steered(layer.mlp.up(hidden).tanh(), "neuron", i)
        hidden = hidden + steered(layer.mlp.down_proj.linear(inner), "ffn", i)
        hidden = steered(hidden, "layer", i)
    return hidden


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("site", WIDTHS)
def test_the_layers_do_what_the_formula_says(seed, site, compiled, in_place):
    model, plans = Decoder(), [plan(site, operation) for operation in ("scale", "push", "shift")]
    rows = torch.full((16,), -1, dtype=torch.int32)
    installed(model, [[(p, 1.5)] for p in plans], rows)
    site_module(model, "llama", site, 1).austeer.in_place = in_place
    run, graphs = model, []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if compiled:
        torch._dynamo.reset()
        run = torch.compile(model, backend=count, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for order in ([-1, 0, 1, 2, 0], [2, -1, 1], [-1, -1, -1, -1]):
            x = torch.randn(len(order), 6)
            rows[: len(order)] = torch.tensor(order)
            found = run(x)
            for number, row in enumerate(order):
                one = x[number : number + 1]
                expected = by_hand(model, plans[row], 1.5 if row >= 0 else 0.0, one)
                torch.testing.assert_close(found[number : number + 1], expected, rtol=1e-5, atol=1e-5)
    assert len(graphs) == compiled  # neither other rows nor another number of tokens makes another one


def test_a_process_of_a_tensor_parallel_group_steers_its_share(seed):
    found, x = [], torch.randn(2, 8)
    sets = [[(plan("attention", "shift").top(k), 2.0)] for k in (8, 3)]
    rows = torch.tensor([1, 0], dtype=torch.int32)
    for rank in range(2):
        model = Decoder(part=2)
        installed(model, sets, rows, part=(rank, 2))
        found.append(model.model.layers[1].self_attn.o_proj.austeer(x[:, 4 * rank : 4 * rank + 4].clone()))
    assert torch.equal(torch.cat(found, dim=1), steer_of(sets, rows, 8)(x.clone()))
    assert not torch.equal(torch.cat(found, dim=1), x)


def test_a_process_steers_the_layers_that_it_has():
    model = Decoder()
    both = [[(plan("ffn", "shift", layer=0), 1.0), (plan("ffn", "shift", layer=1), 1.0)]]
    installed(model, both, torch.zeros(4, dtype=torch.int32), range(1, 2))
    assert hasattr(model.model.layers[1].mlp, "austeer") and not hasattr(model.model.layers[0].mlp, "austeer")


def test_nothing_of_the_steering_is_saved_with_the_model():
    model = Decoder()
    before = model.state_dict().keys()
    installed(model, [[(plan("ffn", "shift"), 1.0)]], torch.zeros(4, dtype=torch.int32))
    assert model.state_dict().keys() == before


def test_other_aus_in_a_row_leave_nothing_of_those_before(seed):
    first, second = plan("neuron", "push"), plan("neuron", "shift").top(3)
    rows, x = torch.zeros(5, dtype=torch.int32), torch.randn(5, 10)
    steer = steer_of([[(first, 1.0)], [(second, 1.0)]], rows)
    tables = Tables({("neuron", 1): steer}, structure([[(first, 1.0)], [(second, 1.0)]]).places)
    room = structure([[(first, 1.0)], [(second, 1.0)]])
    for parts in ([(first, 1.0)], [(second, 2.0)], [(first, -1.0), (second, 1.0)], [(second, 0.5)]):
        tables.fill(0, room.row(parts))
        assert torch.equal(steer(x.clone()), steer_of([parts, [(first, 1.0)], [(second, 1.0)]], rows)(x.clone()))


def test_a_model_whose_sites_are_not_as_its_config_says_is_refused():
    found = structure([[(plan("ffn", "shift", widths=WIDTHS | {"ffn": 12}), 1.0)]])
    with pytest.raises(SiteError, match=r"'ffn', layer 1: found 6 AUs, expected 12"):
        install(Decoder(), found, range(2), torch.zeros(4, dtype=torch.int32))


def test_a_model_without_the_usual_names_is_refused():
    model = Decoder()
    model.model.layers[0].self_attn = nn.Module()
    with pytest.raises(SiteError, match=r"model\.layers\.0\.self_attn\.o_proj.*'attention'"):
        site_module(model, "llama", "attention", 0)
    with pytest.raises(SiteError, match=r"unknown.*layout"):
        site_module(model, "unknown", "attention", 0)
