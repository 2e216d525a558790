"""The definition of steering, written out with plain PyTorch hooks: what every path is compared with in the tests."""

from contextlib import contextmanager

import torch

from austeer.models.sites import find_sites, fingerprint
from austeer.plans.plan import Plan

SITES = ("attention", "ffn", "layer", "neuron")
WEIGHT_SITES = ("attention", "ffn", "neuron")  # where steering can be an edit of weights
BY_UNIT = ("scale", "push", "shift")  # what is done to each AU by itself, which all kernels can do
OPERATIONS = (*BY_UNIT, "ablate")
PATHS = ("fold", "bias", "fused", "columns", "dense")
#: What each path can do.
POSSIBLE = {
    "fold": ("scale", "ablate"),
    "bias": ("shift",),
    "fused": BY_UNIT,
    "columns": OPERATIONS,
    "dense": OPERATIONS,
}
OPERATION = dict.fromkeys(PATHS, "scale") | {"bias": "shift"}  # one that the path can do


def random_plan(model, sites, count, operation="scale", seed=0, layout=None) -> Plan:
    """A plan of random AUs, for tests that do not need a measured one."""
    generator = torch.Generator().manual_seed(seed)
    found = find_sites(model, None if layout is None else sites, layout)
    print_ = fingerprint(model, found)
    sites = [sites] if isinstance(sites, str) else list(sites)
    names, layers, indices = [], [], []
    for name in sites:
        width, numbers = print_.widths[name], torch.tensor([site.layer for site in found[name]])
        flat = torch.randperm(len(numbers) * width, generator=generator)[:count]
        names += [name] * count
        layers.append(numbers[flat // width])
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


def at_units(x, plan, rows, alpha):
    """What the plan's rows, all of one site and layer, make of ``x`` [..., width]."""
    index = plan.index[rows].long()
    beta, delta = (torch.zeros(x.shape[-1], dtype=x.dtype, device=x.device) for _ in range(2))
    beta[index] = plan.beta[rows].to(x)
    delta[index] = plan.delta[rows].to(x)
    strength = torch.tensor(alpha, dtype=x.dtype, device=x.device)
    if plan.operation == "scale":
        return x + strength * beta * x
    if plan.operation == "push":
        return x + strength * beta * x.abs()
    if plan.operation == "ablate":
        direction = torch.nn.functional.normalize(delta.double(), dim=0).float().to(x)
        return x - strength * (x @ direction)[..., None] * direction
    return x + strength * delta


def formula(model, plan, alpha, where=None, layout=None):
    """The definition, written out with plain PyTorch hooks and dense vectors; returns what removes them.

    where: bool [batch, tokens], the tokens that are steered; None: all. layout: for find_sites.
    """
    handles = []

    def steered(x, rows):
        if where is None:
            return at_units(x, plan, rows, alpha)
        return torch.where(where.reshape(*x.shape[:-1], 1), at_units(x, plan, rows, alpha), x)

    for name, sites in find_sites(model, plan.sites, layout).items():
        for site in sites:
            rows = [r for r in range(len(plan)) if plan.site[r] == name and plan.layer[r] == site.layer]
            if rows:
                handles.append(hook(model, site, lambda x, rows=rows: steered(x, rows)))
    return handles


@contextmanager
def formula_at(model, plan, alpha, where=None, layout=None):
    """``formula`` for the time of the context."""
    handles = formula(model, plan, alpha, where, layout)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits(model, ids):
    return model(**ids).logits


def inside(scope, mask, prompt):
    """bool [batch, columns]: the definition of a scope, token by token, from the mask of whole sequences."""
    chosen = torch.zeros_like(mask, dtype=torch.bool)
    for row, real in enumerate(mask.bool()):
        columns = real.nonzero().flatten().tolist()
        last = max(c for c in columns if c < prompt)
        for number, column in enumerate(columns):
            chosen[row, column] = {
                "all": True,
                "prompt": column < prompt,
                "generation": column >= prompt,
                "last_prompt_token": column == last,
                "from_last_prompt_token": column >= last,
            }.get(scope, False)
            if isinstance(scope, tuple):
                chosen[row, column] = scope[0] <= number < (scope[1] or 10**6)
    return chosen


def greedy_by_recomputing(model, batch, plan, alpha, scope, new, layout=None):
    """Greedy tokens from whole sequences run anew for each token, with the formula at the scope's tokens."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    prompt = ids.shape[1]
    for _ in range(new):
        with formula_at(model, plan, alpha, inside(scope, mask, prompt), layout):
            best = logits(model, {"input_ids": ids, "attention_mask": mask})[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, best], 1), torch.cat([mask, torch.ones_like(best)], 1)
    return ids


@torch.no_grad()
def formula_logits(model, ids, plan, alpha):
    with formula_at(model, plan, alpha):
        return model(**ids).logits


def snapshot(model):
    """Every parameter and buffer, and of every module its attributes' names, its mode and what needs gradients."""
    tensors = {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    modes = {name: (set(vars(module)), type(module), module.training) for name, module in model.named_modules()}
    return tensors, modes, {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def assert_unchanged(model, before):
    tensors, *rest = snapshot(model)
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(tensors[name], before[0][name]) for name in tensors)
    assert rest == list(before[1:])


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
