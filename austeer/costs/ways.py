"""What each way to steer does at one site of one layer in one forward pass: bytes, operations, launches.

Written down from what the code does (austeer/steering, the kernels, what others call), as a list of operations. In
the sums each operation reads every tensor that it is given once and writes every one that it makes once; of a gather or
scatter only the selected values count. A launch is one operation that does work, no view: on a GPU a kernel or a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from austeer_kernels import launch

from ..models import linear
from ..models.sites import Site
from ..plans.fit import why_no_edit
from ..steering.forms import most_elements
from ..steering.fused import why_not_fused
from .work import Place, Target, Work

#: Bytes of the tables' entries.
INDEX, STRENGTH = 8, 4


def _op(read: Iterable[int], written: int, operations: int = 0) -> Work:
    return Work(sum(read), written, operations, 1)


def _scattered(place: Place, target: Target) -> int:
    """Bytes beyond the values themselves that one pass over the selected columns of all tokens moves."""
    row = min(place.count * max(target.granule, place.itemsize), place.width * place.itemsize)
    return place.tokens * row - place.chosen * place.itemsize


def fold(place: Place, target: Target) -> Work:
    """Nothing: it is in the weights."""
    return Work()


def bias(place: Place, target: Target) -> Work:
    """``mode="bias"``: the shift in the bias of a linear layer, which the product adds as it writes its result.

    Nothing where the layer has a bias already. Otherwise the product reads one; its addition counts as part of it.
    """
    return Work() if place.bias else Work(_outputs(place) * place.itemsize)


def _outputs(place: Place) -> int:
    """Of the linear layer whose bias adds the shift: at the input side the one that reads the tensor."""
    return place.shape[1] if place.side == "input" else place.width


def _compiled(place: Place, table: int) -> Work:
    """A form that the compiler fuses with what is around it: beyond the tensor itself it reads ``table`` bytes."""
    each = {"push": 3, "ablate": 4}.get(place.operation, 2)
    return Work(table, 0, each * place.values)


def dense(place: Place, target: Target) -> Work:
    """``mode="dense"``: the strengths in the activations' dtype, multiply, add, copy back; no multiply for shift."""
    size, n, w = place.itemsize, place.values, place.width
    if target.execution == "compile":
        return _compiled(place, STRENGTH * w)
    if place.operation == "ablate":
        return _dense_ablation(place) + _op([n * size], n * size)
    cast = _op([STRENGTH * w], size * w) if place.low else Work()
    if place.operation == "shift":
        steer = _op([n * size, w * size], n * size, n)
    else:
        steer = _op([n * size, w * size], n * size, n) + _op([2 * n * size], n * size, n)
        if place.operation == "push":
            steer += _op([n * size], n * size, n)
    return cast + steer + _op([n * size], n * size)


def _dense_ablation(place: Place) -> Work:
    """The direction and the strength in the activations' dtype; d . x; alpha d; the first times the second; less it."""
    size, n, w, t = place.itemsize, place.values, place.width, place.tokens
    cast = _op([STRENGTH * w], size * w) + (_op([STRENGTH], size) if place.low else Work())
    along = _op([n * size, w * size], n * size, n) + _op([n * size], t * size)
    removed = _op([size, w * size], w * size, w) + _op([t * size, w * size], n * size, n)
    return cast + along + removed + _op([2 * n * size], n * size, n)


def public(place: Place, target: Target) -> Work:
    """The public code: multiply by a vector of the activations' dtype, add, copy back, however few AUs there are.

    Its form of "shift" adds the vector alone, that of "push" takes the absolute value first.
    """
    size, w = place.itemsize, place.width
    if target.execution == "compile":
        return _compiled(place, size * w)
    n, x = place.values, place.values * size
    added = _op([x, w * size], x, n)
    if place.operation != "shift":
        added += _op([2 * x], x, n)
    return _absolute(place, n) + added + _op([x], x)


def dense_hook(place: Place, target: Target) -> Work:
    """A hook with one operation in place for every dimension, such as a multiplication by 1 + gamma; two of "push"."""
    size, n = place.itemsize, place.values
    if target.execution == "compile":
        return _compiled(place, size * place.width)
    return _absolute(place, n) + _one_operation(place, n, place.width)


def _absolute(place: Place, values: int) -> Work:
    """|x| of so many values, for "push"."""
    return _op([values * place.itemsize], values * place.itemsize, values) if place.operation == "push" else Work()


