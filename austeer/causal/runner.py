"""Scores of steerings of few AUs, alone or together, as rows of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import TaskError
from ..momentum.momentum import Momentum
from ..plans.plan import Plan
from ..steering.steer import steer
from ..tasks import Task, option_scores
from ..tuning.record import Record
from ..tuning.scorer import slices
from ..utils.progress import Progress
from .sample import Scale

#: Plans that one steering carries: each has a row in the strength tables of the layers that it touches.
PLANS_AT_ONCE = 60


@dataclass(frozen=True)
class Job:
    """A plan whose two sides, at strengths alpha and -alpha, are compared.

    Attributes:
        key: what it is called in the record.
    """

    key: str
    plan: Plan
    alpha: float = 1.0


@dataclass
class Runner:
    """Measures what is not in the record yet, and keeps it there."""

    model: nn.Module
    tokenizer: Any
    task: Task
    record: Record
    batch_tokens: int

    def run(self, jobs: Sequence[Job], bar: Progress) -> np.ndarray:
        """Half the difference of the log-odds between the two sides of each job: [jobs, items], nats."""
        missing = [job for job in jobs if self.record.get(job.key) is None]
        bar.advance(len(jobs) - len(missing))
        for part in slices(missing, PLANS_AT_ONCE // 2):
            self._measure(part)
            bar.advance(len(part))
        return np.array([self.record.get(job.key) for job in jobs]).reshape(len(jobs), len(self.task))

    def unsteered(self) -> float:
        """Mean log-odds of the model as it is, nats."""
        if self.record.get("unsteered") is None:
            self.record.put("unsteered", float(self._margins().mean()))
        return float(self.record.get("unsteered"))

    def _measure(self, jobs: Sequence[Job]) -> None:
        plans, alphas = {}, {}
        for job in jobs:
            # The two sides lie side by side, so that they share a batch.
            for side, alpha in (("raised", job.alpha), ("lowered", -job.alpha)):
                plans[f"{job.key} {side}"], alphas[f"{job.key} {side}"] = job.plan, alpha
        with steer(self.model, plans, alphas, check=False) as steering:
            margins = self._margins(steering, list(plans))
        raised, lowered = margins.unflatten(0, (len(jobs), 2)).unbind(1)
        effect = (raised - lowered) / 2  # [jobs, items]
        for job, values in zip(jobs, effect):
            if not values.isfinite().all():
                raise TaskError(
                    f"{self.task.name}: found log-odds that are no number with few AUs steered ({job.key}), expected "
                    "finite ones; load the model in float32"
                )
        for job, values in zip(jobs, effect.tolist()):
            self.record.put(job.key, values)

    def _margins(self, *steered: Any) -> Tensor:
        scores = option_scores(self.model, self.tokenizer, self.task, *steered, batch_tokens=self.batch_tokens)
        return scores.margins(self.task)


def alone(momentum: Momentum, site: str, scale: Scale, unit: int, way: str) -> Job:
    """One AU, that alpha 1 raises and -1 lowers."""
    row, index = divmod(unit, scale.size.shape[1])
    delta = momentum.counters(site).delta_sum[row, index] / momentum.pairs
    push = delta.abs() if way == "shift" else scale.deviation[row, index]
    plan = Plan(
        site=(site,),
        layer=torch.tensor([momentum.layers[row]], dtype=torch.int32, device="cpu"),
        index=torch.tensor([index], dtype=torch.int32, device="cpu"),
        beta=torch.ones(1, device="cpu"),
        delta=torch.tensor([float(push)], device="cpu"),
        operation="scale" if way == "scale" else "shift",
        model=momentum.model,
        pairs=momentum.pairs,
        chat_template=momentum.chat_template,
    )
    return Job(f"{way} {momentum.layers[row]} {index}", plan)
