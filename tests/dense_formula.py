"""The definition of steering, written out with plain PyTorch hooks: what every path is compared with in the tests."""

from contextlib import contextmanager

import torch

from austeer.models.sites import find_sites, fingerprint
from austeer.plans.plan import Plan

SITES = ("attention", "ffn", "layer", "neuron")
WEIGHT_SITES = ("attention", "ffn", "neuron")  # where steering can be an edit of weights
OPERATIONS = ("scale", "push", "shift")
PATHS = ("fold", "bias", "fused", "columns", "dense")
OPERATION = dict.fromkeys(PATHS, "scale") | {"bias": "shift"}  # one that the path can do


def random_plan(model, sites, count, operation="scale", seed=0) -> Plan:
    """A plan of random AUs, for tests that do not need a measured one."""
    generator = torch.Generator().manual_seed(seed)
    found = find_sites(model)
    print_ = fingerprint(model, found)
    sites = [sites] if isinstance(sites, str) else list(sites)
    names, layers, indices = [], [], []
    for name in sites:
        width = print_.widths[name]
        flat = torch.randperm(print_.layers * width, generator=generator)[:count]
        names += [name] * count
        layers.append(flat // width)
        indices.append(flat % width)
    total = count * len(sites)
    beta = torch.rand(total, generator=generator) * 2 - 1
    delta = torch.randn(total, generator=generator)
    return Plan(
        tuple(names), torch.cat(layers).int(), torch.cat(indices).int(), beta, delta, operation, print_, pairs=10
    )


def shift_plan(model, sites=SITES, count=25, seed=0) -> Plan:
    return random_plan(model, sites, count, "shift", seed)


def keep_layers(plan, layers) -> Plan:
    return plan.take(torch.tensor([i for i, layer in enumerate(plan.layer.tolist()) if layer in layers]))


def hook(model, site, change):
    """Puts ``change`` of a site's tensor in its place, by a hook."""
    module = model.get_submodule(site.path)
    if site.side == "input":
        return module.register_forward_pre_hook(lambda m, args: (change(args[0]), *args[1:]))
    return module.register_forward_hook(
        lambda m, args, out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
    )


def formula(model, plan, alpha, where=None):
    """The definition, written out with plain PyTorch hooks and dense vectors; returns what removes them.

    where: bool [batch, tokens], the tokens that are steered; None: all.
    """
    handles = []

    def steered(x, rows):
        if where is None:
            return at_all(x, rows)
        return torch.where(where.reshape(*x.shape[:-1], 1), at_all(x, rows), x)

    def at_all(x, rows):
        index = plan.index[rows].long()
        beta, delta = (torch.zeros(x.shape[-1], dtype=x.dtype, device=x.device) for _ in range(2))
        beta[index] = plan.beta[rows].to(x)
        delta[index] = plan.delta[rows].to(x)
        strength = torch.tensor(alpha, dtype=x.dtype, device=x.device)
        if plan.operation == "scale":
            return x + strength * beta * x
        if plan.operation == "push":
            return x + strength * beta * x.abs()
        return x + strength * delta

    for name, sites in find_sites(model, plan.sites).items():
        for site in sites:
            rows = [r for r in range(len(plan)) if plan.site[r] == name and plan.layer[r] == site.layer]
            if rows:
                handles.append(hook(model, site, lambda x, rows=rows: steered(x, rows)))
    return handles


@contextmanager
def formula_at(model, plan, alpha, where=None):
    """``formula`` for the time of the context."""
    handles = formula(model, plan, alpha, where)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits(model, ids):
    return model(**ids).logits


@torch.no_grad()
def formula_logits(model, ids, plan, alpha):
    with formula_at(model, plan, alpha):
        return model(**ids).logits


def snapshot(model):
    """Every parameter and buffer, and every attribute name of every module."""
    tensors = {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    return tensors, {name: set(vars(module)) for name, module in model.named_modules()}


def assert_unchanged(model, before):
    tensors, attributes = snapshot(model)
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(tensors[name], before[0][name]) for name in tensors)
    assert attributes == before[1]


def modules_of(model):
    """All that could tell that a module was steered: names and their order, and which tensors they are."""
    return {
        name: (
            list(vars(m)),
            [(key, id(p)) for key, p in m._parameters.items()],
            [(key, id(b)) for key, b in m._buffers.items()],
            set(m._non_persistent_buffers_set),
        )
        for name, m in model.named_modules()
    }