def _one_operation(place: Place, values: int, table: int) -> Work:
    """A multiplication or an addition in place by a vector of ``table`` values; of "push" x + vector * |x|."""
    size, twice = place.itemsize, 2 if place.operation == "push" else 1
    return _op([twice * values * size, table * size], values * size, twice * values)


def sparse_hook(place: Place, target: Target) -> Work:
    """A hook with ``x[..., index] *= factor``, or what else the operation is: gather, compute, scatter."""
    size, t, index = place.itemsize, place.chosen, INDEX * place.count
    one_way = _op([t * size, index], t * size)
    ops = one_way + _absolute(place, t) + _one_operation(place, t, place.count) + one_way
    return ops + Work(padding=2 * _scattered(place, target))


def columns(place: Place, target: Target) -> Work:
    """``mode="columns"``: one operation on the whole tensor, or one sparse kernel, on a CPU its four to six operations.

    Compiled, the dense form.
    """
    if target.execution == "compile":
        return _compiled(place, STRENGTH * place.width)
    if place.operation == "ablate":
        return _ablation(place) + Work(padding=2 * _scattered(place, target))
    if runs_kernel("columns", place, target):
        size, t = place.itemsize, place.chosen
        each = 4 if place.operation == "push" else 3
        kernel = _op([t * size, place.count * (INDEX + 2 * STRENGTH)], t * size, each * t)
        return kernel + Work(padding=2 * _scattered(place, target))
    if _few(place, target):
        return _in_place(place)
    return _sparse_on_cpu(place) + Work(padding=2 * _scattered(place, target))


def runs_as(way: str, place: Place) -> str:
    """The way that is taken: beyond the fused kernel's number of tokens ``fused`` is ``columns``."""
    return "columns" if way == "fused" and place.tokens > launch.MOST_TOKENS else way


def runs_kernel(way: str, place: Place, target: Target) -> bool:
    """Whether a way launches a kernel of this library at a site."""
    way = runs_as(way, place)
    if target.kind == "cpu" or place.operation == "ablate" or way not in ("columns", "fused"):
        return False
    if way == "fused":
        return True
    return target.execution == "graph" or (target.execution == "eager" and not _few(place, target))


def _few(place: Place, target: Target) -> bool:
    """Whether ``columns`` is one operation on the whole tensor."""
    return place.values <= most_elements("cpu" if target.kind == "cpu" else "cuda", place.count, place.width)


def _in_place(place: Place) -> Work:
    size, n, table = place.itemsize, place.values, STRENGTH * place.width
    if place.operation == "push":  # the sign; 1 + gamma * sign, in float32; the product
        factor = n * STRENGTH
        sign = _op([n * size], n * size, n) + _op([n * size, table, STRENGTH], factor, 2 * n)
        return sign + _op([n * size, factor], n * size, n)
    return _op([n * size, table], n * size, n)


def _sparse_on_cpu(place: Place) -> Work:
    size, t, index = place.itemsize, place.chosen, INDEX * place.count
    one_way = _op([t * size, index], t * size)  # gather, or scatter
    there, back = (_op([t * size], 4 * t), _op([4 * t], t * size)) if place.low else (Work(), Work())
    return one_way + there + _steered(t, place.count, 4, place.operation) + back + one_way


def _ablation(place: Place) -> Work:
    """Gather, what is not 0 of the direction and the strength, x - alpha d (d . x) there, scatter."""
    size, t, count, tokens, wide = place.itemsize, place.chosen, place.count, place.tokens, STRENGTH
    one_way = _op([t * size, INDEX * count], t * size)
    there, back = (_op([t * size], wide * t), _op([wide * t], t * size)) if place.low else (Work(), Work())
    masks = _op([wide * count], count, count) + _op([wide], 1, 1) + _op([count, 1], count, count)
    x, d = wide * t, wide * count
    old = _op([], wide) + _op([count, x, wide], x, t)  # 0 where nothing is done
    along = _op([x, d], x, t) + _op([x], wide * tokens)
    removed = _op([wide, wide * tokens], wide * tokens, tokens) + _op([wide * tokens, d], x, t)
    steered = _op([2 * x], x, t) + back + _op([count, 2 * t * size], t * size, t)
    return one_way + masks + there + old + along + removed + steered + one_way


