"""No time without a right result: every way's logits and greedy tokens are held against the formula."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from austeer import Plan
from austeer.errors import AusteerError
from austeer.models.structure import input_device
from austeer.utils.machine import free_memory

from .plain_ways import Formula
from .steered import Steered, twin

#: What a way may err by, as a share of what steering does to the logits, where twice plain PyTorch's error is less.
SHARE, SHARE_UNKNOWN = 0.02, 0.15
#: alpha is doubled until steering changes the logits by this share of their size ...
EFFECT = 0.1
#: ... and this many times as much as a way may err by: an unsteered model has to fail.
CLEAR = 4.0
MOST_ALPHA = 2.0**14
#: How many tokens are generated to look at, and how far, in errors allowed, a token may lie below the formula's best.
TOKENS, SLACK = 6, 8.0


class WeakGateError(AusteerError):
    """At no alpha does steering change the model enough to tell right results from wrong ones."""


@dataclass(frozen=True)
class Outcome:
    """What the gate found.

    Attributes:
        error, allowed: root mean square over all logits. effect: of steering, the same.
        reason: what is wrong; empty if nothing is.
    """

    error: float
    allowed: float
    effect: float
    reason: str


class Exact:
    """The formula one precision higher: float64 for float32, float32 for half precision. Kept for several plans.

    Where there is no memory for a second model, the formula in the model's own precision stands in.
    """

    def __init__(self, model: nn.Module):
        dtype = torch.float64 if model.dtype == torch.float32 else torch.float32
        needed = sum(p.numel() for p in model.parameters()) * dtype.itemsize
        self.model = model
        self.wider = needed < 0.8 * free_memory(input_device(model))
        if self.wider:
            self.model = copy.deepcopy(model).to(dtype)  # type: ignore[arg-type]
            if dtype == torch.float64 and hasattr(self.model, "set_experts_implementation"):
                self.model.set_experts_implementation("eager")  # grouped products take no float64

    def logits(self, plan: Plan, alpha: float, ids: Tensor) -> Tensor:
        return logits(Formula(twin(self.model), plan, alpha), ids)


@torch.no_grad()
def logits(steered: Steered, ids: Tensor) -> Tensor:
    """float64, [batch, tokens, vocabulary]."""
    with steered.active():
        return steered.logits(ids).double()


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


class Gate:
    """What a plan does to a model, and how near to it a way has to come.

    Args:
        ids: [batch, tokens], the prompt to look at.

    Attributes:
        alpha: the strength, found so that an unsteered model fails clearly.

    Raises:
        WeakGateError: there is none.
    """

    def __init__(self, model: nn.Module, exact: Exact, plan: Plan, ids: Tensor):
        self._model, self.exact_model, self._plan, self.ids = model, exact, plan, ids
        unsteered = Steered(twin(model))
        plain_logits, greedy = logits(unsteered, ids), self.greedy(unsteered)
        self.alpha = 1.0
        while self.alpha <= MOST_ALPHA:
            self.exact = exact.logits(plan, self.alpha, ids)
            self._plain = Formula(twin(model), plan, self.alpha)
            self.effect = rms(plain_logits - self.exact)
            own = rms(logits(self._plain, ids) - self.exact)
            self.allowed = max(2 * own, (SHARE if exact.wider else SHARE_UNKNOWN) * self.effect)
            seen = self.effect > EFFECT * rms(self.exact) and self.effect > CLEAR * self.allowed
            if seen and self.below(greedy) > SLACK * self.allowed:
                return
            self.alpha *= 2
        raise WeakGateError(
            f"steering {len(plan)} AUs changes the logits by {self.effect:.2g} at alpha {self.alpha:g}, rounding by "
            f"{self.allowed:.2g}: right results cannot be told from wrong ones; expected more AUs or a wider dtype"
        )

    def __call__(self, steered: Steered) -> Outcome:
        """Looks at a way: all logits of the prompt, then a few greedy tokens of its own generation."""
        error = rms(logits(steered, self.ids) - self.exact)
        reason = self._judged(error, "logits")
        if not reason:
            below = self.below(self.greedy(steered))
            if not below <= SLACK * self.allowed:
                reason = (
                    f"generates a token whose logit lies {below:.2g} below the formula's best, expected at most "
                    f"{SLACK * self.allowed:.2g}"
                )
        return Outcome(error, self.allowed, self.effect, reason)

    def judge_step(self, found: Tensor, ids: Tensor, unsteered: bool = False) -> Outcome:
        """Looks at one decoded step.

        Args:
            found: [batch, vocabulary], the logits after the last of ``ids`` [batch, tokens]. unsteered: of the model
                as it is.
        """
        alpha = 0.0 if unsteered else self.alpha
        exact = self.exact_model.logits(self._plan, alpha, ids)[:, -1]
        error = rms(found.double() - exact)
        return Outcome(error, self.allowed, self.effect, self._judged(error, "logits of a step"))

    def _judged(self, error: float, what: str) -> str:
        if error <= self.allowed:  # false for NaN
            return ""
        return (
            f"{what} differ from the formula by {error:.2g} (steering does {self.effect:.2g}), expected at most "
            f"{self.allowed:.2g}"
        )

    @torch.no_grad()
    def greedy(self, steered: Steered) -> Tensor:
        with steered.active():
            return steered.generate(self.ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)

    def below(self, generated: Tensor) -> float:
        """How far the logit of a generated token lies below the best one at most, both by the formula."""
        found = logits(self._plain, generated[:, :-1])[:, self.ids.shape[1] - 1 :]
        if generated.shape[1] != self.ids.shape[1] + TOKENS:
            return float("inf")
        taken = found.gather(-1, generated[:, self.ids.shape[1] :, None])[..., 0]
        return float((found.max(-1).values - taken).max())
