"""Logistic regressions, many at once: how well each of many groups of activations tells two classes apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

#: Newton's method converges in about ten steps; halving keeps each step downhill.
STEPS, HALVINGS = 100, 30

#: Added to the curvature's diagonal, as a part of it, so that it is positive definite after rounding, too.
ROUNDING = 1e-12

#: The largest gradient, for one text, at which a fit is done.
TOLERANCE = 1e-8


@dataclass(frozen=True)
class Probes:
    """Attributes:
    weight: float64 [groups, width]. bias: float64 [groups].
    """

    weight: Tensor
    bias: Tensor

    def logit(self, x: Tensor) -> Tensor:
        """float64 [groups, texts], above zero for the positive class; x [groups, texts, width]."""
        return torch.einsum("gnw,gw->gn", x.double(), self.weight) + self.bias[:, None]

    def accuracy(self, x: Tensor, positive: Tensor) -> Tensor:
        """Share of texts that are put into their class: float64 [groups]."""
        return ((self.logit(x) > 0) == positive).double().mean(-1)

    def loss(self, x: Tensor, positive: Tensor) -> Tensor:
        """Mean cross-entropy, nats: float64 [groups]."""
        return softplus(torch.where(positive, -1.0, 1.0) * self.logit(x)).mean(-1)


def fit(x: Tensor, positive: Tensor, penalty: float = 1.0) -> Probes:
    """Minimises sum over texts of the cross-entropy + penalty / 2 * |weight|^2 (bias free), for each group.

    With ``penalty=1`` this is the customary default (scikit-learn's C = 1), which ITI's published code uses.

    Args:
        x: [groups, texts, width]. positive: bool [texts], the class; both classes must be there.
    """
    groups, texts, width = x.shape
    ones = torch.ones(groups, texts, 1, dtype=torch.float64, device=x.device)
    x = torch.cat([x.double(), ones], -1)
    sign = torch.where(positive, -1.0, 1.0).double()
    ridge = torch.full((width + 1,), penalty, dtype=torch.float64, device=x.device)
    ridge[-1] = 0.0
    solution = torch.zeros(groups, width + 1, dtype=torch.float64, device=x.device)

    def loss(w: Tensor) -> Tensor:
        return softplus(sign * torch.einsum("gnw,gw->gn", x, w)).sum(-1) + 0.5 * (ridge * w.square()).sum(-1)

    found = loss(solution)
    for _ in range(STEPS):
        chance = torch.sigmoid(torch.einsum("gnw,gw->gn", x, solution))
        gradient = torch.einsum("gnw,gn->gw", x, chance - positive.double()) + ridge * solution
        if gradient.abs().max() <= TOLERANCE * texts:
            break
        curvature = torch.einsum("gnw,gn,gnv->gwv", x, chance * (1 - chance), x) + torch.diag(ridge + 1e-12)
        curvature.diagonal(dim1=-2, dim2=-1).mul_(1 + ROUNDING)
        # Cholesky, which a positive definite matrix allows: torch 2.13's batched LU (solve, inv) fails on oneMKL with
        # several threads from widths of some 256 on.
        step = torch.cholesky_solve(gradient[..., None], torch.linalg.cholesky(curvature))[..., 0]
        size = torch.ones(groups, dtype=torch.float64, device=x.device)
        for _ in range(HALVINGS):
            tried = loss(solution - size[:, None] * step)
            worse = tried > found
            if not worse.any():
                break
            size = torch.where(worse, size / 2, size)
        better = tried <= found
        if not (tried < found).any():
            break  # rounding is all that is left
        solution = torch.where(better[:, None], solution - size[:, None] * step, solution)
        found = torch.where(better, tried, found)
    return Probes(solution[:, :-1], solution[:, -1])
