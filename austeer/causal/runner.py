"""Scores of single AUs, each steered alone, as rows of one batch."""

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


@dataclass
class Runner:
    """Measures what is not in the record yet, and keeps it there."""

    model: nn.Module
    tokenizer: Any
    task: Task
    momentum: Momentum
    site: str
    scale: Scale
    record: Record
    batch_tokens: int

    @property
    def _width(self) -> int:
        return self.scale.size.shape[1]

    def run(self, units: Tensor, ways: Sequence[str], bar: Progress) -> dict[str, np.ndarray]:
        """For each way the effect of raising each AU: [AUs, items], nats."""
        jobs = [(unit, way) for unit in units.tolist() for way in ways]
        missing = [job for job in jobs if self.record.get(self._key(*job)) is None]
        bar.advance(len(jobs) - len(missing))
        for part in slices(missing, PLANS_AT_ONCE // 2):
            self._measure(part)
            bar.advance(len(part))
        return {way: np.array([self.record.get(self._key(unit, way)) for unit in units.tolist()]) for way in ways}

    def unsteered(self) -> float:
        """Mean log-odds of the model as it is, nats."""
        if self.record.get("unsteered") is None:
            self.record.put("unsteered", float(self._margins().mean()))
        return float(self.record.get("unsteered"))

    def _key(self, unit: int, way: str) -> str:
        return f"{way} {self.momentum.layers[unit // self._width]} {unit % self._width}"

    def _measure(self, jobs: Sequence[tuple[int, str]]) -> None:
        """Scores some AUs, each steered in one way."""
        plans, alphas = {}, {}
        for job in jobs:
            # The two sides lie side by side, so that they share a batch.
            for side, alpha in (("raised", 1.0), ("lowered", -1.0)):
                name = f"{self._key(*job)} {side}"
                plans[name], alphas[name] = self._plan(*job), alpha
        with steer(self.model, plans, alphas, check=False) as steering:
            margins = self._margins(steering, list(plans))
        raised, lowered = margins.unflatten(0, (len(jobs), 2)).unbind(1)
        effect = (raised - lowered) / 2  # [jobs, items]
        for job, values in zip(jobs, effect):
            if not values.isfinite().all():
                raise TaskError(
                    f"{self.task.name}: found log-odds that are no number with one AU steered alone (way, layer, "
                    f"index: {self._key(*job)}), expected finite ones; load the model in float32"
                )
        for job, values in zip(jobs, effect.tolist()):
            self.record.put(self._key(*job), values)

    def _margins(self, *steered: Any) -> Tensor:
        scores = option_scores(self.model, self.tokenizer, self.task, *steered, batch_tokens=self.batch_tokens)
        return scores.margins(self.task)

    def _plan(self, unit: int, way: str) -> Plan:
        """A plan of one AU that raises it with alpha 1, and lowers it with -1."""
        row, index = divmod(unit, self._width)
        delta = self.momentum.counters(self.site).delta_sum[row, index] / self.momentum.pairs
        push = delta.abs() if way == "shift" else self.scale.deviation[row, index]
        return Plan(
            site=(self.site,),
            layer=torch.tensor([self.momentum.layers[row]], dtype=torch.int32, device="cpu"),
            index=torch.tensor([index], dtype=torch.int32, device="cpu"),
            beta=torch.ones(1, device="cpu"),
            delta=torch.tensor([float(push)], device="cpu"),
            operation="scale" if way == "scale" else "shift",
            model=self.momentum.model,
            pairs=self.momentum.pairs,
            chat_template=self.momentum.chat_template,
        )
