"""One look, on the first forward pass, whether what a path made is what the formula says.

A kernel that is wrong on some device, or a weight that is not used as it looks, would steer wrongly in silence. The
check compares a few tokens with the formula in float64; it costs one small copy and, on a GPU, one wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from austeer_kernels import reference

from ..errors import SteeringError
from ..models import linear
from ..models.structure import first_tensor, floating_dtype
from .path import Path
from .tables import DirectionTable, StrengthTable, Table

#: How many tokens, and how many outputs of a projection, are compared at most.
TOKENS, OUTPUTS = 64, 128


def steered(x: Tensor, tables: Sequence[Table], rows: Tensor | None) -> Tensor:
    """The formula on whole rows: ``x`` float64 [tokens, width], with ``rows`` as in the kernels."""
    rows = None if rows is None else rows.long()
    for table in tables:
        if isinstance(table, DirectionTable):
            x = reference.ablated(x, *table.spread(rows, torch.float64))
            continue
        assert isinstance(table, StrengthTable)
        gamma, shift = table.expanded(rows, torch.float64)
        x = torch.where((gamma != 0) | (shift != 0), reference.steered(x, gamma, shift, table.magnitude), x)
    return x


def mixed(size: Tensor, tables: Sequence[Table], rows: Tensor | None) -> Tensor:
    """What of the other AUs' ``size`` float64 [tokens, width] may be in each AU's value where directions are removed.

    Their rounding is in there too, however small the value itself.
    """
    found = torch.zeros_like(size)
    for table in tables:
        if isinstance(table, DirectionTable):
            direction, strength = table.spread(None if rows is None else rows.long(), torch.float64)
            d = direction.abs()
            found = found + strength.abs() * d * (d * size.nan_to_num(posinf=0.0, neginf=0.0)).sum(-1, keepdim=True)
    return found


def _sample(tokens: int, device: torch.device) -> Tensor:
    return torch.linspace(0, tokens - 1, min(tokens, TOKENS), device=device, dtype=torch.float64).round().long()


def _tokens(tokens: int, rows: Tensor | None, device: torch.device) -> Tensor:
    """Which tokens are compared: steered ones, and others."""
    if rows is None:
        return _sample(tokens, device)
    steered = (rows >= 0).nonzero().flatten()
    return torch.cat([steered[_sample(len(steered), device)], _sample(tokens, device)]).unique()


def _outputs(path: Path, module: nn.Linear) -> Tensor:
    """Which outputs of a projection are compared: steered ones, where those are its outputs, and others."""
    others = _sample(module.out_features, module.weight.device)[: OUTPUTS // 2]
    index = path.table.index[path.table.index >= 0].to(others.device)
    steered = index if path.site.side == "output" else index[:0]
    return torch.cat([steered[: OUTPUTS // 2], others]).unique()


def checked_tensor(path: Path, x: Tensor, rows: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A function that compares what ``x`` became with the formula, and returns it. Made before ``x`` is steered.

    Raises (the function):
        SteeringError: they differ by more than rounding.
    """
    flat = x.detach().reshape(-1, x.shape[-1])
    chosen = _tokens(flat.shape[0], rows, x.device)
    before = flat[chosen].double()  # now: the path may work in place
    rows = None if rows is None else rows[chosen]

    def check(result: Tensor) -> Tensor:
        after = result.detach().reshape(-1, x.shape[-1])[chosen]
        expected = steered(before, path.tables, rows)
        # What is added up may cancel out; its parts are what rounds. The baseline rounds each of its steps.
        parts = expected.abs() + 2 * before.abs() + (expected - before).abs() + mixed(before.abs(), path.tables, rows)
        rounding = torch.finfo(after.dtype)
        _compare(path, after, expected, 4 * rounding.eps * (parts + rounding.tiny))
        return result

    return check


def check_linear(path: Path, x: Tensor, module: nn.Linear, rows: Tensor | None, y: Tensor) -> None:
    """Compares some outputs of the fused projection of ``x`` [tokens, in] with the formula.

    Raises:
        SteeringError: they differ by more than a sum in the kernel's precision may.
    """
    index, some, columns = path.table.index, _tokens(x.shape[0], rows, x.device), _outputs(path, module)
    with torch.no_grad():
        rows = None if rows is None else rows[some]
        h, weight = x[some].double(), module.weight[columns].double()
        bias = None if module.bias is None else module.bias[columns].double()
        if path.site.side == "input":
            h = steered(h, path.tables, rows)
        expected = torch.nn.functional.linear(h, weight, bias)
        if path.site.side == "output":
            whole = expected.new_zeros(len(some), module.out_features)
            whole[:, columns] = expected
            expected = steered(whole, path.tables, rows)[:, columns]
        gain = path.table.gain if index.numel() and path.site.side == "output" else 1.0
        tolerance = gain * _product_tolerance(h, module.weight[columns], expected)
        _compare(path, y[some][:, columns], expected, tolerance)


