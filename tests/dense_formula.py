"""The definition of steering, written out with plain PyTorch hooks: what every path is compared with in the tests."""

import torch

from austeer.plan import Plan
from austeer.sites import find_sites, fingerprint

SITES = ("attention", "ffn", "layer", "neuron")
OPERATIONS = ("scale", "push", "shift")
PATHS = ("fold", "fused", "columns", "dense")


def random_plan(model, sites, count, operation="scale", seed=0) -> Plan:
    """A plan of random AUs, for tests that do not need a measured one."""
    generator = torch.Generator().manual_seed(seed)
    found = find_sites(model, SITES)
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


def formula(model, plan, alpha):
    """The definition, written out with plain PyTorch hooks and dense vectors; returns what removes them."""
    handles = []

    def steered(x, rows):
        index = plan.index[rows].long()
        beta, delta = (torch.zeros(x.shape[-1], dtype=x.dtype) for _ in range(2))
        beta[index] = plan.beta[rows].to(x.dtype)
        delta[index] = plan.delta[rows].to(x.dtype)
        strength = torch.tensor(alpha, dtype=x.dtype)
        if plan.operation == "scale":
            return x + strength * beta * x
        if plan.operation == "push":
            return x + strength * beta * x.abs()
        return x + strength * delta

    layers = model.model.layers
    for i, layer in enumerate(layers):
        for name in set(plan.site):
            rows = [r for r in range(len(plan)) if plan.site[r] == name and plan.layer[r] == i]
            if not rows:
                continue
            if name in ("attention", "neuron"):
                module = layer.self_attn.o_proj if name == "attention" else layer.mlp.down_proj
                hook = module.register_forward_pre_hook(lambda m, args, rows=rows: (steered(args[0], rows), *args[1:]))
            else:
                module = layer.mlp if name == "ffn" else layer
                hook = module.register_forward_hook(lambda m, args, out, rows=rows: steered(out, rows))
            handles.append(hook)
    return handles


@torch.no_grad()
def logits(model, ids):
    return model(**ids).logits


@torch.no_grad()
def formula_logits(model, ids, plan, alpha):
    handles = formula(model, plan, alpha)
    try:
        return model(**ids).logits
    finally:
        for handle in handles:
            handle.remove()


def snapshot(model):
    """Every parameter and buffer, and every attribute name of every module."""
    tensors = {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    return tensors, {name: set(vars(module)) for name, module in model.named_modules()}


def assert_unchanged(model, before):
    tensors, attributes = snapshot(model)
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(tensors[name], before[0][name]) for name in tensors)
    assert attributes == before[1]