def _steered(values: int, table: int, size: int, operation: str) -> Work:
    """The kernels' definition, for every operation: x * (1 + gamma) + shift, gamma with the sign of x for push."""
    x, strengths = values * size, table * STRENGTH
    if operation == "push":
        signed = _op([x], x, values) + _op([x, strengths], x, values) + _op([x], x, values)
        return signed + _op([x, x, strengths], x, 2 * values)
    return _op([strengths], strengths, table) + _op([x, 2 * strengths], x, 2 * values)


def _product(tokens: int, inputs: int, outputs: int, bias: bool, size: int) -> Work:
    read = [tokens * inputs * size, inputs * outputs * size, outputs * size if bias else 0]
    return _op(read, tokens * outputs * size, 2 * tokens * inputs * outputs)


def fused(place: Place, target: Target) -> Work:
    """``mode="fused"``: what its kernels, or on a CPU its definition, take beyond the product that they replace.

    On a GPU the strengths of all dimensions, and, where the sum is split over programs, a finish that adds the parts.
    Beyond the kernel's number of tokens it is ``columns``.
    """
    if runs_as("fused", place) == "columns":
        return columns(place, target)
    inputs, outputs = place.shape
    size = place.itemsize
    each = 4 if place.operation == "push" else 3
    if target.kind != "cpu":
        work = Work(2 * STRENGTH * place.width, 0, each * place.values)
        splits = _splits(place, target)
        if splits > 1:
            parts = place.tokens * outputs * STRENGTH * splits
            work += Work(parts, parts, place.tokens * outputs * splits, 1)
        return work
    t = place.tokens
    work = _steered(place.values, place.width, 4, place.operation) + _product(t, inputs, outputs, place.bias, 4)
    if place.low:  # everything through float32 and back, the weight too
        sizes = [t * inputs, inputs * outputs, outputs if place.bias else 0]
        for n in sizes:
            work += _op([n * size], n * 4) if n else Work()
        work += _op([4 * t * outputs], size * t * outputs)
        if place.side == "input":  # the steered input is rounded as the tensor that it is
            work += _op([4 * t * inputs], size * t * inputs) + _op([size * t * inputs], 4 * t * inputs)
    return work - _product(t, inputs, outputs, place.bias, size)


def _splits(place: Place, target: Target) -> int:
    """Over how many programs the fused kernel splits the sum."""
    inputs, outputs = place.shape
    shape = (place.tokens, outputs, inputs)
    entry = launch.nearest(_form(place), *shape, place.dtype, target.architecture, target.name)
    return entry.splits(*shape, target.processors)


def lora(place: Place, target: Target) -> Work:
    """PEFT's adapter beside the projection: two products, the scaling, the addition."""
    inputs, outputs = place.shape
    size, t, rank = place.itemsize, place.tokens, _rank(place)
    y = t * outputs * size
    products = _product(t, inputs, rank, False, size) + _product(t, rank, outputs, False, size)
    return products + _op([y], y, t * outputs) + _op([2 * y], y, t * outputs)


def _rank(place: Place) -> int:
    """Of the adapter: one for each AU of the layer, or for their direction."""
    return 1 if place.operation == "ablate" else place.count


#: Name -> what it does at a layer that has AUs. "public" does it at every layer.
WAYS: dict[str, Callable[[Place, Target], Work]] = {
    "fold": fold,
    "bias": bias,
    "columns": columns,
    "fused": fused,
    "dense": dense,
    "public": public,
    "dense hook": dense_hook,
    "sparse hook": sparse_hook,
    "lora": lora,
}


def table_bytes(way: str, place: Place, target: Target) -> int:
    """Bytes that a way keeps on the device for a layer, beside what fold saves of the weights."""
    if way == "public":
        return place.width * place.itemsize
    if place.count == 0:
        return 0
    if way == "dense hook":
        return place.width * place.itemsize
    if way == "sparse hook":
        return place.count * (INDEX + place.itemsize)
    if way == "lora":
        return sum(place.shape) * _rank(place) * place.itemsize
    if place.operation == "ablate":  # lists and direction of the plan and of none, and their strengths
        operands = STRENGTH * (place.width + 1) if way in ("columns", "dense") else 0
        return 2 * (place.count * (2 * INDEX + STRENGTH) + STRENGTH) + operands
    kept = 2 * place.count * (2 * INDEX + 2 * STRENGTH)  # lists of the plan and of none: index, columns, gamma, shift
    if way in ("columns", "fused"):
        kept += STRENGTH * (place.width + (place.operation == "push"))  # the operands of the forms: push has a 1 too
    if way in ("fused", "dense"):
        kept += 2 * STRENGTH * place.width  # gamma and shift
    if way == "bias":  # the bias made, or saved, and a copy of what was written; what is added, before it is rounded
        parts = 2 if place.side == "input" else 1  # W @ shift for alpha = 1 too
        kept += _outputs(place) * (2 * place.itemsize + parts * (8 if target.kind == "cpu" else 4))
    return kept