class EditProbe:
    """Runs a layer whose weights or bias steering changes, or a whole mixture, on random numbers before and after."""

    def __init__(self, path: Path, model: nn.Module):
        self.path = path
        whole = not path.site.projection and path.site.name != "layer"
        self.module = model.get_submodule(path.site.path) if whole else path.module
        self.weight = next(path.module.parameters())
        inputs = path.site.width if whole else linear.sizes(path.module)[0]  # type: ignore[index]
        generator = torch.Generator().manual_seed(0)
        dtype = self.weight.dtype if self.weight.dtype in linear.FLOATING else floating_dtype(model)
        x = torch.randn(1, 4, inputs, generator=generator, dtype=torch.float32, device="cpu")
        self.x = x.to(self.weight.device, dtype)
        self.size = self.x  # the larger of what is multiplied before and after the edit
        if path.site.side == "input":
            inner = self._steered(self.x).to(self.x)
            self.size = self.x.abs() + inner.abs()
            self.expected = self._run(inner).double()
        else:
            factor = path.site.bias_factor if path.name == "bias" else 1.0
            self.expected = self._steered(self._run(self.x) * factor) / factor
        # Where a direction is removed, what was larger and is gone was rounded as well.
        self.removed = self._run(self.x).double().abs() if path.table.ablates else torch.zeros_like(self.expected)
        self.mixed = self._mixed_tolerance() if path.table.ablates and isinstance(self.module, nn.Linear) else 0.0

    def _mixed_tolerance(self) -> Tensor:
        """What the other AUs' rounding adds to each output that is compared."""
        some = _outputs(self.path, cast(nn.Linear, self.module))
        if self.path.site.side == "input":
            parts = mixed(self.x[0].double().abs(), self.path.tables, None)[None]
            return _product_tolerance(parts, self.weight[some], torch.zeros(1, dtype=torch.float64, device=some.device))
        parts = mixed(self.removed.amax(1), self.path.tables, None)[None]
        return (_rounding(self.weight) * parts)[..., some]

    @classmethod
    def of(cls, paths: Sequence[Path], model: nn.Module) -> list[EditProbe]:
        """A probe of the first fold and of the first bias, made before they are; none of what does not run alone."""
        found = []
        edits = [path.edit for path in paths if path.edit is not None]
        for name in ("fold", "bias"):
            for path in edits:
                alone = sum(other.module is path.module for other in edits) == 1  # ffn and neuron can meet in one
                if path.name == name and alone and (linear.sizes(path.module) or not path.site.projection):
                    try:
                        found.append(cls(path, model))
                    except (
                        Exception
                    ):  # a mixture that needs more than its input, an offloaded weight: nothing to compare
                        continue
                    break
        return found

    @torch.no_grad()
    def _run(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # the weights as they are
            # Without hooks, which may count calls.
            return first_tensor(type(self.module).forward(self.module, x)).view(1, x.shape[1], -1)

    def _steered(self, x: Tensor) -> Tensor:
        return steered(x[0].double(), self.path.tables, None)[None]

    @torch.no_grad()
    def check(self) -> None:
        """Raises SteeringError where what was changed does not compute what the formula says."""
        found, expected = self._run(self.x), self.expected
        if isinstance(self.module, nn.Linear) and type(self.weight) is nn.Parameter:
            some = _outputs(self.path, self.module)
            found, expected = found[..., some], expected[..., some]
            tolerance = _product_tolerance(self.size, self.weight[some], expected) + self.mixed
        else:  # sums of products of which only the whole is known
            largest = expected.abs().maximum(self.removed).amax((1, 2), keepdim=True)
            tolerance = (64 * torch.finfo(found.dtype).eps * self.path.table.gain * largest).expand_as(expected)
        _compare(self.path, found, expected, tolerance)


def _product_tolerance(x: Tensor, weight: Tensor, expected: Tensor) -> Tensor:
    """What the rounding of the factors and of the result may make of each entry of x @ weight.T, generously."""
    size = torch.nn.functional.linear(x.double().square(), weight.double().square()).sqrt()
    return _rounding(weight) * (size + expected.double().abs()) + torch.finfo(weight.dtype).tiny


def _rounding(weight: Tensor) -> float:
    """Of a sum of products with a weight [outputs, inputs], as a part of its size."""
    eps = torch.finfo(weight.dtype).eps
    if weight.is_cuda and weight.dtype == torch.float32:
        eps = 2**-10  # TF32, where it is allowed
    return 8 * eps + 4 * torch.finfo(reference.compute_dtype(weight.dtype)).eps * weight.shape[1] ** 0.5


def _compare(path: Path, found: Tensor, expected: Tensor, tolerance: Tensor) -> None:
    sound = torch.isfinite(expected) & (expected.abs() <= torch.finfo(found.dtype).max)
    error = (found.double() - expected).abs()
    if bool(((error > tolerance) | error.isnan())[sound].any()):
        worst = float(error[sound].nan_to_num(nan=torch.inf).max())
        site = path.site
        raise SteeringError(
            f"self-check: {path.name} at site {site.name!r} of layer {site.layer} ({site.path}) differs from the "
            f"formula by {worst:.3g}, expected rounding only. Use another mode (mode='dense' is plain PyTorch), and "
            "please report this with the device and versions; check=False leaves the check out"
        )
