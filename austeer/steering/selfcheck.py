"""One look, on the first forward pass, whether what a path made is what the formula says.

A kernel that is wrong on some device, or a weight that is not used as it looks, would steer wrongly in silence. The
check compares a few tokens with the formula in float64; it costs one small copy and, on a GPU, one wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from austeer_kernels import reference

from ..errors import SteeringError
from ..models.structure import first_tensor
from .path import Path
from .tables import StrengthTable

#: How many tokens, and how many outputs of a projection, are compared at most.
TOKENS, OUTPUTS = 64, 128


def steered(x: Tensor, tables: Sequence[StrengthTable], rows: Tensor | None) -> Tensor:
    """The formula on whole rows: ``x`` float64 [tokens, width], with ``rows`` as in the kernels."""
    for table in tables:
        new = reference.steered_columns(
            x.index_select(1, table.index), table.gamma.double(), table.shift.double(), table.magnitude, rows
        )
        x = x.index_copy(1, table.index, new)
    return x


def _sample(tokens: int, device: torch.device) -> Tensor:
    return torch.linspace(0, tokens - 1, min(tokens, TOKENS), device=device, dtype=torch.float64).round().long()


def _tokens(tokens: int, rows: Tensor | None, device: torch.device) -> Tensor:
    """Which tokens are compared: steered ones, and others."""
    if rows is None:
        return _sample(tokens, device)
    steered = (rows >= 0).nonzero().flatten()
    return torch.cat([steered[_sample(len(steered), device)], _sample(tokens, device)]).unique()


def _outputs(path: Path, linear: nn.Linear) -> Tensor:
    """Which outputs of a projection are compared: steered ones, where those are its outputs, and others."""
    others = _sample(linear.out_features, linear.weight.device)[: OUTPUTS // 2]
    steered = path.table.index.to(others.device) if path.site.side == "output" else others[:0]
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
        parts = expected.abs() + 2 * before.abs() + (expected - before).abs()
        rounding = torch.finfo(after.dtype)
        _compare(path, after, expected, 4 * rounding.eps * (parts + rounding.tiny))
        return result

    return check


def check_linear(path: Path, x: Tensor, linear: nn.Linear, rows: Tensor | None, y: Tensor) -> None:
    """Compares some outputs of the fused projection of ``x`` [tokens, in] with the formula.

    Raises:
        SteeringError: they differ by more than a sum in the kernel's precision may.
    """
    index, some, columns = path.table.index, _tokens(x.shape[0], rows, x.device), _outputs(path, linear)
    with torch.no_grad():
        rows = None if rows is None else rows[some]
        h, weight = x[some].double(), linear.weight[columns].double()
        bias = None if linear.bias is None else linear.bias[columns].double()
        if path.site.side == "input":
            h = steered(h, path.tables, rows)
        expected = torch.nn.functional.linear(h, weight, bias)
        if path.site.side == "output":
            whole = expected.new_zeros(len(some), linear.out_features)
            whole[:, columns] = expected
            expected = steered(whole, path.tables, rows)[:, columns]
        gain = 1 + path.table.gamma.abs().max().double() if index.numel() and path.site.side == "output" else 1.0
        tolerance = gain * _product_tolerance(h, linear.weight[columns], expected)
        _compare(path, y[some][:, columns], expected, tolerance)


class FoldProbe:
    """Runs a folded layer, or a whole mixture of experts, on random numbers before and after the fold."""

    def __init__(self, path: Path, model: nn.Module):
        self.path = path
        self.module = path.module if path.site.projection else model.get_submodule(path.site.path)
        self.weight = next(path.module.parameters())
        inputs = path.module.in_features if isinstance(path.module, nn.Linear) else path.site.width
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(1, 4, inputs, generator=generator, dtype=torch.float32).to(self.weight)
        self.size = self.x  # the larger of what is multiplied before and after the fold
        if path.site.side == "input":
            inner = self._steered(self.x).to(self.weight)
            self.size = self.x.abs() + inner.abs()
            self.expected = self._run(inner).double()
        else:
            self.expected = self._steered(self._run(self.x))

    @classmethod
    def of(cls, paths: Sequence[Path], model: nn.Module) -> FoldProbe | None:
        """A probe of the first layer that will be folded, made before it is; None if none can be run by itself."""
        folded = [path for path in paths if path.name == "fold"]
        for path in folded:
            alone = sum(other.module is path.module for other in folded) == 1  # ffn and neuron can meet in one weight
            if alone and (type(path.module) is nn.Linear or not path.site.projection):
                try:
                    return cls(path, model)
                except Exception:  # a mixture that needs more than its input: there is nothing to compare
                    continue
        return None

    @torch.no_grad()
    def _run(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # the weights as they are
            # Without hooks, which may count calls.
            return first_tensor(type(self.module).forward(self.module, x)).view(1, x.shape[1], -1)

    def _steered(self, x: Tensor) -> Tensor:
        return steered(x[0].double(), self.path.tables, None)[None]

    @torch.no_grad()
    def check(self) -> None:
        """Raises SteeringError where what was folded does not compute what the formula says."""
        found = self._run(self.x)
        if isinstance(self.module, nn.Linear):
            some = _outputs(self.path, self.module)
            found, expected = found[..., some], self.expected[..., some]
            tolerance = _product_tolerance(self.size, self.weight[some], expected)
        else:  # sums of products of which only the whole is known
            expected = self.expected
            gain = 1 + self.path.table.gamma.abs().max().double()
            tolerance = 64 * torch.finfo(self.weight.dtype).eps * gain * expected.abs().amax((1, 2), keepdim=True)
        _compare(self.path, found, expected, tolerance.expand_as(expected))


def _product_tolerance(x: Tensor, weight: Tensor, expected: Tensor) -> Tensor:
    """What the rounding of the factors and of the result may make of each entry of x @ weight.T, generously."""
    eps = torch.finfo(weight.dtype).eps
    if weight.is_cuda and weight.dtype == torch.float32:
        eps = 2**-10  # TF32, where it is allowed
    size = torch.nn.functional.linear(x.double().square(), weight.double().square()).sqrt()
    adding = 4 * torch.finfo(reference.compute_dtype(weight.dtype)).eps * weight.shape[1] ** 0.5
    return (8 * eps + adding) * (size + expected.double().abs()) + torch.finfo(weight.dtype).tiny


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