def place_of(
    network: nn.Module, site: Site, tokens: int, aus: dict[int, int], dtype: torch.dtype, operation: str
) -> Place:
    """A site in a forward pass of ``tokens``. ``aus``: layer -> how many are steered there."""
    module = network.get_submodule(site.projection) if site.projection else None
    adds = network.get_submodule(site.bias) if site.bias else None
    return Place(
        tokens=tokens,
        width=site.width,
        count=aus.get(site.layer, 0),
        dtype=dtype,
        operation=operation,
        side=site.side,
        projection=None if module is None else linear.sizes(module),
        bias=getattr(adds, "bias", None) is not None,
    )


#: What ``mode="auto"`` takes for an operation where it is possible; otherwise it runs.
EDITS = {"scale": "fold", "ablate": "fold", "shift": "bias"}

#: What does the same to each AU by itself, and cannot take a sum over them.
_BY_UNIT = ("fused", "public", "dense hook", "sparse hook")


def automatic(ways: Sequence[str], places: Sequence[Place], target: Target) -> str:
    """The way of ``mode="auto"`` at ``places``, of those that are possible.

    In a graph it is ``fused`` where the kernels' tables say that it is worth while on the device.
    """
    edit = EDITS.get(places[0].operation, "")
    if edit in ways:
        return edit
    fusing = target.execution == "graph" and "fused" in ways
    return "fused" if fusing and all(place.tokens <= _limit(place, target) for place in places) else "columns"


def _limit(place: Place, target: Target) -> int:
    """Up to how many tokens ``auto`` takes the fused kernel."""
    inputs, outputs = place.shape
    return launch.limit_for(_form(place), outputs, inputs, place.dtype, target.architecture, target.name)


def _form(place: Place) -> str:
    return launch.form(place.side == "input", rows=False)


def why_not(network: nn.Module, way: str, sites: Sequence[Site], operation: str) -> str:
    """Why a way is not possible at a site, as far as the model's shapes say; empty if it is."""
    if way == "lora" and EDITS.get(operation) != "fold":
        return f"it multiplies, and cannot {operation}"
    if operation == "ablate" and way in _BY_UNIT:
        return "it works on each AU by itself, and cannot ablate"
    if way in EDITS.values() and way != EDITS.get(operation):
        return f"it cannot {operation}"
    for site in sites:
        projection = network.get_submodule(site.projection) if site.projection else None
        if way == "lora" and projection is None:
            return "no linear layer makes this tensor"
        if way == "fused" and (reason := why_not_fused(projection)):
            return reason
        if way in EDITS.values() and (reason := why_no_edit(network, site, operation)):
            return reason
    return ""


def kept_bytes(
    network: nn.Module,
    way: str,
    sites: Sequence[Site],
    aus: dict[int, int],
    dtype: torch.dtype,
    operation: str,
    target: Target,
) -> int:
    """Bytes on the device: tables, and for fold the rows of the weights (and the biases) that it saves."""
    total = 0
    for site in sites:
        total += table_bytes(way, place_of(network, site, 0, aus, dtype, operation), target)
        if way != "fold" or site.layer not in aus:
            continue
        for path in site.parts:
            weights = linear.weights_of(module := network.get_submodule(path))
            assert isinstance(weights, linear.WeightNames)  # otherwise fold was refused
            saved = getattr(module, weights.weight).numel() // site.width * aus[site.layer]
            # and by what they were scaled, or what was taken of the direction from how much of it
            sums = STRENGTH if operation == "ablate" else 0
            total += dtype.itemsize * saved + STRENGTH * aus[site.layer] + sums * (saved // aus[site.layer])
            if weights.bias and site.side == "output" and getattr(module, weights.bias, None) is not None:
                experts = getattr(module, weights.bias).numel() // site.width
                total += (dtype.itemsize * experts + STRENGTH) * aus[site.layer] + sums * experts
    return total
